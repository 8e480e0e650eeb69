"""What long tests of plans on the lab share: a command line of their own, guests' agents, and services that are well
when their guest is."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from drctl.errors import DrctlError, StepFailed
from drctl.lab.observer import Observer

#: Whatever has to come comes within this many seconds, also beside other work on a small machine.
PATIENCE = 600.0


class Operator:
    """A configuration directory of our own for a lab's appliances, and a command line that uses it.

    In the lab's directory the lab's user could not remove what a test's user makes."""

    def __init__(self, rig: Any, groups: Mapping[str, list[str]], interval: str = "1s") -> None:
        self.rig = rig
        self.directory = Path(tempfile.mkdtemp(prefix="drctl-plans-", dir="/var/tmp"))
        shutil.copy(rig.directory / "drctl.toml", self.directory)
        shutil.copytree(rig.directory / "ca", self.directory / "ca")
        for name in ("groups", "plans"):
            (self.directory / name).mkdir()
        for name, machines in groups.items():
            text = f'name = "{name}"\nsource = "alpha"\nrecovery = "beta"\nmachines = {json.dumps(machines)}\n'
            (self.directory / f"groups/{name}.toml").write_text(text + f'checkpoint_interval = "{interval}"\n')

    def drctl(self, *arguments: str, code: int | None = 0, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=timeout, check=False)
        told = f"{arguments} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert code is None or done.returncode == code, told
        return done

    def json(self, *arguments: str, code: int | None = 0) -> Any:
        return json.loads(self.drctl(*arguments, "-o", "json", code=code).stdout)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "drctl.cli", "--config", str(self.directory), *arguments]

    def write(self, plan: str, text: str) -> Path:
        path = self.directory / f"plans/{plan}.toml"
        path.write_text(text)
        return path

    def script(self, name: str, text: str) -> Path:
        """A program beside the plans, where their scripts run."""
        path = self.directory / "plans" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def checkpoints(self, group: str) -> list[dict[str, Any]]:
        return list(self.json("checkpoint", "list", group)["checkpoints"])

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def wait_for(look: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true answer; what is not there yet may answer with an error."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(DrctlError):
            if found := look():
                return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def in_guest(rig: Any, site: str, domain: str, *argv: str, seconds: float = PATIENCE) -> tuple[int, bytes]:
    """A program run by the guest's agent: its exit code and output. Waits for an agent that is not up yet."""
    deadline = time.monotonic() + seconds

    def ask(execute: str, **arguments: Any) -> Any:
        sent = json.dumps({"execute": execute, "arguments": arguments})
        while True:
            try:
                return json.loads(rig.virsh(site, "qemu-agent-command", domain, sent, "--timeout", "20"))["return"]
            except (StepFailed, subprocess.SubprocessError):
                if time.monotonic() > deadline or execute != "guest-exec":
                    raise
                time.sleep(1)

    pid = ask("guest-exec", path=argv[0], arg=list(argv[1:]), **{"capture-output": True})["pid"]
    while not (told := ask("guest-exec-status", pid=pid))["exited"]:
        assert time.monotonic() < deadline, f"{argv} does not end"
        time.sleep(0.1)
    return int(told.get("exitcode", -1)), base64.b64decode(told.get("out-data", ""))


class _Well(BaseHTTPRequestHandler):
    """Says that all is well, whatever is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok: Log in\n")

    def log_message(self, format: str, *args: object) -> None:
        """Not on the terminal."""


class Service:
    """A port of this machine that listens, and speaks HTTP, once a guest's copy has booted at the recovery site.

    The lab's guests have no network; so this is what an address of theirs would be to a plan's checks."""

    def __init__(self, observer: Observer, guest: str) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Well, bind_and_activate=False)
        self._server.server_bind()
        self.port = int(self._server.server_address[1])
        self.up_ns = 0
        self._observer, self._guest, self._begun = observer, guest, time.time_ns()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.3):
            with suppress(StepFailed):
                self.up_ns = self._observer.await_up(self._guest, "beta", after_ns=self._begun, timeout=0.1)
                break
        if self.up_ns:
            self._server.server_activate()
            self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._ended.set()
        if self.up_ns:
            self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def fitted(text: str, changes: list[tuple[str, str]]) -> str:
    """An example plan with the lab's names in the place of its own. Each word has to be in it."""
    for old, new in changes:
        assert old in text, f"{old!r} is not in the example any more"
        text = text.replace(old, new)
    return text
