"""`links.json` of an appliance's home: the bandwidth limits of its links, by the other site's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from drctl.errors import IntegrityError
from drctl.model.bandwidth import LinkRule
from drctl.store import atomic

FILE = "links.json"
Rules = dict[str, LinkRule]


class LinkLimits:
    """The file. Any process may read it, and change it: each change is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stamp(self) -> tuple[int, int] | None:
        """Another one after each change; None while there is no file."""
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def read(self) -> Rules:
        """Empty when there is no file. Raises IntegrityError."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Rules)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as exc:
            raise IntegrityError(f"{self.path}: {exc}", hint="remove it, and set the limits anew: drctl apply") from exc

    def change(self, site: str, change: Callable[[LinkRule], LinkRule]) -> LinkRule:
        """Let one link's rule be another; durable when this returns. Raises IntegrityError, OutOfSpace."""
        with atomic.lock(self.path.with_suffix(".lock")):
            rules = self.read()
            rules[site] = change(rules.get(site, LinkRule()))
            atomic.write_json(self.path, msgspec.to_builtins(rules))
            return rules[site]
