"""The appliance of an ESX host, which it reaches by SSH: on a machine there, or any other near it. A source only."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

from drctl.appliance.certificate_service import CertificateService
from drctl.appliance.config import Home
from drctl.appliance.control import ControlServer, Handler
from drctl.appliance.esx import address as esx_address
from drctl.appliance.esx.guests import TOLD_SECONDS, EsxGuests
from drctl.appliance.esx.service import EsxService, status
from drctl.appliance.history import History
from drctl.appliance.info import appliance_info, machine_list
from drctl.appliance.lease import Leases
from drctl.appliance.metrics_service import MetricsService
from drctl.appliance.notify import Notifier
from drctl.appliance.picture import Pictures, Shown
from drctl.appliance.process import Processes
from drctl.appliance.roles import RoleView
from drctl.appliance.source.link_service import LinkService
from drctl.appliance.state_watch import States, StateWatch, group_states
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
        self._source = EsxService(home, self._guests, Processes(home.run / "pids", home.logs))
        self._links = LinkService(home, self._source.protections)
        pictures = Pictures(home.config.site, home.config.host, self._guests, self._shown)
        sources = RoleView(self._source.names, lambda name: status(self._source.protection({"group": name})))
        nothing = RoleView(list, lambda _name: {})
        self._metrics = MetricsService(self._info, sources, nothing, home.config.metrics)
        hook = Hook(home.config.notify, home.config.notify_timeout, str(home.path))
        self._watch = StateWatch(hook, (home.config.site, home.config.host), self._states)
        history = History(home.path / "history.jsonl", pictures.take_quietly)
        handlers = self._handlers(pictures)
        self._control = ControlServer(home.control, history.watch(Leases(home.store).watch(handlers)))

    def serve(self) -> None:
        # Shippers that an appliance before us has started report to this socket.
        self._control.start()
        self._source.start()
        self._metrics.start()
        threading.Thread(target=self._look_ahead, name="look", daemon=True).start()
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
        self._source.close()
        self._control.stop()
        self._shell.close()

    def stop(self) -> None:
        self._stopped.set()

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
            **self._source.handlers(),
        }

    def _info(self) -> dict[str, Any]:
        info = appliance_info(self._home, self._guests)
        try:
            info["findings"] += examine(self._guests.inventory(TOLD_SECONDS))
            info["findings"] += [finding("info", *each) for each in self._source.remarks()]
        except DrctlError as exc:
            info["findings"] += [finding("error", "host", exc.message, exc.hint)]
        return info

    def _shown(self, group: str) -> Shown:
        state = self._source.protection({"group": group}).state
        return Shown("source", state.phase.value, state.generation, state.spec.machines)

    def _states(self) -> States:
        return group_states(
            [(one.state.spec.name, one.state.phase.value) for one in self._source.protections()], [], []
        )
