"""An ESX host: machines, their power and registration, questions, disks. Every change is looked at afterwards.

Methods block, any thread may call them; they raise HostUnreachable, NotFound, HypervisorRefused, UnsupportedFormat.
After HostUnreachable from a change its outcome is not known: the same call again finds out, and does nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from drctl.errors import DrctlError, HypervisorRefused, NotFound
from drctl.hypervisor.esx import answers, inventory, value
from drctl.hypervisor.esx.answers import Question
from drctl.hypervisor.esx.batch import Answer
from drctl.hypervisor.esx.inventory import EsxMachine, Inventory
from drctl.hypervisor.esx.session import Runner, Session
from drctl.model.machine import Machine, MachineState

_STATES = {
    "Powered on": MachineState.RUNNING,
    "Powered off": MachineState.SHUT_OFF,
    "Suspended": MachineState.PAUSED,
}
#: Between two looks at something that takes its time on the host.
POLL_SECONDS = 0.5
START_SECONDS = 120.0
ALTERED = "msg.uuid.altered"


class EsxHost:
    """One host by its shell."""

    def __init__(self, name: str, shell: Runner, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = name
        self.session = Session(name, shell)
        self._sleep = sleep

    # -- what there is ----------------------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        return inventory.gather(self.session)

    def version(self) -> str:
        """`VMware ESXi 8.0.3 Update 3 build-24022510`."""
        (text,) = self.session.ask(["esxcli", "system", "version", "get"])
        return describe(answers.version(text))

    def machines(self) -> Sequence[Machine]:
        return [one.machine for one in self.inventory().machines]

    def machine(self, name: str) -> Machine:
        """Raises NotFound."""
        return self.find(name).machine

    def find(self, name: str) -> EsxMachine:
        """By its name, or by the path of its .vmx. Raises NotFound; HypervisorRefused when two have the name."""
        every = self.inventory().machines
        found = [one for one in every if name in (one.name, one.vmx)]
        if not found:
            raise NotFound("machine", name, known=sorted(one.name for one in every))
        if len(found) > 1:
            paths = ", ".join(one.vmx for one in found)
            hint = "name it by its path"
            raise HypervisorRefused(f"{self.name}: two machines are named {name!r}: {paths}", hint=hint)
        return found[0]

    def state(self, name: str) -> MachineState:
        return self.power(self.find(name))

    def power(self, machine: EsxMachine) -> MachineState:
        (text,) = self.session.ask(["vim-cmd", "vmsvc/power.getstate", machine.id])
        return _STATES[answers.power(text)]

    def confirm(self, machine: EsxMachine, summary: Answer | None = None) -> None:
        """Make sure that the number is still this machine's: numbers are given anew. Raises NotFound.

        `summary` is what its get.summary answered, where that was asked already."""
        if summary is None:
            (summary,) = self.session.run(["vim-cmd", "vmsvc/get.summary", machine.id])
        told = value.struct(self.session.checked(summary).out, "vim.vm.Summary").text("config.vmPathName")
        file = machine.vmx.removeprefix(f"{inventory.VOLUMES}/").partition("/")[2]
        if not told.endswith(f"] {file}"):
            text = f"{self.name}: machine {machine.id} is {told} now, no more {machine.vmx}"
            raise NotFound("machine", machine.name, message=text)

    # -- power ------------------------------------------------------------------------------------------------------

    def start(self, machine: EsxMachine, *, copied: bool = False, timeout: float = START_SECONDS) -> None:
        """Power on; no error when it is on. The question of a moved machine is answered, any other is refused.

        power.on waits for questions, and tells failures that are none: the state afterwards counts."""
        if self.power(machine) is MachineState.RUNNING:
            return
        self.confirm(machine)
        command = ["vim-cmd", "vmsvc/power.on", machine.id]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.session.run, command, timeout=timeout + 60)
            try:
                self._attend(machine, running, copied, timeout)
            except BaseException:
                self._cancel(machine)
                raise
        if self.power(machine) is not MachineState.RUNNING:
            told = self.session.checked(running.result()[0]).told
            raise HypervisorRefused(f"{self.name}: {machine.name} does not start: {told}", machine=machine.name)

    def _attend(self, machine: EsxMachine, running: Future[list[Answer]], copied: bool, timeout: float) -> None:
        """Answer what the machine asks while it starts."""
        waited = 0.0
        while not running.done():
            asked = self.question(machine)
            if asked is not None:
                self.answer(machine, asked, _choice(asked, "copied" if copied else "moved", machine.name))
            if waited > timeout:
                raise HypervisorRefused(f"{self.name}: {machine.name} did not start within {timeout:.0f} s")
            self._sleep(POLL_SECONDS)
            waited += POLL_SECONDS

    def _cancel(self, machine: EsxMachine) -> None:
        """Let a start that waits for an unknown answer end, so that nothing is left behind."""
        with suppress(DrctlError):
            asked = self.question(machine)
            cancel = [number for number, text in asked.choices.items() if "cancel" in text.lower()] if asked else []
            if asked and cancel:
                self.answer(machine, asked, cancel[0])

    def stop(self, machine: EsxMachine) -> None:
        """Pull the plug; no error when it is off."""
        if self.power(machine) is MachineState.SHUT_OFF:
            return
        self.confirm(machine)
        (answer,) = self.session.run(["vim-cmd", "vmsvc/power.off", machine.id])
        if self.power(machine) is not MachineState.SHUT_OFF:
            told = self.session.checked(answer).told
            raise HypervisorRefused(f"{self.name}: {machine.name} does not power off: {told}", machine=machine.name)

    def shutdown(self, machine: EsxMachine) -> None:
        """Ask the guest to power off, which needs VMware Tools in it; returns at once."""
        if self.power(machine) is not MachineState.SHUT_OFF:
            self.confirm(machine)
            self.session.ask(["vim-cmd", "vmsvc/power.shutdown", machine.id])

    # -- questions --------------------------------------------------------------------------------------------------

    def question(self, machine: EsxMachine) -> Question | None:
        """What the machine waits for."""
        (text,) = self.session.ask(["vim-cmd", "vmsvc/message", machine.id])
        return answers.question(text)

    def answer(self, machine: EsxMachine, asked: Question, choice: int) -> None:
        self.session.ask(["vim-cmd", "vmsvc/message", machine.id, asked.id, str(choice)])

    # -- registration -----------------------------------------------------------------------------------------------

    def register(self, vmx: str) -> EsxMachine:
        """Let the host know a machine by the path (by UUID) of its .vmx; no error when it does."""
        if found := self._by_path(vmx):
            return found
        (answer,) = self.session.run(["vim-cmd", "solo/registervm", vmx])
        fault = value.fault(answer.out)
        if fault is not None and fault.kind.endswith("AlreadyExists") and fault.name.isdigit():
            # An invalid twin: it is in no list, and holds the path.
            self.session.ask(["vim-cmd", "vmsvc/unregister", fault.name])
            (answer,) = self.session.run(["vim-cmd", "solo/registervm", vmx])
        self.session.checked(answer)
        if found := self._by_path(vmx):
            return found
        raise HypervisorRefused(f"{self.name}: {vmx} is not listed after its registration", host=self.name)

    def _by_path(self, vmx: str) -> EsxMachine | None:
        return next((one for one in self.inventory().machines if one.vmx == vmx), None)

    def unregister(self, machine: EsxMachine) -> None:
        """Let the host forget the machine; its files stay. No error when it has."""
        if self._by_path(machine.vmx) is not None:
            self.confirm(machine)
            self.session.ask(["vim-cmd", "vmsvc/unregister", machine.id])

    def reload(self, machine: EsxMachine) -> None:
        """Let the host read the .vmx again; the machine has to be off."""
        self.session.ask(["vim-cmd", "vmsvc/reload", machine.id])


def describe(facts: Mapping[str, str]) -> str:
    """A host's version in one line."""
    build = facts.get("Build", "").removeprefix("Releasebuild-")
    update = facts.get("Update", "0")
    return f"{facts['Product']} {facts['Version']}{f' Update {update}' if update != '0' else ''} build-{build}"


def _choice(asked: Question, word: str, name: str) -> int:
    """The number of `I moved it` or `I copied it`: numbers differ, so the words are looked for."""
    found = [number for number, text in asked.choices.items() if asked.key == ALTERED and word in text]
    if len(found) == 1:
        return found[0]
    choices = "; ".join(f"{number} {text}" for number, text in asked.choices.items())
    raise HypervisorRefused(
        f"{name} asks what we don't answer: {asked.key or asked.text[:80]} ({choices})",
        hint="answer it there: vim-cmd vmsvc/message",
        machine=name,
    )
