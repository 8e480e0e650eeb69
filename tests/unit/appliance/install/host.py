"""A host in a directory: the real agent on its files; users, systemd, venv and pip as far as the installer sees them."""

from __future__ import annotations

import contextlib
import grp
import io
import os
import pwd
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from drctl.appliance.install import enroll
from drctl.appliance.install.agent import Agent, answer
from drctl.appliance.install.bundle import Bundle, Wheel
from drctl.appliance.install.installation import UNIT, Installation, Outcome, Wanted
from drctl.appliance.install.preflight import Facts, Place, parse
from drctl.appliance.install.roster import Roster
from drctl.appliance.install.session import failure
from drctl.appliance.install.settings import Member
from drctl.errors import ApplianceUnreachable, HostUnreachable
from drctl.model.site import Host, HostKind
from drctl.replication.identity import create_ca

PLACE = Place("/opt/drctl", "/var/lib/drctl", "/run/drctl", 7077)
HOSTS = [
    Host(name, site, HostKind.LIBVIRT, "qemu:///system", "unix:/run/drctl/control.sock", f"192.0.2.{number}:7077")
    for number, (name, site) in enumerate([("a1", "alpha"), ("b1", "beta"), ("a2", "alpha")])
]
ME = pwd.getpwuid(os.getuid()).pw_name
MY_GROUP = grp.getgrgid(os.getgid()).gr_name


class FakeHost:
    """`break_at` loses the connection before the operation of that number; `fail` makes programs fail that name it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations = 0
        self.break_at = -1
        self.fail: dict[str, str] = {}
        self.users: set[str] = set()
        self.service = ""  # what the running service was started with
        self.enabled = False
        self.pid = 0
        self.children: list[list[Any]] = []
        self.sent: list[str] = []
        self.calls: list[list[str]] = []

    def at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def ask(self, op: str, **fields: Any) -> Any:
        self.operations += 1
        if self.operations == self.break_at:
            raise HostUnreachable("a1: the connection was lost")
        if (own := getattr(self, f"_{op}", None)) is not None:
            return own(**fields)
        fields |= {key: ME for key in ("owner",) if key in fields} | {
            key: MY_GROUP for key in ("group",) if key in fields
        }
        if "mode" in fields:
            fields.setdefault("owner", ME)
        reply = answer(Agent(io.BytesIO(), self.root), {"op": op, **fields})
        if "error" in reply:
            raise failure("a1", reply["error"], reply["message"])
        return reply["result"]

    def put(self, path: str, file: Path, sha256: str) -> bool:
        if self.ask("have", path=path, sha256=sha256):
            return False
        self.ask("names", path="/")  # the sending itself, which can break too
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_bytes(file.read_bytes())
        self.sent.append(file.name)
        return True

    def _user(self, name: str, home: str, groups: list[str]) -> bool:
        new = name not in self.users
        self.users.add(name)
        return new

    def _user_gone(self, name: str) -> bool:
        there = name in self.users
        self.users.discard(name)
        return there

    def _processes(self, needle: str) -> list[list[Any]]:
        return [child for child in self.children if needle in child[1]]

    def _end(self, pids: list[int], seconds: float) -> list[int]:
        self.children = [child for child in self.children if child[0] not in pids]
        return []

    def _run(self, argv: list[str], user: str = "", stdin: str = "", timeout: float = 0) -> dict[str, Any]:
        self.calls.append(argv)
        for name, words in self.fail.items():
            if name in " ".join(argv):
                return {"code": 1, "out": "", "err": words}
        code, out = 0, ""
        match argv:
            case [_, "-I", "-m", "venv", *_, place]:
                self.at(f"{place}/bin").mkdir(parents=True)
                self.at(f"{place}/bin/python").write_text("")
            case [_, "-I", "-m", "drctl.appliance.install.enroll", part, tls, uuid]:
                out = self._enroll([part, str(self.at(tls)), uuid], stdin)
            case ["systemctl", "show", *_]:
                out = str(self.pid)
            case ["systemctl", "restart", "--no-block", _]:
                self.pid += 1
                self.service = self.at(UNIT).read_text()
            case ["systemctl", "is-enabled", *_]:
                code = 0 if self.enabled else 1
            case ["systemctl", "enable", *_]:
                self.enabled = True
            case ["systemctl", "disable", *_]:
                self.enabled, self.pid = False, 0
        return {"code": code, "out": out, "err": ""}

    def _enroll(self, arguments: list[str], stdin: str) -> str:
        out = io.StringIO()
        given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with contextlib.redirect_stdout(out), mock.patch.object(sys, "stdin", given):
            enroll.main(arguments)
        return out.getvalue()


class World:
    """An operator with a CA and a bundle of three wheels, and one host."""

    def __init__(self, directory: Path) -> None:
        self.host = FakeHost(directory / "host")
        self.host.root.mkdir()
        create_ca(directory / "ca")
        self.roster = Roster(directory / "ca")
        self.bundle = self.make_bundle(directory / "bundle", "1.0")

    def make_bundle(self, directory: Path, version: str) -> Bundle:
        directory.mkdir()
        names = [f"drctl-{version}-py3-none-any.whl", "numpy-2.0-cp311-cp311-x.whl", "pip-23.0-py3-none-any.whl"]
        wheels = []
        for name in names:
            (directory / name).write_bytes(name.encode())
            import hashlib

            wheels.append(Wheel(name, len(name), hashlib.sha256(name.encode()).hexdigest()))
        return Bundle(directory, version, "3.11", "x86_64", tuple(wheels))

    def facts(self, **changes: str) -> Facts:
        link = self.host.at(f"{PLACE.prefix}/current")
        current = str(link.readlink()) if link.is_symlink() else ""
        active = "active" if self.host.pid else "inactive"
        text = (
            "machine x86_64\nuid 0\nroot yes\npython 3.11 /usr/bin/python3\nlibvirt 9.0.0\nqemu 7.2.17\nqemu_img yes\n"
            f"systemd 252\nspace 9000000 {PLACE.prefix}\nspace 9000000 {PLACE.home}\nspace 900000 {PLACE.run}\nlistening\n"
            f"addresses 192.0.2.0\ncurrent {current}\nactive {active}\nqemu_group libvirt-qemu\nend yes\n"
        )
        facts = parse(text)
        return Facts(facts.values | changes, facts.pythons, facts.space)

    def answers(self) -> str:
        if not self.host.pid:
            raise ApplianceUnreachable("nobody answers")
        return "1.0"

    def run(self, *, upgrade: bool = False) -> Outcome:
        uuids = self.roster.assign(HOSTS)
        own, *_ = HOSTS
        others = [Member(host, uuids[host.name]) for host in HOSTS if host.site != own.site]
        wanted = Wanted(Member(own, uuids["a1"]), others, PLACE, self.bundle, self.roster, self.answers)
        return Installation(self.host, self.facts(), wanted, upgrade=upgrade).run(lambda *_: None)

    def picture(self) -> dict[str, str]:
        """Every file there and its text, but for keys and certificates, and what runs."""
        files = {
            str(path.relative_to(self.host.root)): str(path.readlink()) if path.is_symlink() else path.read_text()
            for path in sorted(self.host.root.rglob("*"))
            if (path.is_file() or path.is_symlink()) and path.suffix != ".pem" and path.name != "started"
        }
        return files | {"service": self.host.service, "enabled": str(self.host.enabled)}
