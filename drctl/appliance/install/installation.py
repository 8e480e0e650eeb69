"""The steps that put an appliance on one host. Each looks before it changes; done again, none changes anything.

What runs is switched last: until then a break leaves files that nobody uses yet, and the same command goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drctl.appliance.install.bundle import Bundle
from drctl.appliance.install.esx_access import EsxAccess
from drctl.appliance.install.preflight import Facts, Place
from drctl.appliance.install.roster import Roster
from drctl.appliance.install.session import Remote, run_program
from drctl.appliance.install.settings import Member, appliance_toml, peers_json, system_file
from drctl.appliance.libvirt_hook import HOOK_PATH, MODE, script
from drctl.errors import DrctlError, StepFailed

USER = "drctl"
SERVICE = "drctl-appliance"
UNIT = f"/etc/systemd/system/{SERVICE}.service"
PROGRAM = "/usr/local/bin/drctl"
APPARMOR = "/etc/apparmor.d/local/abstractions/libvirt-qemu"
SELINUX = "/etc/selinux/drctl.cil"
#: Groups that Debian, Ubuntu and Fedora let libvirt be used by, and QEMU's own: those that exist are joined.
GROUPS = ("libvirt", "kvm", "libvirt-qemu", "qemu")
#: A new appliance answers within a second; libvirt and a busy host may take their time.
START_SECONDS = 120.0
#: The new supervisor lets taps hand over at its first look at each group, which takes as long as a tap's start.
HANDOVER_SECONDS = 15.0
#: What has to work in the new environment before anything is switched to it.
_PROOF = "import drctl.appliance.daemon, drctl.replication.shipper, drctl.replication.receiver, drctl.cli.app"
#: Children that begin anew without harm, with the new version: the ring and the journal hold all they need.
_RENEWED = ("drctl.replication.shipper", "drctl.replication.receiver", "drctl.appliance.source.watchdog")

#: Guests that run have their AppArmor profile compiled already.
_RELOAD = (
    "for each in /etc/apparmor.d/libvirt/libvirt-????????-*[!s]; do [ ! -e $each ] || apparmor_parser -r $each; done"
)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be on a host."""

    own: Member
    others: Sequence[Member]
    place: Place
    bundle: Bundle
    roster: Roster
    answers: Callable[[], str]
    """The version that the appliance tells; raises DrctlError while it does not answer."""
    access: EsxAccess | None = None
    """How the appliance of an ESX host enters that."""


@dataclass(slots=True)
class Outcome:
    """What was changed, in words; nothing when all was as it should be."""

    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Installation:
    """Puts an appliance on one host, or brings it to another version. `run` raises DrctlError; run again it goes on."""

    def __init__(self, remote: Remote, facts: Facts, wanted: Wanted, *, upgrade: bool = False) -> None:
        self._remote = remote
        self._facts = facts
        self._wanted = wanted
        self._upgrade = upgrade
        self._place = wanted.place
        self._system = wanted.own.host.uri.startswith("qemu:///system")
        self._group = facts["qemu_group"] if self._system else ""
        self._unit = ""
        self.outcome = Outcome()
        current = facts["current"]
        #: The version's directory: that of the bundle, or the one that runs, which only an upgrade replaces.
        self._version = f"{self._place.prefix}/versions/{wanted.bundle.identity}"
        if current and not upgrade and remote.ask("read", path=f"{current}/complete") is not None:
            if current != self._version:
                self.outcome.notes.append(f"{current} stays: drctl appliance upgrade brings this version")
            self._version = current

    def run(self, progress: Progress) -> Outcome:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("user and directories", self._directories),
            ("wheels", self._wheels),
            ("environment", self._environment),
            ("identity", self._identity),
            *([("access to the ESX host", self._access)] if self._wanted.access else []),
            ("configuration", self._configuration),
            ("policy", self._policy),
            ("service", self._service),
            ("start", self._start),
            ("older versions", self._prune),
        ]
        for number, (name, step) in enumerate(steps, 1):
            progress(number, len(steps), name)
            step()
        return self.outcome

    # -- what nobody uses yet ----------------------------------------------------------------------------------------

    def _directories(self) -> None:
        place = self._place
        if self._ask("user", name=USER, home=place.home, groups=list(GROUPS)):
            self._changed(f"user {USER}")
        mode = 0o710 if self._group else 0o700
        made = [
            self._ask("directory", path=place.prefix, mode=0o755),
            self._ask("directory", path=f"{place.prefix}/versions", mode=0o755),
            self._ask("directory", path=place.home, mode=mode, owner=USER, group=self._group or USER),
            self._ask("directory", path=f"{place.home}/tls", mode=0o700, owner=USER),
        ]
        if any(made):
            self._changed("directories")

    @property
    def _complete(self) -> bool:
        return self._ask("read", path=f"{self._version}/complete") is not None

    def _wheels(self) -> None:
        if self._complete:
            return
        bundle = self._wanted.bundle
        sent = [
            self._remote.put(f"{self._place.prefix}/wheels/{wheel.name}", bundle.directory / wheel.name, wheel.sha256)
            for wheel in bundle.wheels
        ]
        if any(sent):
            self._changed(f"{sum(sent)} wheels sent")

    def _environment(self) -> None:
        if not self._complete:
            self._build()
        self._ask("remove", path=f"{self._place.prefix}/wheels")

    def _build(self) -> None:
        bundle, wheels = self._wanted.bundle, f"{self._place.prefix}/wheels"
        self._ask("remove", path=self._version)  # what an earlier run left half done
        try:
            self._program([self._facts.python_for(bundle.python), "-I", "-m", "venv", "--without-pip", self._version])
            python = f"{self._version}/bin/python"
            files = [f"{wheels}/{wheel.name}" for wheel in bundle.wheels if wheel != bundle.pip]
            pip = [python, f"{wheels}/{bundle.pip.name}/pip", "install", "--quiet", "--no-index", "--no-deps"]
            self._program([*pip, "--no-cache-dir", "--root-user-action=ignore", *files], timeout=600)
            self._program([python, "-I", "-c", _PROOF], user=USER)
        except DrctlError:
            # Nobody uses it, and its space may be what is missing.
            with suppress(DrctlError):
                self._ask("remove", path=self._version)
            raise
        self._ask("file", path=f"{self._version}/complete", text=f"{bundle.identity}\n", mode=0o644)
        self._changed(f"environment {self._version}")

    # -- identity and configuration ----------------------------------------------------------------------------------

    def _identity(self) -> None:
        own, roster = self._wanted.own, self._wanted.roster
        ca = roster.ca.decode()
        problem = self._enroll("check", ca)
        if not problem:
            return
        request = self._enroll("request", "")
        given = json.dumps({"certificate": roster.sign(request, own.uuid), "ca": ca})
        self._enroll("install", given)
        self._changed("identity (key and certificate)")

    def _enroll(self, part: str, stdin: str) -> str:
        python = [f"{self._version}/bin/python", "-I", "-m", "drctl.appliance.install.enroll"]
        argv = [*python, part, f"{self._place.home}/tls", self._wanted.own.uuid]
        return self._program(argv, user=USER, stdin=stdin)

    def _access(self) -> None:
        assert self._wanted.access
        if self._wanted.access.grant(self._remote, self._place.home, USER):
            self._changed("access to the ESX host")

    def _configuration(self) -> None:
        wanted, home = self._wanted, self._place.home
        old = self._ask("read", path=f"{home}/appliance.toml")
        text = appliance_toml(wanted.own, wanted.others, self._place.run, self._group, old)
        if self._ask("file", path=f"{home}/appliance.toml", text=text, mode=0o600, owner=USER):
            self._changed("appliance.toml")
        text = peers_json(wanted.others, self._ask("read", path=f"{home}/tls/peers.json"))
        if self._ask("file", path=f"{home}/tls/peers.json", text=text, mode=0o600, owner=USER):
            self._changed("peers.json")  # read anew at each connection

    def _policy(self) -> None:
        if not self._system:
            return
        place, labels = self._place, self._facts["labels"]
        rules = system_file("apparmor", home=place.home, run=place.run) if labels == "apparmor" else ""
        module = system_file("drctl.cil") if labels == "selinux" else ""
        hook = script(Path(place.home))
        done, seal = f"{place.prefix}/policy", _seal(rules, module, hook)
        if self._ask("read", path=done) == seal:
            return
        if rules:
            self._ask("block", path=APPARMOR, name="drctl", text=rules)
            self._program(["sh", "-c", _RELOAD])
        if module:
            self._ask("file", path=SELINUX, text=module, mode=0o644)
            self._program(["semodule", "-i", SELINUX])
        self._ask("file", path=str(HOOK_PATH), text=hook, mode=MODE)
        # libvirt looks for hooks when it starts; guests run on meanwhile.
        self._ask("run", argv=["systemctl", "try-restart", "libvirtd.service", "virtqemud.service"])
        self._ask("file", path=done, text=seal, mode=0o644)
        self._changed(", ".join(["libvirt's hook", *([f"rules for {labels}"] if labels else [])]))

    # -- the switch --------------------------------------------------------------------------------------------------

    def _service(self) -> None:
        place = self._place
        mode = "0710" if self._group else "0700"
        values = {"home": place.home, "run": place.run, "user": USER, "version": self._version, "run_mode": mode}
        self._unit = system_file(f"{SERVICE}.service", **values)
        if self._ask("file", path=UNIT, text=self._unit, mode=0o644):
            self._changed("systemd unit")
        if self._ask("link", path=f"{place.prefix}/current", target=self._version):
            self._changed(f"{place.prefix}/current")
        self._ask("link", path=PROGRAM, target=f"{place.prefix}/current/bin/drctl")
        if self._ask("run", argv=["systemctl", "is-enabled", "--quiet", SERVICE])["code"]:
            self._program(["systemctl", "daemon-reload"])
            self._program(["systemctl", "enable", "--quiet", SERVICE])
            self._changed("enabled")

    def _start(self) -> None:
        """Restart it when what it was started with is not what is wanted: a break before this point is made up for."""
        home, done = self._place.home, f"{self._place.prefix}/started"
        files = [self._ask("read", path=f"{home}/{name}") or "" for name in ("appliance.toml", "tls/cert.pem")]
        seal = _seal(self._unit, *files, self._program(["id", "-Gn", USER]))
        before = self._main_pid()
        if before and self._ask("read", path=done) == seal:
            return
        self._program(["systemctl", "daemon-reload"])
        # It says that it is ready only when libvirt answers, which may be long after; we look ourselves.
        self._program(["systemctl", "restart", "--no-block", SERVICE])
        self._wait(before)
        self._renew()
        self._await_taps()
        self._ask("file", path=done, text=seal, mode=0o644)
        self._changed("restarted" if before else "started")

    def _main_pid(self) -> int:
        return int(self._program(["systemctl", "show", "--property", "MainPID", "--value", SERVICE]).strip() or 0)

    def _wait(self, before: int) -> None:
        """Until another process than `before` answers."""
        deadline = time.monotonic() + START_SECONDS
        told = "systemd does not start it"
        while time.monotonic() < deadline:
            if self._main_pid() not in (0, before):
                try:
                    self._wanted.answers()
                    return
                except DrctlError as exc:
                    told = exc.message
            time.sleep(0.2)
        name, lines = self._wanted.own.host.name, self._journal()
        raise StepFailed(
            f"{name}: installed, but it does not answer: {told}{lines}", hint=f"journalctl -u {SERVICE} there"
        )

    def _journal(self) -> str:
        done = self._ask("run", argv=["journalctl", "-u", SERVICE, "-n", "3", "-o", "cat", "--no-pager"])
        return f" ({' / '.join(done['out'].strip().splitlines())})" if done["out"].strip() else ""

    def _renew(self) -> None:
        """Let children of other versions begin anew, but taps and views: guests hang on those. The supervisor lets
        taps hand over to new ones; views end with their recoveries."""
        old = [
            pid
            for pid, words in self._ask("processes", needle=f"{self._place.prefix}/versions/")
            if self._version not in words and any(name in words for name in _RENEWED)
        ]
        if old:
            self._ask("end", pids=old, seconds=5.0)

    def _await_taps(self) -> None:
        """Taps of the version before hand over to ones of this; a note tells of those that know no handover yet."""
        rings = self._ask("names", path=f"{self._place.run}/rings")
        deadline = time.monotonic() + HANDOVER_SECONDS
        while any(name.endswith(".heir") for name in rings) and time.monotonic() < deadline:
            running = self._ask("processes", needle=f"{self._place.prefix}/versions/")
            if not any("drctl.replication.tap" in words and self._version not in words for _, words in running):
                return
            time.sleep(0.2)

    def _prune(self) -> None:
        """Versions that are neither current nor run any process are of no use."""
        directory = f"{self._place.prefix}/versions"
        for name in self._ask("names", path=directory):
            path = f"{directory}/{name}"
            if path == self._version:
                continue
            users = self._ask("processes", needle=f"{path}/")
            if users:
                self.outcome.notes.append(
                    f"{len(users)} processes (taps, views) still run {name}, and go on until they end"
                )
            elif self._upgrade and self._ask("remove", path=path):
                self._changed(f"{path} removed")

    # -- ways of asking ----------------------------------------------------------------------------------------------

    def _ask(self, op: str, **fields: Any) -> Any:
        return self._remote.ask(op, **fields)

    def _program(self, argv: Sequence[str], **options: Any) -> str:
        """A program's output. Raises StepFailed with its last words when it fails, OutOfSpace when they say so."""
        return run_program(self._remote, self._wanted.own.host.name, argv, **options)

    def _changed(self, what: str) -> None:
        self.outcome.changes.append(what)


def _seal(*texts: str) -> str:
    """Tells whether what was done is what is wanted, after a break too."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest() + "\n"
