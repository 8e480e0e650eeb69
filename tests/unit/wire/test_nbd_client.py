"""The client session, against the server session and against servers that lie."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import NotFound, ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd_client import Done, Event, Failed, NbdClient, ReadDone, Ready, StatusDone
from drctl.wire.nbd_server import NbdServer

SIZE = 1 << 20
CONTENT = random.Random(7).randbytes(SIZE)
EXPORTS = {"vm.vda": nbd.Export("vm.vda", SIZE, nbd.READ_ONLY_FLAGS)}


def shake_hands(server: NbdServer, client: NbdClient) -> list[Event]:
    events: list[Event] = []
    while output := server.take_output():
        events += client.receive(output)
        server.receive(client.take_output())
    return events


def ready(*, structured: bool = True) -> tuple[NbdServer, NbdClient]:
    server, client = NbdServer(EXPORTS, structured=structured), NbdClient("vm.vda")
    shake_hands(server, client)
    assert client.ready is not None
    return server, client


def structured_chunk(kind: int, cookie: int, body: bytes, *, last: bool = True) -> bytes:
    return nbd.STRUCTURED_REPLY.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, int(last), kind, cookie, len(body)) + body


@pytest.mark.parametrize("structured", [True, False])
def test_ready_tells_what_was_agreed(structured: bool) -> None:
    server, client = NbdServer(EXPORTS, structured=structured), NbdClient("vm.vda")
    expected = Ready(SIZE, nbd.READ_ONLY_FLAGS, 512, 4096, 32 * nbd.MiB, structured, structured)
    assert shake_hands(server, client) == [expected]
    assert client.ready == expected


def test_an_unknown_export_is_not_found() -> None:
    server, client = NbdServer(EXPORTS), NbdClient("vm.sda")
    with pytest.raises(NotFound, match=r"vm\.sda"):
        shake_hands(server, client)


@pytest.mark.parametrize("structured", [True, False])
def test_replies_may_come_in_any_order(structured: bool) -> None:
    server, client = ready(structured=structured)
    asked = b"".join(client.read(n, n * 65536, 65536) for n in range(5)) + client.flush(9)
    requests = server.receive(asked)
    assert client.in_flight == 6
    answers = b""
    for command, _, cookie, offset, length, _ in reversed(requests):
        if command == nbd.NBD_CMD_FLUSH:
            answers += server.done(cookie)
        else:
            answers += b"".join(map(bytes, server.data(cookie, offset, CONTENT[offset : offset + length])))
    events = client.receive(answers)
    assert events[0] == Done(9)
    assert [event.cookie for event in events[1:]] == [4, 3, 2, 1, 0]
    for event in events[1:]:
        assert isinstance(event, ReadDone)
        assert event.data == CONTENT[event.offset : event.offset + 65536]
    assert client.in_flight == 0


@pytest.mark.parametrize("structured", [True, False])
def test_holes_read_as_zeroes(structured: bool) -> None:
    server, client = ready(structured=structured)
    server.receive(client.read(1, 4096, 12288))
    answer = b"".join(map(bytes, server.read_reply(1, 4096, [4096, b"x" * 4096, 4096])))
    assert (len(answer) < 5000) == structured
    (event,) = client.receive(answer)
    assert event == ReadDone(1, 4096, bytearray(bytes(4096) + b"x" * 4096 + bytes(4096)))


def test_block_status_is_told() -> None:
    server, client = ready()
    server.receive(client.block_status(3, 8192, 65536))
    extents = ((4096, 0), (61440, nbd.NBD_STATE_HOLE | nbd.NBD_STATE_ZERO))
    assert client.receive(server.block_status(3, extents)) == [StatusDone(3, 8192, extents)]


def test_block_status_may_not_be_asked_without_the_context() -> None:
    _, client = ready(structured=False)
    with pytest.raises(ValueError, match="block status"):
        client.block_status(1, 0, 4096)


@pytest.mark.parametrize("structured", [True, False])
def test_an_error_fails_one_request_only(structured: bool) -> None:
    server, client = ready(structured=structured)
    server.receive(client.read(1, 0, 4096) + client.read(2, 4096, 4096))
    answer = server.fail(1, nbd.NBD_EIO, "damaged") + b"".join(map(bytes, server.data(2, 4096, bytes(4096))))
    failed, done = client.receive(answer)
    assert failed == Failed(1, nbd.NBD_EIO, "damaged" if structured else "EIO")
    assert done == ReadDone(2, 4096, bytearray(4096))


def test_an_error_after_data_spoils_the_read() -> None:
    server, client = ready()
    server.receive(client.read(1, 0, 8192))
    answer = structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, bytes(8) + bytes(4096), last=False)
    assert client.receive(answer + server.fail(1, nbd.NBD_EIO)) == [Failed(1, nbd.NBD_EIO, "EIO")]


def test_requests_beyond_the_end_or_with_a_cookie_in_flight_are_our_own_mistake() -> None:
    _, client = ready()
    client.read(1, 0, 4096)
    with pytest.raises(ValueError, match="in flight"):
        client.read(1, 0, 4096)
    with pytest.raises(ValueError, match="beyond"):
        client.read(2, SIZE - 512, 4096)
    with pytest.raises(ValueError, match="before Ready"):
        NbdClient("x").read(1, 0, 1)


def _where(offset: int) -> bytes:
    return offset.to_bytes(8, "big")


@pytest.mark.parametrize(
    "answer",
    [
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(0) + bytes(4096)),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(4096) + bytes(4096)),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(0) + bytes(12288)),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(2**64 - 1) + bytes(4096)),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(0)),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, b""),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, 1, _where(0) + bytes(4096), last=False) * 2
        + structured_chunk(nbd.NBD_REPLY_TYPE_NONE, 1, b""),
        structured_chunk(nbd.NBD_REPLY_TYPE_NONE, 1, b""),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, 1, _where(0) + b"\0\0\x10\0"),
        structured_chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, 1, b"short"),
        structured_chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, 1, bytes(12)),
        structured_chunk(nbd.NBD_REPLY_TYPE_ERROR, 1, b"\0"),
        structured_chunk(77, 1, b""),
        structured_chunk(nbd.NBD_REPLY_TYPE_NONE, 2, b""),
        nbd.STRUCTURED_REPLY.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, 1, nbd.NBD_REPLY_TYPE_NONE, 1, 2**31),
        nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, 0, 1),
        bytes(32),
    ],
)
def test_a_server_that_lies_is_found_out(answer: bytes) -> None:
    """Above all, a part of a read that never came must not pass for zeroes."""
    server, client = ready()
    server.receive(client.read(1, 0, 8192))
    with pytest.raises(ProtocolViolation):
        client.receive(answer)


@pytest.mark.parametrize("hello", [bytes(18), nbd.SERVER_HELLO.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 0)])
def test_what_is_no_fixed_newstyle_server_is_refused(hello: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        NbdClient("vm.vda").receive(hello)


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 48), st.booleans()), min_size=1, max_size=6),
    st.lists(st.integers(1, 3000), min_size=1, max_size=10),
)
def test_the_pieces_in_which_bytes_come_do_not_matter(
    structured: bool, reads: list[tuple[int, int, bool]], cuts: list[int]
) -> None:
    server = NbdServer(EXPORTS, structured=structured)
    client = NbdClient("vm.vda")
    shake_hands(server, client)
    asked = b"".join(client.read(n, at * 512, count * 512) for n, (at, count, _) in enumerate(reads))
    answers = b""
    for (_, _, cookie, offset, length, _), (_, _, hole) in zip(server.receive(asked), reads, strict=True):
        half = length // 1024 * 512
        pieces = (
            [half, CONTENT[offset + half : offset + length]] if hole and half else [CONTENT[offset : offset + length]]
        )
        answers += b"".join(map(bytes, server.read_reply(cookie, offset, pieces)))
    events, position, turn = [], 0, 0
    while position < len(answers):
        count = cuts[turn % len(cuts)]
        events += client.receive(answers[position : position + count])
        position += count
        turn += 1
    assert len(events) == len(reads)
    for event, (at, count, hole) in zip(events, reads, strict=True):
        length = count * 512
        half = count // 2 * 512 if hole else 0
        assert event.data == bytes(half) + CONTENT[at * 512 + half : at * 512 + length]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_garbage_never_does_more_than_break_the_protocol(garbage: bytes, later: bool) -> None:
    server, client = NbdServer(EXPORTS), NbdClient("vm.vda")
    if later:
        shake_hands(server, client)
        client.read(1, 0, 4096)
    with suppress(ProtocolViolation, NotFound):
        client.receive(garbage)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 5)), min_size=1, max_size=6),
    st.lists(st.integers(40, 200_000), min_size=1, max_size=12),
    st.booleans(),
)
def test_what_is_received_into_the_clients_memory_is_the_same(
    reads: list[tuple[int, int]], sizes: list[int], structured: bool
) -> None:
    """However much comes at once, and wherever a reply's head ends."""
    server, client = ready(structured=structured)
    other = ready(structured=structured)[1]
    answers = b""
    for cookie, (place, length) in enumerate(reads):
        request = client.read(cookie, place * 32768, length * 32768)
        other.read(cookie, place * 32768, length * 32768)
        ((_, _, _, offset, size, _),) = server.receive(request)
        pieces = [length * 16384, CONTENT[offset : offset + length * 16384]] if cookie % 2 else None
        if pieces:
            answers += b"".join(map(bytes, server.read_reply(cookie, offset, pieces)))
        else:
            data = CONTENT[offset : offset + size]
            answers += b"".join(map(bytes, server.data(cookie, offset, data)))
    events: list[Event] = []
    at = turn = 0
    while at < len(answers):
        buffer = client.get_buffer()
        count = min(len(buffer), sizes[turn % len(sizes)], len(answers) - at)
        buffer[:count] = answers[at : at + count]
        events += client.buffer_updated(count)
        at, turn = at + count, turn + 1
    assert events == other.receive(answers)
    assert [event.cookie for event in events] == list(range(len(reads)))
