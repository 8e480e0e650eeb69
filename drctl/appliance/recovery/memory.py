"""A recovery host in memory: stores, overlays, views and a hypervisor that tests can break and kill at any effect.

Its state outlives the supervisor that acts on it, as a real host's does."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drctl.appliance.recovery.memory_parts import MemoryClock, MemoryDefinitions, MemorySources
from drctl.appliance.recovery.ports import Recoverable, RecoverableMachine, Room, Told, Tools
from drctl.appliance.recovery.state import RecoveryRecord
from drctl.errors import HypervisorRefused, NotFound, StepFailed
from drctl.model.checkpoint import Checkpoint, CheckpointKind, resolve
from drctl.model.extent import GiB, MiB
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.machine import Machine, MachineState
from drctl.model.ports import BlockProgress


class Killed(BaseException):
    """The supervisor died here. Not an Exception, so that no handler of the code under test survives it."""


@dataclass(slots=True)
class Effects:
    """Counts what is done to the world; dies before effect `die_before` or after effect `die_after` (from 1)."""

    count: int = 0
    die_before: int = 0
    die_after: int = 0
    log: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def effect(self, what: str) -> Iterator[None]:
        self.count += 1
        if self.count == self.die_before:
            raise Killed(what)
        yield
        self.log.append(what)
        if self.count == self.die_after:
            raise Killed(what)


@dataclass(slots=True)
class Domain:
    definition: str
    persistent: bool
    state: MachineState = MachineState.SHUT_OFF
    by_error: bool = False


class MemoryHypervisor:
    """Domains by name. A definition is `name=NAME;uuid=UUID;` and the overlays it stands on."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self.domains: dict[str, Domain] = {}
        self.refuse: dict[str, str] = {}
        self.pulls: dict[tuple[str, str], int] = {}

    def version(self) -> str:
        return "memory"

    def machines(self) -> Sequence[Machine]:
        return [self.machine(name) for name in self.domains]

    def machine(self, name: str) -> Machine:
        domain = self._domain(name)
        return Machine(name, domain.definition.split("uuid=")[1].split(";")[0], domain.state, ())

    def definition(self, name: str) -> str:
        return self._domain(name).definition

    def create(self, definition: str, *, paused: bool = False) -> None:
        name = _name(definition)
        with self._world.effects.effect(f"create {name}"):
            self._may(name)
            if name in self.domains:
                raise HypervisorRefused(f"{name} exists")
            state = MachineState.PAUSED if paused else MachineState.RUNNING
            self.domains[name] = Domain(definition, persistent=False, state=state)

    def define(self, definition: str) -> None:
        name = _name(definition)
        with self._world.effects.effect(f"define {name}"):
            if name in self.domains:
                self.domains[name].definition = definition
            else:
                self.domains[name] = Domain(definition, persistent=True)

    def undefine(self, name: str) -> None:
        with self._world.effects.effect(f"undefine {name}"):
            self._domain(name)
            del self.domains[name]

    def start(self, name: str) -> None:
        with self._world.effects.effect(f"start {name}"):
            self._may(name)
            if self._domain(name).state in (MachineState.RUNNING, MachineState.PAUSED):
                raise HypervisorRefused(f"{name} runs already")
            self._domain(name).state = MachineState.RUNNING

    def shutdown(self, name: str) -> None:
        self.destroy(name)

    def destroy(self, name: str) -> None:
        with self._world.effects.effect(f"destroy {name}"):
            domain = self.domains.get(name)
            if domain is not None and domain.persistent:
                domain.state = MachineState.SHUT_OFF
            else:
                self.domains.pop(name, None)

    def resume(self, name: str) -> None:
        with self._world.effects.effect(f"resume {name}"):
            domain = self._domain(name)
            if domain.by_error and not self._world.views_alive():
                return
            domain.state, domain.by_error = MachineState.RUNNING, False

    def state(self, name: str) -> MachineState:
        return self._domain(name).state

    def watch(self, callback: Callable[[str, str], None]) -> None:
        del callback

    def close(self) -> None:
        pass

    def suspend(self, name: str) -> None:
        self._domain(name).state = MachineState.PAUSED

    def set_autostart(self, name: str, on: bool) -> None:
        with self._world.effects.effect(f"autostart {name} {on}"):
            self._domain(name)

    def live_definition(self, name: str) -> str:
        return self.definition(name)

    def capabilities(self) -> str:
        return "<capabilities/>"

    def monitor(self, name: str, sent: dict[str, Any]) -> Any:
        domain = self._domain(name)
        if sent["execute"] != "query-status":
            raise HypervisorRefused(f"{sent['execute']} is unknown here")
        return {"status": "io-error" if domain.by_error else domain.state.value}

    def agent(self, name: str, sent: dict[str, Any], *, timeout_seconds: int = 5) -> Any:
        raise HypervisorRefused(f"{name} has no agent")

    def source_node(self, name: str, target: str) -> str:
        return f"{name}-{target}"

    def block_pull(self, name: str, target: str, *, bytes_per_second: int = 0) -> None:
        with self._world.effects.effect(f"pull {name}.{target}"):
            if self._domain(name).state is not MachineState.RUNNING:
                raise HypervisorRefused(f"{name} does not run")
            if (name, target) in self.pulls:
                raise HypervisorRefused(f"{name}.{target} has a job already")
            self.pulls[name, target] = 0

    def block_progress(self, name: str, target: str) -> BlockProgress | None:
        """Each look finds a third more of it done."""
        done = self.pulls.get((name, target))
        if done is None:
            return None
        self.pulls[name, target] = done = done + 1
        if done < 3:
            return BlockProgress(done, 3)
        del self.pulls[name, target]
        overlay = next(path for path in self._world.images.files if f"{name}.{target}" in path)
        self._world.images.files[overlay] = None
        return None

    def block_abort(self, name: str, target: str) -> None:
        self.pulls.pop((name, target), None)

    def _may(self, name: str) -> None:
        if name in self.refuse:
            raise HypervisorRefused(self.refuse[name])

    def _domain(self, name: str) -> Domain:
        try:
            return self.domains[name]
        except KeyError:
            raise NotFound("machine", name) from None


def _name(definition: str) -> str:
    return definition.split("name=")[1].split(";")[0]


class MemoryStores:
    """One group of two machines, three disks, and some checkpoints a second apart."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self.reign_of: dict[str, int] = {"erp": 1}
        self.failed_over: set[str] = set()
        self.pins: dict[str, int] = {}
        self.listed = [Checkpoint(n, 999_990.0 + n, CheckpointKind.CRASH, "0" * 32, 1, n * 10) for n in range(1, 4)]

    def groups(self) -> list[str]:
        return sorted(self.reign_of)

    def choose(self, group: str, selector: str, now: float) -> Checkpoint:
        self.generation(group)
        return resolve(selector, self.listed, now)

    def recoverable(self, group: str, checkpoint: int) -> Recoverable:
        self.generation(group)
        if checkpoint not in [c.number for c in self.listed]:
            raise NotFound("checkpoint", f"#{checkpoint}")
        disks = [GroupDisk(1, "db", "vda", MiB), GroupDisk(2, "db", "vdb", MiB), GroupDisk(3, "web", "vda", MiB)]
        machines = [
            RecoverableMachine(name, f"uuid-{name}", f"source of {name}", tuple(d for d in disks if d.machine == name))
            for name in ("db", "web")
        ]
        return Recoverable(GroupSpec(group, "alpha", "beta", ("db", "web")), tuple(machines), "alpha", "a1")

    def newest(self, group: str) -> Recoverable | None:
        return self.recoverable(group, self.listed[0].number)

    def generation(self, group: str) -> int:
        try:
            return self.reign_of[group]
        except KeyError:
            raise NotFound("group", group) from None

    def reign(self, group: str, generation: int) -> None:
        with self._world.effects.effect(f"reign {group} {generation}"):
            self.reign_of[group] = max(self.reign_of[group], generation)
            self.failed_over.add(group)

    def give_back(self, group: str, generation: int) -> None:
        with self._world.effects.effect(f"give back {group} {generation}"):
            self.reign_of[group] = max(self.reign_of[group], generation)
            self.failed_over.discard(group)

    def pin(self, group: str, pin: str, checkpoint: int, epoch: str) -> None:
        with self._world.effects.effect(f"pin {checkpoint}"):
            self.pins[pin] = checkpoint

    def unpin(self, group: str, pin: str) -> None:
        with self._world.effects.effect("unpin"):
            self.pins.pop(pin, None)

    def allocated(self, group: str, checkpoint: int) -> Mapping[str, int]:
        return {"db.vda": MiB // 2, "db.vdb": 0, "web.vda": MiB // 4}


class MemoryImages:
    """Overlays: path to what backs them."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self.files: dict[str, str | None] = {}
        self.sizes: dict[str, int] = {}
        self.space = 100 * GiB

    def exists(self, path: Path) -> bool:
        return str(path) in self.files

    copies = False

    def create(self, path: Path, backing: str, size: int, told: Told) -> None:
        with self._world.effects.effect(f"overlay {path.name}"):
            if not self._world.views_alive():
                raise StepFailed("the backing file does not answer")
            self.files[str(path)] = backing

    def put(self, path: Path, data: bytes) -> None:
        with self._world.effects.effect(f"put {path.name}"):
            self.files[str(path)] = None
            self.sizes[str(path)] = len(data)

    def backing(self, path: Path) -> str | None:
        return self.files[str(path)]

    def localize(self, path: Path) -> None:
        with self._world.effects.effect(f"localize {path.name}"):
            self.files[str(path)] = None

    def allocated(self, path: Path) -> int:
        return self.sizes.get(str(path), 0)

    def remove(self, path: Path) -> None:
        with self._world.effects.effect(f"remove {path.name}"):
            self.files.pop(str(path), None)

    def free(self, directory: Path) -> int:
        return self.space


class MemoryViews:
    """View servers by recovery; `refuse` makes them fail to start."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self.running: set[str] = set()
        self.refuse = False

    def ensure(self, recovery: RecoveryRecord) -> bool:
        if recovery.id in self.running:
            return False
        with self._world.effects.effect("view"):
            if self.refuse:
                raise StepFailed("the view server ended at once")
            self.running.add(recovery.id)
        return True

    def alive(self, recovery: RecoveryRecord) -> bool:
        return recovery.id in self.running

    def end(self, recovery: RecoveryRecord) -> None:
        with self._world.effects.effect("end view"):
            self.running.discard(recovery.id)

    def socket(self, recovery: RecoveryRecord) -> str:
        return f"/run/views/{recovery.id}.sock"

    def backing(self, recovery: RecoveryRecord, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.socket(recovery)}"

    def close(self) -> None:
        pass


class MemoryAddresses:
    """Reservations of a network `lan`: MAC address to IP address."""

    def __init__(self, world: MemoryWorld) -> None:
        self._world = world
        self.given: dict[str, str] = {}
        self.lasting: set[str] = set()

    def reserved(self, network: str, mac: str) -> str:
        return self.given.get(mac, "")

    def reserve(self, network: str, mac: str, ip: str, *, lasting: bool) -> None:
        with self._world.effects.effect(f"reserve {ip}"):
            self.given[mac] = ip
            if lasting:
                self.lasting.add(mac)

    def release(self, network: str, mac: str, ip: str) -> None:
        with self._world.effects.effect(f"release {ip}"):
            if self.given.get(mac) == ip:
                del self.given[mac]


class MemoryWorld:
    """A recovery host with all that stands on it."""

    def __init__(self) -> None:
        self.effects = Effects()
        self.clock = MemoryClock()
        self.hypervisor = MemoryHypervisor(self)
        self.stores = MemoryStores(self)
        self.sources = MemorySources()
        self.images = MemoryImages(self)
        self.views = MemoryViews(self)
        self.addresses = MemoryAddresses(self)
        self._uuids = itertools.count(1)

    def views_alive(self) -> bool:
        return bool(self.views.running)

    def tools(self) -> Tools:
        return Tools(
            hypervisor=self.hypervisor,
            stores=self.stores,
            images=self.images,
            views=self.views,
            sources=self.sources,
            definitions=MemoryDefinitions(),
            addresses=self.addresses,
            clock=self.clock,
            room=Room(Path("/home/scratch"), Path("/home/images"), GiB),
            sleep=self.clock.sleep,
            new_uuid=lambda: f"uuid-test-{next(self._uuids)}",
        )
