"""Installing on many hosts at once: look at all before any is changed, then change them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from drctl.appliance.install.bundle import Bundle
from drctl.appliance.install.installation import Installation, Outcome, Wanted
from drctl.appliance.install.preflight import Facts, Finding, Place, judge, look
from drctl.appliance.install.removal import Holdings, Removal, demand_empty, holdings
from drctl.appliance.install.roster import Roster
from drctl.appliance.install.session import agent_session
from drctl.appliance.install.settings import Member
from drctl.errors import ConfigInvalid, DrctlError, HostUnfit, StepFailed
from drctl.hypervisor.shell import Shell
from drctl.model.site import Host

HOME = "/var/lib/drctl"
#: Hosts at a time; each sends its own copy of the wheels.
WORKERS = 16

#: (host, step, of how many, its name)
Progress = Callable[[str, int, int, str], None]


@dataclass(slots=True)
class Target:
    """One host, and what came of it: `error` ends its part, the others go on."""

    host: Host
    shell: Shell
    answers: Callable[[], str]
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
        place = target.place
        try:
            target.facts = look(target.shell, place)
            if bundle:
                target.findings = judge(target.host.name, target.facts, place, bundle)
        except DrctlError as exc:
            target.findings = [Finding(target.host.name, exc.message, exc.hint, type(exc))]

    _side_by_side(one, targets)
    return [finding for target in targets for finding in target.findings]


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
        wanted = Wanted(Member(host, uuids[host.name]), others, target.place, bundle, roster, target.answers)
        facts = _facts(target)
        with agent_session(host.name, target.shell, facts.agent_python, facts.sudo) as remote:
            installation = Installation(remote, facts, wanted, upgrade=upgrade)
            target.outcome = installation.run(lambda step, steps, name: progress(host.name, step, steps, name))

    _side_by_side(_told(one), targets)


def held_by(target: Target) -> Holdings:
    """What would be lost with the appliance there."""
    facts = _facts(target)
    with agent_session(target.host.name, target.shell, facts.agent_python, facts.sudo) as remote:
        return holdings(remote, target.place)


def uninstall(target: Target, progress: Progress, *, delete_history: bool) -> Outcome:
    """Remove everything. Raises Refused while it protects, or keeps history that was not given up."""
    name, facts = target.host.name, _facts(target)
    with agent_session(name, target.shell, facts.agent_python, facts.sudo) as remote:
        demand_empty(name, holdings(remote, target.place), delete_history=delete_history)
        removal = Removal(remote, name, target.place)
        return removal.run(lambda step, steps, what: progress(name, step, steps, what))


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
