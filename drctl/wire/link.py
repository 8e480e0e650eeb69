"""The link's messages, and the order in which each side may send them. Sans-IO: knows no sockets and no clock.

Every message is (also in docs/formats.md), integers little-endian:

    offset size
         0    4  length of the rest, 1 .. 4 MiB
         4    1  type (MessageType)
         5    n  body: JSON, or for FRAMES whole frames one after the other

The length is checked before a byte of the body is waited for. The source dials and says HELLO; the receiver answers
WELCOME or REFUSED; then FRAMES and PING go one way, ACK, PONG and REFUSED the other. JSON bodies may carry fields
that this version does not know: they are ignored.
"""

from __future__ import annotations

import struct
from enum import Enum, IntEnum

import msgspec

from drctl.errors import ProtocolViolation

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
    """First message of the source."""

    group: str
    host: str
    generation: int
    epoch: str
    appliance: str
    version: int = VERSION
    software: str = ""
    wall_ns: int = 0


class Welcome(msgspec.Struct, frozen=True):
    """The receiver's answer: what is durable there, and so where the source goes on.

    `last_mark` is the newest MARK of this stream that is durable there, proven or not, `proven_mark` the newest that is
    proven; `last_number` the largest number of a mark in the whole group, so that numbers stay unique over epochs.
    `needs` is `initial`, `full` or `nothing`."""

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


class Frames(msgspec.Struct, frozen=True):
    """Whole frames (wire/frame.py), not yet checked."""

    data: bytes


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


Message = Hello | Welcome | Frames | Ack | Ping | Pong | Refused

_TYPES: dict[MessageType, type[Message]] = {
    MessageType.HELLO: Hello,
    MessageType.WELCOME: Welcome,
    MessageType.ACK: Ack,
    MessageType.PING: Ping,
    MessageType.PONG: Pong,
    MessageType.REFUSED: Refused,
}
_NUMBERS: dict[type[Message], MessageType] = {kind: number for number, kind in _TYPES.items()}
_DECODERS = {number: msgspec.json.Decoder(kind) for number, kind in _TYPES.items()}
_ENCODER = msgspec.json.Encoder()


def encode(message: Message) -> bytes:
    """The message's bytes. Raises ProtocolViolation when it is larger than the link allows."""
    if isinstance(message, Frames):
        return frames_head(len(message.data)) + message.data
    body = _ENCODER.encode(message)
    return _head(_NUMBERS[type(message)], len(body)) + body


def frames_head(length: int) -> bytes:
    """What goes before `length` bytes of frames, so that large bodies need not be copied to be sent."""
    return _head(MessageType.FRAMES, length)


def _head(number: MessageType, length: int) -> bytes:
    if length + 1 > MAX_MESSAGE:
        raise ProtocolViolation(f"{number.name} of {length} bytes is larger than the link allows ({MAX_MESSAGE})")
    return _HEAD.pack(length + 1, number)


class Decoder:
    """Bytes in, whole messages out. Never buffers more than one message of MAX_MESSAGE and what came with it."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Message]:
        """The messages that are whole now. Raises ProtocolViolation on a bad length, type or body."""
        self._buffer += data
        found: list[Message] = []
        start = 0
        while (length := self._whole_at(start)) is not None:
            found.append(self._decode(start, length))
            start += 4 + length
        if start:
            del self._buffer[:start]
        return found

    def _whole_at(self, start: int) -> int | None:
        available = len(self._buffer) - start
        if available < 4:
            return None
        length = int.from_bytes(self._buffer[start : start + 4], "little")
        if not 1 <= length <= MAX_MESSAGE:
            raise ProtocolViolation(f"a message of {length} bytes; allowed are 1 to {MAX_MESSAGE}")
        if available >= 5:
            _known_type(self._buffer[start + 4])
        return length if available >= 4 + length else None

    def _decode(self, start: int, length: int) -> Message:
        number = _known_type(self._buffer[start + 4])
        with memoryview(self._buffer) as whole, whole[start + 5 : start + 4 + length] as body:
            if number is MessageType.FRAMES:
                return Frames(bytes(body))
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
    (Role.SOURCE, _State.STREAMING): {Frames: _State.STREAMING, Ping: _State.STREAMING},
    (Role.SOURCE, _State.ENDED): {Frames: _State.ENDED, Ping: _State.ENDED},
    (Role.RECEIVER, _State.GREETING): {Welcome: _State.STREAMING, Refused: _State.ENDED},
    (Role.RECEIVER, _State.STREAMING): {
        Ack: _State.STREAMING,
        Pong: _State.STREAMING,
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
