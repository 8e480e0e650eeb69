"""libvirt's description of a storage volume: how large it is, and when it was written last. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """`file` is False for what is no regular file. `changed_ns` is 0 where libvirt tells no time."""

    file: bool
    size: int
    changed_ns: int


def volume_facts(description: str) -> VolumeFacts:
    root = ET.fromstring(description)
    size = (root.findtext("physical") or root.findtext("capacity") or "0").strip()
    kind = root.get("type", "file")
    return VolumeFacts(kind == "file", int(size) if size.isdigit() else 0, _nanoseconds(root))


def _nanoseconds(root: ET.Element) -> int:
    """`SECONDS.NANOSECONDS`: both parts are numbers of their own, the second of nine digits."""
    text = (root.findtext("target/timestamps/mtime") or "").strip()
    seconds, _, rest = text.partition(".")
    if not seconds.isdigit():
        return 0
    return int(seconds) * 10**9 + (int(rest.ljust(9, "0")[:9]) if rest.isdigit() else 0)
