"""`libvirt-guests`: what it does to guests at the host's shutdown and boot, as its own files say. Only read here.

It is ordered after the appliance (install/files/drctl-appliance.service): at shutdown guests end while their mirrors
live, and the appliance notes that they left in order; at boot it comes when the boot guard has asked the other site. A
guest whose mirror is attached can be shut down but not saved: with ON_SHUTDOWN=suspend (the default outside Debian) it
would run on until its QEMU is killed."""

from __future__ import annotations

import re
from pathlib import Path

#: The program carries the defaults of its distribution; the files that it reads come after it.
_FILES = (
    "usr/lib/libvirt/libvirt-guests.sh",
    "usr/libexec/libvirt-guests.sh",
    "etc/default/libvirt-guests",
    "etc/sysconfig/libvirt-guests",
)
_ENABLED = "etc/systemd/system/multi-user.target.wants/libvirt-guests.service"
_SETTING = re.compile(r"^\s*(?:test[^|]*\|\|\s*)?([A-Z_]+)=[\"']?(\w*)[\"']?\s*(?:#.*)?$", re.MULTILINE)


def settings(root: Path = Path("/")) -> dict[str, str]:
    """What it goes by, ON_SHUTDOWN and ON_BOOT among it; empty when it is not enabled here, or can't be read."""
    if not (root / _ENABLED).is_symlink():
        return {}
    found: dict[str, str] = {}
    for name in _FILES:
        try:
            text = (root / name).read_text(errors="replace")
        except OSError:
            continue
        found |= dict(_SETTING.findall(text))
    return found


def findings(uri: str, root: Path = Path("/")) -> list[tuple[str, str, str]]:
    """(severity, message, hint) of what would end protected guests badly at the host's shutdown."""
    if not uri.startswith("qemu:///system"):
        return []
    if not (root / _ENABLED).is_symlink():
        message = "is not enabled: the host's shutdown kills the guests that run; protected disks are read again then"
        return [("info", message, "systemctl enable --now libvirt-guests, with ON_SHUTDOWN=shutdown")]
    if settings(root).get("ON_SHUTDOWN") != "suspend":
        return []
    message = "would save guests at the host's shutdown (ON_SHUTDOWN=suspend), which QEMU refuses for protected ones"
    return [("warning", message, "set ON_SHUTDOWN=shutdown in /etc/default/libvirt-guests or /etc/sysconfig")]
