"""The source's end of a comparison: questions about the receiver's blocks, many in flight, of one connection."""

from __future__ import annotations

import asyncio
import itertools

from drctl.errors import ProtocolViolation
from drctl.replication.link import Connection
from drctl.wire.signature import (
    DIGESTS_SIZE,
    KEY_SIZE,
    MAX_DIGESTS,
    SIGNATURE_SIZE,
    Compare,
    Digests,
    PartMasks,
    Signatures,
)

_Answer = asyncio.Future[Signatures | PartMasks | None]


class SignatureExchange:
    """Owned by the event loop. Answers of one connection say nothing about another: what the receiver had in memory
    may be lost then. So all questions are answered None when the connection ends."""

    def __init__(self) -> None:
        self._connection: Connection | None = None
        #: The group's key; empty while no receiver is there that knows signatures.
        self.key = b""
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Answer] = {}

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def open(self, connection: Connection, key: bytes) -> None:
        """A connection stands. No key: the receiver knows no signatures, or has nothing to compare with."""
        self.close()
        self._connection = connection
        self.key = key if len(key) == KEY_SIZE else b""

    def hang_up(self) -> None:
        """End the connection: the next one's WELCOME tells what can be compared now."""
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        self._connection, self.key = None, b""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_result(None)

    async def signatures(self, sync: str, disk: int, first: int, count: int, *, fresh: bool = False) -> bytes | None:
        """The receiver's signatures of blocks; None when the connection is gone. `fresh`: made of its data now. Raises
        ProtocolViolation."""
        number = next(self._ids) & 0xFFFFFFFF
        answer = await self._ask(number, Compare(number, sync, disk, first, count, fresh))
        if answer is None:
            return None
        if not isinstance(answer, Signatures) or len(answer.data) != count * SIGNATURE_SIZE:
            raise ProtocolViolation(f"not the {count} signatures that were asked for")
        return answer.data

    async def masks(self, disk: int, blocks: tuple[int, ...], digests: bytes) -> tuple[int, ...] | None:
        """Which parts of these blocks differ; None when the connection is gone. Raises ProtocolViolation."""
        found: list[int] = []
        for at in range(0, len(blocks), MAX_DIGESTS):
            some = blocks[at : at + MAX_DIGESTS]
            number = next(self._ids) & 0xFFFFFFFF
            data = digests[at * DIGESTS_SIZE : (at + len(some)) * DIGESTS_SIZE]
            answer = await self._ask(number, Digests(number, disk, some, data))
            if answer is None:
                return None
            if not isinstance(answer, PartMasks) or len(answer.masks) != len(some):
                raise ProtocolViolation(f"not the {len(some)} masks that were asked for")
            found += answer.masks
        return tuple(found)

    async def _ask(self, number: int, question: Compare | Digests) -> Signatures | PartMasks | None:
        connection = self._connection
        if connection is None:
            return None
        future: _Answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        await connection.send(question)
        return await future

    def answered(self, message: Signatures | PartMasks) -> None:
        """An answer has come. Raises ProtocolViolation when nobody asked."""
        future = self._waiting.pop(message.id, None)
        if future is None:
            raise ProtocolViolation(f"an answer to question {message.id}, which was not asked")
        if not future.done():
            future.set_result(message)
