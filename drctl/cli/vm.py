"""`drctl vm`: the machines on the hosts, and which of them are protected."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import Answer, ask_all, take_inventory
from drctl.cli.options import Format, Output, begin, examples, noun
from drctl.errors import NotFound

app = noun("Machines on the hosts, and which of them are protected.")


@app.command("list", epilog=examples("drctl vm list", "drctl vm list --unprotected --output json"))
def list_(
    ctx: typer.Context,
    unprotected: Annotated[bool, typer.Option("--unprotected", help="Only those that no group holds.")] = False,
    output: Output = Format.TEXT,
) -> int:
    """List the machines of all hosts with their groups. Exits with 3 when an appliance did not answer."""
    context = begin(ctx, output)
    machines, silent = find(context)
    if unprotected:
        machines = [machine for machine in machines if not machine["group"] and not machine["test"]]
    for answer in silent:
        context.screen.say(f"no answer from {answer.host.name}: {answer.error}")
    if context.screen.as_json:
        context.document("machines", machines=machines)
    else:
        columns = ("machine", "site", "host", "state", "disks", "size", "group", "protected")
        context.screen.table(columns, [_row(machine) for machine in machines], "no machines")
    return 3 if silent else 0


@app.command(epilog=examples("drctl vm show db"))
def show(
    ctx: typer.Context,
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="The machine's name.")],
    output: Output = Format.TEXT,
) -> None:
    """Show one machine: its disks, and whether each of them can be replicated."""
    context = begin(ctx, output)
    machines, _ = find(context)
    found = [one for one in machines if one["machine"] == machine]
    if not found:
        raise NotFound("machine", machine, known=sorted(one["machine"] for one in machines))
    if context.screen.as_json:
        context.document("machine", machines=found)
        return
    for one in found:
        facts = {key: "-" if value in (None, "") else render.word(value) for key, value in one.items()}
        context.screen.facts([(key, value) for key, value in facts.items() if key != "disks"])
        rows = [
            (
                d["target"],
                render.size(d.get("size")),
                render.word(d.get("format")),
                render.word(d.get("source")),
                d.get("refusal") or "can be replicated",
            )
            for d in one["disks"]
        ]
        context.screen.line()
        context.screen.table(("disk", "size", "format", "source", "replication"), rows, "no disks")


def find(context: Context) -> tuple[list[dict[str, Any]], list[Answer]]:
    """All machines with the group that holds each, and the appliances that did not answer."""
    answers = ask_all(context, "machine.list")
    inventory = take_inventory(context)
    holders = {
        (place.host.name, name): place
        for place in inventory.places
        if place.role == "source" or place.state == "failed-over"
        for name in place.spec.get("machines", [])
    }
    tested = _tested(context)
    machines: list[dict[str, Any]] = []
    for answer in answers:
        for machine in answer.result or []:
            place = (answer.host.name, machine["name"])
            holder = holders.get(place)
            found = _as_json(answer, machine, holder.group if holder else "", holder.state if holder else "")
            machines.append(found | {"test": tested.get(place, "")})
    return machines, [answer for answer in answers if answer.failed]


def _tested(context: Context) -> dict[tuple[str, str], str]:
    """(host, machine) → the test that it is a copy of something for. A host that does not answer has none to tell."""
    return {
        (answer.host.name, machine.get("recovery_name") or machine["name"]): str(test["id"])
        for answer in ask_all(context, "test.list", group="")
        for test in answer.result or []
        for machine in test.get("machines") or []
    }


def _as_json(answer: Answer, machine: dict[str, Any], group: str, phase: str) -> dict[str, Any]:
    return {
        "machine": machine["name"],
        "site": answer.host.site,
        "host": answer.host.name,
        "state": machine.get("state"),
        "uuid": machine.get("uuid"),
        "group": group,
        "protected": phase in ("live", "syncing", "catching-up"),
        "phase": phase or None,
        "disks": machine.get("disks") or [],
    }


def _row(machine: dict[str, Any]) -> tuple[str, ...]:
    total = sum(disk.get("size") or 0 for disk in machine["disks"])
    return (
        machine["machine"],
        machine["site"],
        machine["host"],
        render.word(machine["state"]),
        str(len(machine["disks"])),
        render.size(total),
        machine["group"] or "-",
        f"test {machine['test']}" if machine["test"] else machine["phase"] or "no",
    )
