"""The receiver's end of a comparison: signatures of what is here, beside the store's writer, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from drctl.errors import IntegrityError
from drctl.store.signatures import UNKNOWN, SignatureStore
from drctl.wire.signature import PARTS, Compare, Digests, PartMasks, Signatures, check_asked, parts_that_differ

#: Without a question for so long (seconds) the look at the log is closed: it keeps files that may have been deleted.
IDLE = 30.0

T = TypeVar("T")
log = logging.getLogger(__name__)


class Signer:
    """Answers for one group. What it tells of is the log's end at some moment after the SYNC_BEGIN of the pass that
    asks: a look of its own for each pass, so that no frame of an earlier pass comes after it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._executor = ThreadPoolExecutor(1, f"sign-{root.name}")
        self._store: SignatureStore | None = None
        self._sync = ""
        self._idle: asyncio.TimerHandle | None = None
        self._forgetting: asyncio.Task[None] | None = None

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def answer(self, asked: Compare | Digests) -> Signatures | PartMasks:
        """What cannot be read here is told to differ: the source sends its own. Raises ProtocolViolation."""
        answer = await self._run(lambda: self._answer(asked))
        self._rest(asyncio.get_running_loop())
        return answer

    def _rest(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look anew when the next question comes late."""

        def forget() -> None:
            self._forgetting = loop.create_task(self.forget())

        self._stop_resting()
        self._idle = loop.call_later(IDLE, forget)

    def _stop_resting(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _answer(self, asked: Compare | Digests) -> Signatures | PartMasks:
        if isinstance(asked, Compare):
            return self._signatures(asked)
        if self._store is None:
            return PartMasks(asked.id, (2**PARTS - 1,) * len(asked.blocks))
        check_asked(asked, self._store.sizes)
        try:
            return parts_that_differ(self._store.key, asked, self._store.contents(asked.disk, asked.blocks))
        except IntegrityError as exc:
            log.warning("%s: %s", self._root.name, exc)
            return PartMasks(asked.id, (2**PARTS - 1,) * len(asked.blocks))

    def _signatures(self, asked: Compare) -> Signatures:
        try:
            store = self._at(asked.sync)
            check_asked(asked, store.sizes)
            return Signatures(asked.id, store.signatures(asked.disk, asked.first, asked.count, fresh=asked.fresh))
        except IntegrityError as exc:
            log.warning("%s: %s", self._root.name, exc)
            self._close()
            return Signatures(asked.id, UNKNOWN * asked.count)

    def _at(self, sync: str) -> SignatureStore:
        """What is here since the pass began."""
        if self._store is None or sync != self._sync:
            self._close()
            self._store, self._sync = SignatureStore(self._root), sync
        return self._store

    async def forget(self) -> None:
        """The stream begins anew or leaves: what was seen of the log may not be what it is."""
        await self._run(self._close)

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            log.info(
                "%s: %d blocks compared, %d of them hashed", self._root.name, store.known + store.hashed, store.hashed
            )
            store.close()

    async def close(self) -> None:
        self._stop_resting()
        await self.forget()
        self._executor.shutdown(wait=False)
