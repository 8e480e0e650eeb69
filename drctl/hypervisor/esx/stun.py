"""How long machines stood still for snapshots, by their own logs.

A machine's `vmware.log` has a line for each such moment, since 5.0 (KB 1002836, KB 2039754, virten.net 2015/10):

    2015-10-27T22:01:42.149Z| vcpu-0| I120: Checkpoint_Unstun: vm stopped for 188405 us"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from drctl.hypervisor.esx.batch import Command
from drctl.hypervisor.esx.inventory import EsxMachine
from drctl.hypervisor.esx.session import Session

_LINE = re.compile(r"Checkpoint_Unstun: vm stopped for (\d+) us\s*$")
#: A cycle makes two or three of them.
_LINES = 20


class Stuns:
    """What the logs have told so far. One thread uses it."""

    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def look(self, session: Session, machines: Sequence[EsxMachine]) -> dict[str, float]:
        """Seconds of the longest stop of each machine since the last look, by its name, in one round trip.

        Of a machine that is looked at for the first time nothing is told. Raises HostUnreachable."""
        found = {}
        told = session.run(*(_lines(machine) for machine in machines)) if machines else []
        for machine, answer in zip(machines, told, strict=True):
            lines = answer.out.splitlines()
            last = self._last.get(machine.vmx)
            new = lines[lines.index(last) + 1 :] if last in lines else lines if last == "" else []
            self._last[machine.vmx] = lines[-1] if lines else ""
            if stops := [int(match[1]) / 1e6 for line in new if (match := _LINE.search(line))]:
                found[machine.name] = max(stops)
        return found


def _lines(machine: EsxMachine) -> Command:
    log = posixpath.join(posixpath.dirname(machine.vmx), "vmware.log")
    return ["sh", "-c", f'grep Checkpoint_Unstun: "$1" | tail -n {_LINES}', "sh", log]
