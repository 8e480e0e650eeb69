"""How the appliance of an ESX host may enter it: with a key that it makes itself, which is let in there and named.

Its public part is a line in the host's authorized_keys that ends with the appliance's UUID: so it is found again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from drctl.appliance.esx import address as esx_address
from drctl.appliance.install.session import Remote, run_program
from drctl.errors import StepFailed
from drctl.hypervisor.esx.batch import Command
from drctl.hypervisor.esx.session import Session
from drctl.model.site import Host, Login

_COMMENT = "drctl-appliance-{uuid}"


def appliance_uri(host: Host, home: str) -> str:
    """The `uri` in the appliance's own configuration: the host as the appliance reaches it."""
    if esx_address.is_esx(host.uri):
        given = esx_address.parse(host.uri)
        login, domain, datastore = given.login, given.domain, given.datastore
    else:
        assert host.login is not None
        login = Login(host.login.host, host.login.user or "root", host.login.port)
        domain, datastore = "kvm", ""
    identity, known = login.identity or f"{home}/esx/id", login.known_hosts or f"{home}/esx/known_hosts"
    return esx_address.render(replace(login, identity=identity, known_hosts=known), domain, datastore)


class EsxAccess:
    """Lets the appliance of one host in. `host_key` is what the operator's own connection was met with."""

    def __init__(self, session: Session, host: Host, uuid: str, host_key: tuple[str, str]) -> None:
        self._session = session
        self._host = host
        self._comment = _COMMENT.format(uuid=uuid)
        self._host_key = host_key

    def grant(self, remote: Remote, home: str, user: str) -> bool:
        """A key on the appliance, and the host's list of keys that has it. Whether anything was changed."""
        name, place = self._host.name, f"{home}/esx"
        login = esx_address.parse(appliance_uri(self._host, home)).login
        changed = bool(remote.ask("directory", path=place, mode=0o700, owner=user))
        public = remote.ask("read", path=f"{place}/id.pub")
        if not public:
            # ESXi's sshd refuses Ed25519.
            words = ["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-C", self._comment, "-f", f"{place}/id"]
            remote.ask("remove", path=f"{place}/id")
            run_program(remote, name, words, user=user)
            public, changed = remote.ask("read", path=f"{place}/id.pub"), True
        known = f"[{login.host}]:{login.port}" if login.port != 22 else login.host
        text = f"{known} {' '.join(self._host_key)}\n"
        changed |= bool(remote.ask("file", path=f"{place}/known_hosts", text=text, mode=0o600, owner=user))
        line = " ".join(str(public).split())
        if not line.endswith(f" {self._comment}"):
            raise StepFailed(f"{name}: {place}/id.pub on the appliance is no key of ours", hint="remove it there")
        return self._let_in(line) or changed

    def _let_in(self, line: str) -> bool:
        keys = self._keys
        if self._session.run(["grep", "-qxF", line, keys])[0].code == 0:
            return False
        self.revoke()  # a machine that was there before us
        self._session.ask(_appending(line, keys))
        return True

    def revoke(self) -> bool:
        """The host's list has no such key. Whether it had."""
        keys = self._keys
        if self._session.run(["grep", "-q", f" {self._comment}$", keys])[0].code:
            return False
        self._session.ask(["sed", "-i", f"/ {self._comment}$/d", keys])
        return True

    @property
    def _keys(self) -> str:
        user = (self._host.login.user if self._host.login else "") or "root"
        return f"/etc/ssh/keys-{user}/authorized_keys"


def _appending(line: str, path: str) -> Command:
    return ["sh", "-c", 'printf "%s\\n" "$0" >>"$1"', line, path]


def known_name(login: Login) -> str:
    """A host's name in known_hosts."""
    return login.host if login.port == 22 else f"[{login.host}]:{login.port}"


def learn(login: Login, keys: tuple[tuple[str, str], ...]) -> bool:
    """Let the operator's file know a new machine by what it told over its host. Whether it did not know it."""
    file, name = Path(login.known_hosts), known_name(login)
    old = file.read_text("utf-8") if file.is_file() else ""
    if any(line.split(" ", 1)[0] == name for line in old.splitlines()):
        return False  # what stands there counts
    if old and not old.endswith("\n"):
        old += "\n"
    file.write_text(old + "".join(f"{name} {kind} {key}\n" for kind, key in keys), "utf-8")
    return True


def forget(login: Login) -> bool:
    """The operator's file knows the machine no more. Whether it did."""
    file, name = Path(login.known_hosts), known_name(login)
    lines = file.read_text("utf-8").splitlines(keepends=True) if file.is_file() else []
    kept = [line for line in lines if line.split(" ", 1)[0] != name]
    if kept != lines:
        file.write_text("".join(kept), "utf-8")
    return kept != lines
