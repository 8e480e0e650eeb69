"""Does the lab's verbs in a process of the lab user, for root. Talks JSON lines: progress, then result or error."""

from __future__ import annotations

import json
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from drctl import errors
from drctl.errors import DrctlError, StepFailed
from drctl.lab import user
from drctl.lab.build import build
from drctl.lab.layout import Options
from drctl.lab.report import report
from drctl.lab.teardown import tear_down


def call(
    verb: str, directory: Path, options: Options, entry: pwd.struct_passwd, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Does `up` or `down` as the lab user and returns the result. Raises what the verb raised there."""
    request = msgspec.json.encode({"verb": verb, "directory": str(directory), "options": options})
    with subprocess.Popen(
        [sys.executable, "-m", "drctl.lab.worker"],
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        umask=0o022,
        env=user.environment(entry),
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(request)
        child.stdin.close()
        for line in child.stdout:
            answer = json.loads(line)
            if "progress" in answer:
                progress(answer["progress"])
            elif "error" in answer:
                child.wait()
                raise error_from(answer["error"])
            else:
                return dict(answer["result"])
    raise StepFailed(f"lab {verb} as {entry.pw_name} ended without an answer ({child.returncode})")


def error_from(fields: dict[str, Any]) -> DrctlError:
    """The error as it was raised there: the class by its slug, message and hint as they were."""
    known = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DrctlError)]
    kind = next((kind for kind in known if kind.slug == fields["error"]), StepFailed)
    error = kind.__new__(kind)
    DrctlError.__init__(error, fields["message"], hint=fields["hint"])
    return error


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _main() -> int:
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any])
    directory = Path(request["directory"])

    def progress(text: str) -> None:
        _say({"progress": text})

    try:
        if request["verb"] == "up":
            options = msgspec.convert(request["options"], Options)
            build(directory, options, progress)
            _say({"result": msgspec.to_builtins(report(directory))})
        else:
            tear_down(directory, progress)
            _say({"result": {}})
    except DrctlError as exc:
        _say({"error": exc.as_dict()})
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
