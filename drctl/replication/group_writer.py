"""One group's store as the receiver uses it: opened when a stream comes, one thread for all of its blocking work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from drctl.errors import DrctlError, NotFound, Refused
from drctl.replication.signer import Signer
from drctl.store.group_info import GroupInfo, StoreMode, read_info
from drctl.store.group_store import Durable, GroupStore, StreamPosition
from drctl.store.signatures import group_key
from drctl.wire import frame
from drctl.wire.frame import FrameHeader, FrameKind
from drctl.wire.link import Ack, JournalSpace, Position, SyncPlace, Welcome
from drctl.wire.signature import Compare, Digests, PartMasks, Signatures

#: The oldest checkpoint is looked up this often; every acknowledgement carries what was found.
OLDEST_EVERY = 10.0
#: During the first sync nothing can be recovered yet, so that its batches may share an fsync, this many seconds long.
#: What waits is still in the source's ring, and read again from there if this process ends.
SHARED_FSYNC = 0.5

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class StreamToken:
    """The right to append. Whoever comes later takes it away: a dead connection's batch must not follow a new HELLO."""

    host: str
    generation: int
    epoch: str


class GroupWriter:
    """Owns the group's store in this process. Methods are called on the loop; the work is done in its one thread."""

    def __init__(self, root: Path, software: str) -> None:
        self.root = root
        self._software = software
        self._executor = ThreadPoolExecutor(1, f"store-{root.name}")
        self._store: GroupStore | None = None
        self._signer = Signer(root)
        self._token: StreamToken | None = None
        self._oldest = (0.0, 0)
        #: The newest sync whose SYNC_END this process has made durable; the store forgets a sync that is done.
        self._ended: SyncPlace | None = None
        self._synced = 0.0
        #: Released to somebody else (failover, removal): no stream is taken.
        self.released = False

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def begin(self, token: StreamToken) -> Welcome:
        """Take up the stream; older tokens are worth nothing from now on. Raises Refused, NotFound, Locked, …"""
        if self.released:
            raise Refused(f"{self.root.name} is being worked on here", hint="it is tried again by itself")
        self._token = token
        await self._signer.forget()
        return await self._run(lambda: self._begin(token))

    def _begin(self, token: StreamToken) -> Welcome:
        refuse_superseded(read_info(self.root), token)
        if self._store is None:
            self._store = GroupStore.open(self.root, writer=True)
        store = self._store
        place = store.begin_stream(token.host, token.generation, token.epoch)
        marks = store.with_catalog(lambda catalog: catalog.newest_number(token.epoch))
        numbers = store.with_catalog(lambda catalog: catalog.newest_number())
        return Welcome(
            position=Position(place.epoch, place.sequence),
            software=self._software,
            last_mark=marks,
            last_number=numbers,
            proven_mark=place.last_mark,
            sync=self._sync(place),
            definition_version=place.definition_version,
            needs=_needs(place, marks),
            wall_ns=time.time_ns(),
            signature_key=_signature_key(self.root, place),
        )

    async def compared(self, token: StreamToken, asked: Compare | Digests) -> Signatures | PartMasks:
        """Say how blocks are here. Raises Refused when another connection has taken the stream over, and
        ProtocolViolation for blocks that no disk has."""
        if self._token is not token or self._store is None:
            raise Refused("another connection has taken this stream over")
        return await self._signer.answer(asked)

    async def write(self, token: StreamToken, messages: Sequence[bytes | memoryview]) -> Ack | None:
        """Append the frames in all messages and make them durable; None when that is left to the next call, within
        SHARED_FSYNC. No messages: make durable what is left. Raises what the store raises, IntegrityError for a
        damaged frame, Refused when another connection has taken the stream over."""
        return await self._run(lambda: self._write(token, messages))

    def _write(self, token: StreamToken, messages: Sequence[bytes | memoryview]) -> Ack | None:
        if self._token is not token or self._store is None:
            raise Refused("another connection has taken this stream over")
        try:
            frames = [each for message in messages for each in frame.split(memoryview(message), "link")]
            self._store.append(frames)
            if frames and self._store.in_first_sync and time.monotonic() - self._synced < SHARED_FSYNC:
                return None
            durable = self._store.sync()
            self._synced = time.monotonic()
            self._note_end(frames)
            return Ack(durable.epoch, durable.sequence, durable.mark, self._sync(durable), self._space(self._store))
        except (DrctlError, OSError):
            # What the store holds in memory may not be what is on the disk: the next HELLO opens it anew.
            self._close()
            raise

    def _note_end(self, frames: list[tuple[FrameHeader, memoryview]]) -> None:
        for header, whole in frames:
            if header.kind is FrameKind.SYNC_END:
                fields = msgspec.json.decode(frame.payload_of(header, whole[frame.HEADER_SIZE :], "SYNC_END"))
                self._ended = SyncPlace(str(fields["sync"]), done=True)

    def _sync(self, durable: Durable | StreamPosition) -> SyncPlace | None:
        """The sync that is under way, or the newest that ended."""
        place = durable.sync
        return self._ended if place is None else SyncPlace(place.sync, place.disk, place.offset)

    def _space(self, store: GroupStore) -> JournalSpace:
        now = time.monotonic()
        if now - self._oldest[0] > OLDEST_EVERY:
            oldest = store.oldest()
            self._oldest = (now, int(oldest.fields["wall_ns"]) if oldest else 0)
        return JournalSpace(store.journal.size, read_info(self.root).retention.journal_limit, self._oldest[1])

    async def release(self) -> None:
        """Close the store and take no stream until `accept`."""
        self.released = True
        self._token = None
        await self._signer.forget()
        await self._run(self._close)

    def accept(self) -> None:
        self.released = False

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.close()
            except (DrctlError, OSError) as exc:
                log.warning("%s: %s", self.root, exc)

    async def close(self) -> None:
        await self._signer.close()
        await self._run(self._close)
        self._executor.shutdown(wait=False)

    def journal_bytes(self) -> int | None:
        """Bytes of the journal; None while no stream has come."""
        return self._store.journal.size if self._store is not None else None


def refuse_superseded(info: GroupInfo, token: StreamToken) -> None:
    """Raises Refused with `superseded` as its refusal: the group reigns elsewhere, and the source must stop."""
    if info.mode is StoreMode.FAILED_OVER:
        raise Refused(f"{info.group} has failed over to this site; it takes no stream", refusal="superseded")
    if token.generation < info.generation:
        raise Refused(
            f"{info.group}: generation {token.generation} is superseded by {info.generation}",
            hint="the group was failed over; its old source may neither run nor replicate",
            refusal="superseded",
        )


def _signature_key(root: Path, place: StreamPosition) -> str:
    """Empty when nothing can be compared: the bases of a first sync are empty, a full disk takes no key."""
    if place.needs == "initial":
        return ""
    try:
        return group_key(root).hex()
    except (DrctlError, OSError):
        return ""


def _needs(place: StreamPosition, marks: int) -> str:
    """An epoch without a mark, or with a sync that was begun and not ended, can't be trusted to be whole."""
    if place.needs == "nothing" and (marks == 0 or place.sync is not None):
        return "full"
    return place.needs


def open_writer(store: Path, group: str, software: str) -> GroupWriter:
    """Raises NotFound when the supervisor has not made a store for the group."""
    root = store / group
    if not group or group in (".", "..") or "/" in group or not (root / "group.json").exists():
        raise NotFound("group", group, hint="apply the group at the recovery site first")
    return GroupWriter(root, software)
