"""The screen: plain tables, progress for logs, values that are never guessed; and who may be asked."""

from __future__ import annotations

import pytest

from drctl.cli import render
from drctl.cli.render import Screen, plain_table


def test_plain_tables_line_up_and_leave_no_blanks() -> None:
    assert plain_table(("a", "long"), [("1", "2"), ("333", "")]) == ["A    LONG", "1    2", "333"]


def test_values() -> None:
    assert render.duration(None) == render.size(None) == render.moment(None) == render.word(None) == "unknown"
    assert render.duration(-2.0) == "-2.0 s"
    assert render.size(1536) == "1.5 KiB"
    assert render.word(True) == "yes"
    assert render.word([]) == "-"
    assert render.word(["a", "b"]) == "a, b"


def test_a_moment_can_be_given_back_as_a_checkpoint() -> None:
    from datetime import datetime

    assert datetime.fromisoformat(render.moment(1_800_000_000.123)).timestamp() == pytest.approx(1_800_000_000.123)


@pytest.mark.parametrize(("seconds", "told"), [(0.0, [0]), (1.0, [0, 25, 50]), (9.0, [0, 10, 20, 30, 40, 50])])
def test_a_bar_off_a_terminal_tells_each_tenth_but_not_more_than_one_each_5_s(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float, told: list[int]
) -> None:
    """A step of 5 % takes `seconds`; half of it is done."""
    clock = [100.0]
    monkeypatch.setattr("drctl.cli.render.time.monotonic", lambda: clock[0])
    with Screen(interactive=False, terminal=False).bar("web") as update:
        for step in range(11):
            update(5 * step, 100, f"syncing, {step} MiB")
            clock[0] += seconds
        update(5, None, "waiting")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" %")[0] for line in lines[:-1]] == [f"web: {share}" for share in told]
    assert lines[-1] == "web: waiting"


def test_a_bar_is_silent_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(interactive=False, terminal=False)
    screen.as_json = True
    with screen.bar("web") as update:
        update(1, 2, "x")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")  # where it is dumb, as it may be where nobody sits, rich draws nothing
    with Screen(interactive=True, terminal=True).bar("web") as update:
        update(1, 2, "half")
    assert "web" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Terminal:
        def isatty(self) -> bool:
            return True

    assert render.colored(Terminal()) is expected


def test_init_writes_a_configuration_that_is_one(tmp_path, capsys) -> None:
    from drctl.cli.app import run
    from drctl.cli.config import load_config

    place = tmp_path / "dr"
    assert run(["init", str(place), "--site", "oslo", "--site", "bergen", "--dry-run"]) == 0
    assert not place.exists()
    assert run(["init", str(place), "--site", "oslo", "--site", "bergen", "--yes"]) == 0
    assert [site.name for site in load_config(place).sites] == ["oslo", "bergen"]
    assert (place / "ca/ca-key.pem").stat().st_mode & 0o777 == 0o600
    assert (place / "ca/.gitignore").read_text() == "ca-key.pem\n"
    assert (place / "groups").is_dir()
    assert run(["init", str(place), "--yes"]) == 12
    assert run(["init", str(tmp_path / "x"), "--site", "a b", "--yes"]) == 10
