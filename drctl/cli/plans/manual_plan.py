"""The manual page of a plan's file, drctl-plan(5), made of the schema that editors get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from drctl.plan.schema import plan_schema

_TABLES = (
    ("", "KEYS OF THE PLAN"),
    ("stage", "[[stage]]"),
    ("vm", "[[stage.vm]]"),
    ("address", "[[stage.vm.address]] AND [[stage.vm.test_address]]"),
    ("check", "[[stage.vm.check]] AND [[stage.check]]"),
    ("script", "[[script]], [[stage.script]] AND [[stage.vm.script]]"),
    ("manual", "[[manual]] AND [[stage.manual]]"),
)
_EXAMPLE = """\
plan = "shop"
groups = ["shop"]
[[stage]]
name = "database"
[[stage.vm]]
name = "shop-db"
[[stage.vm.check]]
kind = "tcp"
host = "10.20.0.11"
port = 5432
[[stage]]
name = "front"
after = ["database"]
all_of = ["shop"]"""


def plan_page(version: str, escape: Callable[[str], str]) -> str:
    """The page's text; `escape` makes text safe for roff."""
    schema = plan_schema()
    lines = [
        '.\\" Made by `make man` from the schema; do not edit.',
        f'.TH "DRCTL-PLAN" "5" "" "drctl {version}" "drctl"',
        ".SH NAME",
        "drctl\\-plan \\- how groups are recovered, in which order, and how they are known to be well",
        ".SH DESCRIPTION",
        escape("A plan is plans/NAME.toml beside drctl.toml. Durations are written 500ms, 30s, 1h30m; sizes 2 GiB. An"),
        escape("unknown key is an error. docs/plans.md says what is carried out by this version, and what is not yet."),
    ]
    for name, title in _TABLES:
        table = schema["$defs"][name] if name else schema
        lines += [f'.SH "{escape(title)}"', *_keys(table, escape)]
    lines += [".SH EXAMPLES", ".nf", *(escape(line) for line in _EXAMPLE.splitlines()), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR drctl\\-plan (1),", ".BR drctl\\-run (1)"]) + "\n"


def _keys(table: Mapping[str, Any], escape: Callable[[str], str]) -> Iterator[str]:
    for key, value in table["properties"].items():
        yield from (".TP", f".B {escape(key)}")
        yield escape(" ".join(_words(value, required=key in table["required"])) or "See below.")


def _words(value: Mapping[str, Any], *, required: bool) -> Iterator[str]:
    if "description" in value:
        yield value["description"]
    inner = value.get("items", {})
    if choices := value.get("enum") or inner.get("enum"):
        yield f"{'Some' if inner else 'One'} of {', '.join(choices)}."
    if "additionalProperties" in value:
        yield "A table of names."
    if "default" in value:
        yield f"Default: {str(value['default']).lower()}."
    if required:
        yield "Required."
