"""`drctl run`: what became of each execution of a plan."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli import render
from drctl.cli.options import DryRun, Format, Output, Yes, begin, examples, noun
from drctl.cli.plans import runs
from drctl.errors import IntegrityError
from drctl.plan.output import tame, tame_line
from drctl.plan.record import StepRecord
from drctl.store.run_log import list_runs


class ReportFormat(StrEnum):
    HTML = "html"
    JUNIT = "junit"
    JSON = "json"
    MARKDOWN = "markdown"


app = noun("Executions of plans, as their records tell them.")


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of runs for the shell."""
    from drctl.cli.context import Context, Settings
    from drctl.errors import DrctlError

    named = ctx.find_root().params.get("config")
    try:
        names = list_runs(runs.run_directory(Context(Settings(Path(named) if named else None))))
    except DrctlError:
        return []
    return [name for name in names if name.startswith(incomplete)]


RunName = Annotated[
    str,
    typer.Argument(metavar="RUN", help="The run, as drctl run list shows it, or latest.", autocompletion=complete_run),
]


@app.command("list", epilog=examples("drctl run list", "drctl run list --last 100 --output json"))
def list_(
    ctx: typer.Context,
    last: Annotated[int, typer.Option("--last", metavar="N", min=0, help="The newest so many; 0: all.")] = 30,
    output: Output = Format.TEXT,
) -> None:
    """List the runs whose records are here or at a recovery site, oldest first."""
    context = begin(ctx, output)
    rows = runs.listed(context, last)
    if context.screen.as_json:
        context.document("runs", runs=rows)
        return
    columns = ("run", "plan", "mode", "state", "began", "took", "failed", "kept at")
    context.screen.table(columns, [_row(one) for one in rows], "no plan was run here yet")


def _row(one: dict[str, object]) -> tuple[str, ...]:
    began, ended = one["began"], one["ended"]
    took = ended - began if isinstance(began, float) and isinstance(ended, float) else None
    return (
        tame_line(str(one["run"])),
        tame_line(render.word(one["plan"])),
        tame_line(render.word(one["mode"])),
        str(one["state"]),
        render.moment(began if isinstance(began, float) else None),
        render.duration(took),
        render.word(one["failed"]),
        tame_line(", ".join(map(str, one["kept"] if isinstance(one["kept"], list) else ())) or "here alone"),
    )


@app.command(
    epilog=examples(
        "drctl run show 20260131T021005Z-shop-3f9c",
        "drctl run show 20260131T021005Z-shop-3f9c --step plan/before:announce",
    )
)
def show(
    ctx: typer.Context,
    run: RunName,
    step: Annotated[str, typer.Option("--step", metavar="ID", help="One step alone, with its whole output.")] = "",
    output: Output = Format.TEXT,
) -> None:
    """Show one run: each step with its outcome, how long it took, and why it failed."""
    context = begin(ctx, output)
    found = runs.find(context, run)
    record = found.record
    if record is None:
        raise IntegrityError(f"{found.place} does not begin as a run's record does", hint=f"drctl run verify {run}")
    steps = [one for one in record.steps.values() if step in ("", one.id)]
    if context.screen.as_json:
        told = [_step_json(one) for one in steps]
        context.document("run", **runs.as_json(found), why=record.why, facts=dict(record.facts), steps=told)
        return
    if step:
        for one in steps:
            context.screen.line(tame(one.output))
        return
    context.screen.facts(
        [
            ("run", found.name),
            ("plan", f"{record.plan}, mode {record.mode}"),
            ("state", runs.state(found)),
            ("because", tame(record.why) or "-"),
            ("began", render.moment(record.began)),
            ("took", render.duration(runs.seconds(record))),
            ("operator", render.word(record.facts.get("operator"))),
            ("plan's commit", render.word(record.facts.get("commit") or None)),
            ("record", f"{found.place}, {found.found.lines} lines, head {found.found.head[:16]}"),
        ]
    )
    context.screen.line()
    rows = [
        (tame_line(one.id), one.outcome or "unfinished", render.duration(one.seconds), tame_line(one.reason or "-"))
        for one in steps
    ]
    context.screen.table(("step", "outcome", "took", "reason"), rows, "no step was begun")


def _step_json(step: StepRecord) -> dict[str, object]:
    return {
        "id": step.id,
        "begun": step.begun,
        "outcome": step.outcome.value if step.outcome else None,
        "seconds": step.seconds,
        "reason": step.reason,
        "output": step.output,
        "attempts": step.attempts,
    }


@app.command(
    epilog=examples(
        "drctl run report 20260131T021005Z-shop-3f9c --format html --output drill.html",
        "drctl run report 20260131T021005Z-shop-3f9c --format markdown",
    )
)
def report(
    ctx: typer.Context,
    run: RunName,
    kind: Annotated[
        ReportFormat,
        typer.Option("--format", "-f", metavar="html|junit|json|markdown", help="What it is written as."),
    ],
    file: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where it goes; stdout without it.")
    ] = None,
) -> None:
    """Tell one run for others: outcome, times against targets, checkpoints, what failed, the last drills.

    html is one file without scripts, to mail and to print; nothing in it is fetched from elsewhere. junit has a case
    for each machine and check. What scripts said is cut where it is long, and the text says so; json has all of it
    that the record kept."""
    from drctl.cli.plans import report as run_report

    context = begin(ctx)
    text = run_report.render(run_report.look(context, run), kind)
    if file is None:
        context.screen.line(text.rstrip("\n"))
    else:
        run_report.write(file, text)
        context.screen.say(f"{file}: {len(text.encode())} bytes")


@app.command(epilog=examples("drctl run verify 20260131T021005Z-shop-3f9c --output json"))
def verify(
    ctx: typer.Context,
    run: RunName,
    head: Annotated[
        str, typer.Option("--head", metavar="HASH", help="What its last line's hash has to be, kept elsewhere.")
    ] = "",
    output: Output = Format.TEXT,
) -> None:
    """Check that no line of a run's record was changed, lost or added in between, and who vouches for it.

    Its lines are chained by hashes. The recovery site's appliance signs up to which line it keeps them; the other site
    keeps the hash of a line, where it could be reached. What holds is told, and up to which line; what is missing is no
    error, what does not fit is: exit code 31, and the first broken line."""
    from drctl.cli.plans import verify as run_verify

    context = begin(ctx, output)
    found = runs.find(context, run)
    proof = run_verify.prove(context, found)
    run_verify.tell(context, found, proof)
    run_verify.demand(found, proof, head)


@app.command(epilog=examples("drctl run resume 20260131T021005Z-shop-3f9c --yes"))
def resume(
    ctx: typer.Context,
    run: RunName,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Also write the outcome as JUnit XML, for a CI.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Go on with a run that was killed: from what is true at the hosts, not from where its record ends.

    Also on another machine than the one that began it: what the recovery site keeps of the record is taken from there;
    the plan's file has to be the same.

    What stands is not made again; scripts that had ended are not run again, one that was cut off is; health checks are
    done anew. A run that was cleaning up goes on with that. Exit codes are those of plan run."""
    from drctl.cli.plans import run as plan_run

    return plan_run.resume(begin(ctx, output), run, junit, dry_run=dry_run, yes=yes)
