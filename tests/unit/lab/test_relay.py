"""Tokens go around rings; a copy of a guest never hears of its original's future."""

from __future__ import annotations

from drctl.lab.protocol import read_log
from drctl.lab.relay import Place, Relay

ONE, TWO = Place("alpha", "web-1"), Place("alpha", "web-2")


def ring(*members: tuple[Place, str]) -> Relay:
    relay = Relay()
    for place, guest in members:
        relay.join(place, guest)
    return relay


def test_a_token_goes_to_the_next_guest_and_around():
    relay = ring((ONE, "web-1"), (TWO, "web-2"))
    assert relay.token(ONE, "0", "5", "ab", 1.0) == [(TWO, "token web-1 0 5 ab")]
    assert relay.token(TWO, "0", "9", "cd", 1.0) == [(ONE, "token web-2 0 9 cd")]


def test_a_guest_alone_may_go_on():
    assert ring((ONE, "web-1")).token(ONE, "0", "5", "ab", 1.0) == [(ONE, "token - 0 0")]


def test_copies_and_other_sites_are_rings_of_their_own():
    copy, other = Place("beta", "web-2-test"), Place("beta", "web-2")
    relay = ring((ONE, "web-1"), (copy, "web-2"), (other, "web-2"))
    for place, guest in ((ONE, "web-1"), (copy, "web-2"), (other, "web-2")):
        assert relay.token(place, "0", "5", "ab", 1.0) == [(place, "token - 0 0")], guest


def test_a_stalled_ring_is_pushed_and_told_its_newest_tokens():
    relay = ring((ONE, "web-1"), (TWO, "web-2"))
    relay.token(ONE, "0", "5", "ab", 10.0)
    assert relay.tick(10.5) == []
    assert relay.tick(11.1) == [(TWO, "token web-1 0 5 ab"), (ONE, "token - 0 0")]
    assert relay.tick(11.2) == []


def test_who_left_gets_nothing():
    relay = ring((ONE, "web-1"), (TWO, "web-2"))
    relay.leave(TWO)
    assert relay.token(ONE, "0", "6", "ab", 2.0) == [(ONE, "token - 0 0")]
    assert relay.token(TWO, "0", "6", "ab", 2.0) == []


LOG = """\
100 alpha web-1 web-1 UP web-1 aa 2
110 alpha web-1 web-1 ACK aa 1 0
120 beta web-1 web-1 ACK bb 7 7
130 alpha web-1-copy web-1 ACK cc 9 9
140 alpha web-1 web-1 ACK aa 3 2
150 alpha web-2 web-2 ACK aa 1 1
160 alpha web-1 web-1 ACK aa 4 2
170 alpha web-1 web-1 ACK aa 5"""


def test_the_log_tells_when_a_record_was_first_acknowledged():
    logs = read_log(LOG.splitlines(keepends=True), "alpha")
    one = logs["web-1"]
    assert (one.acknowledged(0, 1), one.acknowledged(0, 2), one.acknowledged(0, 4)) == (110, 140, 160)
    assert one.acknowledged(0, 5) is None, "the last line is torn"
    assert (one.newest(0, 139), one.newest(1, 1000), one.newest(0, 5)) == (1, 2, 0)
    assert set(logs) == {"web-1", "web-2"}


def test_the_log_up_to_a_moment():
    assert read_log(LOG.splitlines(keepends=True), "alpha", until_ns=145)["web-1"].numbers == [(1, 0), (3, 2)]


def test_a_rollback_starts_the_log_anew():
    lines = [*LOG.splitlines(keepends=True)[:-1], "180 alpha web-1 web-1 ACK dd 2 2\n"]
    log = read_log(lines, "alpha")["web-1"]
    assert log.acknowledged(0, 2) == 180
    assert log.acknowledged(0, 3) is None
