"""What an ESX host that no appliance serves tells the command line: as one would, but read over SSH from here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from drctl.cli.inventory import ESX_METHODS
from drctl.errors import Refused
from drctl.hypervisor.esx.findings import examine
from drctl.hypervisor.esx.host import EsxHost, describe

if TYPE_CHECKING:
    from drctl.hypervisor.esx.inventory import EsxMachine
    from drctl.hypervisor.esx.session import Runner


NOT_SERVED = "no appliance serves its host"


class EsxClient:
    """A ClientLike of one ESX host. vim-cmd is slow: a caller's limit of a few seconds is not kept to."""

    def __init__(self, name: str, address: str, shell: Runner) -> None:
        self._address = address
        self._host = EsxHost(name, shell)

    def call(
        self, method: str, params: dict[str, Any] | None = None, *, on_progress: object = None, timeout: object = None
    ) -> Any:
        """Raises DrctlError; Refused for what needs an appliance."""
        del params, on_progress, timeout
        if method not in ESX_METHODS:
            raise Refused(
                f"{self._host.name}: {method} needs an appliance, and none serves this ESX host",
                hint="name it in drctl.toml: appliance = ...; it can be looked at: drctl host list, vm list, doctor",
            )
        inventory = self._host.inventory()
        if method == "machine.list":
            return [_as_json(one) for one in inventory.machines]
        return {
            "state": "none",
            "uri": f"esx://{self._address}",
            "versions": {"hypervisor": describe(inventory.version)},
            "space": {
                store.name: {"path": f"/vmfs/volumes/{store.name}", "total": store.size, "free": store.free}
                for store in inventory.datastores
            },
            "findings": list(examine(inventory)),
        }


def _as_json(machine: EsxMachine) -> dict[str, Any]:
    """As an appliance tells a machine. Without one no disk can be replicated: it says so."""
    told = asdict(machine.machine)
    return told | {"disks": [disk | {"refusal": disk["refusal"] or NOT_SERVED} for disk in told["disks"]]}
