"""What a shipper is told when it starts: one JSON file, written by the supervisor."""

from __future__ import annotations

from pathlib import Path

import msgspec

from drctl.errors import SetupFailed
from drctl.model.bandwidth import RateLimit

#: Below this, marks cost more than they tell (design: checkpoint interval).
SHORTEST_INTERVAL = 0.5


class ShipperConfig(msgspec.Struct, frozen=True):
    """`group`, `host`, `appliance` (our UUID): who we are; generation and epoch stand in the ring.

    `ring`, `bell`, `control` (our socket), `supervisor` (its socket), `definition` (a JSON file: the DEFINITION frame's
    fields), `tls`: paths. `peer`: HOST:PORT of the receiver; `peer_appliance`: the UUID it must have, empty: any on
    the list. `interval`: seconds between marks, cut by our clock, or where `clock` is false only on order, by whoever
    takes snapshots. `read_limit`: bytes a second for the reader, 0: none.

    `limits` and `priority` are the group's; `links` is the file with the limits of links, `site` the other one's name
    in it, and `share` the table by which this host's shippers share the link.

    `spill` is a directory for what the ring can't hold (empty: none), `spill_size` its bytes at most (0: nothing new
    goes there), `spill_key` the file with its key, which lies in memory beside the ring."""

    group: str
    host: str
    appliance: str
    ring: str
    bell: str
    control: str
    peer: str
    tls: str
    definition: str
    supervisor: str = ""
    peer_appliance: str = ""
    interval: float = 5.0
    clock: bool = True
    read_limit: int = 0
    software: str = ""
    limits: tuple[RateLimit, ...] = ()
    priority: str = "normal"
    links: str = ""
    share: str = ""
    site: str = ""
    spill: str = ""
    spill_key: str = ""
    spill_size: int = 0


def load_config(path: Path) -> ShipperConfig:
    """Raises SetupFailed when the file is not what it should be."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=ShipperConfig)
    except (OSError, msgspec.DecodeError) as exc:
        raise SetupFailed(f"{path}: {exc}") from exc
    if config.interval < SHORTEST_INTERVAL:
        raise SetupFailed(f"{path}: interval {config.interval} is below {SHORTEST_INTERVAL} s")
    return config
