"""The shipper's hold on a ring."""

import os
import time
from pathlib import Path

from drctl.model.identity import StreamIdentity
from drctl.replication.ring_port import RingPort
from drctl.store.ring import Ring
from drctl.wire.ring import Word


def test_a_shipper_that_starts_is_not_taken_for_its_dead_predecessor(tmp_path: Path) -> None:
    """The supervisor kills the process that is named in the ring when the beat is old: a slow start must not look so."""
    identity = StreamIdentity("web", "alpha-1", 1, "0123456789abcdef" * 2)
    ring = Ring.create(tmp_path / "web.ring", identity, {0: 1 << 20}, 1 << 20, 64)
    port = RingPort(tmp_path / "web.ring", tmp_path / "web.bell")
    os.close(port._bell)
    assert ring.words[Word.SHIPPER_PID] == os.getpid()
    assert time.monotonic_ns() - ring.words[Word.SHIPPER_HEARTBEAT] < 60e9
    ring.close()
