"""The first sync: frames go straight to the bases, and a durable note says how far they are right.

    initial.json    {"host", "generation", "epoch", "sequence", "mark", "done",
                     "sync": {"sync", "disk", "offset"} or null}

Nothing is recoverable until SYNC_END; after it the note stays, as the stream's position before the first segment."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from drctl.errors import IntegrityError
from drctl.model.extent import SECTOR
from drctl.store import atomic
from drctl.store.content import StreamState
from drctl.store.replica import Replica
from drctl.store.segment import StreamKey, SyncProgress
from drctl.wire.frame import EXTENT_ZERO, HEADER_SIZE, FrameHeader, extents_of, payload_of


@dataclass(frozen=True, slots=True)
class InitialNote:
    """`done`: SYNC_END was seen, the bases are whole."""

    stream: StreamKey
    state: StreamState
    done: bool = False


def read_note(root: Path) -> InitialNote | None:
    """Raises IntegrityError when the note is damaged."""
    fields = atomic.read_json(root / "initial.json")
    if fields is None:
        return None
    try:
        sync = SyncProgress(**fields["sync"]) if fields["sync"] else None
        stream = StreamKey(fields["host"], int(fields["generation"]), fields["epoch"])
        return InitialNote(
            stream, StreamState(int(fields["sequence"]), int(fields["mark"]), sync), bool(fields["done"])
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise IntegrityError(f"{root / 'initial.json'}: {exc!r}") from exc


def write_note(root: Path, note: InitialNote) -> None:
    state = note.state
    sync = asdict(state.sync) if state.sync else None
    fields = {**asdict(note.stream), "sequence": state.sequence, "mark": state.mark, "sync": sync, "done": note.done}
    atomic.write_json(root / "initial.json", fields)


def forget_note(root: Path) -> None:
    """What a first sync had brought is worth nothing any more: the bases come from elsewhere."""
    atomic.remove(root / "initial.json")


def apply_frame(replica: Replica, header: FrameHeader, whole: memoryview) -> None:
    """Write a DATA or SYNC frame's extents to the bases, in their order. Raises OutOfSpace, IntegrityError."""
    body = whole[HEADER_SIZE:]
    payload = memoryview(payload_of(header, body, "frame of the first sync"))
    for extent in extents_of(header, body):
        offset, length = int(extent["offset"]) * SECTOR, int(extent["length"]) * SECTOR
        base = replica.base(int(extent["disk"]))
        if extent["kind"] == EXTENT_ZERO:
            base.zero(offset, length)
        else:
            start = int(extent["payload_offset"])
            base.write([payload[start : start + length]], offset)
