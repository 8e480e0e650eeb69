"""Labels: tags that operators give to checkpoints, and pins that hold them while they are in use. Data, no cache.

    tags.json    [{"number", "epoch", "tag", "removed"}]; removed: a tag of the mark itself that was taken away
    pins/ID      {"number", "epoch"}

Both change under the store's commit lock, so that a merge or promotion sees them or comes first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drctl.errors import IntegrityError
from drctl.store import atomic
from drctl.store.segment import safe_name


@dataclass(frozen=True, slots=True, order=True)
class CheckpointKey:
    """Names a checkpoint for ever; its place in the log may change by a merge."""

    epoch: str
    number: int


@dataclass(frozen=True, slots=True)
class Tags:
    """What operators added to the tags that marks were cut with, and what they took away."""

    added: frozenset[tuple[CheckpointKey, str]] = frozenset()
    removed: frozenset[tuple[CheckpointKey, str]] = frozenset()

    def of(self, label: CheckpointKey, own: tuple[str, ...]) -> tuple[str, ...]:
        """All tags of a checkpoint whose mark has the tags `own`."""
        stay = tuple(tag for tag in own if (label, tag) not in self.removed)
        return stay + tuple(sorted(tag for key, tag in self.added if key == label and tag not in stay))

    def by_checkpoint(self) -> dict[CheckpointKey, Tags]:
        """The same for each checkpoint that any were added to or taken from."""
        labels = {label for label, _ in self.added | self.removed}
        return {
            label: Tags(*(frozenset(each for each in tags if each[0] == label) for tags in (self.added, self.removed)))
            for label in labels
        }

    def with_tag(self, label: CheckpointKey, tag: str) -> Tags:
        return Tags(self.added | {(label, tag)}, self.removed - {(label, tag)})

    def without(self, label: CheckpointKey, tag: str) -> Tags:
        return Tags(self.added - {(label, tag)}, self.removed | {(label, tag)})


def read_tags(root: Path) -> Tags:
    """Raises IntegrityError when the file is damaged."""
    path = root / "tags.json"
    both: tuple[set[tuple[CheckpointKey, str]], set[tuple[CheckpointKey, str]]] = (set(), set())
    try:
        for entry in atomic.read_json(path) or []:
            label = CheckpointKey(entry["epoch"], int(entry["number"]))
            both[bool(entry["removed"])].add((label, str(entry["tag"])))
    except (KeyError, TypeError, ValueError) as exc:
        raise IntegrityError(f"{path}: {exc!r}", path=path) from exc
    return Tags(frozenset(both[0]), frozenset(both[1]))


def write_tags(root: Path, tags: Tags) -> None:
    entries: list[dict[str, Any]] = [
        {"number": label.number, "epoch": label.epoch, "tag": tag, "removed": removed}
        for removed, each in ((False, tags.added), (True, tags.removed))
        for label, tag in sorted(each)
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
