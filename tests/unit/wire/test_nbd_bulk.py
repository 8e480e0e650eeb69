"""Reads whose data the caller puts in place, against the server session and against servers that lie."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HypervisorRefused, ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd_bulk import BulkReads
from drctl.wire.nbd_client import NbdClient
from drctl.wire.nbd_server import NbdServer

SIZE = 1 << 20
CONTENT = random.Random(7).randbytes(SIZE)
EXPORTS = {"vm.vda": nbd.Export("vm.vda", SIZE, nbd.READ_ONLY_FLAGS)}


def bulk(*, structured: bool = True) -> tuple[NbdServer, BulkReads]:
    server, client = NbdServer(EXPORTS, structured=structured), NbdClient("vm.vda")
    while output := server.take_output():
        client.receive(output)
        server.receive(client.take_output())
    assert client.ready is not None
    return server, BulkReads(client.ready)


def take(reads: BulkReads, stream: bytes) -> tuple[bytearray, list[tuple[int, int]]]:
    """The disk as it was received, and the reads that are whole."""
    disk, done, at = bytearray(SIZE), [], 0
    while at < len(stream):
        count = reads.head(stream[at : at + reads.head_size])
        at += reads.head_size
        chunk = reads.body(stream[at : at + count])
        at += count
        if chunk.length and not chunk.hole:
            disk[chunk.offset : chunk.offset + chunk.length] = stream[at : at + chunk.length]
            at += chunk.length
        if chunk.done is not None:
            done.append(chunk.done)
    return disk, done


@pytest.mark.parametrize("structured", [True, False])
def test_replies_may_come_in_any_order(structured: bool) -> None:
    server, reads = bulk(structured=structured)
    requests = server.receive(b"".join(reads.ask(n * 65536, 65536) for n in range(5)))
    assert reads.waiting == 5
    answers = [server.data(each[2], each[3], CONTENT[each[3] : each[3] + each[4]]) for each in reversed(requests)]
    disk, done = take(reads, b"".join(bytes(part) for parts in answers for part in parts))
    assert disk[: 5 * 65536] == CONTENT[: 5 * 65536]
    assert done == [(n * 65536, 65536) for n in (4, 3, 2, 1, 0)]
    assert reads.waiting == 0


@pytest.mark.parametrize("structured", [True, False])
def test_holes_and_data_make_one_read(structured: bool) -> None:
    server, reads = bulk(structured=structured)
    ((_, _, cookie, *_),) = server.receive(reads.ask(4096, 12288))
    answer = b"".join(map(bytes, server.read_reply(cookie, 4096, [4096, b"x" * 4096, 4096])))
    disk, done = take(reads, answer)
    assert done == [(4096, 12288)]
    assert disk[4096:16384] == bytes(4096) + b"x" * 4096 + bytes(4096)


@pytest.mark.parametrize("structured", [True, False])
def test_an_error_names_its_reason(structured: bool) -> None:
    server, reads = bulk(structured=structured)
    ((_, _, cookie, *_),) = server.receive(reads.ask(0, 4096))
    with pytest.raises(HypervisorRefused, match="damaged" if structured else "EIO"):
        take(reads, server.fail(cookie, nbd.NBD_EIO, "damaged"))


def test_one_piece_is_asked_for_where_that_is_offered() -> None:
    flags = nbd.READ_ONLY_FLAGS | nbd.NBD_FLAG_SEND_DF
    server, client = NbdServer({"a": nbd.Export("a", SIZE, flags)}), NbdClient("a")
    while output := server.take_output():
        client.receive(output)
        server.receive(client.take_output())
    assert client.ready is not None
    asked = nbd.REQUEST.unpack(BulkReads(client.ready).ask(0, 512))
    assert asked[1] == nbd.NBD_CMD_FLAG_DF
    assert nbd.REQUEST.unpack(bulk()[1].ask(0, 512))[1] == 0


def test_what_is_not_on_the_disk_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="beyond"):
        bulk()[1].ask(SIZE - 512, 1024)


def chunk(kind: int, cookie: int, body: bytes, length: int | None = None, *, last: bool = True) -> bytes:
    size = len(body) if length is None else length
    return nbd.STRUCTURED_REPLY.pack(nbd.NBD_STRUCTURED_REPLY_MAGIC, int(last), kind, cookie, size) + body


def _at(offset: int) -> bytes:
    return offset.to_bytes(8, "big")


DATA, HOLE = nbd.NBD_REPLY_TYPE_OFFSET_DATA, nbd.NBD_REPLY_TYPE_OFFSET_HOLE
LIES = {
    "another cookie": chunk(DATA, 9, _at(0), 4096 + 8),
    "no reply": bytes(20),
    "beyond the read": chunk(DATA, 1, _at(8192), 4096 + 8),
    "before the read": chunk(DATA, 1, _at(0), 4096 + 8),
    "less than nothing": chunk(DATA, 1, _at(4096), 4),
    "too little": chunk(DATA, 1, _at(4096), 512 + 8),
    "nothing at all": chunk(nbd.NBD_REPLY_TYPE_NONE, 1, b""),
    "twice": chunk(HOLE, 1, _at(4096) + (4096).to_bytes(4, "big"), last=False) * 2
    + chunk(nbd.NBD_REPLY_TYPE_NONE, 1, b""),
    "a hole of nothing": chunk(HOLE, 1, _at(4096) + bytes(4)),
    "a long error": chunk(nbd.NBD_REPLY_TYPE_ERROR, 1, b"", 1 << 30),
    "a status": chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, 1, bytes(12)),
    "nothing with data": chunk(nbd.NBD_REPLY_TYPE_NONE, 1, bytes(4)),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_server_that_lies_is_found_out(lie: bytes) -> None:
    _, reads = bulk()
    reads.ask(4096, 4096)
    with pytest.raises(ProtocolViolation):
        take(reads, lie)


@settings(max_examples=200)
@given(st.binary(min_size=20, max_size=80))
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    _, reads = bulk()
    reads.ask(0, 4096)
    head = nbd.NBD_STRUCTURED_REPLY_MAGIC.to_bytes(4, "big")
    with suppress(ProtocolViolation, HypervisorRefused):
        count = reads.head(head + data[:4] + _at(1) + data[4:8])
        reads.body(data[8 : 8 + count].ljust(count, b"\0"))
