"""Installing on many hosts at once: look at all before any is changed, then change them side by side.

An ESX host can't run an appliance itself: a machine is made there first, and that is then installed on as any host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from drctl.appliance.install.bundle import Bundle
from drctl.appliance.install.esx_access import EsxAccess, appliance_uri, forget, learn
from drctl.appliance.install.image import Image
from drctl.appliance.install.installation import Installation, Outcome, Wanted
from drctl.appliance.install.preflight import Facts, Finding, Place, demand, judge, look
from drctl.appliance.install.removal import Holdings, Removal, demand_empty, holdings
from drctl.appliance.install.roster import Roster
from drctl.appliance.install.session import agent_session
from drctl.appliance.install.settings import Member
from drctl.appliance.install.vm import ApplianceVm, VmState, VmWanted
from drctl.errors import ConfigInvalid, DrctlError, HostUnfit, Refused, StepFailed
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.shell import Shell
from drctl.model.site import Host

HOME = "/var/lib/drctl"
#: Hosts at a time; each sends its own copy of the wheels.
WORKERS = 16

#: (host, step, of how many, its name)
Progress = Callable[[str, int, int, str], None]


@dataclass(slots=True)
class EsxTarget:
    """An ESX host, by the operator's way in, and the appliance's machine there. `image` is only read to make one."""

    shell: Shell
    vm: ApplianceVm
    uuid: str
    image: Callable[[], Image]
    state: VmState | None = None

    def access(self, host: Host) -> EsxAccess:
        return EsxAccess(EsxHost(host.name, self.shell).session, host, self.uuid, self.shell.host_key())


def esx_target(host: Host, shell: Shell, roster: Roster, image: Callable[[], Image]) -> EsxTarget:
    """Raises ConfigInvalid when drctl.toml tells of no machine, or of a key that is not there."""
    if host.machine is None:
        hint = "write [host.machine] below it; see docs/install.md"
        raise ConfigInvalid(
            "drctl.toml", 0, "machine", f"ESX host {host.name!r} has no machine for an appliance", hint=hint
        )
    uuid = roster.assign([host])[host.name]
    try:
        key = Path(host.machine.authorized_key).read_text("utf-8")
    except OSError as exc:
        text = f"{host.machine.authorized_key} can't be read: {exc.strerror}"
        raise ConfigInvalid("drctl.toml", 0, "authorized_key", text, hint="name your public key's file") from exc
    vm = ApplianceVm(EsxHost(host.name, shell), shell, VmWanted(host.name, uuid, host.machine, key))
    return EsxTarget(shell, vm, uuid, image)


@dataclass(slots=True)
class Target:
    """One host, and what came of it: `error` ends its part, the others go on. `shell` is where its appliance is."""

    host: Host
    shell: Shell
    answers: Callable[[], str]
    esx: EsxTarget | None = None
    facts: Facts | None = None
    findings: list[Finding] = field(default_factory=list)
    outcome: Outcome | None = None
    error: DrctlError | None = None

    @property
    def place(self) -> Place:
        """Where things lie there. Raises ConfigInvalid when drctl.toml does not say where it listens."""
        _, _, port = self.host.link.rpartition(":")
        if not port.isdigit():
            hint = 'write link = "ADDRESS:7077": where the other site reaches it'
            raise ConfigInvalid("drctl.toml", 0, "link", f"host {self.host.name!r} has no link", hint=hint)
        run = str(Path(self.host.control.removeprefix("unix:")).parent)
        return Place(self.host.prefix, HOME, run, int(port))

    @property
    def version(self) -> str:
        """The version that is current there; empty when none is."""
        return self.facts["current"].rpartition("/")[2] if self.facts else ""


def survey(targets: Sequence[Target], bundle: Bundle | None) -> list[Finding]:
    """Look at every host; changes nothing. What keeps a host from being looked at is a finding too."""

    def one(target: Target) -> None:
        try:
            if target.esx is None or _is_up(target.esx, bundle):
                _look(target, bundle)
        except DrctlError as exc:
            target.findings = [Finding(target.host.name, exc.message, exc.hint, type(exc))]

    _side_by_side(one, targets)
    return [finding for target in targets for finding in target.findings]


def _is_up(esx: EsxTarget, bundle: Bundle | None) -> bool:
    """Whether the appliance's machine runs; what keeps it from being made is raised."""
    esx.state = esx.vm.look(None)
    if bundle and not esx.state.registered:
        esx.state = esx.vm.look(esx.image())
    return esx.state.running


def _look(target: Target, bundle: Bundle | None) -> None:
    target.facts = look(target.shell, target.place)
    if bundle:
        name = target.host.name
        target.findings = judge(name, target.facts, target.place, bundle, hypervisor=target.esx is None)


def _make_machine(target: Target, bundle: Bundle, progress: Progress) -> list[str]:
    """The machine of an ESX host's appliance is there, runs, and is known to the operator. What was changed."""
    esx, host = target.esx, target.host
    assert esx is not None
    if esx.state is None or host.appliance is None:
        raise StepFailed(f"{host.name} was not looked at")
    name, steps = host.name, 5
    numbers = iter(range(1, steps + 1))

    def told(what: str) -> None:
        progress(name, next(numbers), steps, f"machine: {what}")

    changes = []
    if not esx.state.running:
        changes = esx.vm.ensure(esx.image(), told)
    if target.facts is None:
        if learn(host.appliance, esx.vm.console(told).keys):
            changes.append(f"its key in {host.appliance.known_hosts}")
        _look(target, bundle)
        demand(target.findings)
    return changes


def install(
    targets: Sequence[Target],
    hosts: Sequence[Host],
    bundle: Bundle,
    roster: Roster,
    progress: Progress,
    *,
    upgrade: bool,
) -> None:
    """Install on all targets; `hosts` are all of the configuration. Each target's outcome or error is put into it."""
    uuids = roster.assign(hosts)

    def one(target: Target) -> None:
        host = target.host
        others = [Member(other, uuids[other.name]) for other in hosts if other.site != host.site and other.link]
        own, access, made = host, None, list[str]()
        if target.esx is not None:
            made = _make_machine(target, bundle, progress)
            own, access = replace(host, uri=appliance_uri(host, HOME)), target.esx.access(host)
        wanted = Wanted(Member(own, uuids[host.name]), others, target.place, bundle, roster, target.answers, access)
        facts = _facts(target)
        with agent_session(host.name, target.shell, facts.agent_python, facts.sudo) as remote:
            installation = Installation(remote, facts, wanted, upgrade=upgrade)
            target.outcome = installation.run(lambda step, steps, name: progress(host.name, step, steps, name))
        target.outcome.changes[:0] = made

    _side_by_side(_told(one), targets)


def held_by(target: Target) -> Holdings:
    """What would be lost with the appliance there. Raises Refused when its machine can't be asked."""
    if target.esx is not None and not _can_be_asked(target.host.name, target.esx):
        return Holdings((), (), ())
    facts = _facts(target)
    with agent_session(target.host.name, target.shell, facts.agent_python, facts.sudo) as remote:
        return holdings(remote, target.place)


def _can_be_asked(name: str, esx: EsxTarget) -> bool:
    """Whether the machine runs. False when there is none, or when its removal has begun."""
    state = esx.state or esx.vm.look()
    if state.registered and not state.running and not state.removing:
        raise Refused(
            f"{name}: the appliance's machine is off: whether it keeps history is not known",
            hint="drctl appliance install starts it",
        )
    return state.running and not state.removing


def uninstall(target: Target, progress: Progress, *, delete_history: bool) -> Outcome:
    """Remove everything. Raises Refused while it protects, or keeps history that was not given up."""
    name = target.host.name
    if target.esx is not None:
        demand_empty(name, held_by(target), delete_history=delete_history)
        return _remove_machine(target, target.esx, progress)
    facts = _facts(target)
    with agent_session(name, target.shell, facts.agent_python, facts.sudo) as remote:
        demand_empty(name, holdings(remote, target.place), delete_history=delete_history)
        removal = Removal(remote, name, target.place)
        return removal.run(lambda step, steps, what: progress(name, step, steps, what))


def _remove_machine(target: Target, esx: EsxTarget, progress: Progress) -> Outcome:
    """The appliance goes with its machine; the host forgets its key, and so does the operator."""
    host, numbers = target.host, iter(range(1, 4))

    def told(what: str) -> None:
        progress(host.name, next(numbers), 3, what)

    outcome = Outcome(esx.vm.remove(told))
    told("access to the ESX host")
    if esx.access(host).revoke():
        outcome.changes.append("its key at the ESX host")
    if host.appliance is not None and forget(host.appliance):
        outcome.changes.append(f"its key in {host.appliance.known_hosts}")
    return outcome


def failure(targets: Sequence[Target]) -> DrctlError | None:
    """What to tell when hosts failed: the error itself, or one for several."""
    failed = [target.error for target in targets if target.error]
    if len(failed) < 2:
        return failed[0] if failed else None
    kinds = {type(error) for error in failed}
    kind = kinds.pop() if len(kinds) == 1 else StepFailed
    hints = list(dict.fromkeys(error.hint for error in failed))
    error = kind.__new__(kind)
    DrctlError.__init__(error, "; ".join(one.message for one in failed), hint="; ".join(hints))
    return error


def _facts(target: Target) -> Facts:
    if target.facts is None or not target.facts.agent_python:
        raise HostUnfit(f"{target.host.name}: it has no Python 3.11 or newer", hint="install one there")
    return target.facts


def _told(work: Callable[[Target], None]) -> Callable[[Target], None]:
    def one(target: Target) -> None:
        try:
            work(target)
        except DrctlError as exc:
            target.error = exc

    return one


def _side_by_side(work: Callable[[Target], None], targets: Sequence[Target]) -> None:
    with ThreadPoolExecutor(max_workers=min(WORKERS, max(1, len(targets)))) as pool:
        list(pool.map(work, targets))
