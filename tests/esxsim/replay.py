"""A host that answers from a capture (`drctl esx capture`): what a real one said, said again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Any

from drctl.hypervisor.shell import Done


class Replay:
    """A shell whose host knows the captured commands, and nothing else."""

    def __init__(self, document: dict[str, Any]) -> None:
        assert document["format"] == 1
        self._files: dict[str, str] = document["files"]
        self._answers = {tuple(one["command"]): one for one in document["answers"]}

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Done:
        assert argv == ["sh", "-s"]
        lines = stdin.decode("utf-8", "surrogateescape").split("\n")
        token = re.match(r"printf '\\n(\w+) 0", lines[0])
        assert token
        commands = [shlex.split(line.removesuffix(" </dev/null")) for line in lines if line.endswith(" </dev/null")]
        out = err = ""
        for number, command in enumerate(commands):
            code, said, told = self._answer(command)
            out += f"\n{token[1]} {number}\n{said}\n{token[1]} = {code}\n"
            err += f"\n{token[1]} {number}\n{told}"
        out, err = f"{out}{token[1]} done\n", f"{err}\n{token[1]} done\n"
        return Done(0, out.encode("utf-8", "surrogateescape"), err.encode("utf-8", "surrogateescape"))

    def _answer(self, command: Sequence[str]) -> tuple[int, str, str]:
        if command[:2] == ["grep", "-H"]:
            texts = ((path, self._files.get(path, "")) for path in command[3:])
            return 0, "".join(f"{path}:{line}\n" for path, text in texts for line in text.splitlines()), ""
        found = self._answers.get(tuple(command))
        return (found["code"], found["out"], found["err"]) if found else (127, "", f"sh: {command[0]}: not captured\n")
