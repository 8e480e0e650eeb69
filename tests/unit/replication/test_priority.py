"""The shipper's priority: yields while there is room, hurries when there is not, never stuck without rights."""

import subprocess
import sys
from pathlib import Path

import pytest

from drctl.replication.priority import FIXED, HURRY_LASTS, PRESSED, YIELDING, Priority


class Nice:
    def __init__(self, lowest: int = -20) -> None:
        self.lowest = lowest
        self.now = 0

    def __call__(self, nice: int) -> bool:
        if nice < self.now and nice < self.lowest:
            return False
        self.now = nice
        return True


def test_yields_while_the_ring_has_room() -> None:
    nice = Nice()
    priority = Priority(nice, lambda _: True)
    priority.look(0.0, 0.1, 0.0, 0.0)
    assert nice.now == YIELDING


def test_hurries_for_a_full_ring_a_late_mark_or_hunger_and_calms_down() -> None:
    for fill, mark_age, starved in ((0.6, 0, 0), (0, 1.5, 0), (0, 0, 0.7)):
        nice = Nice()
        priority = Priority(nice, lambda _: True)
        priority.look(0.0, fill, mark_age, starved)
        assert nice.now == PRESSED
        priority.look(HURRY_LASTS / 2, 0.0, 0.0, 0.0)
        assert nice.now == PRESSED, "no to and fro"
        priority.look(HURRY_LASTS + 0.1, 0.3, 0.0, 0.0)
        assert nice.now == PRESSED, "not before there is room again"
        priority.look(HURRY_LASTS + 0.2, 0.1, 0.0, 0.0)
        assert nice.now == YIELDING


def test_without_the_right_to_come_back_it_stays_where_it_is() -> None:
    nice = Nice(lowest=19)
    priority = Priority(nice, lambda _: True)
    priority.look(0.0, 0.0, 0.0, 0.0)
    priority.look(0.1, 0.9, 0.0, 0.0)
    assert nice.now == FIXED


def test_the_sessions_niceness_is_tried_again_until_it_is_had() -> None:
    asked, answers = [], [False, True, True]

    def set_session(nice: int) -> bool:
        asked.append(nice)
        return answers.pop(0)

    priority = Priority(Nice(lowest=19), set_session)
    for now in (0.0, 0.1, 0.2, 0.3):
        priority.look(now, 0.0, 0.0, 0.0)
    assert asked == [YIELDING, YIELDING]
    priority.look(0.4, 0.9, 0.0, 0.0)
    assert asked[2:] == [PRESSED]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="a kernel without autogroups")
def test_a_process_with_a_session_of_its_own_yields_to_others() -> None:
    program = (
        "from pathlib import Path; from drctl.replication.priority import nice_of_session\n"
        "while not nice_of_session(10): pass\n"
        "print(Path('/proc/self/autogroup').read_text())"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True)
    assert told.stdout.split()[-1] == "10", told
