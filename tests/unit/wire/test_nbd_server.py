"""The server session: what it answers, what it refuses, and that the pieces in which bytes come never matter."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd_server import REFUSED, NbdServer

SIZE = 1 << 20
DISK = nbd.Export("vm.vda", SIZE, nbd.WRITABLE_FLAGS)
VIEW = nbd.Export("vm.view", SIZE, nbd.READ_ONLY_FLAGS, "a view")
EXPORTS = {export.name: export for export in (DISK, VIEW)}
HELLO = nbd.CLIENT_FLAGS.pack(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES)


def go(name: str, *infos: int, option: int = nbd.NBD_OPT_GO) -> bytes:
    wanted = len(infos).to_bytes(2, "big") + b"".join(info.to_bytes(2, "big") for info in infos)
    return nbd.pack_option(option, nbd.pack_string(name) + wanted)


def contexts(name: str, *queries: str, option: int = nbd.NBD_OPT_SET_META_CONTEXT) -> bytes:
    body = nbd.pack_string(name) + len(queries).to_bytes(4, "big") + b"".join(map(nbd.pack_string, queries))
    return nbd.pack_option(option, body)


def request(command: int, cookie: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of the option replies in `output`."""
    found = []
    while output:
        magic, option, kind, length = nbd.OPTION_REPLY.unpack_from(output)
        assert magic == nbd.NBD_REP_MAGIC
        end = nbd.OPTION_REPLY.size + length
        found.append((option, kind, output[nbd.OPTION_REPLY.size : end]))
        output = output[end:]
    return found


def greeted(**options: bool) -> NbdServer:
    server = NbdServer(EXPORTS, **options)
    assert server.take_output() == nbd.SERVER_HELLO.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 3)
    server.receive(HELLO)
    return server


def entered(name: str = "vm.vda", *, structured: bool = False) -> NbdServer:
    server = greeted()
    if structured:
        server.receive(nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY) + contexts(name, nbd.BASE_ALLOCATION))
    server.receive(go(name))
    server.take_output()
    assert server.export is not None
    return server


def kept(requests: list) -> list:
    """Requests with their payloads copied out of the session's buffer."""
    return [(*request[:5], bytes(request[5])) for request in requests]


def test_go_tells_size_flags_and_block_sizes() -> None:
    server = greeted()
    server.receive(go("vm.view", nbd.NBD_INFO_NAME, nbd.NBD_INFO_DESCRIPTION))
    answered = replies(server.take_output())
    assert [kind for _, kind, _ in answered] == [nbd.NBD_REP_INFO] * 4 + [nbd.NBD_REP_ACK]
    assert nbd.INFO_EXPORT.unpack(answered[0][2]) == (nbd.NBD_INFO_EXPORT, SIZE, nbd.READ_ONLY_FLAGS)
    assert nbd.INFO_BLOCK_SIZE.unpack(answered[1][2]) == (nbd.NBD_INFO_BLOCK_SIZE, 512, 4096, 32 * nbd.MiB)
    assert answered[2][2][2:] == b"vm.view"
    assert answered[3][2][2:] == b"a view"
    assert server.export == VIEW


def test_info_tells_but_does_not_enter() -> None:
    server = greeted()
    server.receive(go("vm.vda", option=nbd.NBD_OPT_INFO))
    assert replies(server.take_output())[-1][1] == nbd.NBD_REP_ACK
    assert server.export is None


def test_export_name_enters_and_pads_only_for_old_clients() -> None:
    for flags, padding in ((3, 0), (1, 124)):
        server = NbdServer(EXPORTS)
        server.take_output()
        server.receive(nbd.CLIENT_FLAGS.pack(flags) + nbd.pack_option(nbd.NBD_OPT_EXPORT_NAME, b"vm.vda"))
        assert server.take_output() == nbd.EXPORT_NAME_REPLY.pack(SIZE, DISK.flags) + bytes(padding)
        assert server.export == DISK


def test_export_name_of_nothing_hangs_up() -> None:
    with pytest.raises(ProtocolViolation, match=r"'vm\.sda'"):
        greeted().receive(nbd.pack_option(nbd.NBD_OPT_EXPORT_NAME, b"vm.sda"))


def test_list_names_all_exports() -> None:
    server = greeted()
    server.receive(nbd.pack_option(nbd.NBD_OPT_LIST))
    answered = replies(server.take_output())
    assert [kind for _, kind, _ in answered] == [nbd.NBD_REP_SERVER, nbd.NBD_REP_SERVER, nbd.NBD_REP_ACK]
    assert answered[1][2] == nbd.pack_string("vm.view") + b"a view"


def test_abort_is_acknowledged_and_closes() -> None:
    server = greeted()
    server.receive(nbd.pack_option(nbd.NBD_OPT_ABORT) + go("vm.vda"))
    assert replies(server.take_output()) == [(nbd.NBD_OPT_ABORT, nbd.NBD_REP_ACK, b"")]
    assert server.closed
    assert server.export is None


@pytest.mark.parametrize("option", [nbd.NBD_OPT_STARTTLS, nbd.NBD_OPT_EXTENDED_HEADERS, 12345])
def test_other_options_are_unsupported(option: int) -> None:
    server = greeted()
    server.receive(nbd.pack_option(option, b"whatever"))
    assert replies(server.take_output()) == [(option, nbd.NBD_REP_ERR_UNSUP, b"")]


def test_structured_replies_can_be_withheld() -> None:
    server = greeted(structured=False)
    server.receive(nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY) + contexts("vm.vda", nbd.BASE_ALLOCATION))
    assert {kind for _, kind, _ in replies(server.take_output())} == {nbd.NBD_REP_ERR_UNSUP}


def test_an_unknown_export_is_refused_by_name() -> None:
    server = greeted()
    server.receive(go("vm.sda") + go("vm.vda"))
    first, *_ = replies(server.take_output())
    assert first[1] == nbd.NBD_REP_ERR_UNKNOWN
    assert b"vm.sda" in first[2]
    assert server.export == DISK


def test_the_shell_may_turn_a_client_away() -> None:
    server = NbdServer(EXPORTS, admit=lambda export: f"{export.name} is taken")
    server.take_output()
    server.receive(HELLO + go("vm.vda"))
    assert replies(server.take_output()) == [(nbd.NBD_OPT_GO, nbd.NBD_REP_ERR_POLICY, b"vm.vda is taken")]
    assert server.export is None


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0\xff", nbd.pack_string("vm.vda"), nbd.pack_string("vm.vda") + b"\0\2\0\0", b"\0\0\0\1\xff\0\0"],
)
def test_a_malformed_go_is_invalid_and_the_next_one_works(data: bytes) -> None:
    server = greeted()
    server.receive(nbd.pack_option(nbd.NBD_OPT_GO, data))
    assert [kind for _, kind, _ in replies(server.take_output())] == [nbd.NBD_REP_ERR_INVALID]
    server.receive(go("vm.vda"))
    assert server.export == DISK


def test_contexts_need_structured_replies_first() -> None:
    server = greeted()
    server.receive(contexts("vm.vda", nbd.BASE_ALLOCATION))
    assert replies(server.take_output())[0][1] == nbd.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    ("option", "queries", "found"),
    [
        (nbd.NBD_OPT_SET_META_CONTEXT, ["base:allocation"], 1),
        (nbd.NBD_OPT_SET_META_CONTEXT, ["qemu:dirty-bitmap:x"], 0),
        (nbd.NBD_OPT_SET_META_CONTEXT, [], 0),
        (nbd.NBD_OPT_LIST_META_CONTEXT, [], 1),
        (nbd.NBD_OPT_LIST_META_CONTEXT, ["base:"], 1),
        (nbd.NBD_OPT_LIST_META_CONTEXT, ["qemu:"], 0),
    ],
)
def test_contexts_that_match_are_told(option: int, queries: list[str], found: int) -> None:
    server = greeted()
    server.receive(nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY) + contexts("vm.vda", *queries, option=option))
    answered = replies(server.take_output())[1:]
    assert [kind for _, kind, _ in answered] == [nbd.NBD_REP_META_CONTEXT] * found + [nbd.NBD_REP_ACK]


def test_a_context_of_another_export_is_void() -> None:
    server = greeted()
    server.receive(nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY) + contexts("vm.view", nbd.BASE_ALLOCATION))
    server.receive(go("vm.vda"))
    server.take_output()
    assert server.receive(request(nbd.NBD_CMD_BLOCK_STATUS, 1, 0, 4096)) == []
    assert nbd.STRUCTURED_REPLY.unpack_from(server.take_output())[2] == nbd.NBD_REPLY_TYPE_ERROR


def test_a_query_count_beyond_the_data_is_invalid() -> None:
    server = greeted()
    body = nbd.pack_string("vm.vda") + (2**32 - 1).to_bytes(4, "big")
    server.receive(nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY))
    server.receive(nbd.pack_option(nbd.NBD_OPT_LIST_META_CONTEXT, body))
    assert replies(server.take_output())[1][1] == nbd.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    "data",
    [
        nbd.CLIENT_FLAGS.pack(0xFFFF),
        HELLO + b"\0" * 16,
        HELLO + nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_GO, 2**31),
        HELLO + go("vm.vda") + b"\0" * 28,
        HELLO + go("vm.vda") + request(nbd.NBD_CMD_WRITE, 1, 0, 32 * nbd.MiB + 512),
    ],
)
def test_a_broken_protocol_is_fatal_before_anything_is_read(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        NbdServer(EXPORTS).receive(data)


def test_writes_come_out_whole_and_in_order() -> None:
    server = entered()
    payloads = [bytes([n]) * 512 * (n + 1) for n in range(9)]
    stream = b"".join(request(nbd.NBD_CMD_WRITE, n, n * 8192, len(data), data) for n, data in enumerate(payloads))
    assert kept(server.receive(stream)) == [
        (nbd.NBD_CMD_WRITE, 0, n, n * 8192, len(data), data) for n, data in enumerate(payloads)
    ]
    assert not server.has_output


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request(nbd.NBD_CMD_WRITE, 7, SIZE - 512, 1024, bytes(1024)), nbd.NBD_ENOSPC),
        (request(nbd.NBD_CMD_WRITE, 7, 1, 512, bytes(512)), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_WRITE, 7, 0, 100, bytes(100)), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_WRITE, 7, 0, 0), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_WRITE, 7, 0, 512, bytes(512), flags=0x100), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_WRITE_ZEROES, 7, 0, 2 * SIZE), nbd.NBD_ENOSPC),
        (request(nbd.NBD_CMD_WRITE_ZEROES, 7, 0, 512, flags=nbd.NBD_CMD_FLAG_FAST_ZERO), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_TRIM, 7, 0, 512), nbd.NBD_EINVAL),
    ],
)
def test_a_refused_change_is_answered_and_told(bad: bytes, error: int) -> None:
    server = entered()
    good = request(nbd.NBD_CMD_WRITE, 8, 0, 512, b"x" * 512)
    found = kept(server.receive(good + bad + good))
    assert [entry[0] for entry in found] == [nbd.NBD_CMD_WRITE, REFUSED, nbd.NBD_CMD_WRITE]
    assert found[1][2:5] == (7, 0, error)
    assert server.take_output() == nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, error, 7)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (request(nbd.NBD_CMD_READ, 7, SIZE, 512), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_READ, 7, 2**64 - 512, 512), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_READ, 7, 0, 0), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_READ, 7, 0, 512, flags=nbd.NBD_CMD_FLAG_DF), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_CACHE, 7, 0, 512), nbd.NBD_EINVAL),
        (request(99, 7, 0, 512), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_FLUSH, 7, 512, 0), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_BLOCK_STATUS, 7, 0, 512), nbd.NBD_EINVAL),
        (request(nbd.NBD_CMD_WRITE, 7, 0, 512, bytes(512)), nbd.NBD_EPERM),
        (request(nbd.NBD_CMD_WRITE_ZEROES, 7, 0, 512), nbd.NBD_EPERM),
        (request(nbd.NBD_CMD_TRIM, 7, 0, 512), nbd.NBD_EPERM),
    ],
)
def test_a_view_answers_what_it_does_not_do_by_itself(bad: bytes, error: int) -> None:
    server = entered("vm.view")
    good = request(nbd.NBD_CMD_READ, 8, 0, 512)
    assert [entry[2] for entry in server.receive(good + bad + good)] == [8, 8]
    assert server.take_output() == nbd.SIMPLE_REPLY.pack(nbd.NBD_SIMPLE_REPLY_MAGIC, error, 7)


def test_a_read_longer_than_offered_is_refused_without_ending_the_connection() -> None:
    server = NbdServer({"big": nbd.Export("big", 1 << 30, nbd.READ_ONLY_FLAGS)})
    server.take_output()
    server.receive(HELLO + go("big"))
    server.take_output()
    assert server.receive(request(nbd.NBD_CMD_READ, 1, 0, 64 * nbd.MiB)) == []
    assert server.take_output() == server.fail(1, nbd.NBD_EOVERFLOW)


def test_after_disc_nothing_is_read() -> None:
    server = entered()
    write = request(nbd.NBD_CMD_WRITE, 1, 0, 512, bytes(512))
    assert len(server.receive(write + request(nbd.NBD_CMD_DISC, 0, 0, 0) + write)) == 1
    assert server.closed


def test_errors_are_structured_where_agreed() -> None:
    server = entered(structured=True)
    body = server.fail(5, nbd.NBD_EIO, "checksum")
    magic, flags, kind, cookie, length = nbd.STRUCTURED_REPLY.unpack_from(body)
    assert (magic, flags, kind, cookie) == (nbd.NBD_STRUCTURED_REPLY_MAGIC, 1, nbd.NBD_REPLY_TYPE_ERROR, 5)
    assert body[nbd.STRUCTURED_REPLY.size :] == b"\0\0\0\x05\0\x08checksum"
    assert length == 14


def test_the_largest_write_fits_and_its_buffer_is_given_back() -> None:
    server = NbdServer({"big": nbd.Export("big", 1 << 30, nbd.WRITABLE_FLAGS)})
    server.receive(HELLO + go("big"))
    data = random.Random(1).randbytes(32 * nbd.MiB)
    stream = memoryview(request(nbd.NBD_CMD_WRITE, 1, 0, len(data), data))
    found: list = []
    while stream:
        room = server.get_buffer()
        count = min(len(room), len(stream), 200_000)
        room[:count] = stream[:count]
        stream = stream[count:]
        found += server.buffer_updated(count)
    assert found[0][5] == data
    assert len(server.get_buffer()) > 32 * nbd.MiB
    for _ in range(600):
        server.receive(request(nbd.NBD_CMD_FLUSH, 1, 0, 0))
    assert len(server.get_buffer()) < nbd.MiB


_COMMANDS = st.one_of(
    st.builds(
        lambda n, count, seed: request(
            nbd.NBD_CMD_WRITE, n, n * 512, count * 512, random.Random(seed).randbytes(count * 512)
        ),
        st.integers(0, 1000), st.integers(0, 20), st.integers(),
    ),
    st.builds(request, st.sampled_from([0, 3, 4, 5, 6, 7, 9]), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1),
              st.integers(0, 2**32 - 1)),
    st.builds(lambda n: request(nbd.NBD_CMD_WRITE_ZEROES, n, 0, 4096), st.integers(0, 9)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(_COMMANDS, max_size=12), st.booleans(), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_the_pieces_in_which_bytes_come_do_not_matter(commands: list[bytes], structured: bool, cuts: list[int]) -> None:
    opening = HELLO + (nbd.pack_option(nbd.NBD_OPT_STRUCTURED_REPLY) if structured else b"") + go("vm.vda")
    stream = opening + b"".join(commands)

    def fed(sizes: list[int]) -> tuple[list, bytes]:
        server = NbdServer(EXPORTS)
        found, output, position, turn = [], b"", 0, 0
        while position < len(stream):
            count = sizes[turn % len(sizes)]
            found += kept(server.receive(stream[position : position + count]))
            output += server.take_output()
            position += count
            turn += 1
        return found, output

    whole = fed([len(stream)])
    assert fed([1]) == whole
    assert fed(cuts) == whole


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_garbage_never_does_more_than_break_the_protocol(garbage: bytes, depth: int) -> None:
    server = NbdServer(EXPORTS)
    opening = [b"", HELLO, HELLO + nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_GO, len(garbage)), HELLO + go("vm.vda")]
    server.receive(opening[depth])
    try:
        for requested in server.receive(garbage):
            assert requested[3] + requested[4] <= SIZE or requested[0] == REFUSED
    except ProtocolViolation:
        pass
