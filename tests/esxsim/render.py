"""How hostd prints: structs, faults, tables. By the facts, sections 1.0, 1.1, 1.4 and 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Struct:
    kind: str
    fields: Sequence[tuple[str, Any]]


@dataclass
class Array:
    kind: str
    items: Sequence[Any] = field(default_factory=list)


@dataclass
class Ref:
    """A managed object: `'vim.VirtualMachine:7'`."""

    text: str


@dataclass
class Null:
    kind: str


def value(what: Any, comma: str = ",", depth: int = 0) -> str:
    """One value as vim-cmd prints it. Quotes inside of strings are not escaped: that is hostd's habit."""
    pad, inner = "   " * depth, "   " * (depth + 1)
    if isinstance(what, Struct):
        lines = [f"{inner}{key} = {value(item, comma, depth + 1)}" for key, item in what.fields]
        return f"({what.kind}) {{\n" + f"{comma}\n".join(lines) + f"\n{pad}}}"
    if isinstance(what, Array):
        if not what.items:
            return f"({what.kind}) []"
        lines = [f"{inner}{value(item, comma, depth + 1)}" for item in what.items]
        return f"({what.kind}) [\n" + f"{comma}\n".join(lines) + f"\n{pad}]"
    if isinstance(what, Null):
        return f"({what.kind}) null"
    if isinstance(what, Ref):
        return f"'{what.text}'"
    if what is None:
        return "<unset>"
    if isinstance(what, bool):
        return "true" if what else "false"
    return f'"{what}"' if isinstance(what, str) else str(what)


def fault(kind: str, message: str, comma: str = ",", **fields: str) -> str:
    """A fault at top level: no comma stands before `msg` (verbatim captures of 6.5 to 8.0)."""
    lines = ["faultCause = (vmodl.MethodFault) null", "faultMessage = <unset>"]
    if fields:
        lines = [*lines, *(f'{key} = "{text}"' for key, text in fields.items())]
        body = f"{comma}\n   ".join(lines) + comma
    else:
        body = f"{comma}\n   ".join(lines)
    return f'({kind}) {{\n   {body}\n   msg = "{message}"\n}}\n'


def getallvms(rows: Sequence[tuple[str, ...]]) -> str:
    """The table of `vmsvc/getallvms`, by the algorithm of facts 1.1."""
    head = ("Vmid", "Name", "File", "Guest OS", "Version", "Annotation")
    widths = [max(len(head[index]), *(len(row[index]) for row in rows), 0) for index in range(6)]
    titles = [head[0].ljust(widths[0])]
    for title, width in zip(head[1:], widths[1:], strict=True):
        left = (width - len(title)) // 2
        titles.append((" " * left + title).ljust(width))
    lines = ["   ".join(titles)]
    ordered = sorted(rows, key=lambda row: row[0])
    lines += ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in ordered]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """An esxcli table: titles, dashes, rows; two blanks between columns; numbers and booleans to the right."""
    widths = [max(len(title), *(len(row[index]) for row in rows), 0) for index, title in enumerate(head)]
    lines = ["  ".join(title.ljust(width) for title, width in zip(head, widths, strict=True)).rstrip()]
    lines.append("  ".join("-" * width for width in widths))
    for row in rows:
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns by name, names without blanks, a comma at each line's end (facts 3)."""
    order = sorted(range(len(head)), key=lambda index: head[index].replace(" ", ""))
    lines = [",".join(head[index].replace(" ", "") for index in order) + ","]
    lines += [",".join(f'"{row[i]}"' if "," in row[i] else row[i] for i in order) + "," for row in rows]
    return "\n".join(lines) + "\n"
