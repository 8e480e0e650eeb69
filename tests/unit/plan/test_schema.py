"""The schema for editors says the same as the reader: keys, required ones, choices."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from drctl.errors import ConfigInvalid
from drctl.plan.read import parse_plan
from drctl.plan.schema import plan_schema
from tests.unit.plan.test_examples import PLANS
from tests.unit.plan.test_read import FULL

SCHEMA = json.loads(json.dumps(plan_schema()))


def violations(value: object, schema: dict, place: str = "") -> list[str]:
    """What of the value the schema does not allow: the few words of JSON Schema that ours uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    found = []
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if "type" in schema and type(value) is not kinds[schema["type"]]:
        return [f"{place}: type"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: enum")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{place}: pattern")
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{place}: range")
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            found.append(f"{place}: minItems")
        found += [
            each for number, one in enumerate(value) for each in violations(one, schema["items"], f"{place}[{number}]")
        ]
    if isinstance(value, dict):
        found += [f"{place}: {key} missing" for key in schema.get("required", []) if key not in value]
        other = schema.get("additionalProperties")
        for key, one in value.items():
            inner = schema.get("properties", {}).get(key, other)
            found += (
                [f"{place}.{key}: unknown"] if not isinstance(inner, dict) else violations(one, inner, f"{place}.{key}")
            )
    return found


@pytest.mark.parametrize("text", [*(path.read_text("utf-8") for path in PLANS), FULL])
def test_real_plans_fit(text: str) -> None:
    assert violations(tomllib.loads(text), SCHEMA) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('plan = "shop"', ""),
        ('plan = "shop"', 'plan = "a b"'),
        ('groups = ["shop", "mail"]', "groups = []"),
        ('time_limit = "30m"', 'time_limit = "30 parsecs"'),
        ('on_failure = "rollback"', 'on_failure = "explode"'),
        ("boot = false", 'boot = "no"'),
        ("boot = false", "bot = false"),
        ("vcpus = 2", "vcpus = 0"),
        ("port = 5432", "port = 99999"),
        ('kind = "tcp"', 'kind = "ping"'),
        ("status = 204", "status = 600"),
        ('when = "after"', 'when = "during"'),
        ('modes = ["switchover", "failover"]', "modes = []"),
        ('name = "front"', ""),
    ],
)
def test_both_refuse_the_same(old: str, new: str) -> None:
    text = FULL.replace(old, new)
    assert text != FULL
    assert violations(tomllib.loads(text), SCHEMA)
    with pytest.raises(ConfigInvalid):
        parse_plan(text)


def test_every_key_that_is_read_is_in_the_schema() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[3] / "drctl/plan").glob("read*.py"))
    words = r"(?:text|choice|duration|size|strings|mapping|tables?|boolean|integer)"
    read = set(re.findall(rf'\btable\.{words}\(\s*"(\w+)"', source)) | set(re.findall(r'\(table, "(\w+)"', source))
    tables = [SCHEMA, *SCHEMA["$defs"].values()]
    known = {key for table in tables for key in table["properties"]}
    assert read - {"run"} <= known
    assert known - read <= {"commit_after", "rollback_after", "run", "modes", "on_failure"}


def test_every_key_is_documented_and_the_documented_plan_is_one() -> None:
    text = (Path(__file__).parents[3] / "docs/plans.md").read_text("utf-8")
    tables = [SCHEMA, *SCHEMA["$defs"].values()]
    for key in {key for table in tables for key in table["properties"]} - {"stage", "vm", "check", "script", "manual"}:
        assert re.search(rf"`{key}`", text), key
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert [stage.name for stage in parse_plan(block).stages] == ["database", "front"]
