"""What an appliance says of itself and its host: `appliance.info`, `machine.list`."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from drctl import __version__
from drctl.appliance import libvirt_guests
from drctl.appliance.client import Client
from drctl.appliance.config import Home
from drctl.appliance.encryption import Encryption, encryption
from drctl.appliance.libvirt_hook import HOOK_PATH
from drctl.errors import CertificateRejected, DrctlError, OutOfSpace
from drctl.model.extent import GiB, MiB, format_bytes
from drctl.model.machine import Machine
from drctl.replication.authority import kept
from drctl.replication.identity import certificate_expiry

#: One that `drctl certificate renew` by cron would have renewed long before.
CERTIFICATE_DAYS = 30
_CERTIFICATE = CertificateRejected.slug
#: What plans ask of a recovery site (plan/inventory.py, Ability).
ABILITIES = ("guest-agent", "console", "overrides", "staged-boot", "re-ip")
#: A shipper that is rejected tries again each few seconds; what is older may be mended.
_LATELY_NS = 30 * 10**9
_RECEIVER_SECONDS = 1.0
#: Below these a journal or a ring is about to be in trouble.
STORE_FREE = 2 * GiB
RUN_FREE = GiB // 4
#: With less than this nothing is taken any more, or only for moments.
SPENT = 64 * MiB


class InfoHost(Protocol):
    def version(self) -> str: ...

    def machines(self) -> Any: ...


def machine_list(host: InfoHost) -> list[dict[str, Any]]:
    machines: list[Machine] = list(host.machines())
    return [asdict(machine) for machine in machines]


def appliance_info(home: Home, host: InfoHost) -> dict[str, Any]:
    config = home.config
    findings: list[dict[str, str]] = []
    try:
        version = host.version()
    except DrctlError as exc:
        version = "unknown"
        findings.append(_finding("error", "libvirt", exc.message, exc.hint or "is libvirtd running?"))
    space = {"store": _space(home.store), "run": _space(home.run)}
    findings += _space_findings(space)
    findings += _permission_findings(home)
    findings += _certificate_findings(home)
    findings += _rejections(home)
    findings += hook_findings(config.uri, HOOK_PATH)
    findings += store_findings(config.uri, home.store, encryption)
    findings += [_finding(severity, "libvirt-guests", *told) for severity, *told in libvirt_guests.findings(config.uri)]
    return {
        "site": config.site,
        "host": config.host,
        "appliance": config.uuid,
        "version": __version__,
        "wall_ns": time.time_ns(),
        "uri": config.uri,
        "versions": {"hypervisor": version, "python": platform.python_version()},
        "capabilities": {"labels": labels(), **dict.fromkeys(ABILITIES, True)},
        "space": space,
        "memory": _memory(),
        "certificate": _certificate(home),
        "authority": kept(home.path / "authority"),
        "findings": findings,
    }


def _memory(file: Path = Path("/proc/meminfo")) -> dict[str, int] | None:
    """Bytes of this host's memory, and how many a new process could have; None when the kernel does not tell."""
    try:
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        total, available = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return {"total": total, "available": available}


def _space(path: Path) -> dict[str, Any]:
    usage = shutil.disk_usage(path)
    return {"path": str(path), "total": usage.total, "free": usage.free}


def _space_findings(space: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    limits = {"store": (STORE_FREE, "the journal"), "run": (RUN_FREE, "the rings")}
    return [
        _finding(
            "error" if space[name]["free"] < SPENT else "warning",
            str(space[name]["path"]),
            f"{format_bytes(space[name]['free'])} free for {what}",
            "make room, or lower journal_limit or ring_size",
            OutOfSpace.slug if space[name]["free"] < SPENT else "",
        )
        for name, (limit, what) in limits.items()
        if space[name]["free"] < limit
    ]


def _permission_findings(home: Home) -> list[dict[str, str]]:
    found = []
    for path in (home.path, home.run):
        mode = path.stat().st_mode & (0o067 if home.config.qemu_group else 0o077)
        if mode:
            found.append(_finding("warning", str(path), f"is open to others (mode {mode:03o})", f"chmod 700 {path}"))
    key = home.tls / "key.pem"
    if not os.access(key, os.R_OK):
        found.append(_finding("error", str(key), "is not there or can't be read", "enroll the appliance anew"))
    return found


def _certificate(home: Home) -> dict[str, float] | None:
    """Begin and end of our certificate, in seconds since the epoch; None when it can't be read."""
    try:
        begin, end = certificate_expiry(home.tls)
    except (OSError, ValueError):
        return None
    return {"not_before": begin.timestamp(), "not_after": end.timestamp()}


def _certificate_findings(home: Home) -> list[dict[str, str]]:
    """How long our certificate still lives; a link that ends by an expired one is the most avoidable outage."""
    path = home.tls / "cert.pem"
    try:
        days = (certificate_expiry(home.tls)[1].timestamp() - time.time()) / 86400
    except (OSError, ValueError) as exc:
        return [_finding("error", str(path), f"can't be read: {exc}", _renew(home), _CERTIFICATE)]
    if days < 0:
        message = f"the certificate expired {-days:.0f} days ago: no peer accepts it"
        return [_finding("error", str(path), message, _renew(home), _CERTIFICATE)]
    if days < CERTIFICATE_DAYS:
        return [_finding("warning", str(path), f"the certificate expires in {days:.0f} days", _renew(home))]
    return []


def _renew(home: Home) -> str:
    return f"drctl certificate renew {home.config.host}, where the CA's key is; by cron: --all --yes"


def hook_findings(uri: str, hook: Path) -> list[dict[str, str]]:
    """Whether libvirt would refuse to start a superseded guest. Sessions' daemons are not the installer's business."""
    if not uri.startswith("qemu:///system"):
        return []
    try:
        hook.stat()
    except FileNotFoundError:
        message = "is not there: libvirt would start guests of a group that reigns at the other site"
        return [_finding("warning", str(hook), message, "drctl appliance install puts it there")]
    except OSError:
        return []  # /etc/libvirt is for root alone on some systems: then nothing is known
    return []


def store_findings(uri: str, store: Path, look: Callable[[Path], Encryption]) -> list[dict[str, str]]:
    """Whether a thief of the disks could read what guests wrote. A lab's stores are of no use to one."""
    if not uri.startswith("qemu:///system") or not any(store.glob("*/group.json")):
        return []
    if look(store) is not Encryption.NO:
        return []
    message = "is not encrypted: its checkpoints hold what the guests wrote"
    return [_finding("warning", str(store), message, "put it on an encrypted volume (LUKS); see docs/security.md")]


def _rejections(home: Home) -> list[dict[str, str]]:
    """Whom our receiver turned away lately. TLS can't tell the peer itself, so it is told here."""
    try:
        status = Client(f"unix:{home.run / 'receiver.sock'}").call("status", timeout=_RECEIVER_SECONDS)
    except DrctlError:
        return []  # no receiver runs here, which is no finding of ours
    since = time.time_ns() - _LATELY_NS
    newest = {
        (row["message"], row.get("error")): row
        for row in status.get("rejected") or []
        if row["wall_ns"] > since and row.get("error") == _CERTIFICATE
    }
    return [
        _finding(
            "error",
            f"a peer at {str(row.get('address')).rpartition(':')[0] or row.get('address')}",
            f"was rejected: {row['message']}",
            row.get("hint") or "it needs a certificate of this project's CA, and its UUID in tls/peers.json here",
            _CERTIFICATE,
        )
        for row in newest.values()
    ]


def labels(system: Path = Path("/sys")) -> str:
    """The security module that labels guests and their files here, and what it does: `none` where there is none."""
    enforce = _word(system / "fs/selinux/enforce")
    if enforce:
        return "SELinux " + ("enforcing" if enforce == "1" else "permissive")
    return "AppArmor enabled" if _word(system / "module/apparmor/parameters/enabled") == "Y" else "none"


def _word(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _finding(severity: str, subject: str, message: str, hint: str, error: str = "") -> dict[str, str]:
    return {"severity": severity, "subject": subject, "message": message, "hint": hint, "error": error}
