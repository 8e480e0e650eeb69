"""The run as a machine: what fails, is late or interrupted, and what becomes of the rest; and its threads."""

from __future__ import annotations

import threading
import time

import pytest

from drctl.errors import OutOfSpace, StepFailed
from drctl.plan.compile import compile_plan
from drctl.plan.engine import GRACE, Engine, Outcome, Ready, Verdict
from drctl.plan.execute import Executed, Execution, Result
from drctl.plan.inventory import Ending
from drctl.plan.plan import Mode
from drctl.plan.read import parse_plan
from drctl.plan.record import read_record
from drctl.plan.step import Options, Step, StepKind
from tests.unit.plan.world import inventory

TEXT = """\
plan = "p"
groups = ["g"]
time_limit = "1h"
[[stage]]
name = "a"
on_failure = "{failure}"
time_limit = "100s"
[[stage.vm]]
name = "m1"
time_limit = "30s"
[[stage.vm.check]]
kind = "guest-agent"
[[stage.vm.script]]
when = "after"
run = ["x"]
[[stage.vm]]
name = "m2"
[[stage]]
name = "b"
after = ["a"]
all_of = ["g"]
"""
M1 = "stage:a/vm:m1"


class Drive:
    """An engine, and a clock that the test moves. `running` are steps that were begun and not ended."""

    def __init__(
        self, failure: str = "stop", mode: Mode = Mode.TEST, parallel: int = 32, limit="1h", **options
    ) -> None:
        plan = parse_plan(TEXT.format(failure=failure).replace("1h", limit))
        self.compiled = compile_plan(plan, inventory(g="m1 m2 m3"), mode, None, Options(**options))
        self.engine = Engine(self.compiled, parallel=parallel)
        self.now = 0.0
        self.running: dict[str, Step] = {}
        self.records: list[dict] = []
        self.cancelled: list[str] = []
        self.verdict: Verdict | None = None
        self.take(self.engine.begin(0.0))

    def take(self, ready: Ready) -> Ready:
        self.records += ready.records
        self.cancelled += ready.cancel
        self.running |= {step.id: step for step in ready.start}
        self.verdict = ready.verdict or self.verdict
        return ready

    def end(self, identity: str, outcome: Outcome = Outcome.DONE, **facts) -> Ready:
        del self.running[identity]
        return self.take(self.engine.ended(identity, outcome, self.now, **facts))

    def fail(self, identity: str) -> Ready:
        return self.end(identity, Outcome.FAILED, reason="boom")

    def wait(self, seconds: float) -> Ready:
        self.now += seconds
        return self.take(self.engine.tick(self.now))

    def of(self, event: str) -> list[dict]:
        return [record for record in self.records if record["event"] == event]

    def to_boot(self) -> Drive:
        self.end("group:g/recover")
        return self


def test_a_good_run() -> None:
    drive = Drive()
    assert set(drive.running) == {"group:g/recover"}
    drive.to_boot()
    assert set(drive.running) == {f"{M1}/boot", "stage:a/vm:m2/boot"}, "in parallel"
    drive.end("stage:a/vm:m2/boot")
    drive.end(f"{M1}/boot")
    drive.end(f"{M1}/check:guest-agent", attempts=3)
    assert set(drive.running) == {f"{M1}/after:x"}, "the next stage waits for all of this one"
    drive.end(f"{M1}/after:x")
    assert set(drive.running) == {"stage:b/vm:m3/boot"}
    drive.end("stage:b/vm:m3/boot")
    assert (set(drive.running), drive.engine.ending) == ({"group:g/clean-up"}, Ending.CLEAN_UP)
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.PASSED
    assert {record["step"] for record in drive.of("begin")} == {record["step"] for record in drive.of("end")}
    assert drive.records[-1] == {"event": "over", "verdict": "passed"}


def test_no_more_at_a_time_than_allowed() -> None:
    drive = Drive(parallel=1).to_boot()
    assert len(drive.running) == 1
    drive.end(f"{M1}/boot")
    assert len(drive.running) == 1


@pytest.mark.parametrize("failure", ["stop", "rollback"])
def test_a_test_that_fails_is_cleaned_up_once_nothing_runs(failure: str) -> None:
    drive = Drive(failure).to_boot()
    drive.fail(f"{M1}/boot")
    assert set(drive.running) == {"stage:a/vm:m2/boot"}, "what runs is waited for, nothing more is begun"
    (ending,) = drive.of("ending")
    assert (ending["ending"], ending["why"]) == ("clean-up", f"{M1}/boot: boom")
    assert "stage:b/vm:m3/boot" in ending["skipped"]
    drive.end("stage:a/vm:m2/boot")
    assert set(drive.running) == {"group:g/clean-up"}
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.FAILED


def test_a_failover_that_fails_is_left_or_undone() -> None:
    left = Drive("stop", Mode.FAILOVER).to_boot()
    left.end("stage:a/vm:m2/boot")
    left.fail(f"{M1}/boot")
    assert (left.verdict, left.running) == (Verdict.FAILED, {})
    undone = Drive("rollback", Mode.FAILOVER).to_boot()
    undone.end("stage:a/vm:m2/boot")
    undone.fail(f"{M1}/boot")
    assert set(undone.running) == {"group:g/undo"}
    undone.end("group:g/undo")
    assert undone.verdict is Verdict.FAILED


def test_to_go_on_after_a_failure_fails_the_verdict_only() -> None:
    drive = Drive("continue").to_boot()
    drive.end("stage:a/vm:m2/boot")
    drive.end(f"{M1}/boot")
    drive.fail(f"{M1}/check:guest-agent")
    assert set(drive.running) == {f"{M1}/after:x"}
    drive.end(f"{M1}/after:x")
    drive.end("stage:b/vm:m3/boot")
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.FAILED


def test_what_can_not_be_cleaned_up_is_a_verdict_of_its_own() -> None:
    drive = Drive()
    drive.fail("group:g/recover")
    assert set(drive.running) == {"group:g/clean-up"}, "it may have been done in part"
    drive.fail("group:g/clean-up")
    assert drive.verdict is Verdict.DIRTY


def test_a_step_over_its_limit_fails_and_is_given_up() -> None:
    drive = Drive().to_boot()
    drive.end("stage:a/vm:m2/boot")
    assert drive.engine.next_deadline == 30.0
    assert not drive.wait(29.9).records
    drive.wait(0.1)
    assert drive.cancelled == [f"{M1}/boot"]
    assert drive.of("end")[-1]["reason"] == "time limit"
    assert "group:g/clean-up" not in drive.running, "it is still at work, so its copy can't be removed yet"
    drive.end(f"{M1}/boot")
    assert set(drive.running) == {"group:g/clean-up"}
    assert len([record for record in drive.of("end") if record["step"] == f"{M1}/boot"]) == 1


def test_the_ending_does_not_wait_for_ever() -> None:
    drive = Drive().to_boot()
    drive.wait(30.0)
    assert drive.engine.next_deadline == 30.0 + GRACE
    drive.wait(GRACE)
    assert "group:g/clean-up" in drive.running
    assert drive.engine.next_deadline > drive.now, "no busy loop"
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.FAILED


@pytest.mark.parametrize(("failure", "goes_on"), [("stop", False), ("continue", True)])
def test_a_stage_over_its_limit(failure: str, goes_on: bool) -> None:
    drive = Drive(failure).to_boot()
    drive.end("stage:a/vm:m2/boot")
    drive.end(f"{M1}/boot")
    drive.wait(100.0)
    assert drive.cancelled == [f"{M1}/check:guest-agent"]
    assert ("stage:b/vm:m3/boot" in drive.running) is goes_on
    drive.end(f"{M1}/check:guest-agent", Outcome.FAILED, reason="given up")
    assert f"{M1}/after:x" not in drive.running
    ends = {record["step"]: record.get("reason") for record in drive.of("end") if record["outcome"] == "failed"}
    assert ends == {f"{M1}/check:guest-agent": "time limit of its stage", "stage:a/done": "time limit of the stage"}


def test_a_plan_over_its_limit() -> None:
    drive = Drive("continue", limit="20s").to_boot()
    drive.end(f"{M1}/boot")
    assert drive.engine.next_deadline == 20.0
    drive.wait(20.0)
    assert [record["why"] for record in drive.of("ending")] == ["the plan's time limit"]
    assert drive.cancelled == [f"{M1}/check:guest-agent"]
    drive.end(f"{M1}/check:guest-agent", Outcome.FAILED)
    drive.end("stage:a/vm:m2/boot")
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.FAILED


def test_interrupted_checks_are_given_up_and_scripts_are_not() -> None:
    drive = Drive().to_boot()
    drive.end(f"{M1}/boot")
    drive.take(drive.engine.interrupt(1.0))
    assert drive.cancelled == [f"{M1}/check:guest-agent"]
    drive.end(f"{M1}/check:guest-agent", Outcome.FAILED)
    assert set(drive.running) == {"stage:a/vm:m2/boot"}
    drive.end("stage:a/vm:m2/boot")
    drive.end("group:g/clean-up")
    assert drive.verdict is Verdict.INTERRUPTED


@pytest.mark.parametrize("mode", list(Mode))
def test_interrupted_in_every_stage(mode: Mode) -> None:
    """Whatever had been begun: it ends, a test leaves nothing, and the record says what was decided."""
    for steps in range(8):
        drive = Drive(mode=mode)
        for _ in range(steps):
            if drive.running:
                drive.end(next(iter(drive.running)))
        drive.take(drive.engine.interrupt(1.0))
        while drive.running:
            drive.end(next(iter(drive.running)))
        assert drive.verdict in (Verdict.INTERRUPTED, Verdict.PASSED)
        assert len(drive.of("ending")) == 1
        assert not drive.of("begin") or drive.verdict is not None
        cleaned = [record["step"] for record in drive.of("begin") if record["step"] == "group:g/clean-up"]
        assert bool(cleaned) is (mode is Mode.TEST)


def test_a_kept_test_stays() -> None:
    drive = Drive(keep=True)
    drive.fail("group:g/recover")
    assert (drive.verdict, drive.running) == (Verdict.FAILED, {})


def test_the_record_tells_it_all() -> None:
    drive = Drive("continue").to_boot()
    drive.fail(f"{M1}/boot")
    drive.take(drive.engine.interrupt(5.0))
    record = read_record([{"event": "run", "run": "r", "plan": "p", "mode": "test", "time": 1.0}, *drive.records])
    assert record is not None
    assert record.steps[f"{M1}/boot"].reason == "boom"
    assert record.steps["stage:a/vm:m2/boot"].outcome is None
    assert (record.ending, record.interrupted, record.flawed) == (Ending.CLEAN_UP, True, True)
    assert record.progress().done == {"group:g/recover"}
    assert read_record([]) is None
    assert read_record([{"event": "begin", "step": "x"}]) is None


def execute(perform, record=lambda event: None, mode: Mode = Mode.TEST) -> Executed:
    plan = parse_plan(TEXT.format(failure="stop"))
    engine = Engine(compile_plan(plan, inventory(g="m1 m2 m3"), mode))
    return Execution(engine, perform, record, time.monotonic).run()


def test_steps_run_in_threads_behind_their_records() -> None:
    written: list[dict] = []
    together = threading.Barrier(2, timeout=10)

    def perform(step: Step, cancelled: threading.Event) -> Result:
        assert {"event": "begin", "step": step.id} in written
        if step.stage == "a" and step.kind is StepKind.BOOT:
            together.wait()
        return Result(Outcome.DONE, {"seen": step.id})

    assert execute(perform, written.append) == Executed(Verdict.PASSED)
    assert next(event["seen"] for event in written if event["event"] == "end") == "group:g/recover"


def test_an_error_of_ours_fails_the_step_and_a_bug_is_raised() -> None:
    written: list[dict] = []

    def fail(step: Step, cancelled: threading.Event) -> Result:
        if step.kind is StepKind.BOOT:
            raise StepFailed("no memory")
        return Result(Outcome.DONE)

    assert execute(fail, written.append).verdict is Verdict.FAILED
    assert {event.get("reason") for event in written if event.get("error") == "step-failed"} == {"no memory"}

    def bug(step: Step, cancelled: threading.Event) -> Result:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(bug)


@pytest.mark.parametrize("room", range(1, 12))
def test_a_full_disk_under_the_record_cleans_up_and_is_told(room: int) -> None:
    written: list[dict] = []
    done: list[str] = []

    def record(event) -> None:
        if len(written) == room:
            raise OutOfSpace("no space for the record")
        written.append(dict(event))

    def perform(step: Step, cancelled: threading.Event) -> Result:
        done.append(step.id)
        return Result(Outcome.DONE)

    found = execute(perform, record)
    assert found.unrecorded is not None
    begun = {event["step"] for event in written if event["event"] == "begin"}
    assert set(done) - {"group:g/clean-up"} <= begun, "nothing is done that the record does not know of"
    assert ("group:g/clean-up" in done) is ("group:g/recover" in begun)


def test_ctrl_c_ends_it_in_the_safe_way(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = parse_plan(TEXT.format(failure="stop"))
    engine = Engine(compile_plan(plan, inventory(g="m1 m2 m3"), Mode.TEST))
    done: list[str] = []
    released = threading.Event()

    def perform(step: Step, cancelled: threading.Event) -> Result:
        if step.kind is StepKind.CHECK:
            return Result(Outcome.DONE if not cancelled.wait(20) else Outcome.FAILED)
        if step.id == "stage:a/vm:m2/boot":
            released.wait(20)
        done.append(step.id)
        return Result(Outcome.DONE)

    execution = Execution(engine, perform, lambda event: None, time.monotonic)
    wait, pressed = execution._wait, []

    def press() -> Ready:
        if f"{M1}/boot" in done and engine._state[f"{M1}/check:guest-agent"] == "running" and not pressed:
            pressed.append(True)
            execution.interrupt()
            released.set()
        return wait()

    monkeypatch.setattr(execution, "_wait", press)
    assert execution.run().verdict is Verdict.INTERRUPTED
    assert done[-1] == "group:g/clean-up"
    assert "stage:b/vm:m3/boot" not in done


def test_a_second_interrupt_gives_up_scripts() -> None:
    plan = parse_plan(TEXT.format(failure="stop"))
    engine = Engine(compile_plan(plan, inventory(g="m1 m2 m3"), Mode.TEST))
    given_up: list[bool] = []

    def perform(step: Step, cancelled: threading.Event) -> Result:
        if step.kind is StepKind.RECOVER:
            execution.interrupt()
            assert not cancelled.wait(0.2), "the first one lets it end"
            execution.interrupt()
            given_up.append(cancelled.wait(20))
        return Result(Outcome.DONE)

    execution = Execution(engine, perform, lambda event: None, time.monotonic)
    assert execution.run().verdict is Verdict.INTERRUPTED
    assert given_up == [True]


def test_a_record_that_can_not_be_written_for_another_reason_ends_it_too() -> None:
    def record(event) -> None:
        raise OSError(5, "Input/output error")

    found = execute(lambda step, cancelled: Result(Outcome.DONE), record)
    assert "can't be written: Input/output error" in found.unrecorded.message
