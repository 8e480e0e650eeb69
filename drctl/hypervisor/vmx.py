"""VMware's machine definitions (.vmx): keys and values, and what they say of disks. Pure.

Keys know no case; a value stands in quotes on one line, `|XX` is the byte XX in hexadecimal (quote, bar, line end)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from drctl.errors import UnsupportedFormat

#: Largest file taken, characters; a machine with 60 disks has some 20 KiB.
LIMIT = 1024 * 1024
_LINE = re.compile(r'\s*([A-Za-z0-9_.:!#/\-]+)\s*=\s*"?(.*?)"?\s*')
_ESCAPE = re.compile(r"\|([0-9A-Fa-f]{2})")
_DEVICE = re.compile(r"((?:scsi|sata|ide|nvme)\d+):(\d+)")
#: Media of a machine that its copy at another site has no use for.
_REMOVABLE = ("cdrom-image", "atapi-cdrom", "cdrom-raw", "floppy")


@dataclass(frozen=True, slots=True)
class VmxDisk:
    """A disk as the definition names it. `device` is `scsi0:0`, `file` as it is written there (relative or whole)."""

    device: str
    file: str
    controller: str
    mode: str
    sharing: str

    @property
    def bus(self) -> str:
        return self.device.rstrip("0123456789:")


class Vmx(Mapping[str, str]):
    """One definition. Keeps the order and the case of keys, finds them in any."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._names = {key.lower(): key for key in values}
        self._values = {key.lower(): value for key, value in values.items()}

    def __getitem__(self, key: str) -> str:
        return self._values[key.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.values())

    def __len__(self) -> int:
        return len(self._values)

    def is_on(self, key: str) -> bool:
        return self.get(key, "").upper() == "TRUE"

    def changed(self, changes: Mapping[str, str | None]) -> Vmx:
        """A copy with other values; None takes a key out."""
        values = {key: self[key] for key in self if key.lower() not in {name.lower() for name in changes}}
        return Vmx(values | {key: value for key, value in changes.items() if value is not None})

    def disks(self) -> list[VmxDisk]:
        """Its hard disks in the order of their devices; media and controllers are none."""
        found = []
        for key in self:
            device = key.lower().removesuffix(".filename")
            match = _DEVICE.fullmatch(device)
            if not match or not key.lower().endswith(".filename") or not self.is_on(f"{device}.present"):
                continue
            kind = self.get(f"{device}.devicetype", "").lower()
            if kind in _REMOVABLE or not self[key].lower().endswith(".vmdk"):
                continue
            controller = self.get(f"{match[1]}.virtualdev", "")
            mode, sharing = self.get(f"{device}.mode", "persistent"), self.get(f"{device}.sharing", "")
            found.append(VmxDisk(device, self[key], controller, mode, sharing))
        return sorted(found, key=lambda disk: _order(disk.device))


def _order(device: str) -> tuple[str, int, int]:
    controller, _, unit = device.partition(":")
    bus = controller.rstrip("0123456789")
    return bus, int(controller[len(bus) :]), int(unit)


def parse(text: str) -> Vmx:
    """Read a definition. Raises UnsupportedFormat when a line is none, or a key stands there twice."""
    if len(text) > LIMIT:
        raise UnsupportedFormat(f"a .vmx of {len(text)} characters is too large to be one")
    values: dict[str, str] = {}
    seen: set[str] = set()
    # At line feeds alone: Python's splitlines takes characters of names for line ends, too.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or "=" not in line:
            raise UnsupportedFormat(f".vmx line {number} is no `key = value`", line=number)
        if match[1].lower() in seen:
            raise UnsupportedFormat(f".vmx line {number}: {match[1]!r} is there twice", line=number)
        seen.add(match[1].lower())
        values[match[1]] = unescape(match[2])
    return Vmx(values)


def render(vmx: Vmx) -> str:
    """The text of a definition; `.encoding` comes first, as hostd wants it."""
    encoding = vmx.get(".encoding", "UTF-8")
    lines = [f'{key} = "{escape(vmx[key])}"' for key in vmx if key.lower() != ".encoding"]
    return "\n".join([f'.encoding = "{encoding}"', *lines]) + "\n"


def escape(value: str) -> str:
    """Bars, quotes and control characters as `|XX`."""
    return "".join(f"|{ord(char):02X}" if char in '|"' or ord(char) < 32 else char for char in value)


def unescape(value: str) -> str:
    """Bytes above 7F in escapes are those of UTF-8."""
    if "|" not in value:
        return value
    parts = _ESCAPE.split(value)
    data = b"".join(
        bytes([int(part, 16)]) if index % 2 else part.encode("utf-8", "surrogateescape")
        for index, part in enumerate(parts)
    )
    return data.decode("utf-8", "surrogateescape")
