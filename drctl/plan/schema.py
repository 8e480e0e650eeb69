"""The JSON Schema (2020-12) of a plan's file, for editors that complete and check TOML by one. Data only.

It can't say all that the reader (read.py) knows, e.g. that stages form no cycle; `drctl plan validate` does."""

from __future__ import annotations

from typing import Any

from drctl.model.address import ReIp
from drctl.plan.plan import CheckKind, Mac, Mode, OnFailure, When, Where
from drctl.plan.read_address import INTERFACE
from drctl.plan.read_common import NAME

Schema = dict[str, Any]


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def _choice(description: str, values: type[Any], default: str | None = None) -> Schema:
    chosen = {} if default is None else {"default": default}
    return {"enum": [str(value) for value in values], "description": description, **chosen}


def _duration(description: str, default: str | None = None) -> Schema:
    chosen = {} if default is None else {"default": default}
    return _text(description, pattern=r"^(\s*\d+(\.\d+)?(ms|s|m|h|d|w))+\s*$", examples=["30s", "1h30m"], **chosen)


def _strings(description: str, **more: Any) -> Schema:
    return {"type": "array", "items": {"type": "string"}, "description": description, **more}


def _table(properties: Schema, required: list[str], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def _tables(name: str) -> Schema:
    return {"type": "array", "items": {"$ref": f"#/$defs/{name}"}}


_NAME = _text("Its name in reports and in ids of steps.", pattern=f"^{NAME}$")
_ON_FAILURE = _choice("What its failure means; else as around it.", OnFailure)
_MODES = {"type": "array", "items": _choice("A mode.", Mode), "minItems": 1, "uniqueItems": True}
_RUN = _strings("Program and arguments; no shell is in between.", minItems=1, maxItems=256)
_WHERE = _choice("Beside drctl, or in the guest by its agent.", Where, "operator")
_NETWORKS = {"type": "object", "additionalProperties": {"type": "string"}}

_SCRIPT = _table(
    {
        "name": _NAME,
        "when": _choice("Before or after what it belongs to.", When),
        "run": _RUN,
        "where": _WHERE,
        "vm": _text("In which guest it runs, for where = guest of a plan or stage."),
        "time_limit": _duration("At it the script's processes are ended.", "5m"),
        "on_failure": _ON_FAILURE,
        "modes": _MODES,
    },
    ["when", "run"],
)
_MANUAL = _table(
    {
        "name": _NAME,
        "when": _choice("Before or after what it belongs to.", When),
        "text": _text("What somebody is to do."),
        "time_limit": _duration("At it the step fails.", "1h"),
        "skippable": {"type": "boolean", "default": False, "description": "Passed over where there is no terminal."},
        "on_failure": _ON_FAILURE,
        "modes": _MODES,
    },
    ["when", "text"],
)
_CHECK = _table(
    {
        "name": _NAME,
        "kind": _choice("How it looks.", CheckKind),
        "host": _text("tcp: address."),
        "test_host": _text("tcp: address in a test."),
        "port": {"type": "integer", "minimum": 1, "maximum": 65535},
        "url": _text("http: what is fetched.", pattern="^https?://"),
        "test_url": _text("http: what is fetched in a test.", pattern="^https?://"),
        "status": {"type": "integer", "minimum": 100, "maximum": 599, "default": 200},
        "text": _text("http: to be in the body. console: to be said."),
        "insecure": {"type": "boolean", "default": False, "description": "http: take any certificate."},
        "run": _RUN,
        "where": _WHERE,
        "retries": {"type": "integer", "minimum": 0, "maximum": 100000, "default": 30},
        "interval": _duration("Between attempts.", "2s"),
        "timeout": _duration("Of one attempt.", "5s"),
        "on_failure": _ON_FAILURE,
        "modes": _MODES,
    },
    ["kind"],
)
_VM = _table(
    {
        "name": _text("The machine."),
        "group": _text("Its group; needed when the plan has several."),
        "boot": {"type": "boolean", "default": True, "description": "false: it is recovered and left off."},
        "memory": _text("Instead of what is defined.", examples=["2 GiB"]),
        "vcpus": {"type": "integer", "minimum": 1},
        "mac": _choice("Whether network cards keep their addresses.", Mac, "keep"),
        "networks": _NETWORKS,
        "test_networks": _NETWORKS,
        "re_ip": _choice("How its cards get new addresses.", ReIp),
        "address": _tables("address"),
        "test_address": _tables("address"),
        "time_limit": _duration("To boot.", "5m"),
        "rto_target": _duration("What the time until it is well is compared with."),
        "on_failure": _ON_FAILURE,
        "check": _tables("check"),
        "script": _tables("script"),
    },
    ["name"],
)
_ADDRESS = _table(
    {
        "card": {"type": "integer", "minimum": 1, "maximum": 256, "default": 1, "description": "In definition order."},
        "ip": _strings("Addresses with their prefix; of dhcp one without.", minItems=1, examples=[["10.9.0.11/24"]]),
        "gateway": _strings("Default gateways, one of IPv4 and one of IPv6.", maxItems=2),
        "dns": _strings("Name servers."),
        "search": _strings("Search domains."),
        "interface": _text("What the guest calls the card, for cloud-init.", pattern=f"^{INTERFACE}$"),
    },
    ["ip"],
)
_STAGE = _table(
    {
        "name": _text("Its name.", pattern=f"^{NAME}$"),
        "after": _strings("Stages that have to be done before.", uniqueItems=True),
        "all_of": _strings("Groups whose machines that no stage names belong here.", uniqueItems=True),
        "time_limit": _duration("For the whole stage; none when absent."),
        "rto_target": _duration("What the time until all in it is well is compared with."),
        "on_failure": _ON_FAILURE,
        "vm": _tables("vm"),
        "check": _tables("check"),
        "script": _tables("script"),
        "manual": _tables("manual"),
    },
    ["name"],
)


def plan_schema() -> Schema:
    """The schema of `plans/NAME.toml`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "drctl plan",
        **_table(
            {
                "plan": _text("Its name, that of the file.", pattern=f"^{NAME}$"),
                "description": _text("For people."),
                "groups": _strings("Groups that it recovers.", minItems=1, uniqueItems=True),
                "time_limit": _duration("For the whole run.", "1h"),
                "rto_target": _duration("What the time until all is well is compared with."),
                "rpo_target": _duration("What the age of the newest checkpoint at that moment is compared with."),
                "on_failure": _choice("What a failed step means.", OnFailure, "stop"),
                "commit_after": _duration("After a failover or switchover: made final by itself."),
                "rollback_after": _duration("Undone by itself, unless the plan's checks passed."),
                "stage": {**_tables("stage"), "minItems": 1},
                "script": _tables("script"),
                "manual": _tables("manual"),
            },
            ["plan", "groups", "stage"],
        ),
        "$defs": {
            "stage": _STAGE,
            "vm": _VM,
            "address": _ADDRESS,
            "check": _CHECK,
            "script": _SCRIPT,
            "manual": _MANUAL,
        },
    }
