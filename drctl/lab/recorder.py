"""Holds the witness channels of all guests of both sites: writes witness.log, relays tokens, forwards commands.

Run as `python -m drctl.lab.recorder DIRECTORY`. Its control socket takes one JSON object a line:
`{"status": true}`, or `{"send": LINE, "guest": NAME or null, "site": NAME or null, "domain": NAME or null,
"wait": SECONDS}`; the answer to the latter tells which domains were reached and which said DONE in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from drctl.lab import layout
from drctl.lab.domain import WITNESS_CHANNEL
from drctl.lab.layout import Layout
from drctl.lab.protocol import is_command
from drctl.lab.relay import Place, Relay

log = logging.getLogger(__name__)
#: How often new channels are looked for: a channel appears with its QEMU, seconds before its guest is up.
_SCAN_SECONDS = 0.1
_LINE_LIMIT = 4096


@dataclass
class Channel:
    """One guest's channel, as long as its QEMU lives."""

    place: Place
    path: Path
    writer: asyncio.StreamWriter
    guest: str = ""
    boot: str = ""
    up_ns: int = 0
    ack_ns: int = 0
    numbers: list[int] = field(default_factory=list)
    trouble: str = ""
    done: dict[str, asyncio.Event] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        return {
            "site": self.place.site,
            "domain": self.place.domain,
            "guest": self.guest,
            "boot": self.boot,
            "up_ns": self.up_ns,
            "ack_ns": self.ack_ns,
            "numbers": self.numbers,
            "trouble": self.trouble,
        }


class Recorder:
    """All channels of a lab. Everything runs on one event loop."""

    def __init__(self, places: Layout, log_descriptor: int) -> None:
        self._layout = places
        self._log = log_descriptor
        self._channels: dict[Path, Channel] = {}
        self._connecting: set[Path] = set()
        self._relay = Relay()

    async def run(self, stop: asyncio.Event) -> None:
        """Serves until `stop` is set."""
        path = self._layout.recorder_socket
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._control, str(path))
        path.chmod(0o600)
        async with server, asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                for place, channel in self._found():
                    self._connecting.add(channel)
                    tasks.create_task(self._hold(place, channel))
                self._send(self._relay.tick(time.monotonic()))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _SCAN_SECONDS)
            for held in self._channels.values():
                held.writer.close()
            server.close()
        path.unlink(missing_ok=True)

    def _found(self) -> list[tuple[Place, Path]]:
        """Channels that nobody holds yet. Later versions of libvirt have them in the runtime directory."""
        found = []
        for site in self._layout.sites:
            for base, pattern in (
                (site.config, "libvirt/qemu/channel/target/*"),  # 9.0
                (site.run / "r", "libvirt/qemu/channel/*"),
                (site.run / "r", "libvirt/qemu/run/channel/*"),  # 11.3
            ):
                for path in base.glob(f"{pattern}/{WITNESS_CHANNEL}"):
                    domain = re.sub(r"^(domain-)?\d+-", "", path.parent.name)
                    if path not in self._connecting:
                        found.append((Place(site.name, domain), path))
        return found

    async def _hold(self, place: Place, path: Path) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=_LINE_LIMIT)
        except OSError:
            await asyncio.sleep(_SCAN_SECONDS)  # a dead QEMU's socket, or one not yet listening
            self._connecting.discard(path)
            return
        channel = self._channels[path] = Channel(place, path, writer)
        writer.write(b"hello\n")
        try:
            while line := await reader.readline():
                self._heard(channel, line.decode(errors="replace").split())
        except (OSError, ValueError) as exc:  # ValueError: no newline within the limit
            log.info("%s/%s: %s", place.site, place.domain, exc)
        finally:
            self._record(channel, "GONE")
            self._relay.leave(place)
            del self._channels[path]
            self._connecting.discard(path)
            writer.close()

    def _heard(self, channel: Channel, words: list[str]) -> None:
        now = time.time_ns()
        match words:
            case ["ACK", boot, *numbers]:
                channel.boot, channel.ack_ns, channel.numbers = boot, now, [int(number) for number in numbers]
            case ["TOKEN", chain, number, digest]:
                self._send(self._relay.token(channel.place, chain, number, digest, time.monotonic()))
                return
            case ["UP", guest, boot, _]:
                if boot != channel.boot or not channel.up_ns:
                    channel.boot, channel.up_ns, channel.trouble = boot, now, ""
                channel.guest = guest
                self._relay.join(channel.place, guest)
            case ["DONE", *command]:
                if event := channel.done.get(" ".join(command)):
                    event.set()
            case ["BROKEN" | "ERROR", *_]:
                channel.trouble = " ".join(words)
        if words:
            self._record(channel, " ".join(words), now)

    def _record(self, channel: Channel, text: str, wall_ns: int | None = None) -> None:
        place = channel.place
        line = f"{wall_ns or time.time_ns()} {place.site} {place.domain} {channel.guest or '-'} {text}\n"
        os.write(self._log, line.encode())

    def _send(self, sends: list[tuple[Place, str]]) -> None:
        for channel in self._channels.values():
            for place, line in sends:
                if channel.place == place:
                    channel.writer.write(line.encode() + b"\n")

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                writer.write(msgspec.json.encode(await self._answer(line)) + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError as exc:
            return {"error": str(exc)}
        if request.get("status"):
            return {"channels": [channel.status() for channel in self._channels.values()]}
        command = str(request.get("send", ""))
        if not is_command(command):
            return {"error": f"the witness knows no command {command!r}"}
        chosen = [channel for channel in self._channels.values() if _matches(channel, request)]
        done = await asyncio.gather(
            *(self._command(channel, command, float(request.get("wait", 0))) for channel in chosen)
        )
        return {"sent": [channel.place.domain for channel in chosen], "done": [name for name in done if name]}

    async def _command(self, channel: Channel, command: str, wait: float) -> str:
        event = channel.done[command] = asyncio.Event()
        self._record(channel, f"COMMAND {command}")
        channel.writer.write(command.encode() + b"\n")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), wait)
        return channel.place.domain if event.is_set() else ""


def _matches(channel: Channel, request: dict[str, Any]) -> bool:
    facts = {"guest": channel.guest, "site": channel.place.site, "domain": channel.place.domain}
    return all(request.get(key) in (None, value) for key, value in facts.items())


async def _main(directory: Path) -> None:
    state = layout.load(directory)
    if state is None:
        raise SystemExit(f"no lab in {directory}")
    places = Layout(directory, Path(state.run))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    descriptor = os.open(places.witness_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        await Recorder(places, descriptor).run(stop)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_main(Path(sys.argv[1])))
