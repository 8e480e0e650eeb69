"""Where does a group reign? A source asks the other site before it starts guests; the receiver answers from its store.

One TLS connection: HELLO with `ask`, then WELCOME (the group still reigns at the source) or REFUSED. No stream begins,
and one that runs is not disturbed."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import uvloop

from drctl.errors import DrctlError
from drctl.replication import link
from drctl.replication.group_writer import StreamToken, refuse_superseded
from drctl.replication.link import Connection
from drctl.store.group_info import read_info
from drctl.wire import link as wire

#: Longest that an answer is waited for after the handshake (which has a limit of its own).
ANSWER_SECONDS = 10.0
#: The epoch of one who asks: there is no stream yet.
NO_EPOCH = "0" * 32
#: Asks where the group reigns now, whatever its generation: no other is above it.
ANY_GENERATION = 2**31 - 1


class Reign(StrEnum):
    """What the other site says of a group, asked by its source."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Answer:
    """`reason` is the other site's word, or why there was none; `generation` the one that it takes streams of, 0 where
    that is not told."""

    reign: Reign
    reason: str = ""
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks whom. `peer` is ADDRESS:PORT, `peer_appliance` the UUID that must answer there."""

    group: str
    host: str
    generation: int
    appliance: str
    peer: str
    peer_appliance: str


def ask(question: Question, tls: Path) -> Answer:
    """Ask, and wait for the answer for some seconds. Never raises: no answer is UNKNOWN. Not for an event loop."""
    try:
        return uvloop.run(_ask(question, tls))
    except DrctlError as exc:
        return Answer(Reign.UNKNOWN, exc.message)


async def _ask(question: Question, tls: Path) -> Answer:
    connection = await link.dial(question.peer, tls, question.peer_appliance)
    try:
        hello = wire.Hello(
            group=question.group,
            host=question.host,
            generation=question.generation,
            epoch=NO_EPOCH,
            appliance=question.appliance,
            wall_ns=time.time_ns(),
            ask=True,
        )
        await connection.send(hello)
        async with asyncio.timeout(ANSWER_SECONDS):
            messages = await connection.receive()
    except TimeoutError:
        return Answer(Reign.UNKNOWN, f"{question.peer} does not answer")
    finally:
        await connection.close()
    return _read(messages)


def _read(messages: list[wire.Message]) -> Answer:
    match messages[:1]:
        case [wire.Welcome(generation=generation)]:
            return Answer(Reign.HERE, generation=generation)
        case [wire.Refused(error="superseded", message=text)]:
            return Answer(Reign.ELSEWHERE, text)
        case [wire.Refused(message=text)]:
            return Answer(Reign.UNKNOWN, f"the other site refused to say: {text}")
    return Answer(Reign.UNKNOWN, "the other site left without an answer")


async def answer(connection: Connection, hello: wire.Hello, root: Path, software: str) -> None:
    """The receiver's part. Raises Refused when the group reigns elsewhere, as it would for a stream."""
    info = await asyncio.to_thread(read_info, root)
    refuse_superseded(info, StreamToken(hello.host, hello.generation, hello.epoch))
    welcome = wire.Welcome(wire.Position(), software=software, wall_ns=time.time_ns(), generation=info.generation)
    await connection.send(welcome)
