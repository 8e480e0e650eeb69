"""One place turns errors into exit codes: text or JSON on stderr, once, and nothing on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drctl import errors
from drctl.cli.codes import error_classes
from drctl.errors import ConfigInvalid, DrctlError, NotFound


def make(cls: type[DrctlError]) -> DrctlError:
    if cls is ConfigInvalid:
        return ConfigInvalid("groups/web.toml", 3, "source", "is wrong", hint="do this")
    if cls is NotFound:
        return NotFound("group", "web", hint="do this")
    return cls("it is so", hint="do this", group="web")


CLASSES = [cls for cls in error_classes() if cls is not DrctlError]


def test_there_are_all_classes() -> None:
    defined = [thing for thing in vars(errors).values() if isinstance(thing, type) and issubclass(thing, DrctlError)]
    assert set(error_classes()) == set(defined)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.slug)
def test_the_exit_code_of_every_error_class(world, cls: type[DrctlError]) -> None:
    world.applied()
    world.beta.replies["checkpoint.list"] = make(cls)
    result = world("checkpoint", "list", "web")
    assert result.code == cls.exit_code
    assert result.out == ""
    assert result.err.endswith(f"drctl: {make(cls).message}\n  what to do: do this\n")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.slug)
def test_the_json_of_every_error_class(world, cls: type[DrctlError]) -> None:
    world.applied()
    world.beta.replies["checkpoint.list"] = make(cls)
    result = world("checkpoint", "list", "web", "--output", "json")
    assert result.code == cls.exit_code
    assert result.out == ""
    error = json.loads(result.err)
    assert error["error"] == cls.slug
    assert error["exit_code"] == cls.exit_code
    assert (error["message"], error["hint"]) == (make(cls).message, "do this")


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["status", "--nonsense"], ["checkpoint", "list"], ["status", "-o", "xml"], ["replicate", "start", "web", "--timeout", "soon"],
     ["checkpoint", "list", "web", "--last", "-x"], ["checkpoint", "list", "web", "--last", "many"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_is_2(world, words: list[str]) -> None:
    result = world.applied()(*words)
    assert result.code == 2
    assert "Error: " in result.err
    assert result.out == ""


def test_a_wrong_command_line_in_json(world) -> None:
    result = world("status", "--nonsense", "-o", "json")
    assert result.code == 2
    assert json.loads(result.err)["error"] == "usage"


def test_a_wrong_selector_says_what_would_be_right(world) -> None:
    result = world.applied()("checkpoint", "show", "web", "yesterday")
    assert result.code == 2
    assert "write latest, -10m, '#123', tag:NAME or 2026-01-31T02:10:05+00:00" in result.err


def test_a_mistyped_command_suggests_the_right_one(world) -> None:
    assert "Did you mean 'status'" in world("sttaus").err


def test_a_bug_is_1_and_its_traceback_goes_to_the_log(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    world.alpha.replies["group.list"] = ZeroDivisionError("oops")
    result = world("status")
    log = tmp_path / "state/drctl/errors.log"
    assert result.code == 1
    assert (
        f"drctl: unexpected ZeroDivisionError: oops\n  what to do: this is a bug in drctl; the traceback is in {log}"
        in result.err
    )
    assert "Traceback" not in result.err
    assert "Traceback" in log.read_text()
    assert "ZeroDivisionError: oops" in log.read_text()


def test_a_bug_with_debug_shows_its_traceback(world) -> None:
    world.alpha.replies["group.list"] = ZeroDivisionError("oops")
    result = world("status", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err


def test_a_bug_where_no_log_can_be_written(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    world.alpha.replies["group.list"] = ZeroDivisionError("oops")
    assert "add --debug to see where" in world("status").err


def test_ctrl_c_is_130(world) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    world.alpha.replies["group.list"] = interrupt
    assert world("status").code == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_end_a_real_process(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "drctl.toml").write_text(
        '[[site]]\nname = "a"\n[[host]]\nname = "a1"\nsite = "a"\ncontrol = "unix:/no/a.sock"\n'
    )
    argv = [sys.executable, "-m", "drctl.cli", "status", "--watch", "--config", str(tmp_path)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)}
    ) as process:
        assert process.stderr is not None
        while b"no answer" not in process.stderr.readline():
            pass
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == code


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    code = f"{sys.executable} -m drctl.cli explain | sleep 0"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {code}"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 141
    assert done.stderr == ""


def test_every_error_is_explained(world) -> None:
    """By name and by code, with advice of its own; in JSON as the contract says."""
    for cls in error_classes():
        by_name = world("explain", cls.slug)
        assert by_name.code == 0
        assert by_name.out.startswith(f"code        {cls.exit_code}\nname        {cls.slug}\nmeaning     ")
        assert len(by_name.out.partition("what to do  ")[2].strip()) > 20
        assert cls.slug in world("explain", str(cls.exit_code)).out
    listed = world("explain", "--output", "json").json["codes"]
    assert {row["slug"] for row in listed} >= {cls.slug for cls in error_classes()}
    ours = {cls.slug for cls in error_classes()}
    advice = [row["advice"] for row in listed if row["slug"] in ours]
    assert len(set(advice)) == len(advice)


def test_codes_are_unique_but_for_kinds_of_one_error() -> None:
    """A subclass may share its parent's code; nothing else does."""
    for cls in error_classes():
        twins = [other for other in error_classes() if other.exit_code == cls.exit_code and other is not cls]
        assert all(issubclass(cls, other) or issubclass(other, cls) for other in twins), cls
