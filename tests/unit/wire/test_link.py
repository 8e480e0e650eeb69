"""The link's codec and session: any splitting of the bytes, no message out of place, nothing unbounded."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import ProtocolViolation
from drctl.wire import link
from drctl.wire.link import (
    Ack,
    Decoder,
    Frames,
    Hello,
    Ping,
    Pong,
    Position,
    Refused,
    Role,
    Session,
    SyncPlace,
    Welcome,
)

EPOCH = "0123456789abcdef0123456789abcdef"
HELLO = Hello(group="web", host="a", generation=1, epoch=EPOCH, appliance="u")
WELCOME = Welcome(position=Position(EPOCH, 7), last_mark=3, sync=SyncPlace("5f", 1, 4096))

messages = st.one_of(
    st.builds(Frames, st.binary(max_size=300)),
    st.builds(Ack, st.just(EPOCH), st.integers(0, 2**63 - 1), st.integers(0, 2**40)),
    st.builds(Ping, st.integers(0, 2**40), st.integers(0, 2**62)),
    st.builds(Pong, st.integers(0, 2**40), st.integers(0, 2**62), st.integers(0, 2**62)),
    st.builds(Refused, st.just("refused"), st.text(max_size=30)),
    st.just(HELLO),
    st.just(WELCOME),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(messages, max_size=6), st.data())
def test_any_splitting_gives_the_same_messages(sent, data):
    stream = b"".join(link.encode(message) for message in sent)
    decoder = Decoder()
    got = []
    position = 0
    while position < len(stream):
        step = data.draw(st.integers(1, max(1, len(stream) - position)))
        got += decoder.feed(stream[position : position + step])
        position += step
    assert got == sent


def test_byte_by_byte_is_as_at_once():
    stream = b"".join(link.encode(m) for m in (HELLO, Frames(b"abc" * 50), Ping(1, 2)))
    decoder = Decoder()
    got = [message for byte in stream for message in decoder.feed(bytes([byte]))]
    assert got == Decoder().feed(stream) == [HELLO, Frames(b"abc" * 50), Ping(1, 2)]


@pytest.mark.parametrize("length", [0, link.MAX_MESSAGE + 1, 2**32 - 1])
def test_a_bad_length_is_refused_before_its_body(length):
    with pytest.raises(ProtocolViolation, match="bytes; allowed"):
        Decoder().feed(struct.pack("<I", length))


@pytest.mark.parametrize("number", [0, 12, 255])
def test_an_unknown_type_is_refused_before_its_body(number):
    with pytest.raises(ProtocolViolation, match="unknown message type"):
        Decoder().feed(struct.pack("<IB", 1000, number))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"group": 5}', b"\xff\xfe", b'{"id": "x", "wall_ns": 1}'])
def test_a_body_that_is_not_understood_is_refused(body):
    for number in (1, 2, 4, 5, 6, 7):
        with pytest.raises(ProtocolViolation, match="can't be understood"):
            Decoder().feed(struct.pack("<IB", len(body) + 1, number) + body)


def test_unknown_fields_are_ignored():
    body = b'{"id": 4, "wall_ns": 9, "colour": "blue"}'
    assert Decoder().feed(struct.pack("<IB", len(body) + 1, 5) + body) == [Ping(4, 9)]


def test_too_large_is_not_sent():
    with pytest.raises(ProtocolViolation, match="larger than the link allows"):
        link.encode(Frames(bytes(link.MAX_MESSAGE)))


def test_the_largest_message_passes():
    message = Frames(bytes(link.MAX_MESSAGE - 1))
    assert Decoder().feed(link.encode(message)) == [message]


def _pair():
    source, receiver = Session(Role.SOURCE), Session(Role.RECEIVER)
    return source, receiver


def test_two_sessions_back_to_back():
    source, receiver = _pair()
    assert receiver.receive(source.send(HELLO)) == [HELLO]
    assert source.receive(receiver.send(WELCOME)) == [WELCOME]
    assert receiver.receive(source.send(Frames(b"x"))) == [Frames(b"x")]
    assert source.receive(receiver.send(Ack(EPOCH, 8))) == [Ack(EPOCH, 8)]
    assert receiver.receive(source.send(Ping(1, 2))) == [Ping(1, 2)]
    assert source.receive(receiver.send(Refused("refused", "no"))) == [Refused("refused", "no")]
    assert source.ended
    assert receiver.ended


@pytest.mark.parametrize("early", [Frames(b"x"), Ping(1, 2), Ack(EPOCH, 1), WELCOME])
def test_nothing_comes_before_hello(early):
    with pytest.raises(ProtocolViolation):
        Session(Role.RECEIVER).receive(link.encode(early))


def test_hello_comes_once():
    receiver = Session(Role.RECEIVER)
    receiver.receive(link.encode(HELLO))
    with pytest.raises(ProtocolViolation):
        receiver.receive(link.encode(HELLO))


def test_frames_wait_for_welcome():
    source, receiver = _pair()
    receiver.receive(source.send(HELLO))
    with pytest.raises(ProtocolViolation):
        source.send(Frames(b"x"))
    with pytest.raises(ProtocolViolation):
        receiver.receive(link.encode(Frames(b"x")))


def test_an_ack_before_welcome_is_refused():
    source, _ = _pair()
    source.send(HELLO)
    with pytest.raises(ProtocolViolation):
        source.receive(link.encode(Ack(EPOCH, 1)))


def test_after_refused_the_receiver_is_silent():
    source, receiver = _pair()
    receiver.receive(source.send(HELLO))
    source.receive(receiver.send(Refused("refused", "no")))
    with pytest.raises(ProtocolViolation):
        receiver.send(Ack(EPOCH, 1))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_violation_or_nothing(noise):
    try:
        messages = Session(Role.RECEIVER).receive(noise)
    except ProtocolViolation:
        return
    assert messages == []
