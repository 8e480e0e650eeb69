"""`drctl checkpoint bisect`: find the newest checkpoint at which all was well, by test boots and a script."""

from __future__ import annotations

import secrets
import shlex
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from drctl.cli import points, render
from drctl.cli.bisect_run import Bisection, Order, Tried, fetch_checkpoints, known_answers, room_for
from drctl.cli.confirm import propose
from drctl.cli.context import Context
from drctl.cli.inventory import side
from drctl.cli.options import DryRun, Format, GroupName, Output, Yes, begin, examples, seconds, selector
from drctl.errors import Interrupted, NotFound, SetupFailed, StepFailed
from drctl.model.checkpoint import Checkpoint
from drctl.model.site import Host
from drctl.plan.bisect import Answer, Bounds, at_most, bounds
from drctl.plan.output import tame_line
from drctl.store import atomic
from drctl.store.run_log import RunLog, list_runs, read_run, run_path

#: Test boots at a time, unless told otherwise.
PARALLEL = 4


def install(app: typer.Typer) -> None:
    """Add the command to `drctl checkpoint`."""
    app.command(
        epilog=examples(
            "drctl checkpoint bisect web --check ./database-is-whole --yes",
            "drctl checkpoint bisect web --check './check --deep' --good -7d --parallel 2 --tag last-good",
            "drctl checkpoint bisect web --resume --yes",
        )
    )(bisect)


def bisect(
    ctx: typer.Context,
    group: GroupName,
    check: Annotated[
        str, typer.Option("--check", metavar="SCRIPT", help="The program, with arguments; 0 good, 125 skip, else bad.")
    ] = "",
    good: Annotated[
        str, typer.Option("--good", metavar="CHECKPOINT", parser=selector, help="Known to be good; none is newer.")
    ] = "",
    bad: Annotated[
        str, typer.Option("--bad", metavar="CHECKPOINT", parser=selector, help="Known to be bad; none is older.")
    ] = "",
    machine: Annotated[
        list[str] | None, typer.Option("--machine", "-m", metavar="NAME", help="Boot only this one; may be repeated.")
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", metavar="N", min=1, max=32, help="Test boots at a time, if memory allows.")
    ] = PARALLEL,
    timeout: Annotated[
        float,
        typer.Option("--check-timeout", parser=seconds, metavar="DURATION", help="Of one check; at it, it is bad."),
    ] = "10m",  # type: ignore[assignment]  # the parser makes seconds of it
    tag: Annotated[
        str, typer.Option("--tag", metavar="TAG", help="Tag the newest good one, so that it is never deleted.")
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last one of this group that was not finished.")
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Find the newest checkpoint at which all was well, as git bisect run finds a commit.

    Checkpoints in between are booted as isolated tests, several at a time where the recovery host's memory allows it,
    and the script judges each: exit code 0 is good, 125 can't be judged, anything else is bad. It finds DRCTL_GROUP,
    DRCTL_CHECKPOINT, DRCTL_CHECKPOINT_TIME, DRCTL_TEST and DRCTL_MACHINES (the copies' names) in its environment, and
    the test as JSON on its stdin; it has to wait for what it needs in the guests by itself. The newest checkpoint is
    tried first, unless --bad names another. The source and replication are not touched.

    Whatever ends it, it can be gone on with (--resume). Exits with 40 when none is good, with 3 when checkpoints that
    were skipped hide which one is the newest good one."""
    context = begin(ctx, output)
    if bool(check) == resume:
        raise typer.BadParameter("give --check SCRIPT, or --resume")
    host = side(context, group, "recovery")
    directory = _directory(context)
    with _alone(directory, group):
        if resume:
            begun = _Begun.again(context, host, group, directory)
        else:
            order = Order(group, _command(check), tuple(machine or ()), timeout, Path.cwd())
            begun = _Begun.new(context, host, order, (good, bad), directory)
        fit, why = room_for(context, host, group, begun.order.machines, parallel)
        if not propose(context.screen, begun.steps(fit, why), dry_run=dry_run, yes=yes, question="Begin?"):
            return 0
        return begun.carry_out(fit, tag)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A bisection that can begin, or go on. `path`: of its log; it is not there yet when it is `fresh`."""

    context: Context
    host: Host
    order: Order
    path: Path
    checkpoints: list[Checkpoint]
    answers: dict[int, Answer]
    fresh: bool
    ends: dict[str, int]

    @classmethod
    def new(cls, context: Context, host: Host, order: Order, ends: tuple[str, str], directory: Path) -> _Begun:
        """Raises NotFound, or a usage error when the ends are the wrong way round."""
        checkpoints = fetch_checkpoints(context, host, order.group)
        chosen = {
            word: points.choose(context, checkpoints, each).number
            for word, each in zip(("good", "bad"), ends, strict=True)
            if each
        }
        moment = datetime.fromtimestamp(context.clock.time(), UTC)
        name = f"{moment:%Y%m%dT%H%M%SZ}-{order.group}-{secrets.token_hex(2)}"
        checkpoints, answers = _within(checkpoints, {"newest": checkpoints[-1].number, **chosen})
        ends_known = {"newest": checkpoints[-1].number, **chosen}
        return cls(context, host, order, run_path(directory, name), checkpoints, answers, True, ends_known)

    @classmethod
    def again(cls, context: Context, host: Host, group: str, directory: Path) -> _Begun:
        """The newest of the group that was not finished. Raises NotFound."""
        for name in reversed([name for name in list_runs(directory) if f"-{group}-" in name]):
            events, _ = read_run(run_path(directory, name))
            if not events or events[0].get("group") != group:
                continue
            if events[-1].get("event") == "over":
                break
            first = events[0]
            order = Order(
                group,
                tuple(first["check"]),
                tuple(first["machines"]),
                float(first["time_limit"]),
                Path(str(first["directory"])),
            )
            ends = {str(word): int(number) for word, number in first["ends"].items()}
            checkpoints, answers = _within(fetch_checkpoints(context, host, group), ends)
            answers |= known_answers(events, checkpoints)
            return cls(context, host, order, run_path(directory, name), checkpoints, answers, False, ends)
        raise NotFound("bisection", group, message=f"no bisection of {group} is unfinished here")

    def steps(self, parallel: int, why: str) -> list[str]:
        found = bounds(len(self.checkpoints), self.answers)
        first, last = self.checkpoints[0], self.checkpoints[-1]
        left = len(found.open)
        return [
            f"look for the newest good one of {len(self.checkpoints)} checkpoints of {self.order.group}, "
            f"#{first.number} ({render.moment(first.time)}) to #{last.number} ({render.moment(last.time)})",
            f"boot copies in isolation at {self.host.site}/{self.host.name}, {parallel} at a time ({why}); "
            f"{left} are not judged yet, {at_most(left) + 1} tries one after the other at most",
            f"run {shlex.join(self.order.check)} for each",
        ]

    def carry_out(self, parallel: int, tag: str) -> int:
        atomic.make_directory(self.path.parent)
        log = RunLog.create(self.path) if self.fresh else RunLog.open(self.path)[0]
        with log:
            if self.fresh:
                log.append(self._first(), self.context.clock.time())
            bisection = Bisection(
                self.context,
                self.host,
                self.order,
                log,
                self.path.stem,
                self.checkpoints,
                dict(self.answers),
                parallel,
                self._told,
            )
            bisection.remove_strays()
            try:
                found = bisection.run()
            except KeyboardInterrupt:
                raise Interrupted(
                    f"the bisection of {self.order.group} was stopped; its copies are removed",
                    hint=f"drctl checkpoint bisect {self.order.group} --resume",
                ) from None
            log.append(
                {"event": "over", "good": self._number(found.good), "bad": self._number(found.bad)},
                self.context.clock.time(),
            )
        return self._finish(self._tried(bisection.answers), found, tag)

    def _first(self) -> dict[str, Any]:
        order = self.order
        return {
            "event": "bisect",
            "format": 1,
            "group": order.group,
            "check": list(order.check),
            "machines": list(order.machines),
            "time_limit": order.time_limit,
            "directory": str(order.directory),
            "ends": self.ends,
            "operator": self.context.settings.operator,
        }

    def _tried(self, answers: dict[int, Answer]) -> dict[int, Answer]:
        """Without those that were said to be good or bad."""
        said = {self.ends.get("good"), self.ends.get("bad")}
        return {place: answer for place, answer in answers.items() if self.checkpoints[place].number not in said}

    def _number(self, place: int) -> int | None:
        return self.checkpoints[place].number if 0 <= place < len(self.checkpoints) else None

    def _told(self, place: int, tried: Tried, found: Bounds) -> None:
        checkpoint = self.checkpoints[place]
        age = render.duration(max(0.0, self.context.clock.time() - checkpoint.time))
        low, high = self._number(found.good), self._number(found.bad)
        where = f"between {f'#{low}' if low is not None else 'the oldest'} and {f'#{high}' if high else 'the newest'}"
        self.context.screen.say(
            f"  #{checkpoint.number}, {age} ago: {tried.answer} ({tame_line(tried.reason)}; "
            f"{render.duration(tried.seconds)}); {len(found.open)} left {where}"
        )

    def _finish(self, answers: dict[int, Answer], found: Bounds, tag: str) -> int:
        context, group = self.context, self.order.group
        good = self.checkpoints[found.good] if found.good >= 0 else None
        bad = self.checkpoints[found.bad] if found.bad < len(self.checkpoints) else None
        if good is not None and tag:
            params: dict[str, Any] = {"checkpoint": f"#{good.number}", "tags": [tag], "remove": []}
            context.call(self.host, "checkpoint.tag", group=group, timeout=60, **params)
        now = context.clock.time()
        command = f"drctl failover {group} --checkpoint '#{good.number}' --source-is-down REASON" if good else ""
        if context.screen.as_json:
            context.document(
                "bisection",
                group=group,
                good=points.as_json(good, now) if good else None,
                bad=points.as_json(bad, now) if bad else None,
                skipped=[self.checkpoints[place].number for place in found.skipped],
                crooked=found.crooked,
                tries=[
                    {"number": self.checkpoints[place].number, "answer": answer}
                    for place, answer in sorted(answers.items())
                ],
                tag=tag if good else None,
                next=command,
                record=str(self.path),
            )
        self._say(good, bad, found, command)
        if good is None:
            raise StepFailed(
                f"none of the checkpoints of {group} that were tried is good",
                hint=f"the oldest is from {render.moment(self.checkpoints[0].time)}; an archive may be older",
            )
        return 3 if found.skipped else 0

    def _say(self, good: Checkpoint | None, bad: Checkpoint | None, found: Bounds, command: str) -> None:
        context, now = self.context, self.context.clock.time()
        if found.crooked:
            context.screen.say("warning: an older one than this is bad: there may be others that are good, and newer")
        if found.skipped:
            numbers = ", ".join(f"#{self.checkpoints[place].number}" for place in found.skipped[:10])
            context.screen.say(f"could not be judged, and may be good, too: {numbers}")
        if good is None:
            return
        if not context.screen.as_json:
            context.screen.line(f"newest good checkpoint: {points.spell(good, now)}")
            if bad is not None:
                context.screen.line(f"oldest bad one after it: {points.spell(bad, now)}")
            else:
                context.screen.line("none after it is bad")
        group = self.order.group
        context.screen.say(f"to recover to it: {command}")
        context.screen.say(f"single disks and files of it: drctl restore files {group}/VM/DISK -k '#{good.number}'")
        if not good.tags:
            context.screen.say(f"to keep it: drctl checkpoint tag {group} '#{good.number}' last-good")


def _within(checkpoints: list[Checkpoint], ends: dict[str, int]) -> tuple[list[Checkpoint], dict[int, Answer]]:
    """The checkpoints between the ends, and what is known of these. Raises NotFound, BadParameter."""
    numbers = [checkpoint.number for checkpoint in checkpoints]
    for word, number in ends.items():
        if number not in numbers and word != "newest":
            raise NotFound("checkpoint", f"#{number}", hint=f"it was the one known to be {word}")
    newest = numbers.index(ends["newest"]) if ends["newest"] in numbers else len(numbers) - 1
    low = numbers.index(ends["good"]) if "good" in ends else 0
    high = numbers.index(ends["bad"]) if "bad" in ends else newest
    if low >= high and "good" in ends:
        raise typer.BadParameter("what is good has to be older than what is bad")
    kept = checkpoints[low : high + 1]
    answers: dict[int, Answer] = {}
    if "good" in ends:
        answers[0] = Answer.GOOD
    if "bad" in ends:
        answers[len(kept) - 1] = Answer.BAD
    return kept, answers


def _command(text: str) -> tuple[str, ...]:
    """The check's arguments. Raises SetupFailed when it can't be run here: then nothing is booted for nothing."""
    try:
        words = shlex.split(text)
    except ValueError as exc:
        raise typer.BadParameter(f"--check: {exc}") from exc
    if not words or shutil.which(words[0]) is None:
        raise SetupFailed(f"{text!r} can't be run here", hint="--check names a program that is executable")
    return tuple(words)


def _directory(context: Context) -> Path:
    base = context.config.directory
    return (base if base is not None else context.settings.home_directory) / "bisects"


def _alone(directory: Path, group: str) -> AbstractContextManager[int]:
    """One bisection of a group at a time. Raises Locked, SetupFailed."""
    try:
        atomic.make_directory(directory)
    except OSError as exc:
        raise SetupFailed(f"{directory} can't be made: {exc.strerror}", hint="its steps are recorded there") from exc
    return atomic.lock(directory / f".{group}.lock", wait=False, what=f"another bisection of {group} from here")
