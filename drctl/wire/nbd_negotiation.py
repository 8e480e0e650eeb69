"""The option phase of fixed newstyle NBD, the server's side: an option in, its answer out. Knows no buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from drctl.errors import ProtocolViolation
from drctl.wire import nbd
from drctl.wire.nbd import Export

#: The id under which base:allocation is answered.
ALLOCATION_ID = 1

Exports = Mapping[str, Export]
#: Asked before an export is entered; a text says why not, an empty one lets the client in.
Admit = Callable[[Export], str]


def admit_all(export: Export) -> str:
    """Let everybody in."""
    return ""


class Negotiation:
    """What client and server have agreed so far. Invariant: `export` is set once, at its end."""

    def __init__(self, exports: Exports, *, structured: bool, admit: Admit) -> None:
        self._exports = exports
        self._offer_structured = structured
        self._admit = admit
        self._allocation_for: str | None = None
        self.no_zeroes = False
        self.structured = False
        self.allocation = False
        self.aborted = False
        self.export: Export | None = None

    def flags(self, flags: int) -> None:
        """The client's flags. Raises ProtocolViolation for one that was not offered."""
        if flags & ~(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES):
            raise ProtocolViolation(f"NBD client flags {flags:#x} were not offered")
        self.no_zeroes = bool(flags & nbd.NBD_FLAG_C_NO_ZEROES)

    def option(self, option: int, data: bytes) -> bytes:
        """The answer. Raises ProtocolViolation where the protocol leaves no way to refuse."""
        match option:
            case nbd.NBD_OPT_EXPORT_NAME:
                return self._export_name(data)
            case nbd.NBD_OPT_ABORT:
                self.aborted = True
                return nbd.pack_option_reply(option, nbd.NBD_REP_ACK)
            case nbd.NBD_OPT_LIST:
                return self._list(data)
            case nbd.NBD_OPT_INFO | nbd.NBD_OPT_GO:
                return self._info(option, data)
            case nbd.NBD_OPT_STRUCTURED_REPLY if self._offer_structured:
                return self._structured(data)
            case nbd.NBD_OPT_LIST_META_CONTEXT | nbd.NBD_OPT_SET_META_CONTEXT if self._offer_structured:
                return self._meta_context(option, data)
            case _:
                return nbd.pack_option_reply(option, nbd.NBD_REP_ERR_UNSUP)

    def _export_name(self, data: bytes) -> bytes:
        name = data.decode("utf-8", "replace")
        export = self._exports.get(name)
        refusal = self._admit(export) if export is not None else "there is no such export"
        if export is None or refusal:
            # This old option has no error reply: the protocol says to hang up.
            raise ProtocolViolation(f"NBD export {name!r} refused: {refusal}")
        self._enter(export)
        return nbd.EXPORT_NAME_REPLY.pack(export.size, export.flags) + (b"" if self.no_zeroes else bytes(124))

    def _enter(self, export: Export) -> None:
        self.export = export
        # A context chosen for another export is void.
        self.allocation = self.structured and self._allocation_for == export.name

    def _list(self, data: bytes) -> bytes:
        if data:
            return _refuse(nbd.NBD_OPT_LIST, nbd.NBD_REP_ERR_INVALID, "LIST takes no data")
        names = (nbd.pack_string(e.name) + e.description.encode() for e in self._exports.values())
        replies = [nbd.pack_option_reply(nbd.NBD_OPT_LIST, nbd.NBD_REP_SERVER, name) for name in names]
        return b"".join(replies) + nbd.pack_option_reply(nbd.NBD_OPT_LIST, nbd.NBD_REP_ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        parsed = _string_at(data, 0)
        if parsed is None or len(data) < parsed[1] + 2:
            return _refuse(option, nbd.NBD_REP_ERR_INVALID, "malformed request")
        name, position = parsed
        count = int.from_bytes(data[position : position + 2], "big")
        if len(data) != position + 2 + 2 * count:
            return _refuse(option, nbd.NBD_REP_ERR_INVALID, "malformed information requests")
        wanted = {int.from_bytes(data[at : at + 2], "big") for at in range(position + 2, len(data), 2)}
        export = self._exports.get(name)
        if export is None:
            return _refuse(option, nbd.NBD_REP_ERR_UNKNOWN, f"there is no export {name!r}")
        if option == nbd.NBD_OPT_GO:
            if refusal := self._admit(export):
                return _refuse(option, nbd.NBD_REP_ERR_POLICY, refusal)
            self._enter(export)
        return _export_info(option, export, wanted)

    def _structured(self, data: bytes) -> bytes:
        option = nbd.NBD_OPT_STRUCTURED_REPLY
        if data:
            return _refuse(option, nbd.NBD_REP_ERR_INVALID, "STRUCTURED_REPLY takes no data")
        self.structured = True
        return nbd.pack_option_reply(option, nbd.NBD_REP_ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        chosen = option == nbd.NBD_OPT_SET_META_CONTEXT
        if chosen:
            self._allocation_for = None
        if chosen and not self.structured:
            return _refuse(option, nbd.NBD_REP_ERR_INVALID, "structured replies come first")
        parsed = _queries(data)
        if parsed is None:
            return _refuse(option, nbd.NBD_REP_ERR_INVALID, "malformed request")
        name, queries = parsed
        if name not in self._exports:
            return _refuse(option, nbd.NBD_REP_ERR_UNKNOWN, f"there is no export {name!r}")
        matched = nbd.BASE_ALLOCATION in queries or (not chosen and (not queries or "base:" in queries))
        if not matched:
            return nbd.pack_option_reply(option, nbd.NBD_REP_ACK)
        if chosen:
            self._allocation_for = name
        context = (ALLOCATION_ID if chosen else 0).to_bytes(4, "big") + nbd.BASE_ALLOCATION.encode()
        reply = nbd.pack_option_reply(option, nbd.NBD_REP_META_CONTEXT, context)
        return reply + nbd.pack_option_reply(option, nbd.NBD_REP_ACK)


def _refuse(option: int, kind: int, message: str) -> bytes:
    return nbd.pack_option_reply(option, kind, message.encode())


def _export_info(option: int, export: Export, wanted: set[int]) -> bytes:
    infos = [
        nbd.INFO_EXPORT.pack(nbd.NBD_INFO_EXPORT, export.size, export.flags),
        # Sent unasked too: a client that does not look at it would get errors for what is not aligned.
        nbd.INFO_BLOCK_SIZE.pack(
            nbd.NBD_INFO_BLOCK_SIZE, export.minimum_block, export.preferred_block, export.maximum_payload
        ),
    ]
    if nbd.NBD_INFO_NAME in wanted:
        infos.append(nbd.NBD_INFO_NAME.to_bytes(2, "big") + export.name.encode())
    if nbd.NBD_INFO_DESCRIPTION in wanted and export.description:
        infos.append(nbd.NBD_INFO_DESCRIPTION.to_bytes(2, "big") + export.description.encode())
    replies = [nbd.pack_option_reply(option, nbd.NBD_REP_INFO, info) for info in infos]
    return b"".join(replies) + nbd.pack_option_reply(option, nbd.NBD_REP_ACK)


def _string_at(data: bytes, position: int) -> tuple[str, int] | None:
    """The string with its length before it, and where it ends; None when it does not fit or is no UTF-8."""
    begin = position + 4
    end = begin + int.from_bytes(data[position:begin], "big")
    if len(data) < begin or len(data) < end or end - begin > nbd.MAX_STRING:
        return None
    try:
        return data[begin:end].decode(), end
    except UnicodeDecodeError:
        return None


def _queries(data: bytes) -> tuple[str, list[str]] | None:
    parsed = _string_at(data, 0)
    if parsed is None or len(data) < parsed[1] + 4:
        return None
    name, position = parsed
    count = int.from_bytes(data[position : position + 4], "big")
    position += 4
    queries: list[str] = []
    # A query takes at least its four length bytes, so a forged count can't make this loop long.
    if count > (len(data) - position) // 4:
        return None
    for _ in range(count):
        query = _string_at(data, position)
        if query is None:
            return None
        queries.append(query[0])
        position = query[1]
    return (name, queries) if position == len(data) else None
