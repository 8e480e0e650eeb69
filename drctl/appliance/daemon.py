"""The appliance of one host: starts what it needs, answers its control socket, watches until it is told to end.

Ending it ends neither taps nor shippers, receivers nor views: they go on, and the next one adopts them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drctl.appliance import config as configuration
from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import Home
from drctl.appliance.control import ControlServer, Handler, Progress
from drctl.appliance.esx.address import is_esx
from drctl.appliance.failback.exports import OldExports
from drctl.appliance.failback.ports import Deps
from drctl.appliance.failback.reign import FailbackReign
from drctl.appliance.failback.sample import FailbackSample
from drctl.appliance.failback.service import FailbackService
from drctl.appliance.history import History
from drctl.appliance.info import appliance_info, machine_list
from drctl.appliance.lease import Leases
from drctl.appliance.metrics_service import MetricsService
from drctl.appliance.notify import Notifier
from drctl.appliance.picture import Pictures, Shown
from drctl.appliance.process import Processes
from drctl.appliance.recovery.host import open_recovery
from drctl.appliance.recovery.run_pictures import RunPictures
from drctl.appliance.replica.checkpoint_serve import CheckpointServer
from drctl.appliance.replica.expiry import KEEP_SECONDS, StoreExpiry
from drctl.appliance.replica.held_store import HeldStores
from drctl.appliance.replica.receiver_link import ReceiverLink
from drctl.appliance.replica.seed_service import SeedService
from drctl.appliance.replica.service import StoreService
from drctl.appliance.roles import RECOVERY, SOURCE, Roles, RoleView
from drctl.appliance.run_service import open_runs
from drctl.appliance.source.evacuation import Evacuations, in_the_way
from drctl.appliance.source.evacuation_record import EvacuationFile
from drctl.appliance.source.group_state import spec_from
from drctl.appliance.source.handover_service import HandoverService
from drctl.appliance.source.link_service import LinkService
from drctl.appliance.source.service import SourceService
from drctl.appliance.source.verification import SourceVerification
from drctl.appliance.state_watch import States, StateWatch, group_states
from drctl.appliance.support import collect
from drctl.errors import DrctlError, HostUnreachable, WrongPhase
from drctl.hypervisor.libvirt import LibvirtHypervisor
from drctl.model.hook import Hook
from drctl.store import atomic

if TYPE_CHECKING:
    from drctl.appliance.esx.daemon import EsxAppliance

log = logging.getLogger(__name__)

#: Between two looks at children and views; a dead view server is back within 2 s.
SUPERVISE_SECONDS = 0.25
#: A host whose libvirtd does not answer is tried this often at start.
CONNECT_SECONDS = 2.0


class Appliance:
    """All roles of one host. `serve` returns after `stop`."""

    def __init__(self, home: Home, notifier: Notifier) -> None:
        self._home = home
        self._notifier = notifier
        self._stopped = threading.Event()
        self._processes = Processes(home.run / "pids", home.logs)
        self._host = _connect(home.config.uri, self._stopped)
        self._recovery = open_recovery(home.path, home.run, self._host, self._processes)
        self._source = SourceService(home, self._host, self._processes)
        self._served = CheckpointServer(home.run, home.store, self._processes)
        self._links = LinkService(home, self._source.protections)
        self._expiry = StoreExpiry(home.store, home.run / "receiver.sock")
        self._stores = StoreService(home.store, self._expiry, self._recovery.recoveries)
        self._receiver = ReceiverLink(home, self._processes)
        self._held = HeldStores(home.run / "receiver.sock")
        self._seeds = SeedService(home.store, self._held)
        source = self._source
        self._handovers = HandoverService(
            home, self._host, source.protection, source.refuse_superseded, source.who_reigns
        )
        self._roles = Roles(source, self._stores)
        self._evacuations = Evacuations(
            EvacuationFile(home.path), home.config.host, source, self._host, self._in_the_way
        )
        exports = OldExports(home.run, self._processes)
        deps = Deps(self._host, source, self._held, exports, self._expiry, self._recovery.reigns.state)
        self._failbacks, self._away = FailbackService(home, deps), FailbackReign(home, deps)
        self._pictures = Pictures(home.config.site, home.config.host, self._host, self._shown)
        sources = RoleView(lambda: self._roles.names(SOURCE), source.status)
        recoveries = RoleView(lambda: self._roles.names(RECOVERY), self._stores.status)
        self._metrics = MetricsService(self._info, sources, recoveries, home.config.metrics)
        hook = Hook(home.config.notify, home.config.notify_timeout, str(home.path))
        self._watch = StateWatch(hook, (home.config.site, home.config.host), self._states)
        history = History(home.path / "history.jsonl", self._pictures.take_quietly)
        self._control = ControlServer(home.control, history.watch(Leases(home.store).watch(self._handlers())))

    def serve(self) -> None:
        self._supervise_children()
        self._served.sweep()
        self._host.watch(self._source.happened)
        self._held.forgotten()
        self._recovery.resume()
        self._source.start()
        self._handovers.resume(self._source.names())
        self._failbacks.resume()
        self._control.start()
        self._metrics.start()
        self._source.await_first_answers()
        self._notifier.ready(f"appliance of {self._home.config.host}, site {self._home.config.site}")
        log.info("appliance of %s (%s): ready", self._home.config.host, self._home.config.site)
        while not self._stopped.wait(SUPERVISE_SECONDS):
            self._supervise()
            self._notifier.alive()
        self._notifier.stopping()
        self._source.settle()  # while shippers can still ask us
        self._metrics.stop()
        self._watch.stop()
        self._control.stop()
        self._served.close()
        self._recovery.close()
        self._failbacks.close()
        self._source.close()
        self._host.close()

    def stop(self) -> None:
        self._stopped.set()

    def _supervise(self) -> None:
        try:
            self._supervise_children()
            self._recovery.supervise()
            self._source.refuse_superseded()
            self._handovers.look()
            self._watch.look_again()
            self._failbacks.look()
        except DrctlError as exc:
            log.warning("%s", exc.message)
        except Exception:  # the supervisor's edge: it must outlive any single thing it looks at
            log.exception("supervise")

    def _supervise_children(self) -> None:
        rings = str(self._home.run / "rings")
        self._processes.ensure("watchdog", "drctl.appliance.source.watchdog", [rings])
        self._receiver.ensure()
        self._expiry.sweep()

    def _handlers(self) -> dict[str, Handler]:
        source, recovery = self._source, self._recovery
        return {
            "appliance.info": lambda _params, _progress: self._info(),
            "appliance.metrics": self._metrics.answer,
            **CertificateService(self._home).handlers(),
            **open_runs(self._home).handlers(),
            **RunPictures(self._host, self._home.path).handlers(),
            "support.collect": lambda _params, _progress: {"files": collect(self._home)},
            "link.list": self._links.listed,
            "link.put": self._links.put,
            "link.limit": self._links.limit,
            "machine.list": lambda _params, _progress: machine_list(self._host),
            "group.put": self._group_put,
            "group.remove": self._group_remove,
            "group.list": self._group_list,
            "group.status": self._group_status,
            **self._recovery.fit.handlers(source.describe),
            **self._evacuations.handlers(),
            "replicate.start": self._evacuations.guarded(source.replicate_start),
            "replicate.pause": source.replicate_pause,
            "replicate.resume": self._evacuations.guarded(source.replicate_start),
            "replicate.stop": self._replicate_stop,
            "replicate.seed": self._seeds.take,
            "resync": source.resync,
            "source.verify": SourceVerification(source.protection).verify,
            "checkpoint.create": source.checkpoint_create,
            **self._stores.handlers(),
            "checkpoint.serve": self._served.serve,
            **recovery.handlers(),
            "failover.run": self._lifted(recovery.reigns.failover),
            "appliance.note": lambda _params, _progress: {},  # an installer's work; only history is written here
            "fence.note": lambda _params, _progress: {},  # the operator's machine fenced; only history is written here
            "switchover.run": self._lifted(recovery.reigns.switchover),
            "handover.plan": self._handovers.plan,
            "handover.run": self._handovers.run,
            "handover.undo": self._handovers.undo,
            "failback.plan": self._away.plan,
            "failback.protect": self._away.protect,
            "failback.disks": self._failbacks.disks,
            "failback.prepare": self._failbacks.prepare,
            "failback.sample": FailbackSample(self._home, self._host, self._processes).take,
            "group.picture": lambda params, _progress: self._pictures.take(str(params.get("group"))),
            "shipper.attest": source.attest,
            "shipper.order": source.order,
            "shipper.report": source.report,
        }

    def _info(self) -> dict[str, Any]:
        facts = appliance_info(self._home, self._host) | {"evacuation": self._evacuations.told()}
        return facts | {"findings": [*facts["findings"], *self._recovery.fit.findings()]}

    def _in_the_way(self) -> list[str]:
        """What forbids an evacuation of this host."""
        handovers = {name: self._handovers.told(name) for name in self._source.names()}
        return in_the_way(handovers, {name: self._recovery.recoveries(name) for name in self._stores.names()})

    # -- groups of either role --------------------------------------------------------------------------------------

    def _group_put(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        spec = spec_from(dict(params.get("spec") or {}))
        site = self._home.config.site
        if site == spec.source:
            return {"group": spec.name, "role": "source", "changed": self._source.put(spec)}
        if site == spec.recovery:
            return {"group": spec.name, "role": "recovery", "changed": self._stores.put(spec)}
        raise WrongPhase(f"{spec.name} goes from {spec.source} to {spec.recovery}; this appliance is of {site}")

    def _group_remove(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        name = str(params.get("group"))
        if self._roles.of(name) == SOURCE:
            left = name in self._stores.names()  # what the group had left here is history, and goes with it
            until = self._expiry.until(name) if left else None
            if left:
                self._expiry.keep(name, KEEP_SECONDS, "the group was deleted")  # first: its lock may refuse it
            try:
                self._source.remove(name)
            except DrctlError:
                if left and until is None:
                    self._expiry.forget(name)
                raise
            return {"group": name, "removed": True, "kept_until": None}
        return {"group": name, "removed": True, "kept_until": self._stores.remove(name)}

    def _lifted(self, handler: Handler) -> Handler:
        """While a group is brought to this host, nothing refuses its guests here."""

        def call(params: dict[str, Any], progress: Progress) -> Any:
            with self._source.lifted(str(params.get("group"))):
                return handler(params, progress)

        return call

    def _shown(self, group: str) -> Shown:
        if self._roles.of(group) == SOURCE:
            state = self._source.protection(group).state
            return Shown("source", state.phase.value, state.generation, state.spec.machines)
        summary = self._stores.summary(group)
        machines = tuple((summary.get("spec") or {}).get("machines") or ())
        return Shown("recovery", summary["mode"], summary["generation"], machines)

    def _replicate_stop(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        here = self._source if self._roles.of(str(params.get("group"))) == SOURCE else self._stores
        return here.replicate_stop(params, progress)

    def _group_list(self, params: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
        del progress
        sources, recoveries = self._roles.names(SOURCE), self._roles.names(RECOVERY)
        found = [{"group": name, "role": SOURCE, **self._source.summary(name)} for name in sources]
        found += [self._store_summary(name) for name in recoveries]
        return [row | self._told_status(row["group"]) for row in found] if params.get("status") else found

    def _told_status(self, name: str) -> dict[str, Any]:
        """For a listing with statuses; one that can't be told is asked for by itself, and says why."""
        try:
            return {"status": self._group_status({"group": name}, lambda _: None)}
        except DrctlError:
            return {}

    def _states(self) -> States:
        sources, stores = self._source.names(), self._stores.names()
        return group_states(
            [(name, self._source.summary(name)["phase"]) for name in sources],
            [(name, str(self._store_summary(name)["mode"])) for name in stores],
            [one for name in stores for one in self._recovery.recoveries(name)],
        )

    def _store_summary(self, name: str) -> dict[str, Any]:
        """A store that can't be opened must not hide the others; its `group.status` says what is wrong with it."""
        try:
            return {"group": name, "role": "recovery", **self._stores.summary(name)}
        except DrctlError as exc:
            log.warning("store %s: %s", name, exc.message)
            unknown = {"mode": "unreadable", "generation": 0, "spec": None}
            return {"group": name, "role": "recovery", **unknown, "problem": exc.message}

    def _group_status(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        del progress
        name = str(params.get("group"))
        more = {"failback": self._failbacks.told(name), "evacuated": self._evacuations.told(name)}
        if self._roles.of(name) == SOURCE:
            return self._source.status(name) | {"handover": self._handovers.told(name)} | more
        return self._stores.status(name) | more


def _connect(uri: str, stopped: threading.Event) -> LibvirtHypervisor:
    """The host's libvirt, waited for: the appliance may start before it."""
    while True:
        try:
            return LibvirtHypervisor(uri)
        except HostUnreachable as exc:
            log.warning("%s; trying again", exc.message)
            if stopped.wait(CONNECT_SECONDS):
                raise


def _made(home: Home, notifier: Notifier) -> Appliance | EsxAppliance:
    """The appliance of the host that the home's `uri` names."""
    if is_esx(home.config.uri):
        from drctl.appliance.esx.daemon import EsxAppliance  # paramiko is for these alone

        return EsxAppliance(home, notifier)
    return Appliance(home, notifier)


def main(home: Path) -> int:
    """Serve until SIGTERM. Raises DrctlError when it can't start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    loaded = configuration.load(home)
    if loaded.config.qemu_group:
        os.umask(0o007)  # overlays and sockets in directories of that group are for guests, too
    loaded.make_directories()
    notifier = Notifier()
    notifier.status(f"waiting for {loaded.config.uri}")
    # One supervisor per home: two would fight over the same mirrors.
    lock = atomic.acquire(home / "lock", wait=False, what="another appliance")
    try:
        appliance = _made(loaded, notifier)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: appliance.stop())
        appliance.serve()
    finally:
        os.close(lock)
    return 0


def _run() -> int:
    parser = argparse.ArgumentParser(prog="drctl.appliance.daemon")
    parser.add_argument("--home", type=Path, default=Path("/var/lib/drctl"))
    try:
        return main(parser.parse_args().home)
    except DrctlError as exc:
        log.error("%s%s", exc.message, f" ({exc.hint})" if exc.hint else "")
        return exc.exit_code


if __name__ == "__main__":
    sys.exit(_run())
