"""Plans and runs on the command line: found, checked, shown, carried out as drills, recorded and told."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET

import pytest

from drctl.cli.app import app as program
from drctl.errors import ApplianceUnreachable
from drctl.store.run_log import RunLog
from tests.cli.appliance import machine, recovery

PLAN = """\
plan = "web"
description = "the shop"
groups = ["web"]
rto_target = "1h"
[[script]]
when = "before"
run = ["/bin/sh", "-c", "echo $DRCTL_MODE $DRCTL_RUN; printf '\\\\033[2J'"]
[[stage]]
name = "data"
[[stage.vm]]
name = "db"
[[stage.vm.check]]
kind = "command"
run = ["/bin/sh", "-c", "test $DRCTL_VM = db"]
interval = "100ms"
retries = 2
[[stage]]
name = "front"
after = ["data"]
all_of = ["web"]
"""


@pytest.fixture
def plans(world):
    (world.directory / "plans").mkdir()
    write(world, PLAN)
    return world.applied()


def write(world, text: str, name: str = "web") -> None:
    (world.directory / "plans" / f"{name}.toml").write_text(text)


def runs_of(world) -> list[dict]:
    return world("run", "list", "-o", "json").json["runs"]


def test_list(plans) -> None:
    write(plans, "plan = 'bad'", "bad")
    result = plans("plan", "list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == ["PLAN", "bad", "web"]
    rows = plans("plan", "list", "-o", "json").json["plans"]
    assert [(row["plan"], row["stages"], bool(row["problem"])) for row in rows] == [
        ("bad", None, True),
        ("web", 2, False),
    ]


def test_a_plan_that_could_be_carried_out(plans) -> None:
    result = plans("plan", "validate")
    assert result.code == 0
    assert result.out.splitlines()[0] == "web: 2 warnings"
    assert "all machines of 'web' boot at once" in result.out
    assert "no drill of 'web' has passed here yet" in result.out


def test_files_alone_ask_nobody(plans) -> None:
    plans.alpha.down = plans.beta.down = True
    result = plans("plan", "validate", "web", "--offline")
    assert (result.code, result.out) == (0, "web: ok\n")


def test_every_mistake_in_every_file_is_told_with_its_line(plans) -> None:
    write(plans, PLAN.replace('kind = "command"', 'kind = "comand"').replace("rto_target", "rto_traget"))
    write(plans, "plan = 'other'\ngroups = []", "other")
    result = plans("plan", "validate", "--offline", "-o", "json")
    assert result.code == 10
    lines = {row["plan"]: [found["line"] for found in row["findings"]] for row in result.json["plans"]}
    assert lines == {"other": [2], "web": [4, 13]}
    (near,) = [found for found in result.json["plans"][1]["findings"] if found["line"] == 4]
    assert near["hint"] == "did you mean 'rto_target'?"


def edit_disks(world) -> None:
    world.alpha.machines[0] = machine("db", "vda", "vdb")


def refuse_disk(world) -> None:
    world.alpha.machines[0]["disks"][0]["refusal"] = "is shared with another machine"


def remove_machine(world) -> None:
    world.alpha.machines = world.alpha.machines[1:]


def unprotect(world) -> None:
    world.alpha.phases["web"] = "unprotected"


def empty_store(world) -> None:
    world.beta.checkpoints = []


def name_taken(world) -> None:
    plan = world.beta.call("failover.plan", {"group": "web"})
    finding = {
        "severity": "error",
        "subject": "db",
        "message": "the host has a machine named db already",
        "hint": "rename",
    }
    world.beta.replies["failover.plan"] = plan | {"findings": [finding]}


def change_file(world) -> None:
    path = world.directory / "groups/web.toml"
    path.write_text(path.read_text().replace('["db", "front"]', '["db", "front", "lonely"]'))


def forget_group(world) -> None:
    world.beta.groups.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_file, "the appliances don't have group 'web' as its file says (drctl apply)"),
        (forget_group, "the appliances don't have group 'web' as its file says (drctl apply)"),
        (edit_disks, "web.toml:3: disk vdb of 'db' is not replicated"),
        (refuse_disk, "'db' can't be replicated whole: vda: is shared with another machine"),
        (remove_machine, "machine 'db' is not on its source host"),
        (unprotect, "group 'web' is unprotected: nothing can be recovered (drctl replicate start web)"),
        (empty_store, "group 'web' has no restorable checkpoint"),
        (name_taken, "db: the host has a machine named db already (rename)"),
    ],
)
def test_what_is_not_as_the_plan_needs_it_is_42(plans, change, message: str) -> None:
    change(plans)
    result = plans("plan", "validate", "web")
    assert result.code == 42
    assert f"error: {plans.directory}/plans/web.toml:3: " in result.out
    assert message in result.out
    drill = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (drill.code, plans.beta.called("test.start"), runs_of(plans)) == (42, [], [])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('groups = ["web"]', 'groups = ["web", "wep"]', "web.toml:3: there is no group 'wep' (did you mean 'web'?)"),
        ('name = "db"', 'name = "db1"', "web.toml:10: machine 'db1' is not in group 'web' (did you mean 'db'?)"),
        ('all_of = ["web"]', '[[stage.vm]]\nname = "db2"', "machine 'front' of group 'web' is in no stage"),
        ('name = "db"', 'name = "db"\nmemory = "1 GiB"', "the appliance can't change memory"),
        ('kind = "command"', 'kind = "command"\nwhere = "guest"', "gives no access to its guest-agent"),
    ],
)  # fmt: skip
def test_what_the_plan_says_and_nobody_has(plans, old: str, new: str, message: str) -> None:
    write(plans, PLAN.replace(old, new, 1).replace('name = "db"\n', 'name = "db"\ngroup = "web"\n'))
    result = plans("plan", "validate", "web")
    assert result.code == 42
    assert message in result.out


def test_an_appliance_that_says_nothing_is_no_error_of_the_plan(plans) -> None:
    plans.alpha.down = True
    result = plans("plan", "validate", "web")
    assert result.code == 3
    assert "no answer from a1" in result.err
    assert "error:" not in result.out
    plans.alpha.down = False
    plans.beta.replies["failover.plan"] = ApplianceUnreachable("timed out")
    assert "no forecast from b1: timed out" in plans("plan", "validate", "web").out


def test_junit_of_validate(plans, tmp_path) -> None:
    edit_disks(plans)
    file = tmp_path / "v.xml"
    assert plans("plan", "validate", "--junit", str(file)).code == 42
    root = ET.fromstring(file.read_text())
    assert (root.get("tests"), root.get("failures")) == ("3", "1")
    cases = {case.get("name"): case.find("failure") for case in root.iter("testcase")}
    assert set(cases) == {"file", "group web", "machine web/db"}
    assert "vdb" in cases["machine web/db"].get("message")
    assert plans("plan", "validate", "--junit", "/no/such/place.xml").code == 43


def test_names_and_files_of_plans(plans) -> None:
    assert plans("plan", "show", str(plans.directory / "plans/web.toml")).code == 0
    missing = plans("plan", "show", "wep")
    assert (missing.code, "did you mean web?" in missing.err) == (11, True)
    assert plans("plan", "show", "../groups/web").code == 11
    assert plans("plan", "show", "none.toml").code == 11


def test_show_tells_the_steps_in_order(plans) -> None:
    out = plans("plan", "show", "web", "--mode", "failover").out
    lines = [line.strip() for line in out.splitlines()]
    expected = ["stage data:", "boot db, at most 5m", "stage front, after data:", "boot front, at most 5m"]
    assert [line for line in lines if line in expected] == expected
    assert "\\x1b" not in out
    steps = plans("plan", "show", "web", "-o", "json").json["steps"]
    assert next(step for step in steps if step["id"] == "stage:front/begin")["after"] == ["stage:data/done"]
    assert steps[-1]["part"] == "clean-up"


def test_schema_is_json(plans) -> None:
    assert plans("plan", "schema").json["title"] == "drctl plan"


def test_dry_run_shows_the_same_steps_and_changes_nothing(plans) -> None:
    result = plans("plan", "run", "web", "--mode", "failover", "--dry-run")
    assert result.code == 0
    assert "fail over web, as of latest: db, front" in result.out
    assert "forecast: loss web 4.0 s, time unknown" in result.err
    document = plans("plan", "run", "web", "--mode", "test", "--dry-run", "-o", "json").json
    assert document["forecast"] == {"loss_seconds": {"web": 4.0}, "seconds": None, "last_run": None}
    assert not plans.beta.called("test.start")
    assert runs_of(plans) == []


def test_a_drill_that_passes(plans, tmp_path) -> None:
    file = tmp_path / "drill.xml"
    result = plans("plan", "run", "web", "--mode", "test", "-k", "#11", "--yes", "--junit", str(file), "-o", "json")
    assert (result.code, result.json["verdict"]) == (0, "passed")
    assert (plans.beta.called("test.start")[0]["checkpoint"], plans.beta.tests) == ("#11", [])
    root = ET.fromstring(file.read_text())
    assert (root.get("failures"), root.get("skipped")) == ("0", "0")
    names = [case.get("name") for case in root.iter("testcase")]
    assert "see that db runs" in names
    (row,) = runs_of(plans)
    assert (row["state"], row["plan"], row["mode"]) == ("passed", "web", "test")
    shown = plans("run", "show", row["run"], "-o", "json").json
    script = next(step for step in shown["steps"] if step["id"] == "plan/before:sh")
    assert script["output"] == f"test {row['run']}\n\\x1b[2J"
    assert next(step for step in shown["steps"] if "check" in step["id"])["outcome"] == "done"
    verified = plans("run", "verify", row["run"], "-o", "json").json
    assert (verified["sound"], verified["head"]) == (True, result.json["head"])
    assert plans("run", "verify", row["run"], "--head", "0" * 64).code == 31
    assert "no drill of" not in plans("plan", "validate", "web").out
    write(plans, PLAN + "# changed\n")
    assert f"was changed since its last good drill, {row['run']}" in plans("plan", "validate", "web").out


@pytest.mark.parametrize("arguments", [(), ("--keep",)])
def test_a_drill_that_fails_says_what_and_cleans_up(plans, arguments, tmp_path) -> None:
    write(plans, PLAN.replace("test $DRCTL_VM = db", "echo no luck; exit 9"))
    result = plans("plan", "run", "web", "--mode", "test", "--yes", "--junit", str(tmp_path / "j.xml"), *arguments)
    assert result.code == 40
    assert "failed: stage:data/vm:db/check:command: exited with 9: no luck" in result.err
    assert len(plans.beta.tests) == len(arguments)
    root = ET.parse(tmp_path / "j.xml").getroot()
    assert (root.get("failures"), root.get("skipped")) == ("1", "1")
    (row,) = runs_of(plans)
    assert (row["state"], row["failed"]) == ("failed", 1)
    assert "exited with 9" in plans("run", "show", row["run"]).out


def test_a_machine_that_does_not_run(plans) -> None:
    machines = [{"name": "db", "state": "running"}, {"name": "front", "state": "failed", "reason": "no boot disk"}]

    def start(params, progress):
        plans.beta.tests.append(recovery("test", "web", state="partly", machines=machines))
        return plans.beta.tests[-1]

    plans.beta.replies["test.start"] = start
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, plans.beta.tests) == (40, [])
    assert "stage:front/vm:front/boot: no boot disk" in result.err


def test_what_can_not_be_cleaned_up_is_44(plans) -> None:
    plans.beta.replies["test.stop"] = ApplianceUnreachable("no answer")
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert result.code == 44
    assert "not all was cleaned up: group:web/clean-up: no answer" in result.err


def test_a_start_without_an_answer_is_found_by_its_label(plans) -> None:
    def start(params, progress):
        plans.beta.tests.append(recovery("test", "web", label=params["label"]))
        raise ApplianceUnreachable("the connection broke")

    plans.beta.replies["test.start"] = start
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 40
    assert plans.beta.tests == []


def test_an_older_appliance_keeps_no_label_and_nothing_is_guessed(plans) -> None:
    def start(params, progress):
        plans.beta.tests.append(recovery("test", "web", id="t7"))
        del plans.beta.tests[-1]["label"]
        raise ApplianceUnreachable("the connection broke")

    plans.beta.replies["test.start"] = start
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert result.code == 44
    assert "test t7 of web may be what this run started" in result.err
    assert plans.beta.called("test.stop") == [], "it may be somebody else's"


def test_nobody_is_waited_for_without_a_terminal(plans) -> None:
    manual = '[[manual]]\nwhen = "before"\ntext = "plug in\\u001b[2J"\n'
    write(plans, PLAN.replace("[[stage]]", manual + "[[stage]]", 1))
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert result.code == 40
    assert "nobody can be asked" in result.err
    assert not plans.beta.called("test.start")
    assert plans("plan", "run", "web", "--mode", "test", typed="y\ny\n").code == 0
    refused = plans("plan", "run", "web", "--mode", "test", typed="y\nn\n")
    assert (refused.code, "somebody said that it failed" in refused.err) == (40, True)
    assert "\x1b" not in refused.err
    write(plans, PLAN.replace("[[stage]]", manual + "skippable = true\n[[stage]]", 1))
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 0


def test_without_yes_nothing_is_begun(plans) -> None:
    assert plans("plan", "run", "web", "--mode", "test").code == 14
    assert plans("plan", "run", "web", "--mode", "test", typed="n\n").code == 41
    assert runs_of(plans) == []


def test_two_runs_of_a_plan_exclude_each_other(plans) -> None:
    inner: list[int] = []

    def start(params, progress):
        inner.append(plans("plan", "run", "web", "--mode", "test", "--yes").code)
        plans.beta.tests.append(recovery("test", "web"))
        return plans.beta.tests[-1]

    plans.beta.replies["test.start"] = start
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 0
    assert inner == [13]


def test_runs_that_are_not_there_or_damaged(plans) -> None:
    assert plans("run", "list").err.endswith("no plan was run here yet\n")
    assert plans("run", "show", "x").code == 11
    plans("plan", "run", "web", "--mode", "test", "--yes")
    (row,) = runs_of(plans)
    path = plans.directory / "runs" / f"{row['run']}.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"time":', '"time": ')
    path.write_text("\n".join(lines) + "\n")
    broken = plans("run", "verify", row["run"])
    assert (broken.code, "line 4: it does not follow" in broken.err) == (31, True)
    assert runs_of(plans)[0]["state"] == "damaged"
    path.write_text(json.dumps({"n": 1}) + "\n")
    assert plans("run", "show", row["run"]).code == 31


def test_an_unfinished_run_is_told_as_such(plans) -> None:
    plans("plan", "run", "web", "--mode", "test", "--yes")
    (row,) = runs_of(plans)
    path = plans.directory / "runs" / f"{row['run']}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert runs_of(plans)[0]["state"] == "unfinished"
    assert "unfinished" in plans("run", "show", row["run"]).out


def killed_after(world, run: str, lines: int) -> None:
    """The record as a kill behind its line `lines` leaves it, and the copies that stand then."""
    path = world.directory / "runs" / f"{run}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    of_steps = [(event["event"], event.get("step")) for event in events]
    started = ("begin", "group:web/recover") in of_steps
    removed = ("end", "group:web/clean-up") in of_steps
    world.beta.tests = [recovery("test", "web", label=run)] if started and not removed else []


def test_a_killed_run_goes_on_from_every_line_of_its_record(plans) -> None:
    plans("plan", "run", "web", "--mode", "test", "--yes")
    (row,) = runs_of(plans)
    path = plans.directory / "runs" / f"{row['run']}.jsonl"
    whole = path.read_text()
    count = whole.count("\n")
    assert count > 12
    for lines in range(1, count):
        path.write_text(whole)
        killed_after(plans, row["run"], lines)
        assert plans("run", "resume", row["run"], "--dry-run").code == 0
        result = plans("run", "resume", row["run"], "--yes", "-o", "json")
        assert (result.code, result.json["verdict"], plans.beta.tests) == (0, "passed", []), lines
        scripts = [json.loads(line) for line in path.read_text().splitlines() if "plan/before:sh" in line]
        begun = [event for event in scripts if event["event"] == "begin"]
        assert len(begun) == (2 if lines == 3 else 1), "a script that had ended is not run again"
        assert plans("run", "verify", row["run"]).code == 0
    assert plans("run", "resume", row["run"], "--yes").code == 12


def test_what_can_not_go_on(plans) -> None:
    plans("plan", "run", "web", "--mode", "test", "--yes")
    (row,) = runs_of(plans)
    assert "has ended: passed" in plans("run", "resume", row["run"], "--yes").err
    killed_after(plans, row["run"], 5)
    assert plans("run", "resume", row["run"]).code == 14
    write(plans, PLAN + "# changed\n")
    changed = plans("run", "resume", row["run"], "--yes")
    assert (changed.code, "was changed since" in changed.err) == (14, True)
    assert len(plans.beta.tests) == 1, "what stands is not touched"


def test_what_could_not_be_cleaned_up_is_by_a_second_try(plans) -> None:
    plans.beta.replies["test.stop"] = ApplianceUnreachable("no answer")
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 44
    del plans.beta.replies["test.stop"]
    assert len(plans.beta.tests) == 1
    (row,) = runs_of(plans)
    assert row["state"] == "dirty"
    assert plans("run", "resume", row["run"], "--yes").code == 0
    assert plans.beta.tests == []


def test_somebody_elses_test_is_never_touched(plans) -> None:
    plans.beta.tests.append(recovery("test", "web", id="t9"))
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 0
    assert [test["id"] for test in plans.beta.tests] == ["t9"]


def test_hostile_names_reach_no_terminal(plans) -> None:
    write(plans, PLAN.replace("the shop", "\\u001b]0;owned\\u0007").replace('["web"]', '["w\\u001b[2J"]'))
    for arguments in (("plan", "validate", "--offline"), ("plan", "list"), ("plan", "show", "web")):
        result = plans(*arguments)
        assert "\x1b" not in result.out + result.err, arguments


def test_completion(plans) -> None:
    import typer

    from drctl.cli.plan import complete_plan
    from drctl.cli.run import complete_run

    context = typer.Context(typer.main.get_command(program))
    context.params["config"] = str(plans.directory)
    assert complete_plan(context, "w") == ["web"]
    plans("plan", "run", "web", "--mode", "test", "--yes")
    assert complete_run(context, "2027") == [runs_of(plans)[0]["run"]]
    context.params["config"] = "/nowhere"
    assert (complete_plan(context, ""), complete_run(context, "")) == ([], [])


def test_five_hundred_machines_are_validated_in_a_second(world) -> None:
    names = [f"vm-{number}" for number in range(500)]
    (world.directory / "plans").mkdir()
    (world.directory / "groups/web.toml").write_text(
        f'name = "web"\nsource = "alpha"\nrecovery = "beta"\nmachines = {json.dumps(names)}\n'
    )
    check = '[[stage.vm.check]]\nkind = "tcp"\nhost = "h"\nport = 22\n'
    stages = [
        f'[[stage]]\nname = "s{first}"\n'
        + "".join(f'[[stage.vm]]\nname = "{name}"\n{check}' for name in names[first::5])
        for first in range(5)
    ]
    write(world, 'plan = "web"\ngroups = ["web"]\n' + "".join(stages))
    world.alpha.machines = [machine(name) for name in names]
    world.applied()
    before = time.process_time()
    result = world("plan", "validate", "web")
    assert time.process_time() - before < 1.0
    assert (result.code, result.out.splitlines()[0]) == (0, "web: 2 warnings")


@pytest.mark.parametrize(
    ("number", "code", "state"), [("INT", 41, "interrupted"), ("TERM", 41, "interrupted"), ("HUP", 0, "passed")]
)
def test_signals_end_a_run_in_the_safe_way(plans, number: str, code: int, state: str) -> None:
    """The script signals the program: ctrl-C, a service's stop, a terminal that went away."""
    write(plans, PLAN.replace("test $DRCTL_VM = db", f"kill -{number} $PPID; sleep 0.2"))
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, runs_of(plans)[0]["state"], plans.beta.tests) == (code, state, [])
    if code:
        assert "its copies are removed" in result.err


def test_a_place_where_no_record_can_be_begins_nothing(plans, monkeypatch) -> None:
    (plans.directory / "runs").write_text("in the way")
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, plans.beta.called("test.start")) == (43, [])
    assert "can't be made: File exists" in result.err or "Not a directory" in result.err


def test_a_record_of_something_else_is_told_as_damaged(plans) -> None:
    with RunLog.create(plans.directory / "runs/r1.jsonl") as log:
        log.append({"event": "run", "run": "r1", "plan": "\x1b[2J", "mode": "test"}, 1.0)
        log.append({"event": "ending", "ending": "by magic"}, 2.0)
    result = plans("run", "list")
    assert "damaged" in result.out
    assert plans("run", "show", "r1").code == 31


def test_keys_that_hide_commands_reach_no_terminal(plans) -> None:
    write(plans, PLAN.replace('name = "db"', 'name = "db"\n"a\\u001b[2J" = 1'))
    for arguments in (("plan", "validate", "--offline"), ("plan", "list"), ("plan", "show", "web")):
        result = plans(*arguments)
        assert "\x1b" not in result.out + result.err, arguments
        assert r"\x1b[2J" in result.out + result.err, arguments


GUEST = """\
plan = "web"
groups = ["web"]
[[stage]]
name = "data"
[[stage.vm]]
name = "db"
[[stage.vm.check]]
kind = "guest-agent"
interval = "100ms"
retries = 3
[[stage.vm.check]]
kind = "console"
text = "login:"
interval = "100ms"
retries = 3
[[stage.vm.script]]
when = "after"
where = "guest"
run = ["/usr/bin/id"]
[[stage]]
name = "rest"
all_of = ["web"]
"""


@pytest.fixture
def guests(plans):
    """A recovery site that gives access to its guests."""
    info = plans.beta._appliance_info({})
    plans.beta.replies["appliance.info"] = info | {"capabilities": {"guest-agent": True, "console": True}}
    said = iter(["", "booting", "host login: "])
    plans.beta.replies["recovery.console"] = lambda params, progress: {"text": next(said, "host login: "), "bytes": 9}

    def agent(params, progress):
        match params["command"]["execute"]:
            case "guest-exec":
                return {"return": {"pid": 7}}
            case "guest-exec-status":
                return {"return": {"exited": True, "exitcode": 0, "out-data": "dWlkPTA="}}
        return {"return": {}}

    plans.beta.replies["recovery.agent"] = agent
    write(plans, GUEST)
    return plans


def test_checks_and_scripts_in_the_guest(guests) -> None:
    result = guests("plan", "run", "web", "--mode", "test", "--yes", "-o", "json")
    assert result.code == 0, result.err
    asked = guests.beta.called("recovery.agent")
    assert {params["recovery"] for params in asked} == {"t1"}
    assert [params["command"]["execute"] for params in asked] == ["guest-ping", "guest-exec", "guest-exec-status"]
    assert len(guests.beta.called("recovery.console")) == 3, "until it says so"
    shown = guests("run", "show", result.json["run"], "-o", "json").json
    assert next(one["output"] for one in shown["steps"] if one["id"].endswith("after:id")) == "uid=0"


def test_after_a_failover_they_ask_what_reigns(guests) -> None:
    down = ("--source-is-down", "fire", "--confirm", "web")
    assert guests("plan", "run", "web", "--mode", "failover", *down).code == 0
    assert {params["recovery"] for params in guests.beta.called("recovery.agent")} == {"f1"}


def test_a_guest_that_does_not_answer_fails_its_check(guests) -> None:
    from drctl.errors import HypervisorRefused

    guests.beta.replies["recovery.agent"] = HypervisorRefused("the guest agent is not connected")
    result = guests("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, "check:guest-agent: the guest agent is not connected" in result.err) == (40, True)
    assert guests.beta.tests == []


@pytest.mark.parametrize("mode", ["test", "switchover", "failover"])
def test_what_the_plan_wants_of_one_machine_is_ordered(plans, mode: str) -> None:
    info = plans.beta._appliance_info({})
    plans.beta.replies["appliance.info"] = info | {"capabilities": {"overrides": True}}
    wanted = 'name = "db"\nmemory = "1 GiB"\nvcpus = 2\nmac = "new"\nnetworks = {lan = "dmz"}\ntest_networks = {lan = "island"}'
    write(plans, PLAN.replace('name = "db"', wanted))
    more = ("--source-is-down", "fire", "--confirm", "web") if mode == "failover" else ("--yes",)
    result = plans("plan", "run", "web", "--mode", mode, *more)
    assert result.code == 0, result.err
    (order,) = plans.beta.called({"test": "test.start"}.get(mode, f"{mode}.run"))
    network = "island" if mode == "test" else "dmz"
    assert order["changes"] == {"db": {"memory": 2**30, "vcpus": 2, "new_macs": True, "networks": {"lan": network}}}


@pytest.mark.parametrize(
    ("more", "told"),
    [("", True), ('memory = "256 MiB"\n', False), ("boot = false\n", False)],
)
def test_memory_at_the_recovery_site_is_held_against_what_the_plan_boots(plans, more: str, told: bool) -> None:
    """Two machines of 1 GiB each, 1.5 GiB available."""
    plan = plans.beta.call("failover.plan", {"group": "web"})
    plans.beta.replies["failover.plan"] = plan | {"machines": [{**one, "memory": 2**30} for one in plan["machines"]]}
    info = plans.beta._appliance_info({})
    memory = {"total": 2**32, "available": 3 * 2**29}
    plans.beta.replies["appliance.info"] = info | {"memory": memory, "capabilities": {"overrides": True}}
    text = PLAN.replace('all_of = ["web"]', f'[[stage.vm]]\nname = "front"\n{more}')
    write(plans, text)
    result = plans("plan", "validate", "web")
    assert result.code == 0
    warning = "b1: its machines take 2.0 GiB of memory, 1.5 GiB are available"
    assert (warning in result.out) is told, result.out


def test_a_drill_of_a_group_that_is_left_off_boots_nothing(plans) -> None:
    """No names at all would mean all machines to an appliance."""
    off = '[[stage]]\nname = "a"\n[[stage.vm]]\nname = "db"\nboot = false\n[[stage.vm]]\nname = "front"\nboot = false\n'
    write(plans, f'plan = "web"\ngroups = ["web"]\n{off}')
    assert plans("plan", "run", "web", "--mode", "test", "--yes").code == 0
    assert plans.beta.called("test.start") == []
