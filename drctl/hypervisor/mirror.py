"""The mirror of one disk: QEMU's write-blocking mirror job from the disk's node to the tap.

Every write of the guest goes to the disk, then to the tap, and only then is it acknowledged. All commands go through a
`Monitor`, so that the same code drives libvirt's passthrough, a bare QEMU and a `qemu-storage-daemon`.

Laws, each with the measurement behind it (QEMU 7.2):

* **Never force.** A forced cancel under load ended the guest's QEMU in 9 of 41 trials; a soft one in none.
* **`on-target-error=stop`.** With it a dead tap stops the job and the guest runs on (0 deaths in 95 kills); with
  QEMU's default the job dies too, and took QEMU with it in 3 of 102.
* **No reconnect delay.** With one, a write waits for a tap that is not there.
* QEMU talks to a tap synchronously in a few commands (attach, poke, barrier): while a tap *hangs* they hang the whole
  QEMU. Call them only while the tap's heartbeat is fresh; the watchdog's SIGKILL frees them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from drctl.errors import HypervisorRefused, PreconditionFailed
from drctl.hypervisor.block_graph import (
    GRANULARITY,
    MirrorName,
    MirrorState,
    dirty_bytes,
    filters,
    found_mirrors,
    has_filter,
    look,
    virtual_size,
)
from drctl.hypervisor.qmp import Monitor, command

#: Between two looks at a job. A look costs QEMU under 1 ms.
_POLL_SECONDS: Final = 0.02
#: Between two attempts to reconnect: QEMU tries at each, so more often is more BLOCK_JOB_ERROR events, not more luck.
_RETRY_SECONDS: Final = 0.15
#: How long a detach trusts the tap it finds before it asks for a sink. A live tap ends a soft cancel in milliseconds;
#: from error standby QEMU needs some tries to connect first.
_TAP_PATIENCE_SECONDS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Time as a mirror sees it; tests own it. Seconds."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def find(monitor: Monitor) -> list[MirrorState]:
    """All of drctl's mirrors in this QEMU, of any generation and epoch: to adopt, or to remove."""
    return found_mirrors(monitor(command("query-block-jobs")))


class Mirror:
    """The mirror `name` of the disk whose root node is `source`. Keeps no state: every answer is asked of QEMU.

    Not thread-safe: one thread at a time per mirror."""

    def __init__(self, monitor: Monitor, name: MirrorName, source: str, *, pace: Pace | None = None) -> None:
        self.name = name
        self.source = source
        self._monitor = monitor
        self._pace = pace or Pace()

    # -- looking ----------------------------------------------------------------------------------------------------

    def inspect(self) -> MirrorState:
        """The state now. Raises HostUnreachable."""
        dirty = self._dirty()
        return look(self.name, self._run("query-block-jobs"), dirty)

    def _dirty(self) -> int | None:
        nodes = self._nodes()
        dirty = dirty_bytes(nodes, self.source)
        if dirty is None and has_filter(nodes):
            above = filters(self._run("query-blockstats", query_nodes=True), self.source)
            dirty = dirty_bytes(nodes, *above)
        return dirty

    # -- attaching --------------------------------------------------------------------------------------------------

    def attach(self, socket: str, export: str) -> MirrorState:
        """Send every write from now on to `export` on the tap's `socket`. READY at once; nothing is copied.

        A mirror of this name that is there already is adopted as it is. Raises HypervisorRefused (QEMU's reason, e.g.
        another job on the disk) or PreconditionFailed (sizes differ), and then leaves nothing behind."""
        if (state := self.inspect()).present:
            return state
        self._delete_node()
        self._run(
            "blockdev-add", driver="nbd", node_name=self.name.node, server={"type": "unix", "path": socket},
            export=export, reconnect_delay=0,
        )  # fmt: skip
        try:
            self._check_sizes()
            self._start_job()
        except (HypervisorRefused, PreconditionFailed):
            self._delete_node()
            raise
        # A write that passed before the job looked is not sent; the reader may only start when it is on the disk.
        self.barrier()
        return self._wait(lambda state: state.status not in ("created", "running"), 5.0, "get ready")

    def _check_sizes(self) -> None:
        nodes = self._nodes()
        source, target = virtual_size(nodes, self.source), virtual_size(nodes, self.name.node)
        if source != target:
            raise PreconditionFailed(
                f"the disk has {source} bytes, the tap was told {target}",
                hint="a grown disk is detached, its base extended, and attached again",
                source=source,
                target=target,
            )

    def _start_job(self) -> None:
        self._run(
            "blockdev-mirror",
            job_id=self.name.job,
            device=self.source,
            target=self.name.node,
            sync="none",
            copy_mode="write-blocking",
            on_target_error="stop",
            on_source_error="report",
            granularity=GRANULARITY,
            auto_dismiss=False,
        )

    # -- order ------------------------------------------------------------------------------------------------------

    def prove_order(
        self,
        read_sequence: Callable[[], int],
        connected: Callable[[], bool] = lambda: True,
        *,
        timeout_seconds: float = 30.0,
    ) -> int:
        """The first sequence of the ring from which on every prefix holds all that the guest's writes depend on.

        `read_sequence` reads PUBLISHED; `connected` tells whether the tap has this disk's connection now (its
        CONNECTION word is not 0, and its heartbeat is fresh: a dead tap clears no word). Raises HypervisorRefused with
        what is left when the time is over.

        Why it is right. After a lost or refused write QEMU's bitmap holds what is missing at the tap. The steps:

        1. The job runs, its bitmap counts 0, and the connection is there. (A tap that was restarted while the guest
           was idle has none, and QEMU does not know: the next write would be lost *after* the proof. So it is made to
           connect by a read.)
        2. The job is paused and its status is `standby`: its own copying has ended. Writes of the guest still go to
           the tap, and the bitmap still counts 0.
        3. *Barrier.* A write clears its bits when it is sent, not when it arrives: an acknowledged, lost write X may
           be clean only because Y, on the same block, is on its way. A prefix that holds a later write than X, but
           not yet Y, would be torn. An empty transaction makes QEMU wait for all requests in flight (`bdrv_drain_all`).
        4. Still 0, and still connected: all that the guest was told is on the disk is in the ring. Any sequence read
           from now on is ordered, as long as no write is lost.

        **Several disks of a group.** Each disk is proven by itself, one after the other; the group is ordered from the
        *largest* of the sequences on, if nothing was lost between the start of the first proof and the end of the
        last. The tap tells that: it raises ORDER_STAMP before it accepts a write after any loss. So the caller reads
        ORDER_STAMP before the first proof and after the last, and throws all away when they differ; it does the same
        with the CONNECTION words. Under one stamp a disk that was proven early stays ordered while the others are
        proven: its later writes all arrive, each before it is acknowledged, and so before any write of any disk that
        depends on it is sent. Disks need not be paused at the same moment."""
        deadline = self._pace.monotonic() + timeout_seconds
        while True:
            self._settle(connected, deadline)
            self._run("block-job-pause", device=self.name.job)
            try:
                proven = self._proven(read_sequence, connected, deadline)
            finally:
                self._resume()
            if proven is not None:
                return proven
            self._pace.sleep(_POLL_SECONDS)

    def _settle(self, connected: Callable[[], bool], deadline: float) -> None:
        """Wait until the job runs, nothing is missing, and the tap has the connection; resume and reconnect for it."""
        while True:
            state = self.inspect()
            self._demand_present(state)
            if state.healthy and state.clean and connected():
                return
            if self._pace.monotonic() > deadline:
                raise self._late(state, "become clean" if connected() else "connect to the tap")
            self._push(state, connected)

    def _proven(self, read_sequence: Callable[[], int], connected: Callable[[], bool], deadline: float) -> int | None:
        while (state := self.inspect()).status != "standby":
            self._demand_present(state)
            if self._pace.monotonic() > deadline:
                raise self._late(state, "pause")
            self._pace.sleep(_POLL_SECONDS / 10)
        if not state.clean or state.io_status != "ok":
            return None
        self.barrier()
        state = self.inspect()
        if not state.clean or state.io_status != "ok" or not connected():
            return None
        return read_sequence()

    def barrier(self) -> None:
        """Return when every request that was in flight in this QEMU has ended: an empty transaction drains them all."""
        self._run("transaction", actions=[])

    def poke(self) -> None:
        """Make QEMU notice a dead connection, and connect again: a read of one sector at the tap.

        Two pokes are needed, the first finds out. Says nothing (the monitor does not tell how a read ended); without
        effect in a QEMU that has no human monitor."""
        with suppress(HypervisorRefused):
            self._run("human-monitor-command", command_line=f'qemu-io {self.name.node} "read -q 0 512"')

    # -- recovering -------------------------------------------------------------------------------------------------

    def recover(self, connected: Callable[[], bool] = lambda: True, *, timeout_seconds: float = 15.0) -> MirrorState:
        """Bring the job back to `ready` after the tap's restart. QEMU connects lazily: it takes some tries.

        Only what failed is sent again. Order is not proven by this. Raises HypervisorRefused when the time is over."""
        deadline = self._pace.monotonic() + timeout_seconds
        while True:
            state = self.inspect()
            self._demand_present(state)
            if state.healthy and connected():
                return state
            if self._pace.monotonic() > deadline:
                raise self._late(state, "recover")
            self._push(state, connected)

    def _push(self, state: MirrorState, connected: Callable[[], bool]) -> None:
        """One step towards a running, connected job."""
        if state.paused:
            self._resume()
            self._pace.sleep(_RETRY_SECONDS)
        elif not connected():
            self.poke()
            self._pace.sleep(_RETRY_SECONDS)
        else:
            self._pace.sleep(_POLL_SECONDS)

    def _resume(self) -> None:
        # Refused when an error resumed or ended the job in the meantime; the next look tells.
        with suppress(HypervisorRefused):
            self._run("block-job-resume", device=self.name.job)

    # -- detaching --------------------------------------------------------------------------------------------------

    def detach(self, start_sink: Callable[[], None], *, timeout_seconds: float = 30.0) -> None:
        """End the mirror by the soft path only; the guest does not notice. Nothing to do when it is not there.

        A soft cancel needs a target that answers. When the tap does not bring it to its end in 4 s, `start_sink` is
        called, once: it must put a sink (a tap that acknowledges and discards) on the socket, in the place of the
        tap. Raises HypervisorRefused with what is left when the time is over; the job then goes on as it was."""
        deadline = self._pace.monotonic() + timeout_seconds
        sink_at = self._pace.monotonic() + _TAP_PATIENCE_SECONDS
        asked = False
        while (state := self.inspect()).present and state.status != "concluded":
            now = self._pace.monotonic()
            if now > deadline:
                raise self._late(state, "detach")
            if now > sink_at and not asked:
                start_sink()
                asked = True
            self._lead_out(state)
        if state.present:
            self._run("job-dismiss", id=self.name.job)
        self._delete_node()

    def _lead_out(self, state: MirrorState) -> None:
        """One step towards `concluded`."""
        if state.paused:
            self._resume()
            self._pace.sleep(_RETRY_SECONDS)
        elif state.healthy and state.clean:
            with suppress(HypervisorRefused):
                self._run("block-job-cancel", device=self.name.job, force=False)
            self._pace.sleep(_POLL_SECONDS)
        else:
            self._pace.sleep(_POLL_SECONDS)

    def _delete_node(self) -> None:
        """Close the connection to the tap, if there is one."""
        if any(node.get("node-name") == self.name.node for node in self._nodes()):
            self._run("blockdev-del", node_name=self.name.node)

    # -- the monitor ------------------------------------------------------------------------------------------------

    def _run(self, execute: str, /, **arguments: Any) -> Any:
        return self._monitor(command(execute, **arguments))

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = self._run("query-named-block-nodes", flat=True)
        return nodes

    def _wait(self, reached: Callable[[MirrorState], bool], timeout_seconds: float, what: str) -> MirrorState:
        deadline = self._pace.monotonic() + timeout_seconds
        while not reached(state := self.inspect()):
            if self._pace.monotonic() > deadline:
                raise self._late(state, what)
            self._pace.sleep(_POLL_SECONDS)
        return state

    def _demand_present(self, state: MirrorState) -> None:
        if not state.present or state.status in ("concluded", "aborting", "null"):
            raise HypervisorRefused(
                f"mirror {self.name.job} is gone{f': {state.error}' if state.error else ''}",
                hint="the guest was powered off, or another program ended the job; it is attached anew",
                job=self.name.job,
            )

    def _late(self, state: MirrorState, what: str) -> HypervisorRefused:
        left = "unknown" if state.dirty is None else f"{state.dirty} bytes"
        return HypervisorRefused(
            f"mirror {self.name.job} did not {what} in time: "
            f"status {state.status or 'none'}, io-status {state.io_status or 'none'}, dirty {left}",
            job=self.name.job,
            status=state.status,
            io_status=state.io_status,
            dirty=state.dirty,
        )
