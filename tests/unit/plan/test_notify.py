"""The command that is told: never waited for, bounded, and told all that fits."""

from __future__ import annotations

import json
import time

from drctl.model.hook import Hook
from drctl.plan.notify import WAITING, Notifications, environment


def test_who_tells_never_waits_and_what_does_not_fit_is_said(tmp_path) -> None:
    said: list[str] = []
    notifications = Notifications(Hook(("/bin/sleep", "30"), 1.0, str(tmp_path)), said.append)
    begun = time.monotonic()
    for number in range(WAITING + 10):
        notifications.tell("e", {"n": number})
    assert time.monotonic() - begun < 0.5
    assert any(f"{WAITING} others wait" in line for line in said)
    begun = time.monotonic()
    notifications.close()
    assert time.monotonic() - begun < 4.0


def test_megabytes_on_stdin_need_not_be_read(tmp_path) -> None:
    said: list[str] = []
    notifications = Notifications(Hook(("/bin/true",), 5.0, str(tmp_path)), said.append)
    notifications.tell("e", {"text": "x" * 4_000_000, "list": [1, 2]})
    notifications.close()
    assert said == []


def test_events_come_in_their_order(tmp_path) -> None:
    script = "cat >> told"
    notifications = Notifications(Hook(("/bin/sh", "-c", script), 5.0, str(tmp_path)), print)
    for number in range(5):
        notifications.tell("e", {"n": number, "deep": {"a": [1]}})
    notifications.close()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [one["n"] for one in told] == [0, 1, 2, 3, 4]
    assert told[0] == {"format": 1, "event": "e", "n": 0, "deep": {"a": [1]}}


def test_nobody_is_told_without_a_command() -> None:
    notifications = Notifications(Hook(), print)
    notifications.tell("e", {})
    notifications.close()


def test_the_environment_holds_words_alone() -> None:
    facts = {"event": "e", "n": 1.5, "yes": True, "list": [1], "bad": "a\0b", "none": None}
    assert environment(facts) == {"DRCTL_EVENT": "e", "DRCTL_N": "1.5", "DRCTL_YES": "true", "DRCTL_BAD": "a\\x00b"}
