"""The appliance of an ESX host, which it reaches by SSH: on a machine there, or any other near it."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import Home
from drctl.appliance.control import ControlServer, Handler
from drctl.appliance.esx import address as esx_address
from drctl.appliance.esx.groups import EsxGroups
from drctl.appliance.esx.guests import TOLD_SECONDS, EsxGuests
from drctl.appliance.esx.recovery_side import RecoverySide
from drctl.appliance.esx.service import EsxService
from drctl.appliance.history import History
from drctl.appliance.info import appliance_info, machine_list
from drctl.appliance.lease import Leases
from drctl.appliance.metrics_service import MetricsService
from drctl.appliance.notify import Notifier
from drctl.appliance.picture import Pictures
from drctl.appliance.process import Processes
from drctl.appliance.run_service import open_runs
from drctl.appliance.source.link_service import LinkService
from drctl.appliance.state_watch import StateWatch
from drctl.appliance.support import collect
from drctl.errors import DrctlError
from drctl.hypervisor.esx.findings import examine, finding
from drctl.hypervisor.esx.host import EsxHost
from drctl.hypervisor.esx.session import Runner
from drctl.hypervisor.shell import Shell
from drctl.model.hook import Hook

log = logging.getLogger(__name__)

#: Between two looks at what is told to others.
SUPERVISE_SECONDS = 0.5


class EsxAppliance:
    """All that an ESX host's appliance does. `serve` returns after `stop`."""

    def __init__(self, home: Home, notifier: Notifier, runner: Runner | None = None) -> None:
        """`runner` in place of SSH. Raises ConfigInvalid. The host need not be there yet."""
        self._home = home
        self._notifier = notifier
        self._stopped = threading.Event()
        address = esx_address.parse(home.config.uri)
        self._shell = Shell(address.login)
        self._guests = EsxGuests(EsxHost(home.config.host, runner or self._shell), address.domain)
        processes = Processes(home.run / "pids", home.logs)
        self._source = EsxService(home, self._guests, processes)
        self._links = LinkService(home, self._source.protections)
        self._side = RecoverySide(home, self._guests, processes, address.datastore)
        self._groups = EsxGroups(home, self._source, self._side)
        pictures = Pictures(home.config.site, home.config.host, self._guests, self._groups.shown)
        self._metrics = MetricsService(self._info, self._groups.sources, self._groups.recoveries, home.config.metrics)
        hook = Hook(home.config.notify, home.config.notify_timeout, str(home.path))
        self._watch = StateWatch(hook, (home.config.site, home.config.host), self._groups.states)
        history = History(home.path / "history.jsonl", pictures.take_quietly)
        handlers = self._handlers(pictures)
        self._control = ControlServer(home.control, history.watch(Leases(home.store).watch(handlers)))

    def serve(self) -> None:
        # Shippers that an appliance before us has started report to this socket.
        self._side.start()
        self._control.start()
        self._source.start()
        self._metrics.start()
        threading.Thread(target=self._look_ahead, name="look", daemon=True).start()
        threading.Thread(target=self._attend, name="recoveries", daemon=True).start()
        self._notifier.ready(f"appliance of ESX host {self._home.config.host}, site {self._home.config.site}")
        log.info("appliance of ESX host %s (%s): ready", self._home.config.host, self._home.config.site)
        while not self._stopped.wait(SUPERVISE_SECONDS):
            try:
                self._watch.look_again()
            except DrctlError as exc:
                log.warning("%s", exc.message)
            self._notifier.alive()
        self._notifier.stopping()
        self._metrics.stop()
        self._watch.stop()
        self._side.close()
        self._source.close()
        self._control.stop()
        self._shell.close()

    def stop(self) -> None:
        self._stopped.set()

    def _attend(self) -> None:
        """The recoveries; apart from the rest, since a look may have to wait for the host."""
        while not self._stopped.wait(SUPERVISE_SECONDS):
            try:
                self._side.supervise()
            except DrctlError as exc:
                log.warning("%s", exc.message)

    def _look_ahead(self) -> None:
        """So that who asks what the host is like need not wait for it."""
        while not self._stopped.is_set():
            with suppress(DrctlError):
                self._guests.inventory(TOLD_SECONDS / 2)
            self._stopped.wait(TOLD_SECONDS / 4)

    def _handlers(self, pictures: Pictures) -> dict[str, Handler]:
        return {
            "appliance.info": lambda _params, _progress: self._info(),
            "appliance.metrics": self._metrics.answer,
            "appliance.note": lambda _params, _progress: {},  # only history is written here
            **CertificateService(self._home).handlers(),
            "support.collect": lambda _params, _progress: {"files": collect(self._home)},
            "link.list": self._links.listed,
            "link.put": self._links.put,
            "link.limit": self._links.limit,
            "machine.list": lambda _params, _progress: machine_list(self._guests),
            "group.picture": lambda params, _progress: pictures.take(str(params.get("group"))),
            **open_runs(self._home).handlers(),
            **self._source.handlers(),
            **self._side.handlers(),
            **self._groups.handlers(),
        }

    def _info(self) -> dict[str, Any]:
        info = appliance_info(self._home, self._guests)
        # Nothing of a guest can be asked by SSH; and this machine's memory says nothing of the host's.
        info["capabilities"] |= dict.fromkeys(("guest-agent", "console", "re-ip"), False)
        info["memory"] = None
        info["findings"] += self._side.findings()
        try:
            info["findings"] += examine(self._guests.inventory(TOLD_SECONDS))
            info["findings"] += [finding("info", *each) for each in self._source.remarks()]
        except DrctlError as exc:
            info["findings"] += [finding("error", "host", exc.message, exc.hint)]
        return info
