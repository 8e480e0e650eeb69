"""The link's messages, and the order in which each side may send them. Sans-IO: knows no sockets and no clock.

Every message is (also in docs/formats.md), integers little-endian:

    offset size
         0    4  length of the rest, 1 .. 4 MiB
         4    1  type (MessageType)
         5    n  body: JSON; for FRAMES whole frames one after the other; for SIGNATURES, DIGESTS and MASKS
                 what wire/signature.py lays out

The length is checked before a byte of the body is waited for. The source dials and says HELLO; the receiver answers
WELCOME or REFUSED; then FRAMES, PING, COMPARE and DIGESTS go one way, ACK, PONG, SIGNATURES, MASKS and REFUSED the
other. JSON bodies may carry fields that this version does not know: they are ignored. COMPARE and DIGESTS are said only
to a receiver whose WELCOME had a signature_key: an older one would not understand them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum, IntEnum

import msgspec
import numpy as np

from drctl.errors import ProtocolViolation
from drctl.wire import signature
from drctl.wire.signature import Compare, Digests, PartMasks, Signatures

VERSION = 1
#: Bounds the memory that a peer can make us reserve; the shipper packs at most a quarter of it into one message.
MAX_MESSAGE = 4 * 1024 * 1024
_HEAD = struct.Struct("<IB")


class MessageType(IntEnum):
    HELLO = 1
    WELCOME = 2
    FRAMES = 3
    ACK = 4
    PING = 5
    PONG = 6
    REFUSED = 7
    COMPARE = 8
    SIGNATURES = 9
    DIGESTS = 10
    MASKS = 11


class Position(msgspec.Struct, frozen=True):
    """A place in a stream. `sequence` 0: the epoch was never seen."""

    epoch: str = ""
    sequence: int = 0


class SyncPlace(msgspec.Struct, frozen=True):
    """How far a sync is durable: every disk before `disk` whole, and `disk` below `offset` (bytes)."""

    id: str
    disk: int = 0
    offset: int = 0
    done: bool = False


class JournalSpace(msgspec.Struct, frozen=True):
    """Bytes used and allowed, and the wall time of the oldest checkpoint (nanoseconds; 0: none)."""

    bytes: int = 0
    limit: int = 0
    oldest_wall_ns: int = 0


class Hello(msgspec.Struct, frozen=True):
    """First message of the source. With `ask` it only wants to know whether the group still reigns at its site."""

    group: str
    host: str
    generation: int
    epoch: str
    appliance: str
    version: int = VERSION
    software: str = ""
    wall_ns: int = 0
    ask: bool = False


class Welcome(msgspec.Struct, frozen=True):
    """The receiver's answer: what is durable there, and so where the source goes on.

    `last_mark` is the newest MARK of this stream that is durable there, proven or not, `proven_mark` the newest that is
    proven; `last_number` the largest number of a mark in the whole group, so that numbers stay unique over epochs.
    `generation` is the one that the receiver takes streams of. `needs` is `initial`, `full` or `nothing`.
    `signature_key`: hex; empty when no signatures can be asked for."""

    position: Position
    version: int = VERSION
    software: str = ""
    last_mark: int = 0
    proven_mark: int = 0
    last_number: int = 0
    sync: SyncPlace | None = None
    definition_version: int = 0
    needs: str = "nothing"
    wall_ns: int = 0
    signature_key: str = ""
    generation: int = 0


class Frames(msgspec.Struct, frozen=True):
    """Whole frames (wire/frame.py), not yet checked."""

    data: bytes | memoryview


class Ack(msgspec.Struct, frozen=True):
    """What is durable now. `mark` is the newest proven and durable one; `sync` the newest sync's place."""

    epoch: str
    sequence: int
    mark: int = 0
    sync: SyncPlace | None = None
    journal: JournalSpace = JournalSpace()
    base: str = ""


class Ping(msgspec.Struct, frozen=True):
    id: int
    wall_ns: int
    monotonic_ns: int = 0


class Pong(msgspec.Struct, frozen=True):
    """`wall_ns` and `monotonic_ns` are the answering side's."""

    id: int
    wall_ns: int
    monotonic_ns: int = 0


class Refused(msgspec.Struct, frozen=True):
    """The receiver ends the connection and says why."""

    error: str
    message: str
    hint: str = ""


Message = Hello | Welcome | Frames | Ack | Ping | Pong | Refused | Compare | Signatures | Digests | PartMasks

_TYPES: dict[MessageType, type[Message]] = {
    MessageType.HELLO: Hello,
    MessageType.WELCOME: Welcome,
    MessageType.ACK: Ack,
    MessageType.PING: Ping,
    MessageType.PONG: Pong,
    MessageType.REFUSED: Refused,
    MessageType.COMPARE: Compare,
    MessageType.SIGNATURES: Signatures,
    MessageType.DIGESTS: Digests,
    MessageType.MASKS: PartMasks,
}
_NUMBERS: dict[type[Message], MessageType] = {kind: number for number, kind in _TYPES.items()}
_UNPACK: dict[MessageType, Callable[[memoryview], Message]] = {
    MessageType.FRAMES: lambda body: Frames(body),
    MessageType.SIGNATURES: signature.unpack_signatures,
    MessageType.DIGESTS: signature.unpack_digests,
    MessageType.MASKS: signature.unpack_masks,
}
_DECODERS = {number: msgspec.json.Decoder(kind) for number, kind in _TYPES.items() if number not in _UNPACK}
_ENCODER = msgspec.json.Encoder()
_FRAMES = Frames(b"")


def encode(message: Message) -> bytes:
    """The message's bytes. Raises ProtocolViolation when it is larger than the link allows."""
    if isinstance(message, Frames):
        return frames_head(len(message.data)) + message.data
    body = _body(message)
    return _head(_NUMBERS[type(message)], len(body)) + body


def _body(message: Message) -> bytes:
    match message:
        case Signatures():
            return signature.pack_signatures(message)
        case Digests():
            return signature.pack_digests(message)
        case PartMasks():
            return signature.pack_masks(message)
    return _ENCODER.encode(message)


def frames_head(length: int) -> bytes:
    """What goes before `length` bytes of frames, so that large bodies need not be copied to be sent."""
    return _head(MessageType.FRAMES, length)


def _head(number: MessageType, length: int) -> bytes:
    if length + 1 > MAX_MESSAGE:
        raise ProtocolViolation(f"{number.name} of {length} bytes is larger than the link allows ({MAX_MESSAGE})")
    return _HEAD.pack(length + 1, number)


class Decoder:
    """Bytes in, whole messages out. Each body is received into memory of its own, which FRAMES then hand on uncopied.

    Invariant: no more is reserved than one message of MAX_MESSAGE. `_filled` bytes of the head are there, or, with a
    `_body`, of that."""

    def __init__(self) -> None:
        self._head = bytearray(_HEAD.size)
        self._body: memoryview | None = None
        self._filled = 0

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """The messages that are whole now. Raises ProtocolViolation on a bad length, type or body."""
        found: list[Message] = []
        rest = memoryview(data)
        while rest:
            buffer = self.get_buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            buffer.release()
            rest = rest[count:]
            if (message := self.buffer_updated(count)) is not None:
                found.append(message)
        return found

    def get_buffer(self) -> memoryview:
        """Where the next bytes belong: never empty, never beyond the message at hand."""
        return memoryview(self._head if self._body is None else self._body)[self._filled :]

    def buffer_updated(self, count: int) -> Message | None:
        """The first `count` bytes of the buffer are there; the message that is whole by them, if one is."""
        self._filled += count
        if self._body is None:
            if not self._head_whole():
                return None
            self._filled, self._body = 0, _room(int.from_bytes(self._head[:4], "little") - 1)
        if self._filled < len(self._body):
            return None
        body, self._body, self._filled = self._body, None, 0
        return _decode(_known_type(self._head[4]), body)

    def _head_whole(self) -> bool:
        """Judges length and type as soon as they are there, before there is memory for the body."""
        if self._filled >= 4:
            length = int.from_bytes(self._head[:4], "little")
            if not 1 <= length <= MAX_MESSAGE:
                raise ProtocolViolation(f"a message of {length} bytes; allowed are 1 to {MAX_MESSAGE}")
        if self._filled < _HEAD.size:
            return False
        _known_type(self._head[4])
        return True


def _room(length: int) -> memoryview:
    """Memory that is about to be filled. A bytearray would be filled with zeroes first: a quarter of the receiver's
    loop, measured."""
    return np.empty(length, np.uint8).data


def _decode(number: MessageType, body: memoryview) -> Message:
    if (unpack := _UNPACK.get(number)) is not None:
        return unpack(body)
    try:
        return _DECODERS[number].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ProtocolViolation(f"a {number.name} that can't be understood: {exc}") from exc


def _known_type(number: int) -> MessageType:
    try:
        return MessageType(number)
    except ValueError:
        raise ProtocolViolation(f"unknown message type {number}") from None


class Role(Enum):
    SOURCE = "source"
    RECEIVER = "receiver"


class _State(Enum):
    GREETING = "greeting"
    STREAMING = "streaming"
    ENDED = "ended"


#: Everything that decides which message may come when is in this table: what a role may *send* in a state, and after
#: it the state. The peer may send what its role may; the pair moves through the states together.
_TABLE: dict[tuple[Role, _State], dict[type[Message], _State]] = {
    (Role.SOURCE, _State.GREETING): {Hello: _State.GREETING},
    (Role.SOURCE, _State.STREAMING): dict.fromkeys((Frames, Ping, Compare, Digests), _State.STREAMING),
    (Role.SOURCE, _State.ENDED): dict.fromkeys((Frames, Ping, Compare, Digests), _State.ENDED),
    (Role.RECEIVER, _State.GREETING): {Welcome: _State.STREAMING, Refused: _State.ENDED},
    (Role.RECEIVER, _State.STREAMING): {
        Ack: _State.STREAMING,
        Pong: _State.STREAMING,
        Signatures: _State.STREAMING,
        PartMasks: _State.STREAMING,
        Refused: _State.ENDED,
    },
    (Role.RECEIVER, _State.ENDED): {},
}


class Session:
    """One connection of the link as one of the two roles sees it: h11 style, bytes in and messages out.

    Invariant: only messages that the table allows pass, in either direction."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._peer = Role.RECEIVER if role is Role.SOURCE else Role.SOURCE
        self._state = _State.GREETING
        self._greeted = False
        self._decoder = Decoder()

    @property
    def ended(self) -> bool:
        """True after REFUSED: nothing more is said."""
        return self._state is _State.ENDED

    def receive(self, data: bytes | memoryview) -> list[Message]:
        """The messages that are whole now. Raises ProtocolViolation; the connection must end then."""
        messages = self._decoder.feed(data)
        for message in messages:
            self._pass(self._peer, message)
        return messages

    def get_buffer(self) -> memoryview:
        """Where the peer's next bytes belong; tell by `buffer_updated` how many came."""
        return self._decoder.get_buffer()

    def buffer_updated(self, count: int) -> Message | None:
        """As `receive`, for bytes that are in the buffer already."""
        message = self._decoder.buffer_updated(count)
        if message is not None:
            self._pass(self._peer, message)
        return message

    def sends_frames(self) -> None:
        """A FRAMES message that is packed already is about to be sent. Raises as `send`."""
        self._pass(self._role, _FRAMES)

    def send(self, message: Message) -> bytes:
        """The bytes to write for `message`. Raises ProtocolViolation when it may not be sent now."""
        data = encode(message)
        self._pass(self._role, message)
        return data

    def _pass(self, sender: Role, message: Message) -> None:
        kind = type(message)
        allowed = _TABLE[sender, self._state]
        # What is no HELLO is answered with REFUSED, before there was one.
        in_order = kind is Refused or (kind is Hello) != self._greeted
        if kind not in allowed or not in_order:
            raise ProtocolViolation(f"{kind.__name__.upper()} from the {sender.value} while {self._state.value}")
        self._greeted = True
        self._state = allowed[kind]
