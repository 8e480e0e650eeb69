"""What a host gives to a support bundle: its appliance's files as texts without secrets. Reads only, needs no libvirt.

No key, no certificate, no data of guests: of rings and segments the headers alone."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from drctl import __version__
from drctl.appliance.config import Home
from drctl.appliance.process import start_time_of
from drctl.model.redaction import redact
from drctl.replication.identity import certificate_expiry
from drctl.store.segment import HEADER_SIZE as SEGMENT_HEADER
from drctl.wire.ring import DISK_TABLE, DISK_WORDS, HEADER_SIZE, MAGIC, MAX_DISKS, DiskWord, Word

#: The end of each log, and of the history: what happened last says most.
TAIL = 128 * 1024
#: A whole file larger than this is none that a person would read.
WHOLE = 256 * 1024
#: Segments that are listed one by one, the newest.
SEGMENTS = 200
_FILES = (
    "appliance.toml",
    "groups/*.json",
    "handovers/*.json",
    "recoveries/*.json",
    "store/*/group.json",
    "store/*/initial.json",
    "store/*/tags.json",
    "store/*/lease.json",
    "guard/*",
)
_TAILS = ("history.jsonl", "logs/*.log")


def collect(home: Home) -> dict[str, str]:
    """{name: text}. What can't be read is said in its place: half a bundle is better than none."""
    found = {name: text for name, text in _files(home.path)}
    made: dict[str, Callable[[], Any]] = {
        "host.json": lambda: _host(home),
        "processes.json": lambda: _processes(home.run / "pids"),
        "rings.json": lambda: {path.stem: ring_header(path) for path in sorted((home.run / "rings").glob("*.ring"))},
        "stores.json": lambda: {path.name: _store(path) for path in _directories(home.store)},
    }
    for name, make in made.items():
        try:
            found[name] = json.dumps(make(), indent=1, default=str) + "\n"
        except (OSError, ValueError) as exc:
            found[name] = f"not read: {exc}\n"
    return found


def _files(root: Path) -> Iterator[tuple[str, str]]:
    for patterns, limit in ((_FILES, WHOLE), (_TAILS, TAIL)):
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                if path.is_file() and not path.is_symlink():
                    yield str(path.relative_to(root)), tail(path, limit)


def tail(path: Path, limit: int) -> str:
    """The last whole lines of a file, at most `limit` bytes, secrets taken out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            text = file.read(limit).decode(errors="replace")
    except OSError as exc:
        return f"not read: {exc.strerror}\n"
    if size > limit:
        text = f"[the last {limit} of {size} bytes]\n" + text.partition("\n")[2]
    return redact(text)


def _host(home: Home) -> dict[str, Any]:
    usage = {}
    for name, path in (("home", home.path), ("run", home.run)):
        with suppress(OSError):
            usage[name] = shutil.disk_usage(path)._asdict()
    certificate: Any = None
    with suppress(OSError, ValueError):
        certificate = [moment.isoformat() for moment in certificate_expiry(home.tls)]
    return {
        "software": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load": os.getloadavg(),
        "memory": _lines(Path("/proc/meminfo"), ("MemTotal", "MemAvailable", "SwapFree")),
        "space": usage,
        "certificate": certificate,
        "tls": {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in sorted(home.tls.glob("*"))},
    }


def _lines(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    with suppress(OSError):
        rows = (line.partition(":") for line in path.read_text().splitlines())
        return {name: value.strip() for name, _, value in rows if name in names}
    return {}


def _processes(pids: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(pids.glob("*.json")):
        told: dict[str, Any] = {"name": path.stem}
        with suppress(OSError, ValueError):
            told |= json.loads(path.read_text())
        pid = int(told.get("pid") or 0)
        told["alive"] = bool(pid) and start_time_of(pid) == told.get("start_time")
        told["status"] = _lines(Path(f"/proc/{pid}/status"), ("State", "VmRSS", "VmLck", "Threads"))
        told["command"] = [redact(str(word)) for word in told.get("command") or ()]
        found.append(told)
    return found


def ring_header(path: Path) -> dict[str, Any]:
    """The words of a ring's header by name, and each disk's."""
    try:
        with path.open("rb") as file:
            words = memoryview(file.read(HEADER_SIZE)).cast("Q")
    except (OSError, TypeError) as exc:
        return {"problem": str(exc)}
    if len(words) < HEADER_SIZE // 8 or words[Word.MAGIC] != MAGIC:
        return {"problem": "not a ring of this version"}
    starts = range(DISK_TABLE, DISK_TABLE + DISK_WORDS * min(words[Word.DISKS], MAX_DISKS), DISK_WORDS)
    disks = [{word.name.lower(): words[start + word] for word in DiskWord} for start in starts]
    return {word.name.lower(): words[word] for word in Word} | {"disks": disks}


def _store(root: Path) -> dict[str, Any]:
    segments = sorted(root.glob("streams/*/*/*.seg"), key=lambda path: path.name)
    bases = sorted(root.glob("disks/*/base.raw"))
    return {
        "segments": len(segments),
        "bytes": sum(_size(path) for path in segments),
        "newest": [_segment(root, path) for path in segments[-SEGMENTS:]],
        "bases": {path.parent.name: {"size": _size(path), "allocated": _allocated(path)} for path in bases},
        "runs": len(list(root.glob("runs/*"))),
        "pins": sorted(path.name for path in root.glob("pins/*")),
    }


def _segment(root: Path, path: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"name": str(path.relative_to(root)), "size": _size(path)}
    with suppress(OSError), path.open("rb") as file:
        told["header"] = file.read(SEGMENT_HEADER).hex()
    return told


def _size(path: Path) -> int:
    with suppress(OSError):  # merged or promoted a moment ago
        return path.stat().st_size
    return 0


def _allocated(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _directories(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
