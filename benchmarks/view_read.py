"""A view against the same bytes in a local raw file behind qemu-nbd and nbdkit: sequential and random reads.

`python benchmarks/view_read.py [--size MIB] [--journal MIB] [--rounds N]`. All servers run at once and are read in turn
(alternated, so that another load on the machine meets all of them), from the page cache; printed are medians and the
view's share of the best peer. The journal holds 4 KiB writes at random places (a database) and 1 MiB ones (copies)."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab_world import save
from drctl.model.group import GroupDisk
from tests.integration.store_rig import StoreRig

MiB = 1024 * 1024
EXPORT = "db.vda"
FIO_SECONDS = 3


def payload(rng: random.Random, length: int) -> bytes:
    """Half random, half text: zstd saves a half of it, as of a guest's files."""
    return b"".join(rng.randbytes(256) + b"some text of a log file, 16 times" * 8 for _ in range(length // 512 + 1))[
        :length
    ]


def build(root: Path, size: int, journal: int) -> StoreRig:
    rng = random.Random(5)
    base = payload(rng, MiB) * (size // MiB)
    rig = StoreRig(root, "erp", [GroupDisk(1, "db", "vda", size)], {EXPORT: base})
    small = journal // 2 // 4096
    where = [rng.randrange(size // 4096) * 4096 for _ in range(small)]
    for start in range(0, small, 5000):
        rig.write_many(EXPORT, [(offset, payload(rng, 4096)) for offset in where[start : start + 5000]])
        rig.mark(keep=False)
    for _ in range(journal // 2 // MiB):
        rig.write(EXPORT, rng.randrange(size // MiB) * MiB, payload(rng, MiB))
    rig.mark()
    rig.store.close()
    return rig


class Server:
    def __init__(self, name: str, command: list[str], url: str, sock: Path):
        begin = time.monotonic()
        self.name, self.url = name, url
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while subprocess.run(["nbdinfo", "--size", url], capture_output=True, check=False).returncode:
            if self.process.poll() is not None or time.monotonic() - begin > 60:
                raise SystemExit(f"{name} did not start")
            time.sleep(0.05)
        self.opened = time.monotonic() - begin
        del sock

    def cpu(self) -> float:
        """Seconds of CPU time so far. On a busy machine the only measure that tells the server from its neighbours."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def servers(directory: Path, rig: StoreRig, raw: Path) -> list[Server]:
    config = directory / "view.json"
    sock = directory / "view.sock"
    fields = {"store": str(rig.root), "group": "erp", "checkpoint": rig.number, "view": "bench", "socket": str(sock)}
    config.write_text(json.dumps(fields))
    view = [sys.executable, "-m", "drctl.replication.view_server", str(config)]
    qemu, nbdkit = directory / "qemu.sock", directory / "nbdkit.sock"
    found = [
        Server("view", view, f"nbd+unix:///{EXPORT}?socket={sock}", sock),
        Server(
            "qemu-nbd",
            ["qemu-nbd", "-r", "-t", "-e", "16", "-f", "raw", "-k", str(qemu), str(raw)],
            f"nbd+unix:///?socket={qemu}",
            qemu,
        ),
    ]
    if shutil.which("nbdkit"):
        command = ["nbdkit", "-f", "-r", "-U", str(nbdkit), "file", str(raw)]
        found.append(Server("nbdkit", command, f"nbd+unix:///?socket={nbdkit}", nbdkit))
    return found


def copy(server: Server, request: int, size: int, connections: int) -> float:
    """MiB/s of nbdcopy to nowhere."""
    begin = time.monotonic()
    subprocess.run(
        ["nbdcopy", f"--request-size={request}", f"--connections={connections}", server.url, "null:"], check=True
    )
    return size / MiB / (time.monotonic() - begin)


def fio(server: Server, depth: int, seconds: int = FIO_SECONDS) -> float:
    """4 KiB random reads per second."""
    argv = ["fio", "--name=x", "--ioengine=nbd", f"--uri={server.url}", "--rw=randread", "--bs=4k", "--time_based"]
    argv += [f"--iodepth={depth}", f"--runtime={seconds}", "--size=100%", "--output-format=json", "--randrepeat=0"]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return json.loads(out[out.index("{") :])["jobs"][0]["read"]["iops"]


def measure(found: list[Server], rounds: int, size: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    tests = [
        (f"sequential {request // 1024} KiB, {connections} connections", "MiB/s", copy, (request, size, connections))
        for request, connections in ((65536, 1), (262144, 1), (MiB, 1), (262144, 4))
    ]
    if shutil.which("fio"):
        tests += [(f"random 4 KiB, depth {depth}", "reads/s", fio, (depth,)) for depth in (1, 16)]
    for label, unit, test, arguments in tests:
        results: dict[str, list[float]] = {server.name: [] for server in found}
        cpu: dict[str, list[float]] = {server.name: [] for server in found}
        for _ in range(rounds):
            for server in found:
                before = server.cpu()
                rate = test(server, *arguments)
                reads = size / arguments[0] if test is copy else rate * FIO_SECONDS
                results[server.name].append(rate)
                cpu[server.name].append((server.cpu() - before) / reads * 1e6)
        medians = {name: statistics.median(values) for name, values in results.items()}
        cost = {name: round(statistics.median(values), 1) for name, values in cpu.items()}
        best = max(value for name, value in medians.items() if name != "view")
        shown = "  ".join(f"{name} {value:,.0f}" for name, value in medians.items())
        print(f"{label}: {shown} {unit}  (view / best peer {medians['view'] / best:.2f}); CPU us per read {cost}")
        rounded = {name: round(value) for name, value in medians.items()}
        share = round(medians["view"] / best, 2)
        rows.append({"test": label, "unit": unit, **rounded, "view_to_best_peer": share, "cpu_us_per_read": cost})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--journal", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="drctl-bench-") as name:
        directory, size = Path(name), options.size * MiB
        rig = build(directory / "erp", size, options.journal * MiB)
        raw = directory / "same.raw"
        raw.write_bytes(rig.images[EXPORT])
        found = servers(directory, rig, raw)
        try:
            print(f"disk {options.size} MiB, journal {options.journal} MiB; the view opened in {found[0].opened:.2f} s")
            rows = measure(found, options.rounds, size)
            print(f"the view's peak memory: {found[0].peak():.0f} MiB")
            result: dict[str, object] = {"disk_MiB": options.size, "journal_MiB": options.journal}
            result |= {"rounds": options.rounds, "view_opened_s": round(found[0].opened, 2)}
            save("view_read", result | {"view_peak_MiB": round(found[0].peak()), "rows": rows})
        finally:
            for server in found:
                server.stop()


if __name__ == "__main__":
    main()
