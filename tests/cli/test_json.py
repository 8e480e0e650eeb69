"""The contract of JSON output: every document's kind, version and fields, with their types. Fields may be added, with an
entry here and in docs/json.md; none may go or change its type without a new schema version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from drctl.store.run_log import RunLog
from tests.cli.appliance import NOW

DOCS = Path(__file__).parents[2] / "docs" / "json.md"
NUMBER = (int, float)
NONE = type(None)

GROUP = {
    "group": str, "phase": (str, NONE), "reason": str, "generation": (int, NONE), "rpo_seconds": (*NUMBER, NONE),
    "interval_seconds": (*NUMBER, NONE), "newest": (dict, NONE), "oldest": (dict, NONE), "checkpoints": (int, NONE),
    "history": (dict, NONE), "journal": (dict, NONE), "link": (dict, NONE), "backlog_bytes": (int, NONE),
    "sync": (dict, NONE), "ring": (dict, NONE), "spill": (dict, NONE), "dirty_map": (dict, NONE), "machines": list, "boot": (dict, NONE), "strays": (list, NONE), "cycle": (dict, NONE), "recovery_mode": (str, NONE), "recoveries": list, "failback": (dict, NONE),
    "source": (dict, NONE), "recovery": (dict, NONE), "evacuated": (dict, NONE), "lock": (dict, NONE),
}  # fmt: skip
LINK = {
    "from": str, "from_host": str, "to": str, "to_host": str, "address": str, "limits": list, "override": (dict, NONE),
    "rate": (int, NONE), "because": str, "until": (*NUMBER, NONE), "groups": list,
}  # fmt: skip
CHECKPOINT = {
    "number": int, "time": NUMBER, "iso": str, "age_seconds": NUMBER, "kind": str, "tags": list, "pinned": bool,
    "generation": int, "epoch": str, "sequence": int,
}  # fmt: skip
HOST = {
    "host": str, "site": str, "host_kind": str, "uri": str, "control": str, "link": str, "appliance": str, "problem": str,
    "version": (str, NONE), "versions": dict, "capabilities": dict, "space": dict, "evacuation": (dict, NONE),
}  # fmt: skip
MACHINE = {
    "machine": str, "site": str, "host": str, "state": (str, NONE), "uuid": (str, NONE), "group": str, "protected": bool,
    "phase": (str, NONE), "disks": list, "test": str,
}  # fmt: skip
SITE = {"site": str, "hosts": list, "answering": list, "source_of": list, "recovery_of": list}
APPLIANCE = {
    "host": str, "site": str, "state": str, "version": (str, NONE), "identity": (str, NONE), "control": str, "link": str,
    "problem": str,
}  # fmt: skip
CERTIFICATE = {
    "host": str, "appliance": str, "not_before": (*NUMBER, NONE), "not_after": (*NUMBER, NONE), "renewal": (*NUMBER, NONE),
    "due": bool, "problem": str, "authority": (dict, NONE),
}  # fmt: skip
RECOVERY = {
    "id": str, "label": str, "kind": str, "group": str, "generation": int, "checkpoint": dict, "state": str, "started": NUMBER,
    "machines": list, "rto_seconds": (*NUMBER, NONE),
}  # fmt: skip
PICTURE = {"site": str, "host": str, "role": str, "state": str, "generation": int, "machines": list}
AROUND = {"before": list, "after": list}
KEPT = {"machine": str, "target": str, "written_bytes": int, "overlay": str}
ENTRY = {"host": str, "time": NUMBER, "user": str, "method": str, "group": str, "outcome": str, "detail": str}
FINDING = {"severity": str, "subject": str, "message": str, "hint": str, "error": str}
CHANGE = {"group": str, "role": str, "host": str, "action": str, "differences": list}
PLAN = {
    "plan": str, "description": str, "groups": list, "stages": (int, NONE), "machines": (int, NONE), "file": str, "problem": str,
}  # fmt: skip
STEPS = {
    "plan": str, "description": str, "mode": str, "groups": list, "time_limit_seconds": NUMBER,
    "rto_target_seconds": (*NUMBER, NONE), "steps": list,
}  # fmt: skip
STEP = {
    "id": str, "kind": str, "text": str, "after": list, "stage": str, "group": str, "machine": str,
    "time_limit_seconds": (*NUMBER, NONE), "on_failure": str, "part": str,
}  # fmt: skip
RUN = {
    "run": str, "plan": (str, NONE), "mode": (str, NONE), "state": str, "began": (*NUMBER, NONE), "ended": (*NUMBER, NONE),
    "operator": (str, NONE), "failed": (int, NONE), "file": str,
    "kept": list,
}  # fmt: skip
LISTED = {"group": str, "machines": list, "source": (str, NONE), "recovery": (str, NONE), "state": str, "file": bool}

#: command line → (kind, fields of the document, field that holds rows or one object, that one's fields)
CONTRACT: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "status": ("status", {"groups": list, "unreachable": list}, "groups", GROUP),
    "checkpoint list web": ("checkpoints", {"group": str, "checkpoints": list}, "checkpoints", CHECKPOINT),
    "failover web --candidates": ("checkpoints", {"group": str, "checkpoints": list}, "checkpoints", CHECKPOINT),
    "checkpoint show web": ("checkpoint", {"group": str, "checkpoint": dict}, "checkpoint", CHECKPOINT),
    "checkpoint create web": ("checkpoint", {"group": str, "checkpoint": dict}, "checkpoint", CHECKPOINT),
    "checkpoint verify web": (
        "verification",
        {"group": str, "number": int, "bytes": (int, NONE), "frames": (int, NONE), "damaged": list},
        "",
        {},
    ),
    "host list": ("hosts", {"hosts": list}, "hosts", HOST),
    "host show a1": ("host", HOST, "", {}),
    "site list": ("sites", {"sites": list}, "sites", SITE),
    "site show alpha": ("site", SITE, "", {}),
    "vm list": ("machines", {"machines": list}, "machines", MACHINE),
    "vm show db": ("machine", {"machines": list}, "machines", MACHINE),
    "certificate list": ("certificates", {"certificates": list}, "certificates", CERTIFICATE),
    "appliance list": ("appliances", {"appliances": list}, "appliances", APPLIANCE),
    "group list": ("groups", {"groups": list}, "groups", LISTED),
    "group show web": ("group", {"group": str, "origin": str, "settings": dict}, "", {}),
    "test start web --yes": ("test", {"recovery": dict}, "recovery", RECOVERY),
    "test list": ("tests", {"tests": list}, "tests", RECOVERY),
    "failover web --dry-run": ("failover-plan", {"plan": dict, "source": dict, "before": list}, "before", PICTURE),
    "failover web --source-is-down fire --confirm web": (
        "failover",
        {"recovery": dict, **AROUND},
        "recovery",
        RECOVERY,
    ),
    "switchover web --dry-run": ("switchover-plan", {"plan": dict, "before": list}, "before", PICTURE),
    "switchover web --yes": (
        "switchover",
        {"recovery": dict, "loss_seconds": (*NUMBER, NONE), **AROUND},
        "recovery",
        RECOVERY,
    ),
    "commit web --yes": ("commit", {"recovery": dict, **AROUND}, "recovery", RECOVERY),
    "rollback web --dry-run": ("rollback-plan", {"plan": dict, "before": list}, "before", PICTURE),
    "rollback web --yes": (
        "rollback",
        {
            "group": str,
            "generation": (int, NONE),
            "recovery": (dict, NONE),
            "kept": list,
            "kept_until": (*NUMBER, NONE),
            "source": (dict, NONE),
            **AROUND,
        },
        "kept",
        KEPT,
    ),
    "apply --dry-run": ("apply", {"dry_run": bool, "changes": list, "links": list}, "changes", CHANGE),
    "link show": ("links", {"links": list, "unreachable": list}, "links", LINK),
    "link limit show": ("link-limits", {"links": list, "unreachable": list}, "links", LINK),
    "link limit set alpha beta 1Mbit/s": ("link-limits", {"links": list, "unreachable": list}, "links", LINK),
    "plan list": ("plans", {"plans": list}, "plans", PLAN),
    "plan show web": ("plan", STEPS, "steps", STEP),
    "plan validate web": (
        "plan-validation",
        {"offline": bool, "plans": list, "unreachable": list},
        "plans",
        {"plan": str, "file": str, "ok": bool, "findings": list},
    ),
    "plan run web --mode test --dry-run": (
        "plan-run-plan",
        {**STEPS, "checkpoint": str, "forecast": dict, "findings": list},
        "steps",
        STEP,
    ),
    "plan run web --mode test --yes": (
        "plan-run",
        {
            "run": str,
            "plan": str,
            "mode": str,
            "verdict": str,
            "why": str,
            "rto_seconds": (*NUMBER, NONE),
            "rto_target_seconds": (*NUMBER, NONE),
            "steps": list,
            "head": str,
        },
        "steps",
        {"id": str, "outcome": (str, NONE), "seconds": (*NUMBER, NONE), "reason": str},
    ),
    "run list": ("runs", {"runs": list}, "runs", RUN),
    "run show r1": (
        "run",
        {**RUN, "why": str, "facts": dict, "steps": list},
        "steps",
        {
            "id": str,
            "begun": NUMBER,
            "outcome": (str, NONE),
            "seconds": (*NUMBER, NONE),
            "reason": str,
            "output": str,
            "attempts": int,
        },
    ),
    "run verify r1": (
        "run-verification",
        {
            "run": str,
            "sound": bool,
            "lines": int,
            "broken_line": (int, NONE),
            "problem": str,
            "head": str,
            "torn_bytes": int,
            "read_from": str,
            "kept": list,
            "differing": list,
            "signatures": list,
            "anchors": list,
        },
        "",
        {},
    ),
    "history": ("history", {"entries": list}, "entries", ENTRY),
    "doctor": ("doctor", {"findings": list}, "findings", FINDING),
}


def check(value: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    assert set(value) == set(fields), where
    for name, kinds in fields.items():
        assert isinstance(value[name], kinds), f"{where}.{name} is {value[name]!r}"


def plan_and_run(world) -> None:
    """A plan that passes, and the record of a run of it."""
    world.alpha.machines[0]["disks"] = world.alpha.machines[0]["disks"][:1]
    (world.directory / "plans").mkdir()
    (world.directory / "plans/web.toml").write_text(
        'plan = "web"\ngroups = ["web"]\n[[stage]]\nname = "all"\nall_of = ["web"]\n'
    )
    with RunLog.create(world.directory / "runs/r1.jsonl") as log:
        log.append({"event": "run", "run": "r1", "plan": "web", "mode": "test"}, NOW)
        log.append({"event": "begin", "step": "group:web/recover"}, NOW)


@pytest.mark.parametrize("line", CONTRACT)
def test_documents(world, line: str) -> None:
    kind, fields, rows, inner = CONTRACT[line]
    if not line.startswith("apply"):
        world.applied()
    world.beta.tests = [world.beta.call("test.start", {"group": "web"})]
    world.alpha.machines[0]["disks"].append({**world.alpha.machines[0]["disks"][0], "target": "vdb"})
    if line.startswith(("plan", "run")):
        plan_and_run(world)
    if line.startswith(("commit", "rollback")):
        world.beta.call("failover.run", {"group": "web"})
    result = world(*line.split(), "--output", "json")
    assert result.out.count("\n") == 1, "one document, one line"
    document = result.json
    assert document["schema_version"] == 1
    assert document["kind"] == kind
    check(document["read"], {"from": str, "sites": list}, f"{line}: read")
    check(document, {"schema_version": int, "kind": str, "read": dict, **fields}, line)
    if rows:
        values = document[rows] if isinstance(document[rows], list) else [document[rows]]
        assert values, "nothing to check"
        for value in values:
            check(value, inner, f"{line}: {rows}")


def test_codes_and_lab_need_no_configuration(capsys, tmp_path, monkeypatch) -> None:
    import json

    from drctl.cli.app import run

    monkeypatch.chdir(tmp_path)
    assert run(["explain", "12", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["kind"]) == (1, "codes")
    for code in document["codes"]:
        check(code, {"code": int, "slug": str, "meaning": str, "advice": str}, "explain")
    assert run(["lab", "status", "--directory", str(tmp_path / "lab"), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["kind"], document["lab"]["running"]) == (1, "lab", False)


def test_what_a_status_says(world) -> None:
    (group,) = world.applied()("status", "-o", "json").json["groups"]
    assert group["newest"] == {"number": 12, "time": NOW - 4, "age_seconds": 4.0}
    assert group["rpo_seconds"] == 4.0
    assert group["journal"] == {"bytes": 2**30, "limit": 64 * 2**30}
    assert group["history"] == {"seconds": 3600.0, "target_seconds": 604800.0, "forecast": None}
    assert group["source"] == {"site": "alpha", "host": "a1"}


def test_every_field_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    for kind, fields, _, inner in CONTRACT.values():
        assert f"`{kind}`" in text, kind
        for name in {*fields, *inner}:
            assert re.search(rf"`{name}`|\b{name}\b", text), f"{kind}: {name} is not in docs/json.md"
