"""Checkpoints for other tools: exported into image files and served as NBD, by the real command, view server and
qemu-img; what is in them is what the store's oracle says."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from drctl.appliance.client import Client
from drctl.appliance.control import ControlServer
from drctl.appliance.process import Processes
from drctl.appliance.recovery.store import GroupStores
from drctl.appliance.replica.checkpoint_serve import CheckpointServer
from drctl.cli.app import run
from drctl.cli.config import Config
from drctl.cli.context import Context
from drctl.cli.render import Screen
from drctl.errors import DrctlError, PreconditionFailed
from drctl.model.extent import KiB, MiB
from drctl.model.group import GroupDisk
from drctl.model.site import Host, HostKind, Login, Site
from tests.integration.link_rig import until
from tests.integration.store_rig import StoreRig

TOOLS = ("nbdinfo", "nbdcopy", "qemu-img")
pytestmark = pytest.mark.skipif(any(shutil.which(t) is None for t in TOOLS), reason=f"needs {', '.join(TOOLS)}")

DISKS = [GroupDisk(1, "db", "vda", 24 * MiB), GroupDisk(2, "web", "vda", 3 * MiB + 512)]


class Recovery:
    """A recovery host with one group: its store, a control socket with what the commands need."""

    def __init__(self, root: Path, short: Path) -> None:
        dice = random.Random(5)
        self.root, self.short = root, short
        base = {"db.vda": dice.randbytes(MiB) + bytes(4 * MiB) + dice.randbytes(MiB)}
        self.rig = StoreRig(root / "store" / "erp", "erp", DISKS, base)
        for number in range(1, 4):
            self.rig.write("db.vda", 9 * MiB + number * 64 * KiB, dice.randbytes(32 * KiB))
            self.rig.write("web.vda", 3 * MiB, dice.randbytes(512))
            self.rig.mark()
        (root / "logs").mkdir()
        (short / "pids").mkdir()
        self.processes = Processes(short / "pids", root / "logs")
        self.server = CheckpointServer(short, root / "store", self.processes)
        stores = GroupStores(root / "store")
        place = {"group": "erp", "role": "recovery", "mode": "journal", "generation": 1, "spec": {}}
        self.control = ControlServer(
            short / "c.sock",
            {
                "group.list": lambda _params, _progress: [place],
                "checkpoint.choose": lambda params, _: asdict(stores.choose("erp", params["checkpoint"], time.time())),
                "checkpoint.serve": self.server.serve,
            },
        )
        self.control.start()

    def command(self, *words: str, login: Login | None = None) -> tuple[int, str, str]:
        """One command line; its exit code, output, and what it said."""
        host = Host("b1", "beta", HostKind.LIBVIRT, "", f"unix:{self.short}/c.sock", "", login)
        config = Config("the test's configuration", None, (Site("beta", (host,)),))
        out, said = io.StringIO(), io.StringIO()
        context = Context(
            config=config, clients={"b1": Client(f"unix:{self.short}/c.sock")}, screen=Screen(interactive=False)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", said)
            code = run(words, context)
        return code, out.getvalue(), said.getvalue()

    def pins(self) -> list[str]:
        return sorted(self.rig.store.pins())

    def left(self) -> list[str]:
        """What a service that ended has left behind."""
        return [*self.pins(), *(path.name for path in (self.short / "views").glob("*")), *self.processes.names()]

    def ended(self) -> None:
        """Soon nothing is left: the appliance notices within half a second that its caller has left."""
        until(lambda: not self.left(), 10, why="the services have ended")


@pytest.fixture
def recovery(tmp_path: Path):
    short = Path(tempfile.mkdtemp(prefix="dx-", dir="/tmp"))
    host = Recovery(tmp_path, short)
    yield host
    host.server.close()
    host.control.stop()
    host.ended()
    host.rig.close()
    shutil.rmtree(short)


def content(file: Path, form: str) -> bytes:
    plain = file.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", file, plain], check=True)
    return plain.read_bytes()


@pytest.mark.parametrize("form", ["raw", "qcow2", "vmdk"])
def test_exported_disks_are_the_checkpoint(recovery: Recovery, tmp_path: Path, form: str) -> None:
    code, out, said = recovery.command(
        "checkpoint", "export", "erp", "#2", "--format", form, "-o", str(tmp_path / "out")
    )
    assert code == 0, said
    for name, expected in recovery.rig.marks[2].items():
        file = tmp_path / "out" / f"{name}.{form}"
        assert content(file, form)[: len(expected)] == expected
        assert str(file) in out
        assert file.stat().st_mode & 0o777 == 0o600
    # 2 MiB and some are not zeroes; VMDK counts in grains of 64 KiB.
    assert (tmp_path / "out" / f"db.vda.{form}").stat().st_blocks * 512 < 4 * MiB
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []
    recovery.ended()


def test_one_disk_alone(recovery: Recovery, tmp_path: Path) -> None:
    code, _, said = recovery.command(
        "checkpoint", "export", "erp", "latest", "-d", "web.vda", "-o", str(tmp_path / "out")
    )
    assert code == 0, said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["web.vda.raw"]
    assert (tmp_path / "out" / "web.vda.raw").read_bytes() == recovery.rig.marks[3]["web.vda"]
    code, _, said = recovery.command(
        "checkpoint", "export", "erp", "latest", "-d", "web.vdb", "-o", str(tmp_path / "out")
    )
    assert code == 11
    assert "did you mean web.vda" in said
    recovery.ended()


def test_nothing_is_overwritten(recovery: Recovery, tmp_path: Path) -> None:
    (tmp_path / "web.vda.raw").write_text("precious")
    code, _, said = recovery.command("checkpoint", "export", "erp", "latest", "-o", str(tmp_path))
    assert code == 12
    assert "web.vda.raw is there already" in said
    assert (tmp_path / "web.vda.raw").read_text() == "precious"
    assert not (tmp_path / "db.vda.raw").exists()
    recovery.ended()


def wrap(directory: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Another qemu-img before the real one, $REAL."""
    tool = directory / "bin" / "qemu-img"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\nREAL={shutil.which('qemu-img')}\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        # A file system that lies: a bit of what was written is another one when it is read.
        (
            'if [ "$1" = compare ]; then for f; do :; done; printf X | dd of="$f" bs=1 seek=9700000 conv=notrunc 2>&-; fi\n'
            'exec $REAL "$@"',
            31,
            "reads back otherwise than it was written: Content mismatch at offset",
        ),
        (
            '[ "$1" = convert ] && { echo "qemu-img: No space left on device" >&2; exit 1; }\nexec $REAL "$@"',
            32,
            "No space",
        ),
        (
            '[ "$1" = convert ] && { echo "qemu-img: oh" >&2; exit 1; }\nexec $REAL "$@"',
            40,
            "convert failed: qemu-img: oh",
        ),
        ('[ "$1" = measure ] && { echo \'{"required": 1000000000000000}\'; exit; }\nexec $REAL "$@"', 32, "don't fit"),
    ],
)
def test_what_is_not_whole_gets_no_name(
    recovery: Recovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int, words: str
) -> None:
    wrap(tmp_path, monkeypatch, text)
    got, _, said = recovery.command("checkpoint", "export", "erp", "latest", "-o", str(tmp_path / "out"))
    assert (got, words in said) == (code, True), said
    assert list((tmp_path / "out").iterdir()) == []
    recovery.ended()


def test_another_machines_disks_are_not_sent_over_ssh(recovery: Recovery, tmp_path: Path) -> None:
    code, _, said = recovery.command(
        "checkpoint", "export", "erp", "latest", "-o", str(tmp_path), login=Login("b1.example")
    )
    assert code == 42
    assert "ssh b1.example sudo drctl checkpoint export erp" in said


class Service:
    """`checkpoint.serve` called as the command does, in a thread; `leave` hangs up."""

    def __init__(self, recovery: Recovery, **params: object) -> None:
        self.facts: dict = {}
        self.result: dict | None = None
        self._leave = False
        order = {"group": "erp", "checkpoint": "#2", **params}

        def told(progress: dict) -> None:
            self.facts = self.facts or progress
            if self._leave:
                raise ConnectionAbortedError

        def call() -> None:
            with suppress(ConnectionAbortedError, DrctlError):
                self.result = Client(f"unix:{recovery.short}/c.sock").call("checkpoint.serve", order, on_progress=told)

        self._thread = threading.Thread(target=call, daemon=True)
        self._thread.start()
        until(lambda: self.facts, 10)

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.facts['socket']}"

    def leave(self) -> None:
        self._leave = True
        self._thread.join(5)


def test_any_tool_reads_what_is_served_until_the_caller_leaves(recovery: Recovery, tmp_path: Path) -> None:
    service = Service(recovery)
    assert [disk["name"] for disk in service.facts["disks"]] == ["db.vda", "web.vda"]
    assert service.facts["checkpoint"]["number"] == 2
    assert len(recovery.pins()) == 1
    subprocess.run(["nbdcopy", service.uri("db.vda"), tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == recovery.rig.marks[2]["db.vda"]
    told = subprocess.check_output(["nbdinfo", "--json", "--no-content", service.uri("web.vda")])
    assert json.loads(told)["exports"][0]["is_read_only"]
    service.leave()
    recovery.ended()
    assert subprocess.run(["nbdinfo", service.uri("db.vda")], capture_output=True, check=False).returncode


def test_a_port_of_the_loopback_address_and_an_end_by_the_clock(recovery: Recovery) -> None:
    service = Service(recovery, port=0, seconds=1.5, disks=["web.vda"])
    address = service.facts["address"]
    assert address.startswith("127.0.0.1:")
    assert subprocess.check_output(["nbdinfo", "--size", f"nbd://{address}/web.vda"]).strip() == b"3146240"
    refused = subprocess.run(["nbdinfo", f"nbd://{address}/db.vda"], capture_output=True, check=False)
    assert refused.returncode
    until(lambda: service.result, 5)
    assert service.result is not None
    assert 1.5 <= service.result["served_seconds"] < 4
    recovery.ended()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        order = {"group": "erp", "port": taken.getsockname()[1]}
        with pytest.raises(PreconditionFailed, match="can't be had"):
            Client(f"unix:{recovery.short}/c.sock").call("checkpoint.serve", order)


def test_a_view_server_that_dies_ends_the_service_with_an_error(recovery: Recovery) -> None:
    service = Service(recovery)
    child = recovery.processes.find(recovery.pins()[0])
    assert child is not None
    os.kill(child.pid, signal.SIGKILL)
    recovery.ended()
    service.leave()
    assert service.result is None


def test_what_a_dead_supervisor_left_is_taken_away(recovery: Recovery) -> None:
    service = Service(recovery)
    assert recovery.left()
    fresh = CheckpointServer(
        recovery.short, recovery.root / "store", Processes(recovery.short / "pids", recovery.root / "logs")
    )
    fresh.sweep()
    recovery.ended()
    service.leave()


def test_the_command_serves_until_ctrl_c(recovery: Recovery, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def interrupted(service: object) -> None:
        seen.append(recovery.pins())
        raise KeyboardInterrupt

    monkeypatch.setattr("drctl.cli.serving.Served.wait", interrupted)
    code, out, said = recovery.command("checkpoint", "serve", "erp", "#1", "--for", "1h")
    assert code == 0
    assert len(seen[0]) == 1
    assert "nbd+unix:///db.vda?socket=" in out
    assert "#1 of erp is not served any more" in said
    recovery.ended()


def test_the_command_ends_by_itself_and_speaks_json(recovery: Recovery) -> None:
    begin = time.monotonic()
    code, out, _ = recovery.command("checkpoint", "serve", "erp", "#1", "--for", "500ms", "-o", "json", "-d", "db.vda")
    assert code == 0
    assert time.monotonic() - begin < 10
    document = json.loads(out)
    assert (document["kind"], document["number"], document["address"]) == ("service", 1, None)
    assert [disk["name"] for disk in document["disks"]] == ["db.vda"]
