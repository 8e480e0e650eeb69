"""What a host must be before anything is changed there: the questions, and the judgement of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from drctl.appliance.install.bundle import Bundle
from drctl.errors import (
    DrctlError,
    HostUnfit,
    HostUnreachable,
    OutOfSpace,
    PreconditionFailed,
    PrivilegeMissing,
)
from drctl.hypervisor.shell import Shell
from drctl.model.extent import MiB, format_bytes

OLDEST_PYTHON = (3, 11)
#: Debian 12's, the oldest that drctl is tested with.
OLDEST_LIBVIRT = (9, 0)
OLDEST_QEMU = (7, 2)
#: The wheels, unpacked and compiled, beside their own files (measured: 3.1 times the bundle).
_UNPACKED = 5
#: What the appliance's home must have at least; a journal's own needs are forecast when a group is protected.
HOME_FREE = 512 * MiB
#: Rings are on that file system: 256 MiB per group unless told otherwise.
RUN_FREE = 64 * MiB
LOOK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found at a host. `error`: nothing may be installed while it is so, and what it is raised as."""

    host: str
    message: str
    hint: str
    error: type[DrctlError] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything lies on a host, and where its appliance listens."""

    prefix: str
    home: str
    run: str
    port: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A host as it is. Empty strings are what is not there."""

    values: dict[str, str]
    pythons: tuple[tuple[str, str], ...]
    space: dict[str, int]
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> str:
        return self.values.get(key, "")

    @property
    def sudo(self) -> list[str]:
        return ["sudo", "-n", "--"] if self["root"] == "sudo" else []

    def python_for(self, version: str) -> str:
        """The path of a Python of that version; empty when there is none."""
        return next((path for found, path in self.pythons if found == version), "")

    @property
    def agent_python(self) -> str:
        """One that can run the agent; empty when there is none."""
        return next((path for found, path in self.pythons if _version(found) >= OLDEST_PYTHON), "")


def look(shell: Shell, place: Place) -> Facts:
    """Ask a host; changes nothing there. Raises the Shell's errors."""
    script = resources.files(__package__).joinpath("files/preflight.sh").read_bytes()
    argv = ["sh", "-s", place.prefix, place.home, place.run, str(place.port)]
    done = shell.run(argv, stdin=script, timeout=LOOK_SECONDS)
    facts = parse(done.out.decode(errors="replace"))
    if facts["end"] != "yes":
        raise HostUnreachable(f"{shell.login}: it can't be looked at: {done.told}", host=shell.login.host)
    return facts


def parse(text: str) -> Facts:
    """The script's answers."""
    values: dict[str, str] = {}
    pythons: list[tuple[str, str]] = []
    space: dict[str, int] = {}
    for key, _, value in (line.partition(" ") for line in text.splitlines()):
        first, _, rest = value.partition(" ")
        if key == "python" and first:
            pythons.append((first, rest))
        elif key == "space" and first.isdigit():
            space[rest] = int(first) * 1024
        elif key == "firewall" and values.get(key):
            values[key] += f" {value}"
        else:
            values[key] = value.strip()
    return Facts(values, tuple(pythons), space)


def judge(host: str, facts: Facts, place: Place, bundle: Bundle, *, hypervisor: bool = True) -> list[Finding]:
    """All that stands in the way, and what is worth saying. Without `hypervisor` it need be none itself."""
    found = [*_privilege(host, facts), *_python(host, facts, bundle), *_programs(host, facts, hypervisor)]
    found += _space(host, facts, place, bundle)
    if facts["listening"] and facts["active"] != "active":
        hint = "another link in drctl.toml, or end what listens there"
        found.append(Finding(host, f"port {place.port} is taken", hint, PreconditionFailed))
    return [*found, *_advice(host, facts, place)]


def _privilege(host: str, facts: Facts) -> Iterable[Finding]:
    if facts["root"] not in ("yes", "sudo"):
        reason = facts["root"].removeprefix("no ")
        hint = "log in as root, or let the login use sudo without a password"
        yield Finding(host, f"the login may not become root: {reason}", hint, PrivilegeMissing)


_HYPERVISOR = (
    ("libvirt", "libvirt", OLDEST_LIBVIRT, "apt install libvirt-daemon-system"),
    ("qemu", "QEMU", OLDEST_QEMU, "apt install qemu-system-x86 qemu-block-extra"),
)


def _programs(host: str, facts: Facts, hypervisor: bool) -> Iterable[Finding]:
    for name, title, oldest, hint in _HYPERVISOR if hypervisor else ():
        needed = ".".join(map(str, oldest))
        if not facts[name]:
            yield Finding(host, f"there is no {title}", f"install {needed} or newer: {hint}", HostUnfit)
        elif _version(facts[name]) < oldest:
            yield Finding(host, f"{title} is {facts[name]}", f"{needed} or newer is needed", HostUnfit)
    if not facts["qemu_img"]:
        yield Finding(host, "there is no qemu-img", "apt install qemu-utils", HostUnfit)
    if not facts["systemd"]:
        yield Finding(host, "it was not booted by systemd", "drctl runs as a systemd service", HostUnfit)


def _python(host: str, facts: Facts, bundle: Bundle) -> Iterable[Finding]:
    versions = sorted({version for version, _ in facts.pythons}, key=_version)
    told = ", ".join(versions) or "none"
    if not facts.agent_python:
        yield Finding(host, f"Python is {told}", "3.11 or newer is needed", HostUnfit)
    elif not facts.python_for(bundle.python):
        hint = "fill a directory on a machine like it (pip wheel -w DIR drctl pip), then add --wheels DIR"
        yield Finding(host, f"Python is {told}, the wheels are for {bundle.python}", hint, HostUnfit)
    if facts["machine"] != bundle.machine:
        hint = "add --wheels DIR with wheels for its processor"
        yield Finding(
            host, f"its processor is {facts['machine']}, the wheels are for {bundle.machine}", hint, HostUnfit
        )


def _space(host: str, facts: Facts, place: Place, bundle: Bundle) -> Iterable[Finding]:
    needed = {place.prefix: 0 if facts["current"].endswith(bundle.identity) else bundle.size * _UNPACKED}
    needed |= {place.home: HOME_FREE, place.run: RUN_FREE}
    for directory, least in needed.items():
        free = facts.space.get(directory, 0)
        if free < least:
            text = f"{directory} has {format_bytes(free)} free, {format_bytes(least)} are needed"
            yield Finding(host, text, "make room there", OutOfSpace)


def _advice(host: str, facts: Facts, place: Place) -> Iterable[Finding]:
    if facts["firewall"]:
        hint = {
            "firewalld": f"firewall-cmd --permanent --add-port={place.port}/tcp && firewall-cmd --reload",
            "ufw": f"ufw allow proto tcp from PEER to any port {place.port}",
        }.get(facts["firewall"].split()[0], f"nft add rule inet filter input tcp dport {place.port} accept")
        yield Finding(host, f"{facts['firewall']} is active; the peers need port {place.port}/tcp", hint)


def demand(findings: Sequence[Finding]) -> None:
    """Raise what keeps hosts from being installed on: its own class when all is of one kind, else PreconditionFailed.

    Nothing was changed anywhere when it raises."""
    errors = [finding for finding in findings if finding.error]
    if not errors:
        return
    kinds = {finding.error for finding in errors}
    kind = kinds.pop() if len(kinds) == 1 else PreconditionFailed
    assert kind is not None
    text = "; ".join(f"{finding.host}: {finding.message}" for finding in errors)
    hints = list(dict.fromkeys(finding.hint for finding in errors))
    raise kind(f"nothing was changed: {text}", hint="; ".join(hints))


def _version(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(".")[:2] if part.isdigit()]
    return tuple(numbers)
