"""The shipper's priority: yields while there is room, hurries when there is not, never stuck without rights."""

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
    priority = Priority(nice)
    priority.look(0.0, 0.1, 0.0, 0.0)
    assert nice.now == YIELDING


def test_hurries_for_a_full_ring_a_late_mark_or_hunger_and_calms_down() -> None:
    for fill, mark_age, starved in ((0.6, 0, 0), (0, 1.5, 0), (0, 0, 0.7)):
        nice = Nice()
        priority = Priority(nice)
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
    priority = Priority(nice)
    priority.look(0.0, 0.0, 0.0, 0.0)
    priority.look(0.1, 0.9, 0.0, 0.0)
    assert nice.now == FIXED
