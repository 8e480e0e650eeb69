"""The screen: results on stdout, talk on stderr; tables and bars by rich on a terminal, plain text elsewhere.

The only module that knows rich, and it imports it when something is really drawn. Honours NO_COLOR."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import typer

from drctl.errors import DrctlError
from drctl.model.duration import format_duration
from drctl.model.extent import format_bytes

UNKNOWN = "unknown"

#: (done, total or None, what is happening)
Update = Callable[[float, float | None, str], None]

#: Between two lines of progress about the same thing, where they go to a pipe or a log.
_LOG_SECONDS = 5.0
#: A column with longer cells is prose and may be folded.
_PROSE = 40
_GOOD = {"live", "running", "ok", "yes", "committed", "connected"}
_POOR = {
    "syncing",
    "catching-up",
    "paused",
    "warning",
    "partly",
    "staged",
    "starting",
    "committing",
    "unprotected",
    "no",
}
_BAD = {"broken", "failed", "error", "unreachable", "disconnected", "failed-over", UNKNOWN}


class Screen:
    """Where a command's words go. Invariant: stdout carries results only, so it can be piped."""

    def __init__(self, *, interactive: bool | None = None, terminal: bool | None = None) -> None:
        #: somebody can be asked
        self.interactive = sys.stdin.isatty() if interactive is None else interactive
        #: stdout is looked at by a person
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        #: results are JSON; talk that only decorates them is left out
        self.as_json = False

    def say(self, text: str) -> None:
        """Talk, on stderr."""
        typer.echo(text, err=True)

    def line(self, text: str = "") -> None:
        """A line of the result, on stdout."""
        typer.echo(text)

    def json(self, document: Mapping[str, Any]) -> None:
        """The result as one JSON object, on stdout."""
        typer.echo(json.dumps(document, indent=2 if self.terminal else None, default=str))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> None:
        """Rows under a heading; when there are none, `empty` is said instead."""
        if not rows:
            self.say(empty)
        elif self.terminal:
            _rich_table(columns, rows)
        else:
            for text in plain_table(columns, rows):
                typer.echo(text)

    def facts(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values, one a line."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            typer.echo(f"{name:<{width}}  {value}".rstrip())

    def fail(self, error: DrctlError, *, as_json: bool) -> None:
        """An error: one JSON object or two lines of text, on stderr."""
        if as_json:
            typer.echo(json.dumps(error.as_dict()), err=True)
            return
        word = typer.style("drctl:", fg="red", bold=True) if colored(sys.stderr) else "drctl:"
        typer.echo(f"{word} {error.message}", err=True)
        if error.hint:
            typer.echo(f"  what to do: {error.hint}", err=True)

    def ask(self, question: str) -> str:
        """One line from the operator. Only when `interactive`; the end of input counts as an empty answer."""
        typer.echo(f"{question} ", err=True, nl=False)
        return sys.stdin.readline().strip()

    def clear(self) -> None:
        """An empty terminal for the next picture of a watch; a blank line between pictures elsewhere."""
        typer.echo("\x1b[H\x1b[2J" if self.terminal else "", nl=not self.terminal)

    @contextmanager
    def bar(self, label: str) -> Iterator[Update]:
        """A progress bar on stderr while it lasts; off a terminal a line for each tenth."""
        if sys.stderr.isatty() and not self.as_json:
            with _rich_bar(label) as update:
                yield update
        else:
            yield _PlainBar(self, label).update


class _PlainBar:
    """Progress for a log: a line when another thing is done than before, else at most one each 5 s."""

    def __init__(self, screen: Screen, label: str) -> None:
        self._screen = screen
        self._label = label
        self._last = ("", "", 0.0)

    def update(self, done: float, total: float | None, text: str) -> None:
        # What is behind the first comma are numbers: another one is no news by itself.
        what, tenth = text.partition(",")[0], f"{int(10 * done / total)}" if total else ""
        said_what, said_tenth, said_at = self._last
        news = what != said_what or tenth != said_tenth
        if self._screen.as_json or not news or (what == said_what and time.monotonic() - said_at < _LOG_SECONDS):
            return
        self._last = (what, tenth, time.monotonic())
        share = f"{100 * done / total:.0f} % " if total else ""
        self._screen.say(f"{self._label}: {share}{text}".rstrip())


def colored(stream: Any) -> bool:
    """Whether text on the stream may carry colours (https://no-color.org)."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two blanks apart, heading in capitals: for pipes, `awk` and logs."""
    lines = [[column.upper() for column in columns], *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    longest = [max(len(line[index]) for line in [columns, *rows]) for index in range(len(columns))]
    if sum(min(width, _PROSE) + 2 for width in longest) > console.width:
        _rich_records(columns, rows)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column, width in zip(columns, longest, strict=True):
        table.add_column(column, overflow="fold", no_wrap=width <= _PROSE)
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console.print(table)


def _rich_records(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that does not fit the terminal, as a block of lines for each row: words are never broken."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    width = max(len(column) for column in columns)
    for number, row in enumerate(rows):
        if number:
            console.print()
        for column, cell in zip(columns, row, strict=True):
            line = Text.assemble(
                (f"{column:<{width}}  ", "bold" if column == columns[0] else "dim"), (cell, _style(cell))
            )
            console.print(line, overflow="fold")


def _style(cell: str) -> str:
    word = cell.split(" ")[0].rstrip(":,")
    return "green" if word in _GOOD else "yellow" if word in _POOR else "red" if word in _BAD else ""


@contextmanager
def _rich_bar(label: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None, text="")

        def update(done: float, total: float | None, text: str) -> None:
            progress.update(task, completed=done, total=total, text=text)

        yield update


def duration(seconds: float | None) -> str:
    """`4.2 s`, or `unknown`."""
    if seconds is None:
        return UNKNOWN
    return f"-{format_duration(-seconds)}" if seconds < 0 else format_duration(seconds)


def size(count: float | None) -> str:
    """`1.5 GiB`, or `unknown`."""
    return UNKNOWN if count is None else format_bytes(count)


def moment(seconds: float | None) -> str:
    """ISO time with the local zone, or `unknown`; what an operator can paste back as a checkpoint."""
    if seconds is None:
        return UNKNOWN
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(timespec="milliseconds")


def word(value: Any) -> str:
    """Any other value for a table: `unknown` for None, `yes`/`no`, comma-separated lists."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(word(inner) for inner in value) or "-"
    return str(value)
