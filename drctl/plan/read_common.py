"""Keys that several tables of a plan have. Every one raises ConfigInvalid with the key's line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from drctl.plan.plan import Mode, OnFailure
from drctl.toml.table import Table

#: Plans, stages, checks and scripts: names that become ids of steps, file names and cases of a JUnit report.
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
#: A time limit that is longer than a day is none.
LONGEST = 86400.0
#: Linux takes 2 MiB of arguments in all and 128 KiB in one; nobody needs that in a plan.
MAXIMUM_ARGUMENTS = 256
MAXIMUM_ARGUMENT = 8192


def limit(table: Table, key: str, default: float) -> float:
    """A time limit in seconds, 1 s to 1 day."""
    return table.duration(key, default, minimum=1.0, maximum=LONGEST)


def on_failure(table: Table, default: OnFailure) -> OnFailure:
    """What to do when the step fails; `default` is the surrounding table's."""
    return OnFailure(table.choice("on_failure", [*OnFailure], default.value))


def modes(table: Table) -> tuple[Mode, ...]:
    """The modes in which it is done; all when the key is absent."""
    named = table.strings("modes", [mode.value for mode in Mode])
    for name in named:
        if name not in list(Mode):
            raise table.error("modes", f"{name!r} is not one of {', '.join(Mode)}")
    if not named:
        raise table.error("modes", "names no mode, so it would never be done", hint=f"some of {', '.join(Mode)}")
    return tuple(mode for mode in Mode if mode in named)


def arguments(table: Table, key: str = "run") -> tuple[str, ...]:
    """An argument list, not empty."""
    if key in table and isinstance(table.peek(key), str):
        hint = 'write an array of arguments, e.g. run = ["/usr/local/bin/check", "--fast"]; no shell is in between'
        raise table.error(key, "is a string, must be an array", hint=hint)
    values = table.strings(key, unique=False)
    if not values or not values[0]:
        raise table.error(key, "names no program", hint='e.g. run = ["/usr/local/bin/check", "--fast"]')
    if len(values) > MAXIMUM_ARGUMENTS or any(len(value) > MAXIMUM_ARGUMENT for value in values):
        raise table.error(key, f"more than {MAXIMUM_ARGUMENTS} arguments, or one above {MAXIMUM_ARGUMENT} characters")
    if any("\0" in value for value in values):
        raise table.error(key, "an argument holds a zero byte, which no program can be given")
    return values


def own_name(table: Table, source: str) -> str:
    """`name`, or one made of what the table is about, e.g. `check-shop` of `/usr/local/bin/check-shop.sh`."""
    if "name" in table:
        return table.text("name", pattern=NAME, example="announce")
    table.text("name", "")
    last = source.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.")[:40] or "unnamed"


def machine_name(table: Table, key: str) -> str:
    """A machine's name, whatever the hypervisor allows; no line ends or other control characters."""
    name = table.text(key)
    if not name or len(name) > 255 or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise table.error(key, f"{name!r} names no machine", hint="see: drctl vm list")
    return name


def check_unique(tables: Sequence[Table], what: str, key: str) -> None:
    """Refuse two tables of the same name."""
    seen: dict[str, int] = {}
    for table in tables:
        if key not in table:
            continue
        name = table.text(key)
        if name in seen:
            raise table.error(key, f"{what} {name!r} is there already, in line {seen[name]}")
        seen[name] = table.line(key)
