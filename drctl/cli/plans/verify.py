"""`drctl run verify`: which proofs of a run's record hold: its chain, its copies, the site's signature, the anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import ask_all
from drctl.cli.plans.keeper import Copy
from drctl.cli.plans.runs import Run
from drctl.errors import CertificateRejected, IntegrityError
from drctl.store.run_log import head_at


@dataclass(frozen=True, slots=True)
class Vouched:
    """Who stands for a record up to a line. `problem`: it does not fit; else `doubt` says what could not be checked."""

    by: str
    lines: int
    time: float | None = None
    problem: str = ""
    doubt: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"by": self.by, "lines": self.lines, "time": self.time, "problem": self.problem, "doubt": self.doubt}


@dataclass(frozen=True, slots=True)
class Proof:
    """What holds of one record beside its chain. `differing` are places whose copy tells something else."""

    kept: tuple[str, ...]
    differing: tuple[str, ...]
    signatures: tuple[Vouched, ...]
    anchors: tuple[Vouched, ...]

    @property
    def problems(self) -> list[str]:
        differing = [f"the record at {place} differs from the one here" for place in self.differing]
        return differing + [f"{one.by}: {one.problem}" for one in (*self.signatures, *self.anchors) if one.problem]


def prove(context: Context, run: Run) -> Proof:
    """Everything that can be asked now."""
    data = max([run.own, *(copy.data for copy in run.copies)], key=len)
    differing = [
        copy.label for copy in run.copies if not (run.own.startswith(copy.data) or copy.data.startswith(run.own))
    ]
    ca = _authority(context)
    signatures = [_signature(copy, ca) for copy in run.copies if copy.signature is not None]
    anchors = [
        _anchor(f"{answer.host.site}/{answer.host.name}", dict(row), data)
        for answer in ask_all(context, "run.anchored", run=run.name)
        if not answer.failed
        for row in answer.result[-1:]
    ]
    return Proof(tuple(copy.label for copy in run.copies), tuple(differing), tuple(signatures), tuple(anchors))


def _authority(context: Context) -> bytes | None:
    """The project's CA: beside the configuration, or the local appliance's."""
    directory: Path | None = context.config.directory
    places = [directory / "ca" / "ca.pem"] if directory is not None else []
    for place in (*places, context.settings.home_directory / "tls" / "ca.pem"):
        try:
            return place.read_bytes()
        except OSError:
            continue
    return None


def _signature(copy: Copy, ca: bytes | None) -> Vouched:
    from drctl.appliance.run_service import signed_text
    from drctl.replication.statement import check_statement

    told: Mapping[str, Any] = copy.signature or {}
    lines, moment = int(told.get("lines") or 0), told.get("time")
    by = f"{told.get('site')}/{told.get('host')}"
    time = float(moment) if isinstance(moment, (int, float)) else None
    if head_at(copy.data, lines) != told.get("head"):
        return Vouched(by, lines, time, problem=f"signed another line {lines} than the record has")
    if ca is None:
        return Vouched(by, lines, time, doubt="not checked: the project's CA is not here (ca/ca.pem)")
    try:
        appliance = check_statement(signed_text(told), told, ca)
    except CertificateRejected as exc:
        return Vouched(by, lines, time, problem=exc.message)
    if appliance != told.get("appliance"):
        return Vouched(by, lines, time, problem=f"signed by appliance {appliance}, said to be {told.get('appliance')}")
    return Vouched(by, lines, time)


def _anchor(by: str, row: Mapping[str, Any], data: bytes) -> Vouched:
    lines, moment = int(row.get("lines") or 0), row.get("time")
    time = float(moment) if isinstance(moment, (int, float)) else None
    if head_at(data, lines) == row.get("head"):
        return Vouched(by, lines, time)
    return Vouched(by, lines, time, problem=f"keeps another hash of line {lines} than the record has")


def tell(context: Context, run: Run, proof: Proof) -> None:
    """As JSON, or in lines."""
    what = run.found
    if context.screen.as_json:
        fields = {"lines": what.lines, "broken_line": what.broken or None, "problem": what.problem, "head": what.head}
        context.document(
            "run-verification",
            run=run.name,
            sound=what.sound,
            **fields,
            torn_bytes=what.torn_bytes,
            read_from=run.place,
            kept=list(proof.kept),
            differing=list(proof.differing),
            signatures=[one.as_json() for one in proof.signatures],
            anchors=[one.as_json() for one in proof.anchors],
        )
        return
    if what.sound:
        torn = f"; {what.torn_bytes} bytes of a last line that was never finished" if what.torn_bytes else ""
        context.screen.line(f"{run.name}: {what.lines} lines are sound{torn}; head {what.head}")
    context.screen.line(f"kept:     {', '.join(proof.kept) or 'on this machine alone'}")
    _tell_vouched(
        context, "signed:  ", proof.signatures, what.lines, "by nobody: no site keeps it, or has a certificate"
    )
    _tell_vouched(context, "anchored:", proof.anchors, what.lines, "no other site keeps its head, or none answered")


def _tell_vouched(context: Context, word: str, vouched: tuple[Vouched, ...], lines: int, none: str) -> None:
    for one in vouched:
        far = "all" if one.lines == lines else f"up to line {one.lines} of {lines}"
        state = f"WRONG: {one.problem}" if one.problem else f"{far}, {render.moment(one.time)}"
        context.screen.line(f"{word} {one.by}: {state}" + (f"; {one.doubt}" if one.doubt else ""))
    if not vouched:
        context.screen.line(f"{word} {none}")


def demand(run: Run, proof: Proof, head: str) -> None:
    """Raises IntegrityError for the first thing that does not fit."""
    what = run.found
    if not what.sound:
        raise IntegrityError(f"{run.place}: line {what.broken}: {what.problem}", hint="lines before it are sound")
    if proof.problems:
        hint = "one of the two was rewritten; which one the others tell"
        raise IntegrityError(f"{run.name}: {proof.problems[0]}", hint=hint)
    if head and head != what.head:
        raise IntegrityError(f"{run.place}: its head is {what.head}, not {head}", hint="lines were added or rewritten")
