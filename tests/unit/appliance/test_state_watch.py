"""Changed states are told once each; what was there from the beginning is not."""

from __future__ import annotations

import json

from drctl.appliance.state_watch import StateWatch, group_states
from drctl.model.hook import Hook


def test_changes_alone_are_told(tmp_path) -> None:
    test = {"kind": "test", "id": "t1", "group": "web", "state": "running"}
    looks = [
        group_states([("web", "live")], [("mail", "journal")], []),
        group_states([("web", "live")], [("mail", "journal")], []),
        group_states([("web", "broken")], [("mail", "journal")], [test]),
        group_states([("web", "broken")], [("mail", "failed-over")], []),
    ]
    waiting = iter(looks)
    hook = Hook(("/bin/sh", "-c", "cat >> told"), 5.0, str(tmp_path))
    watch = StateWatch(hook, ("beta", "b1"), lambda: next(waiting))
    for _ in looks:
        watch.look()
    watch.stop()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [(one["kind"], one["name"], one["before"], one["state"]) for one in told] == [
        ("source", "web", "live", "broken"),
        ("test", "t1", "", "running"),
        ("recovery", "mail", "journal", "failed-over"),
        ("test", "t1", "running", "gone"),
    ]
    assert {(one["event"], one["site"], one["host"]) for one in told} == {("state-changed", "beta", "b1")}
