"""Many commands in one round trip: a script for the host's shell, and its output taken apart again. Pure.

Each command's words on stdout and stderr stand between marks with a token that nothing on the host can know; a mark
that is missing means that the output was cut, and nothing of it is believed. The only place that quotes for a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from drctl.errors import HostUnreachable
from drctl.model.extent import SECTOR, Extent, MiB

Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one command said, and its exit code."""

    command: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """Its last words."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


def script(commands: Sequence[Command], token: str) -> bytes:
    """A script for `sh -s`. No command reads the script's own input."""
    lines = []
    for number, command in enumerate(commands):
        mark = f"printf '\\n{token} {number}\\n'"
        lines += [f"{mark}; {mark} >&2", f"{shlex.join(command)} </dev/null", f"printf '\\n{token} = %s\\n' $?"]
    lines.append(f"printf '{token} done\\n'; printf '\\n{token} done\\n' >&2")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def parse(commands: Sequence[Command], token: str, out: bytes, err: bytes) -> list[Answer]:
    """The answers in the order of the commands. Raises HostUnreachable when the output is not whole."""
    said = _split(out, rf"\n?{token} (?:= )?(\d+|done)\n")
    told = _split(err, rf"\n{token} (\d+|done)\n")
    count = len(commands)
    begun = [mark for mark, _ in said[0::2]]
    ordered = [*map(str, range(count)), "done"]
    if begun != ordered or [mark for mark, _ in told] != ordered or len(said) != 2 * count + 1:
        hint = "whether the commands were carried out is not known: look"
        raise HostUnreachable("the host's output was cut", hint=hint)
    return [
        Answer(tuple(command), int(said[2 * n + 1][0]), said[2 * n][1], told[n][1])
        for n, command in enumerate(commands)
    ]


def _split(data: bytes, mark: str) -> list[tuple[str, str]]:
    """Each mark with the text after it."""
    parts = re.split(mark, data.decode("utf-8", "surrogateescape"))
    return list(zip(parts[1::2], parts[2::2], strict=True))


def worker(command: Command, product: str, log: str) -> Command:
    """A command that begins another one that no lost connection ends, unless it is under way or its product is there.

    It writes into `log`, whose making is the lock, and its exit code into `log`.code at its end."""
    made, place, code = shlex.quote(product), shlex.quote(log), shlex.quote(f"{log}.code")
    inner = f"{shlex.join(command)} >>{place} 2>&1; echo $? >{code}"
    begin = f"setsid sh -c {shlex.quote(inner)} </dev/null >/dev/null 2>&1 &"
    there = f"if [ -e {made} ] && [ ! -e {place} ]; then : >{place}; echo 0 >{code}"
    return ["sh", "-c", f"set -C; {there}; elif true 2>/dev/null >{place}; then set +C; {begin} fi; true"]


def appending(path: str, at: int) -> Command:
    """A command that puts its stdin behind a file's first `at` bytes, and does nothing when it has another length."""
    place = shlex.quote(path)
    there = f'[ -e {place} ] || : >{place}; [ "$(stat -c %s {place})" = {at} ]'
    return ["sh", "-c", f"{there} || {{ echo 'it has another length' >&2; exit 1; }}; cat >>{place}"]


def reading(path: str, ranges: Sequence[Extent]) -> bytes:
    """A script that writes ranges of a file, one after the other, to stdout, and ends with 1 when one can't be read.

    busybox's dd counts in blocks: the largest is taken that divides both ends of a range."""
    lines = []
    for one in ranges:
        block = MiB
        while one.offset % block or one.length % block:
            block //= 2
        if block < SECTOR:
            raise ValueError(f"{one} is not of whole sectors")
        words = ["dd", f"if={path}", f"bs={block}", f"skip={one.offset // block}", f"count={one.length // block}"]
        lines.append(f"{shlex.join(words)} 2>/dev/null </dev/null || {{ {shlex.join(words[:2])} count=0; exit 1; }}")
    return ("\n".join(lines) + "\nexit 0\n").encode("utf-8", "surrogateescape")
