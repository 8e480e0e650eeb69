"""One ESX host's shell: batches of commands there, and what goes wrong with them as errors of ours.

Exit codes prove little on ESXi, and a lost connection proves nothing: whoever changes something looks afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NoReturn, Protocol

from drctl.errors import HostUnreachable, HypervisorRefused, NotFound, OutOfSpace
from drctl.hypervisor.esx import batch, value
from drctl.hypervisor.esx.batch import Answer, Command
from drctl.model.extent import SECTOR, Extent

#: vim-cmd on a busy host takes seconds; a batch over hundreds of machines more.
TIMEOUT = 120.0
#: What vim-cmd says instead of an answer when the host's daemon is sick.
_SICK = ("Failed to login:", "Connect to localhost failed", "terminate called after throwing", "Killed")


class Ran(Protocol):
    """A command that ended, as Shell tells it."""

    @property
    def code(self) -> int: ...
    @property
    def out(self) -> bytes: ...
    @property
    def err(self) -> bytes: ...


class Runner(Protocol):
    """What a session needs of a Shell."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Ran: ...


class Session:
    """Commands on one host. Any thread may use it."""

    def __init__(self, name: str, shell: Runner, token: Callable[[], str] = lambda: secrets.token_hex(16)) -> None:
        self.name = name
        self._shell = shell
        self._token = token

    def run(self, *commands: Command, timeout: float = TIMEOUT) -> list[Answer]:
        """All of them, one after the other, in one round trip; each whatever became of those before.

        Raises HostUnreachable: whether they were carried out is then not known."""
        token = self._token()
        done = self._shell.run(["sh", "-s"], stdin=batch.script(commands, token), timeout=timeout)
        return batch.parse(commands, token, done.out, done.err)

    def ask(self, *commands: Command, timeout: float = TIMEOUT) -> list[str]:
        """As run; what each said on stdout. Raises HypervisorRefused or NotFound when one of them failed."""
        return [self.checked(answer).out for answer in self.run(*commands, timeout=timeout)]

    def checked(self, answer: Answer) -> Answer:
        """The answer, if it is none of a fault. Raises NotFound, HypervisorRefused."""
        program = answer.command[0] + (f" {answer.command[1]}" if len(answer.command) > 1 else "")
        if found := value.fault(answer.out) or value.fault(answer.err):
            self._raise(program, found)
        if any(answer.out.lstrip().startswith(word) for word in _SICK):
            hint = "its daemon hostd is sick: services.sh restart there, when no task runs"
            raise HypervisorRefused(f"{self.name}: {program}: {answer.told}", hint=hint, host=self.name)
        if answer.code:
            raise HypervisorRefused(f"{self.name}: {program}: {answer.told}", host=self.name)
        return answer

    def size(self, path: str) -> int:
        """Bytes of a file. Raises HypervisorRefused when there is none."""
        (text,) = self.ask(["stat", "-c", "%s", path])
        return int(text)

    def fetch(self, path: str, ranges: Sequence[Extent]) -> list[bytes]:
        """The bytes of a file at these ranges, in one round trip; the last may end with the file.

        Raises HypervisorRefused when the host does not let them be read, HostUnreachable when they are not whole."""
        if not ranges:
            return []
        whole = [_sectors(one) for one in ranges]
        done = self._shell.run(["sh", "-s"], stdin=batch.reading(path, whole), timeout=TIMEOUT)
        if done.code > 0:
            told = done.err.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise HypervisorRefused(f"{self.name}: {path} can't be read: {told}", host=self.name)
        starts = list(accumulate((one.length for one in whole), initial=0))
        if done.code < 0 or not starts[-2] <= len(done.out) <= starts[-1]:
            raise HostUnreachable(f"{self.name}: {path} was not read whole", host=self.name)
        begins = [start + one.offset - full.offset for start, one, full in zip(starts, ranges, whole, strict=False)]
        return [done.out[begin : begin + one.length] for begin, one in zip(begins, ranges, strict=True)]

    def send(self, command: Command, data: bytes, timeout: float = TIMEOUT) -> None:
        """One command with these bytes on its stdin.

        Raises OutOfSpace, HypervisorRefused; HostUnreachable: how much of them it took is not known."""
        done = self._shell.run(command, stdin=data, timeout=timeout)
        if done.code < 0:
            raise HostUnreachable(f"{self.name}: {command[0]} was ended", host=self.name)
        if done.code:
            told = (done.err or done.out).decode("utf-8", "replace").strip().rpartition("\n")[2]
            error = OutOfSpace if "No space left" in told else HypervisorRefused
            raise error(f"{self.name}: {command[0]}: {told or f'exit code {done.code}'}", host=self.name)

    def _raise(self, program: str, fault: value.Fault) -> NoReturn:
        kind = fault.kind.rpartition(".")[2]
        text = f"{self.name}: {program}: {fault.message or kind}"
        if kind in ("NotFound", "ManagedObjectNotFound"):
            raise NotFound("object", program, message=text)
        raise HypervisorRefused(f"{text} ({kind})", host=self.name, fault=kind, object=fault.name)


def _sectors(extent: Extent) -> Extent:
    """The whole sectors that a range lies in."""
    begin, end = extent.offset // SECTOR * SECTOR, -(-extent.end // SECTOR) * SECTOR
    return Extent(begin, end - begin)
