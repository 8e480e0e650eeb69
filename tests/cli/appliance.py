"""An appliance in memory: it answers the control methods as docs/internals.md writes them down."""

from __future__ import annotations

from typing import Any

from drctl.cli.points import decode
from drctl.errors import ApplianceUnreachable, NotFound, WrongPhase
from drctl.model.checkpoint import resolve

NOW = 1_800_000_000.0


class FakeClock:
    """Stands still until somebody sleeps."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def checkpoint(number: int, age: float, **changes: Any) -> dict[str, Any]:
    row = {
        "number": number,
        "time": NOW - age,
        "kind": "crash-consistent",
        "epoch": "a" * 32,
        "generation": 1,
        "sequence": number * 100,
        "tags": [],
        "pinned": False,
    }
    return row | changes


def recovery(kind: str, group: str, **changes: Any) -> dict[str, Any]:
    machines = [{"name": "db", "state": "running", "reason": ""}, {"name": "front", "state": "running", "reason": ""}]
    row = {
        "id": f"{kind[:1]}1",
        "label": "",
        "kind": kind,
        "group": group,
        "generation": 2,
        "checkpoint": {"number": 12, "time": NOW - 4},
        "state": "running",
        "started": NOW,
        "machines": machines,
        "rto_seconds": 6.5,
    }
    return row | changes


def machine(name: str, *targets: str, **changes: Any) -> dict[str, Any]:
    disks = [
        {"target": target, "source": f"/images/{name}.{target}", "format": "raw", "size": 2**30, "refusal": ""}
        for target in targets or ("vda",)
    ]
    return {"name": name, "uuid": f"uuid-{name}", "state": "running", "disks": disks, "memory": 2**28} | changes


class FakeAppliance:
    """One host's appliance. `calls` has every method with its parameters; `replies` overrides results (or raises)."""

    def __init__(self, host: str, site: str) -> None:
        self.host = host
        self.site = site
        self.down = False
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.replies: dict[str, Any] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.phases: dict[str, str] = {}
        self.machines: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.tests: list[dict[str, Any]] = []
        self.failovers: list[dict[str, Any]] = []
        self.handover: dict[str, Any] | None = None
        self.limits: list[dict[str, Any]] = []
        self.override: dict[str, Any] | None = None
        self.in_force: dict[str, Any] | None = None
        self.evacuation: dict[str, Any] | None = None

    def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        on_progress: Any = None,
        timeout: float | None = None,
    ) -> Any:
        if self.down:
            raise ApplianceUnreachable(f"no appliance answers at {self.host}")
        params = params or {}
        self.calls.append((method, params))
        if method in self.replies:
            reply = self.replies[method]
            if isinstance(reply, Exception):
                raise reply
            return reply(params, on_progress) if callable(reply) else reply
        # As an appliance that keeps no records and shows no screens; see test_run_keeper.py and test_report.py.
        if method.startswith("run.") or method in ("recovery.screen", "checkpoint.ages"):
            raise NotFound("method", method)
        return getattr(self, "_" + method.replace(".", "_"))(params)

    def called(self, method: str) -> list[dict[str, Any]]:
        return [params for name, params in self.calls if name == method]

    def _appliance_info(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "site": self.site,
            "host": self.host,
            "appliance": f"uuid-of-{self.host}",
            "version": "0.1.0",
            "wall_ns": int(NOW * 1e9),
            "uri": "qemu:///system",
            "versions": {"qemu": "7.2.22", "libvirt": "9.0.0"},
            "capabilities": {},
            "space": {"store": {"path": "/store", "total": 100 * 2**30, "free": 60 * 2**30}},
            "findings": [],
            "evacuation": self._evacuated(),
        }

    def _evacuated(self) -> dict[str, Any] | None:
        away = self.evacuation
        return {"host": self.host, **{key: away[key] for key in ("since", "by", "phase")}} if away else None

    def _active(self) -> list[str]:
        own = [name for name in self.groups if self._role(name) == "source"]
        return [name for name in own if self.phases.get(name) in ("live", "syncing", "catching-up")]

    def _host_evacuation(self, _: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {"group": name, "phase": "live", "running": self.groups[name]["machines"], "recovery": "beta"}
            for name in self._active()
        ]
        return {"host": self.host, "evacuation": self.evacuation, "sources": rows, "reasons": []}

    def _host_evacuate(self, params: dict[str, Any]) -> dict[str, Any]:
        away = self.evacuation or {"since": NOW, "by": params["by"], "sources": {}, "recoveries": {}}
        self.evacuation = away | {"phase": "evacuated"}
        away["recoveries"] |= params["recoveries"]
        for name in self._active():
            away["sources"][name] = self.groups[name]["machines"] if params["shutdown"] else []
            self.phases[name] = "paused"
        return {"host": self.host, "evacuation": self.evacuation, "failed": {}}

    def _host_return(self, params: dict[str, Any]) -> dict[str, Any]:
        names = list((self.evacuation or {"sources": {}})["sources"])
        self.phases |= dict.fromkeys(names, "live")
        self.evacuation = None
        return {"host": self.host, "evacuation": None, "returned": names, "failed": {}}

    def _support_collect(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"files": {"logs/tap-web.log": "tap: vm.vda: connection 1\n"}}

    def _certificate_show(self, _: dict[str, Any]) -> dict[str, Any]:
        begin = NOW - 86400 * 100
        times = {"not_before": begin, "not_after": begin + 86400 * 366, "renewal": begin + 86400 * 244}
        return {"appliance": f"uuid-of-{self.host}", "due": False, "problem": ""} | times

    def _appliance_history(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        entry = {
            "time": NOW - 60,
            "user": "root",
            "method": "replicate.start",
            "group": "web",
            "outcome": "done",
            "detail": "",
        }
        return [entry] if params["group"] in ("", "web") else []

    def _machine_list(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return self.machines

    def _role(self, group: str) -> str:
        return "source" if self.groups[group]["source"] == self.site else "recovery"

    def _group_list(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        rows = []
        for name, spec in self.groups.items():
            role = self._role(name)
            key = "phase" if role == "source" else "mode"
            state = self.phases.get(name, "unprotected" if role == "source" else "journal")
            rows.append({"group": name, "role": role, key: state, "generation": 1, "spec": spec})
        return rows

    def _group_put(self, params: dict[str, Any]) -> dict[str, Any]:
        spec = params["spec"]
        self.groups[spec["name"]] = spec
        return {"group": spec["name"], "role": self._role(spec["name"]), "changed": True}

    def _group_remove(self, params: dict[str, Any]) -> dict[str, Any]:
        if params["group"] not in self.groups:
            raise NotFound("group", params["group"])
        if self.phases.get(params["group"]) == "live":
            raise WrongPhase(f"{params['group']} is live", group=params["group"])
        del self.groups[params["group"]]
        return {"group": params["group"], "removed": True}

    def _group_status(self, params: dict[str, Any]) -> dict[str, Any]:
        group = params["group"]
        return self._source_status(group) if self._role(group) == "source" else self._recovery_status(group)

    def _source_status(self, group: str) -> dict[str, Any]:
        spec = self.groups[group]
        disks = [{"target": "vda", "size": 2**30, "state": "ordered"}]
        return {
            "group": group,
            "role": "source",
            "phase": self.phases.get(group, "unprotected"),
            "reason": "",
            "generation": 1,
            "epoch": "a" * 32,
            "rpo_seconds": 4.0,
            "interval": spec["checkpoint_interval"],
            "last_checkpoint": {"number": 12, "time": NOW - 4},
            "link": {"state": "connected", "offset_ms": 0.2},
            "backlog_bytes": 4096,
            "sync": None,
            "machines": [{"name": name, "state": "running", "disks": disks} for name in spec["machines"]],
            "ring": {"size": 2**28, "used": 4096, "dropping": False},
            "spill": {"size": 2**30, "used": 0, "state": "empty", "error": ""},
            "dirty_map": {"size": 2**33, "used": 0},
            "evacuated": self._evacuated(),
        }

    def _recovery_status(self, group: str) -> dict[str, Any]:
        points = [{"number": row["number"], "time": row["time"]} for row in self.checkpoints]
        return {
            "group": group,
            "role": "recovery",
            "mode": "failed-over" if self.failovers else "journal",
            "generation": 1,
            "wall_ns": int(NOW * 1e9),
            "checkpoints": {
                "count": len(points),
                "oldest": points[0] if points else None,
                "newest": points[-1] if points else None,
            },
            "journal": {"bytes": 2**30, "limit": 64 * 2**30},
            "history": {"seconds": 3600.0, "target": 604800.0, "forecast": None},
            "recoveries": self.failovers,
            "evacuated": self._evacuated(),
        }

    def _link_list(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        other = "beta" if self.site == "alpha" else "alpha"
        groups = [
            {"group": name, "priority": spec["priority"], "limits": spec["limits"], "override": None, "rate": None}
            | {"because": "", "until": None, "state": "connected", "in_force": self.in_force}
            | {"sent_bytes": 2**20, "backlog_bytes": 4096}
            for name, spec in self.groups.items()
            if spec["source"] == self.site
        ]
        link = {"site": other, "host": f"{other[0]}1", "address": "127.0.0.1:7002", "limits": self.limits}
        return [link | {"override": self.override, "rate": None, "because": "", "until": None, "groups": groups}]

    def _link_put(self, params: dict[str, Any]) -> dict[str, Any]:
        changed = list(params["limits"])
        self.limits = params["limits"][changed[0]]
        return {"changed": changed}

    def _link_limit(self, params: dict[str, Any]) -> dict[str, Any]:
        rate = params["rate"]
        until = NOW + params["seconds"] if params.get("seconds") else 0
        self.override = None if rate is None else {"rate": rate, "until": until, "by": params["by"]}
        row = self._link_list({})[0]
        return (
            row if rate is None else row | {"rate": rate, "because": f"set by {params['by']}", "until": until or None}
        )

    def _fence_note(self, _: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _lease_take(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"group": params["group"], "holder": params["holder"], "token": "t"}

    def _lease_release(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"group": params["group"], "released": True}

    def _group_describe(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"spec": self.groups[params["group"]], "machines": [], "disks": []}

    def _group_fit(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"group": params["group"], "findings": []}

    def _replicate_start(self, params: dict[str, Any]) -> dict[str, Any]:
        self.phases[params["group"]] = "live"
        return {"group": params["group"], "phase": "syncing"}

    def _replicate_pause(self, params: dict[str, Any]) -> dict[str, Any]:
        self.phases[params["group"]] = "paused"
        return {"group": params["group"], "phase": "paused"}

    def _replicate_resume(self, params: dict[str, Any]) -> dict[str, Any]:
        self.phases[params["group"]] = "live"
        return {"group": params["group"], "phase": "catching-up"}

    def _replicate_stop(self, params: dict[str, Any]) -> dict[str, Any]:
        if self._role(params["group"]) == "recovery":
            return {"group": params["group"], "kept_until": NOW + params["keep_replica_seconds"]}
        self.phases[params["group"]] = "unprotected"
        return {"group": params["group"], "phase": "unprotected"}

    def _checkpoint_list(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return self.checkpoints

    def _checkpoint_choose(self, params: dict[str, Any]) -> dict[str, Any]:
        rows = {row["number"]: row for row in self.checkpoints}
        found = resolve(params["checkpoint"], [decode(row) for row in self.checkpoints], NOW)
        return rows[found.number]

    def _group_picture(self, params: dict[str, Any]) -> dict[str, Any]:
        row = next(row for row in self._group_list({}) if row["group"] == params["group"])
        role = row["role"]
        state = row["phase"] if role == "source" else "failed-over" if self.failovers else "journal"
        here = "running" if (role == "source") is (state != "failed-over") else "absent"
        machines = [{"name": name, "state": here} for name in row["spec"]["machines"]]
        return {
            "site": self.site,
            "host": self.host,
            "role": role,
            "state": state,
            "generation": 1,
            "machines": machines,
        }

    def _checkpoint_create(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"number": 13, "time": NOW, "kind": params["kind"], "tags": params["tags"]}

    def _checkpoint_tag(self, params: dict[str, Any]) -> dict[str, Any]:
        number = int(params["checkpoint"].removeprefix("#"))
        row = next(row for row in self.checkpoints if row["number"] == number)
        row["tags"] = [tag for tag in [*row["tags"], *params["tags"]] if tag not in params["remove"]]
        return row

    def _checkpoint_verify(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"number": 12, "time": NOW - 4, "bytes": 2**20, "frames": 16, "damaged": []}

    def _test_start(self, params: dict[str, Any]) -> dict[str, Any]:
        self.tests.append(recovery("test", params["group"], label=params.get("label", "")))
        return self.tests[-1]

    def _test_list(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        return [test for test in self.tests if params["group"] in ("", test["group"])]

    def _test_stop(self, params: dict[str, Any]) -> dict[str, Any]:
        self.tests = [test for test in self.tests if test["id"] != params["id"]]
        return {"id": params["id"], "removed": True}

    def _failover_plan(self, params: dict[str, Any]) -> dict[str, Any]:
        return {
            "group": params["group"],
            "checkpoint": self.checkpoints[-1],
            "loss_seconds": 4.0,
            "generation": 2,
            "source": {"site": "alpha", "host": "a1", "reachable": None, "fenced": False},
            "machines": [{"name": name, "disks": [{"target": "vda", "size": 2**30}]} for name in ("db", "front")],
            "networks": [["lan", "lan-b"]],
            "findings": [],
        }

    def _failover_run(self, params: dict[str, Any]) -> dict[str, Any]:
        self.failovers = [recovery("failover", params["group"])]
        return self.failovers[0]

    def _failover_hold(self, params: dict[str, Any]) -> dict[str, Any]:
        one = self.failovers[0]
        one["auto"] = {"action": "rollback", "due": NOW + 60, "cancelled": "ann called it off", "seconds_left": None}
        return one

    def _handover_plan(self, params: dict[str, Any]) -> dict[str, Any]:
        group = params["group"]
        phase = self.phases.get(group, "live")
        return {"group": group, "generation": 1, "phase": phase, "handover": self.handover, "reasons": []}

    def _handover_run(self, params: dict[str, Any]) -> dict[str, Any]:
        self.phases[params["group"]] = "failed-over"
        final = {"number": 13, "time": NOW, "sequence": 1300, "epoch": "a" * 32}
        machines = self.groups[params["group"]]["machines"]
        self.handover = {
            "group": params["group"],
            "phase": "handed-over",
            "generation": 2,
            "machines": machines,
            "final": final,
        }
        return self.handover

    def _handover_undo(self, params: dict[str, Any]) -> dict[str, Any]:
        self.phases[params["group"]] = "catching-up"
        started, self.handover = (self.handover or {}).get("machines", []), None
        return {"group": params["group"], "phase": "catching-up", "generation": 3, "started": started}

    def _switchover_run(self, params: dict[str, Any]) -> dict[str, Any]:
        self.failovers = [recovery("switchover", params["group"], checkpoint={"number": 13, "time": NOW})]
        return self.failovers[0]

    def _rollback_plan(self, params: dict[str, Any]) -> dict[str, Any]:
        if not self.failovers and not params["generation"]:
            raise WrongPhase(f"{params['group']} is not failed over to this host")
        disk = {"machine": "db", "target": "vda", "written_bytes": 4096, "overlay": "/images/web/db.vda-g2.qcow2"}
        return {
            "group": params["group"],
            "recovery": self.failovers[0] if self.failovers else None,
            "generation": 3,
            "discards": [disk] if self.failovers else [],
        }

    def _rollback(self, params: dict[str, Any]) -> dict[str, Any]:
        plan = self._rollback_plan(params)
        if self.failovers:
            plan["recovery"] = self.failovers[0] | {"state": "rolled-back"}
        self.failovers = []
        kept, until = plan.pop("discards"), NOW + 7 * 86400 if plan["recovery"] else None
        return plan | {"kept": kept, "kept_until": until}

    def _commit(self, params: dict[str, Any]) -> dict[str, Any]:
        return recovery("failover", params["group"], state="committed")
