"""`drctl plan`: recipes of a recovery, checked before they are needed, and carried out."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from drctl.cli.failover import SourceIsDown
from drctl.cli.options import DryRun, Format, Output, Selector, Yes, begin, examples, noun
from drctl.cli.plans import findings as plan_report
from drctl.cli.plans import show as plan_show
from drctl.cli.plans.files import find_plan, plan_path, plan_paths
from drctl.cli.plans.inventory import from_appliances, from_files
from drctl.cli.plans.junit import write_junit
from drctl.cli.switchover import OnShutdownTimeout, ShutdownTimeout
from drctl.errors import DrctlError
from drctl.model.move import OnTimeout
from drctl.plan.compile import compile_plan
from drctl.plan.plan import Mode
from drctl.plan.read import read_plan
from drctl.plan.schema import plan_schema
from drctl.plan.step import Options

app = noun("Recipes of a recovery: check, show and run them.")


class ModeName(StrEnum):
    TEST = "test"
    SWITCHOVER = "switchover"
    FAILOVER = "failover"


def complete_plan(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of plans for the shell; no appliance is asked."""
    from drctl.cli.context import Context, Settings

    named = ctx.find_root().params.get("config")
    try:
        paths = plan_paths(Context(Settings(Path(named) if named else None)).config)
    except DrctlError:
        return []
    return [path.stem for path in paths if path.stem.startswith(incomplete)]


PlanName = Annotated[
    str, typer.Argument(metavar="PLAN", help="The plan's name, or its file.", autocompletion=complete_plan)
]
ModeOption = Annotated[
    ModeName,
    typer.Option("--mode", metavar="test|switchover|failover", help="What is done with the plan's groups."),
]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Also write the outcome as JUnit XML, for a CI.")
]


@app.command("list", epilog=examples("drctl plan list", "drctl plan list --output json"))
def list_(ctx: typer.Context, output: Output = Format.TEXT) -> None:
    """List the plans of plans/*.toml, and whether each can be read."""
    context = begin(ctx, output)
    rows = [plan_report.summary(path, read_plan(path)) for path in plan_paths(context.config)]
    if context.screen.as_json:
        context.document("plans", plans=rows)
    else:
        context.screen.table(plan_report.COLUMNS, [plan_report.row(one) for one in rows], "no plans")


@app.command(
    epilog=examples(
        "drctl plan validate",
        "drctl plan validate shop --offline",
        "drctl plan validate --junit validate.xml --output json",
    )
)
def validate(
    ctx: typer.Context,
    plans: Annotated[
        list[str] | None,
        typer.Argument(metavar="PLAN...", help="Names or files; all plans without it.", autocompletion=complete_plan),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Look at files alone: plans/*.toml and groups/*.toml.")
    ] = False,
    junit: Junit = None,
    output: Output = Format.TEXT,
) -> int:
    """Check plans, and hold them against what the appliances say now. Changes nothing.

    Every mistake in a file is told with its line. Then: whether groups and machines exist, every machine has a stage,
    every disk is replicated, there is something to recover, and what the recovery site says would go wrong.

    Exits with 10 when a file is wrong, with 42 when a plan could not be carried out now, with 3 when an appliance did
    not answer (nothing else being wrong); warnings alone are 0."""
    context = begin(ctx, output)
    paths = [plan_path(context.config, name) for name in plans] if plans else plan_paths(context.config)
    found = [(path, read_plan(path)) for path in paths]
    groups = sorted({name for _, one in found if one.plan for name in one.plan.groups})
    stock = from_files(context) if offline else from_appliances(context, groups)
    results = [plan_report.examine_file(context, path, one, stock) for path, one in found]
    for answer in stock.silent:
        context.screen.say(f"no answer from {answer.host.name}: {answer.error}")
    if junit is not None:
        write_junit(junit, [plan_report.suite(one) for one in results])
    if context.screen.as_json:
        silent = [{"host": answer.host.name, "message": str(answer.error)} for answer in stock.silent]
        rows = [plan_report.as_json(one) for one in results]
        context.document("plan-validation", offline=offline, plans=rows, unreachable=silent)
    else:
        plan_report.print_results(context.screen, results)
    return plan_report.exit_code(results, silent=bool(stock.silent))


@app.command(epilog=examples("drctl plan show shop", "drctl plan show shop --mode failover --output json"))
def show(ctx: typer.Context, plan: PlanName, mode: ModeOption = ModeName.TEST, output: Output = Format.TEXT) -> None:
    """Show the steps that a plan comes to, and what each of them waits for. No appliance is asked."""
    context = begin(ctx, output)
    found = find_plan(context.config, plan)
    compiled = compile_plan(found, from_files(context).known, Mode(mode.value))
    if context.screen.as_json:
        context.document("plan", **plan_show.as_json(compiled))
    else:
        plan_show.print_steps(context.screen, compiled)


@app.command(epilog=examples("drctl plan schema"))
def schema(ctx: typer.Context) -> None:
    """Print the JSON Schema of plans, for editors that check TOML by one."""
    ctx.obj.screen.line(json.dumps(plan_schema(), indent=2))


@app.command(
    epilog=examples(
        "drctl plan run shop --mode test --dry-run",
        "drctl plan run shop --mode test --yes --junit drill.xml",
        "drctl plan run shop --mode switchover --yes",
        "drctl plan run shop --mode failover --dry-run --output json",
        'drctl plan run shop --mode failover --source-is-down "fire in hall 2" --confirm shop',
    )
)
def run(
    ctx: typer.Context,
    plan: PlanName,
    mode: ModeOption,
    checkpoint: Selector = "latest",
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave a test's copies running at the end, to look at them.")
    ] = False,
    source_is_down: SourceIsDown = "",
    shutdown_timeout: ShutdownTimeout = "3m",  # type: ignore[assignment]  # the parser makes seconds of it
    on_shutdown_timeout: OnShutdownTimeout = OnTimeout.ABORT,
    junit: Junit = None,
    dry_run: DryRun = False,
    confirm: Annotated[
        str,
        typer.Option("--confirm", metavar="PLAN", help="The plan's name again, where nobody can be asked to type it."),
    ] = "",
    yes: Yes = False,
    output: Output = Format.TEXT,
) -> int:
    """Carry out a plan: its steps in their order, machines in parallel, gated by health checks.

    A dry run compiles the same steps and checks the same things, and ends with what would be done.

    A switchover and a failover are guarded as drctl switchover and drctl failover are: for a failover the plan's name
    has to be typed, or given by --confirm, and a source that is alive or may be alive needs --source-is-down. No group
    can be changed by anybody else meanwhile. A run that failed or was stopped leaves what it had moved, unless the plan
    says rollback; drctl run resume goes on with it.

    Exits with 40 when the plan ran and failed, with 41 when it was stopped, with 42 when it could not be run, with 44
    when what it made could not be cleaned up."""
    from drctl.cli.plans import run as plan_run

    context = begin(ctx, output)
    if keep and mode is not ModeName.TEST:
        raise typer.BadParameter("--keep leaves a test's copies running; it goes with --mode test")
    if checkpoint != "latest" and mode is ModeName.SWITCHOVER:
        raise typer.BadParameter("a switchover loses nothing: it has no --checkpoint but its final one")
    options = Options(checkpoint, keep, source_is_down, on_shutdown_timeout, shutdown_timeout)
    attempt = plan_run.prepare(context, plan_path(context.config, plan), Mode(mode.value), options)
    return attempt.dry_run(junit) if dry_run else attempt.carry_out(junit, yes=yes, confirm=confirm)
