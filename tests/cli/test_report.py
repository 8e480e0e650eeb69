"""Reports of runs: what they tell, what they keep out, how long they take."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from drctl.store.run_log import RunLog
from tests.cli.appliance import NOW, recovery

PLAN = """\
plan = "web"
description = "the <shop>"
groups = ["web"]
rto_target = "1s"
rpo_target = "1m"
[[script]]
when = "before"
run = ["/bin/sh", "-c", "echo '<script>alert(1)</script>'; printf '\\\\033[2J|`'"]
[[stage]]
name = "data"
rto_target = "1h"
[[stage.vm]]
name = "db"
rto_target = "2m"
[[stage.vm.check]]
kind = "command"
run = ["/bin/sh", "-c", "test -e well"]
interval = "100ms"
retries = 0
[[stage]]
name = "front"
after = ["data"]
all_of = ["web"]
"""


class Page(HTMLParser):
    """The document's elements, whether each that was opened is closed, and its text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def plans(world):
    (world.directory / "plans").mkdir()
    (world.directory / "plans/web.toml").write_text(PLAN)
    applied = world.applied()
    (world.directory / "plans/well").touch()
    start = world.beta._test_start

    def replied(params, progress):
        return start(params) | {"started": NOW}

    world.beta.replies["test.start"] = replied
    return applied


def drill(world, code: int = 0) -> str:
    assert world("plan", "run", "web", "--mode", "test", "--yes").code == code
    world.clock.now += 86400
    return world("run", "list", "-o", "json").json["runs"][-1]["run"]


def report(world, run: str, kind: str) -> str:
    result = world("run", "report", run, "--format", kind)
    assert result.code == 0, result.err
    return result.out


def test_a_good_drill_as_html(plans) -> None:
    run = drill(plans)
    text = report(plans, run, "html")
    page = Page(text)
    words = " ".join(page.text.split())
    assert "✓ passed · drill of web" in words
    assert "Machines well2 of 2" in words
    assert "the <shop>" in words
    assert re.search(r"#12.*UTC4\.0 s4\.0 s of 1m", words), "the checkpoint, and its age then"
    assert words.index("✓ passed") < words.index("Timeline") < words.index("This run"), "the outcome comes first"
    assert sum(tag == "svg" for tag, _ in page.tags) >= 3


def test_html_fetches_nothing_and_runs_nothing(plans) -> None:
    text = report(plans, drill(plans), "html")
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "form", "base")]
    assert not [key for _, attrs in page.tags for key in attrs if key in ("src", "href") or key.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_failed_drill_says_why_everywhere(plans) -> None:
    (plans.directory / "plans/well").unlink()
    run = drill(plans, 40)
    words = " ".join(Page(report(plans, run, "html")).text.split())
    assert "✗ failed · drill of web" in words
    assert "What failed" in words
    assert "exited with 1" in words
    told = report(plans, run, "markdown")
    assert told.startswith("# FAILED: test of plan web\n")
    assert "exited with 1" in told
    root = ET.fromstring(report(plans, run, "junit"))
    assert (root.get("failures"), root.get("skipped")) == ("1", "1")
    document = json.loads(report(plans, run, "json"))
    assert document["verdict"] == "failed"
    (db,) = [one for one in document["machines"] if one["name"] == "db"]
    assert (db["state"], db["rto"], db["checks"], db["passed"]) == ("failed", None, 1, 0)
    (front,) = [one for one in document["machines"] if one["name"] == "front"]
    assert front["state"] == "not reached"


def test_times_and_ages_against_targets(plans) -> None:
    document = json.loads(report(plans, drill(plans), "json"))
    assert (document["kind"], document["rpo_seconds"], document["rpo_target_seconds"]) == ("run-report", 4.0, 60.0)
    assert document["rto_target_seconds"] == 1.0
    (group,) = document["groups"]
    assert (group["checkpoint"], group["checkpoint_time"], group["age"]) == (12, NOW - 4, 4.0)
    targets = {one["name"]: one["target"] for one in (*document["stages"], *document["machines"])}
    assert targets == {"data": 3600.0, "front": 0.0, "db": 120.0}
    assert document["versions"]["b1"]["qemu"] == "7.2.22"


def test_junit_has_a_case_for_each_machine_and_check(plans) -> None:
    root = ET.fromstring(report(plans, drill(plans), "junit"))
    cases = {(case.get("classname"), case.get("name")) for case in root.iter("testcase")}
    assert ("web.data.web.db", "see that db runs") in cases
    assert any(owner == "web.data.web.db" and name.startswith("check of db") for owner, name in cases)
    assert ("web.front.web.front", "see that front runs") in cases


def test_markdown_takes_names_and_outputs_for_text(plans) -> None:
    path = plans.directory / "plans/web.toml"
    path.write_text(
        PLAN.replace("| `'\"]", "'\"]")
        .replace('"echo', '"exit 3; echo')
        .replace("exit 3; ", "")
        .replace("\\\\033[2J|`'", "```'; exit 3")
    )
    run = drill(plans, 40)
    told = report(plans, run, "markdown")
    assert "````text\n" in told, "a fence that the output can't close"
    assert "\n<script>" in told.partition("````text")[2].partition("````")[0]


def test_the_trend_goes_back_over_drills_of_the_same_plan(plans) -> None:
    first = drill(plans)
    (plans.directory / "plans/well").unlink()
    second = drill(plans, 40)
    (plans.directory / "plans/well").touch()
    third = drill(plans)
    trend = json.loads(report(plans, third, "json"))["trend"]
    assert [(one["run"], one["verdict"]) for one in trend] == [(first, "passed"), (second, "failed"), (third, "passed")]
    assert [one["run"] for one in json.loads(report(plans, first, "json"))["trend"]] == [first]
    assert "The last 3 drills" in report(plans, third, "html")


def test_a_file_and_what_can_not_be_written(plans, tmp_path) -> None:
    run = drill(plans)
    file = tmp_path / "r.html"
    result = plans("run", "report", run, "--format", "html", "--output", str(file))
    assert (result.code, result.out) == (0, "")
    assert file.read_text().startswith("<!doctype html>")
    assert plans("run", "report", run, "-f", "html", "-o", "/no/such/place").code == 43
    assert plans("run", "report", "none", "-f", "html").code == 11


def test_an_unfinished_and_a_damaged_record(plans) -> None:
    run = drill(plans)
    path = plans.directory / "runs" / f"{run}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    assert "unfinished · drill" in " ".join(Page(report(plans, run, "html")).text.split())
    path.write_text("".join([*lines[:6], lines[6].replace("done", "DONE", 1), *lines[7:]]) + "{}\n")
    assert "record is damaged" in Page(report(plans, run, "html")).text


def test_a_record_without_descriptions_of_its_steps(plans) -> None:
    with RunLog.create(plans.directory / "runs/20260101T000000Z-web-0001.jsonl") as log:
        log.append({"event": "run", "run": "20260101T000000Z-web-0001", "plan": "web", "mode": "test"}, 1.0)
        log.append({"event": "begin", "step": "stage:a/vm:db@g/check:x"}, 2.0)
        log.append(
            {"event": "end", "step": "stage:a/vm:db@g/check:x", "outcome": "failed", "reason": "no", "seconds": 3}, 5.0
        )
    document = json.loads(report(plans, "20260101T000000Z-web-0001", "json"))
    (only,) = document["machines"]
    assert (only["name"], only["group"], only["stage"], only["state"]) == ("db", "g", "a", "failed")
    for kind in ("html", "junit", "markdown"):
        assert report(plans, "20260101T000000Z-web-0001", kind)


def test_a_failover_by_plan_is_told_too(plans) -> None:
    down = ("--source-is-down", "fire in hall 2", "--confirm", "web")
    assert plans("plan", "run", "web", "--mode", "failover", *down).code == 0
    run = plans("run", "list", "-o", "json").json["runs"][-1]["run"]
    words = " ".join(Page(report(plans, run, "html")).text.split())
    assert "✓ passed · failover of web" in words
    assert "fire in hall 2" in words


def big_record(world, run: str, began: float) -> None:
    """500 machines in five stages, a boot, two checks and a script each; every script says 60 kB."""
    names = [(f"s{number % 5}", f"vm-{number}") for number in range(500)]
    kinds = (("boot", "boot"), ("check", "check:tcp"), ("check", "check:http"), ("script", "after:tell"))
    rows = [
        {
            "id": f"stage:{stage}/vm:{name}/{what}",
            "kind": kind,
            "text": f"{what} {name}",
            "stage": stage,
            "group": "g",
            "machine": name,
        }
        for stage, name in names
        for kind, what in kinds
    ]
    with RunLog.create(world.directory / "runs" / f"{run}.jsonl") as log:
        log.append({"event": "run", "run": run, "plan": "big", "mode": "test", "operator": "ann"}, began)
        log.append({"event": "steps", "steps": rows}, began)
        for number, row in enumerate(rows):
            log.append({"event": "begin", "step": row["id"]}, began + number / 10)
            said = {"output": f"{number} <&>\n" * 6000} if row["kind"] == "script" else {"seen": "answers 200"}
            log.append(
                {"event": "end", "step": row["id"], "outcome": "done", "seconds": 3.5, **said},
                began + number / 10 + 3.5,
            )
        png = "iVBORw0KGgo" + "A" * 5000
        consoles = [{"group": "g", "machine": name, "png": png} for _, name in names]
        log.append({"event": "consoles", "consoles": consoles}, began + 300)
        log.append({"event": "over", "verdict": "passed"}, began + 300)


def test_five_hundred_machines_in_two_seconds_and_three_megabytes(world, monkeypatch) -> None:
    monkeypatch.setattr("drctl.store.atomic.sync_data", lambda file: None)
    for number in range(2):
        big_record(world, f"2026010{number + 1}T000000Z-big-000{number}", 1e9 + number)
    before = time.process_time()
    result = world("run", "report", "20260102T000000Z-big-0001", "--format", "html")
    took = time.process_time() - before
    assert took < 2.0
    assert len(result.out.encode()) < 3_000_000
    page = Page(result.out)
    assert all(f"vm-{number}<" in result.out for number in (0, 250, 499))
    assert "characters left out" in page.text
    assert "not shown here: drctl run show" in page.text
    assert "420 machines that went well and were not among the slowest are left out here" in page.text
    assert len(world("run", "report", "20260102T000000Z-big-0001", "--format", "junit").out.encode()) < 20_000_000


def test_a_recovery_that_failed_is_in_the_groups(plans) -> None:
    machines = [{"name": "db", "state": "failed", "reason": "no disk"}]
    plans.beta.replies["test.start"] = recovery("test", "web", state="failed", machines=machines)
    document = json.loads(report(plans, drill(plans, 40), "json"))
    (group,) = document["groups"]
    assert (group["outcome"], group["reason"]) == ("failed", "no machine of web runs: no disk")
    assert document["rpo_seconds"] == 4.0, "by the forecast"


def shown(plans, screens) -> str:
    """The report of a drill whose machines show `screens` (name → what recovery.screen tells)."""
    plans.beta.replies["recovery.screen"] = lambda params, _progress: screens[params["machine"]]
    worst = [None] * 100 + [5.0] * 187 + [900.0]
    plans.beta.replies["checkpoint.ages"] = {"begin": NOW - 86400, "end": NOW, "worst": worst}
    plans("plan", "run", "web", "--mode", "test", "--yes")
    return plans("run", "report", "latest", "--format", "html").out


def test_screens_and_the_day_before_are_in_the_file_itself(plans) -> None:
    from base64 import b64encode

    from drctl.hypervisor.picture import small_png

    png = b64encode(small_png(b"P6\n4 4\n255\n" + bytes(48))).decode()
    text = shown(plans, {"db": {"png": png, "text": ""}, "front": {"png": "", "text": "<b>login:\x1b[2J"}})
    page = Page(text)
    assert [one["src"] for tag, one in page.tags if tag == "img"] == [f"data:image/png;base64,{png}"]
    assert "<b>login:\\x1b[2J" in page.text
    (plot,) = [one for tag, one in page.tags if tag == "polygon"]
    assert plot["points"].startswith("0,100 0.0,100.0 ")
    (gap,) = [one for tag, one in page.tags if tag == "rect" and one.get("class") == "none"]
    assert (gap["x"], gap["width"]) == ("0.0", "347.2"), "100 of 288 parts have no checkpoint"
    assert plot["points"].endswith("1000.0,0.0 1000,100")
    assert "at most 15m" in page.text
    policy = next(one["content"] for tag, one in page.tags if one.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize("png", ["javascript:alert(1)", 'iVBORw0KGgo"onerror="x', 7, None])
def test_what_is_no_picture_is_never_an_address(plans, png) -> None:
    page = Page(
        shown(plans, {"db": {"png": png, "text": ""}, "front": {"png": "", "text": "", "reason": "no display"}})
    )
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "no display" in page.text


def test_pictures_have_a_bound(plans, monkeypatch) -> None:
    monkeypatch.setattr("drctl.cli.plans.report_html.ALL_PICTURES", 5000)
    png = "iVBORw0KGgo" + "A" * 4000
    page = Page(shown(plans, {"db": {"png": png, "text": ""}, "front": {"png": png, "text": ""}}))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert "would grow too large" in page.text


def test_after_a_move_its_machines_are_looked_at_when_it_is_over(plans) -> None:
    plans.beta.replies["recovery.screen"] = {"png": "", "text": "up and running"}
    plans("plan", "run", "web", "--mode", "test", "--yes", "--keep")
    page = Page(plans("run", "report", "latest", "--format", "html").out)
    assert page.text.count("up and running") == 2
