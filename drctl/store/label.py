"""Labels: tags that operators give to checkpoints, and pins that hold them while they are in use. Data, no cache.

    tags.json    [{"number", "epoch", "tag"}]
    pins/ID      {"number", "epoch"}

Both change under the store's commit lock, so that a merge or promotion sees them or comes first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.store import atomic
from drctl.store.segment import safe_name


@dataclass(frozen=True, slots=True, order=True)
class CheckpointKey:
    """Names a checkpoint for ever; its place in the log may change by a merge."""

    epoch: str
    number: int


def read_tags(root: Path) -> dict[CheckpointKey, tuple[str, ...]]:
    """The operators' tags. Raises IntegrityError when the file is damaged."""
    tags: dict[CheckpointKey, tuple[str, ...]] = {}
    for entry in atomic.read_json(root / "tags.json") or []:
        key = CheckpointKey(entry["epoch"], int(entry["number"]))
        tags[key] = (*tags.get(key, ()), entry["tag"])
    return tags


def write_tags(root: Path, tags: dict[CheckpointKey, tuple[str, ...]]) -> None:
    entries: list[dict[str, Any]] = [
        {"number": key.number, "epoch": key.epoch, "tag": tag} for key in sorted(tags) for tag in tags[key]
    ]
    atomic.write_json(root / "tags.json", entries)


def read_pins(root: Path) -> dict[str, CheckpointKey]:
    """{pin's id: what it holds}."""
    pins: dict[str, CheckpointKey] = {}
    for path in sorted((root / "pins").glob("[!.]*")):
        fields = atomic.read_json(path)
        if fields is not None:
            pins[path.name] = CheckpointKey(fields["epoch"], int(fields["number"]))
    return pins


def write_pin(root: Path, name: str, key: CheckpointKey) -> None:
    atomic.make_directory(root / "pins")
    atomic.write_json(root / "pins" / safe_name(name), {"number": key.number, "epoch": key.epoch})


def remove_pin(root: Path, name: str) -> None:
    """No error when it is gone already."""
    atomic.remove(root / "pins" / safe_name(name))
