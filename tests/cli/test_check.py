"""The monitoring plugins: exit codes, one line, performance data by the guidelines; what is not known is never OK."""

from __future__ import annotations

import re

import pytest

from drctl.cli.plugin import Perf, Range, State, Verdict, at_least, at_most, judge, line, parse_range, worst
from tests.cli.appliance import NOW, checkpoint

#: monitoring-plugins.org, "Performance data": 'label'=value[UOM];[warn];[crit];[min];[max]
RANGE = r"@?(?:(?:~|-?\d+(?:\.\d+)?):)?(?:-?\d+(?:\.\d+)?)?"
PERF = re.compile(
    rf"'(?:[^'=]|'')+'=(?:U|-?\d+(?:\.\d+)?(?:s|%|B|c)?)(?:;(?:{RANGE})?(?:;(?:{RANGE})?(?:;(?:-?[\d.]+)?(?:;(?:-?[\d.]+)?)?)?)?)?"
)


def split(result) -> tuple[int, str, list[str]]:
    """(exit code, text, performance data) of a plugin's only line, checked against the guidelines."""
    (only,) = result.out.splitlines()
    text, _, perf = only.partition(" | ")
    assert "|" not in text
    found = [match.group() for match in PERF.finditer(perf)]
    assert " ".join(found) == perf
    word = ("OK", "WARNING", "CRITICAL", "UNKNOWN")[result.code]
    assert f" {word}: " in text
    return result.code, text, found


@pytest.fixture
def web(world):
    return world.applied()


def test_all_is_well(web):
    code, text, perf = split(web("check", "rpo", "web"))
    assert (code, text) == (0, "DRCTL RPO OK: web: RPO 4.0 s")
    assert perf == ["'web rpo'=4s;15;60;0"]
    assert web("check", "rpo").code == 0
    assert web("check", "rpo", "web").err == ""


@pytest.mark.parametrize(
    ("age", "arguments", "code"),
    [
        (14.0, (), 0),
        (16.0, (), 1),
        (61.0, (), 2),
        (61.0, ("--warning", "5m", "--critical", "1h"), 0),
        (4.0, ("-w", "1s", "-c", "3s"), 2),
        (4.0, ("-w", "1s"), 1),
    ],
)
def test_the_recovery_points_age(web, age, arguments, code):
    web.beta.checkpoints = [checkpoint(12, age)]
    assert split(web("check", "rpo", "web", *arguments))[0] == code


@pytest.mark.parametrize("trouble", ["silent", "empty"])
def test_an_unknown_recovery_point_is_critical_and_never_0(web, trouble):
    if trouble == "silent":
        web.beta.down = True
    else:
        web.beta.checkpoints = []
    code, text, perf = split(web("check", "rpo", "web"))
    assert code == 2
    assert perf == ["'web rpo'=U;15;60;0"]
    assert "no recovery point" in text


def test_a_silent_appliance_may_know_of_more_groups(web):
    web.alpha.down = True
    code, text, _ = split(web("check", "rpo"))
    assert code == 3
    assert text.startswith("DRCTL RPO UNKNOWN: a1: no answer")
    assert split(web("check", "rpo", "web"))[0] == 0


def test_nothing_answers(web):
    web.alpha.down = web.beta.down = True
    assert split(web("check", "rpo"))[0] == 3
    assert split(web("check", "appliance"))[0] == 2
    assert split(web("check", "space"))[0] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("check",),
        ("check", "nonsense"),
        ("check", "rpo", "web", "--warning", "much"),
        ("check", "rpo", "web", "--warning", "20:10"),
        ("check", "rpo", "--nonsense"),
        ("check", "rpo", "unheard-of"),
        ("check", "all", "--warning", "1"),
    ],
)
def test_whatever_keeps_it_from_looking_is_unknown(web, arguments):
    code, _, perf = split(web(*arguments))
    assert (code, perf) == (3, [])


def test_a_broken_configuration_is_unknown(world, capsys):
    from drctl.cli.app import run

    (world.directory / "drctl.toml").write_text("nonsense")
    assert run(["--config", str(world.directory), "check", "rpo"]) == 3
    assert capsys.readouterr().out.startswith("DRCTL UNKNOWN: ")


def test_a_bug_is_unknown(web, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("drctl.cli.check.look", lambda *_: 1 / 0)
    code, text, _ = split(web("check", "rpo"))
    assert code == 3
    assert "ZeroDivisionError" in text
    assert "1 / 0" in (tmp_path / "drctl" / "errors.log").read_text()


def status(web, **changes):
    web.beta.replies["group.status"] = lambda params, _: web.beta._recovery_status(params["group"]) | changes


def test_the_journal(web):
    code, text, perf = split(web("check", "journal", "web"))
    assert (code, text) == (0, "DRCTL JOURNAL OK: web: journal 2 %, 1.0 GiB of 64.0 GiB")
    assert perf[0] == "'web journal'=1.56%;80;95;0;100"
    assert perf[1] == f"'web journal_bytes'={2**30}B;;;0;{64 * 2**30}"
    assert perf[2] == "'web history'=3600s;;;0"
    status(web, journal={"bytes": 90, "limit": 100})
    assert split(web("check", "journal", "web"))[0] == 1
    assert split(web("check", "journal", "web", "--critical", "89"))[0] == 2
    ahead = {"seconds": 1800.0, "falls_short": True, "hours_until_short": 2.0}
    status(web, history={"seconds": 60.0, "target": 3600.0, "forecast": ahead})
    code, text, _ = split(web("check", "journal", "web"))
    assert code == 1
    assert "history falls below 1h in 2h" in text
    ahead = {"falls_short": False, "hours_until_short": None, "held_back": True, "hours_until_full": 48.0}
    status(web, history={"seconds": 20 * 86400.0, "target": 3600.0, "forecast": ahead})
    code, text, _ = split(web("check", "journal", "web"))
    assert code == 1
    assert "a tag or pin keeps all since 20d ago: full in 2d, and then nothing is replicated" in text
    status(web, history={"seconds": 20 * 86400.0, "target": 3600.0, "forecast": ahead | {"hours_until_full": 1000.0}})
    assert split(web("check", "journal", "web"))[0] == 0
    web.beta.down = True
    assert split(web("check", "journal", "web"))[0] == 3


def source(web, **changes):
    web.alpha.replies["group.status"] = lambda params, _: web.alpha._source_status(params["group"]) | changes


def test_the_backlog(web):
    code, text, perf = split(web("check", "backlog", "web"))
    assert (code, text) == (0, "DRCTL BACKLOG OK: web: backlog 4.0 KiB of 1.2 GiB")
    assert perf == [
        "'web backlog'=0%;50;90;0;100",
        f"'web ring'=4096B;;;0;{2**28}",
        f"'web spill'=0B;;;0;{2**30}",
        f"'web dirty_map'=0B;;;0;{2**33}",
    ]
    held = {"size": 2**30, "used": 2**29 + 2**28, "state": "holding", "error": ""}
    source(web, spill=held)
    assert split(web("check", "backlog", "web"))[0] == 1
    assert split(web("check", "backlog", "web", "--critical", "50"))[0] == 2
    source(web, spill={"size": 2**30, "used": 0, "state": "failed", "error": "no room there"})
    code, text, _ = split(web("check", "backlog", "web"))
    assert code == 1
    assert "the spill fails: no room there" in text
    source(web, dirty_map={"size": 2**33, "used": 8192})
    code, text, _ = split(web("check", "backlog", "web"))
    assert code == 2
    assert "8.0 KiB dropped" in text
    source(web, phase="paused", ring=None)
    assert split(web("check", "backlog", "web"))[0] == 0
    source(web, ring=None)
    assert split(web("check", "backlog", "web"))[0] == 3
    web.alpha.down = True
    assert split(web("check", "backlog", "web"))[0] == 3


def info(appliance, **changes):
    appliance.replies["appliance.info"] = appliance._appliance_info({}) | changes


def test_the_appliances(web):
    assert split(web("check", "appliance"))[0] == 0
    row = {"severity": "warning", "subject": "/var/lib/drctl", "message": "1 MiB free | nearly\nnothing", "hint": ""}
    info(web.beta, findings=[row])
    code, text, _ = split(web("check", "appliance", "web"))
    assert code == 1
    assert "1 MiB free / nearly nothing" in text
    info(web.beta, findings=[row | {"severity": "error"}])
    assert split(web("check", "appliance", "web"))[0] == 2


@pytest.mark.parametrize(("days", "code"), [(100, 0), (20, 1), (3, 2), (-3, 2)])
def test_certificates(web, days, code):
    for each in (web.alpha, web.beta):
        info(each, certificate={"not_before": NOW, "not_after": NOW + days * 86400})
    found, text, perf = split(web("check", "certificate"))
    assert found == code
    assert perf[0] == f"'a1 certificate'={days};30:;7:"
    assert ("expired 3 days ago" in text) is (days < 0)


def test_a_certificate_that_is_not_told_is_unknown(web):
    assert split(web("check", "certificate"))[0] == 3


def test_clocks(web):
    assert split(web("check", "clock"))[0] == 0
    info(web.beta, wall_ns=int((NOW + 90) * 1e9))
    code, text, _ = split(web("check", "clock"))
    assert code == 2
    assert text.startswith("DRCTL CLOCK CRITICAL: b1: clock differs by 1m")


def test_space(web):
    code, text, perf = split(web("check", "space", "web"))
    assert code == 0
    assert "b1: 60 % of /store free, 60.0 GiB" in text
    assert "'b1 store free'=60%;10:;2:;0;100" in perf
    info(web.beta, space={"store": {"path": "/store", "total": 1000, "free": 15}})
    assert split(web("check", "space"))[0] == 2
    info(web.beta, space={})
    assert split(web("check", "space"))[0] == 3


def test_all_of_it_tells_the_worst_first(web):
    for each in (web.alpha, web.beta):
        info(each, certificate={"not_before": NOW, "not_after": NOW + 8640000})
    assert split(web("check", "all"))[0] == 0
    web.beta.checkpoints = [checkpoint(12, 30.0)]
    code, text, perf = split(web("check", "all", "web"))
    assert code == 1
    assert text.startswith("DRCTL ALL WARNING: web: RPO 30.0 s (live)")
    assert len(perf) >= 10


# -- the convention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("10", [0, 10], [-1, 10.1]),
        ("10:", [10, 1e9], [9.9]),
        ("~:10", [-1e9, 10], [10.1]),
        ("10:20", [10, 20], [9, 21]),
        ("@10:20", [9, 21], [10, 20]),
        ("30s", [30], [31]),
        ("2h", [7200], [7201]),
        ("5 GiB:", [5 * 2**30], [2**30]),
        ("1.5", [1.5], [1.6]),
    ],
)
def test_ranges(text, inside, outside):
    found = parse_range(text)
    assert not any(found.alerts(value) for value in inside)
    assert all(found.alerts(value) for value in outside)
    assert parse_range(str(found)) == found


@pytest.mark.parametrize("text", ["", "x", "20:10", "10:x", "@"])
def test_no_ranges(text):
    with pytest.raises(ValueError):
        parse_range(text)


def test_performance_data():
    assert str(Perf("it's=x", 1.5, "s", at_most(2), at_least(1), 0, 10)) == "'it''s_x'=1.5s;2;1:;0;10"
    assert str(Perf("x", 1e15, "B")) == "'x'=1000000000000000B"
    assert str(Perf("x", 0.1 + 0.2)) == "'x'=0.3"
    assert str(Range(float("-inf"), 5, inverted=True)) == "@~:5"


def test_a_failure_is_graver_than_ignorance():
    assert worst([State.WARNING, State.UNKNOWN, State.OK]) is State.UNKNOWN
    assert worst([State.CRITICAL, State.UNKNOWN]) is State.CRITICAL
    assert worst([]) is State.OK
    assert judge(5, at_most(4), at_most(10)) is State.WARNING
    assert line("x", [Verdict(State.OK, "a"), Verdict(State.WARNING, "b|\nc")]) == (State.WARNING, "X WARNING: b/ c, a")
