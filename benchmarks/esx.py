"""A simulated ESX host over real SSH: its inventory, drctl's own share of a snapshot cycle, and the first sync.

    python -m benchmarks.esx [--machines 300] [--size 512MiB] [--rounds 5] [--rate 100]

inventory   300 machines of one disk each: seconds, and round trips (goals: 2 s, 6 of them).
cycle       one machine with one disk, some MiB written in between. `rest` is what a cycle takes beyond the host: from
            its seconds those are taken in which the host had one of our commands at work, with the door of SSH (goal:
            1 s). The link goes to a receiver on this machine.
sync        the first sync of a half filled disk by the appliance, against the flat file by SSH from the same host, both
            over a link of --rate: seconds, from the first command to the first checkpoint, and bytes on the link. What
            the appliance reads of the host over SSH is all of the disk, at no limit, and not in them: it is meant to
            run on that host. `free`: the same without a limit, where both are as fast as this machine.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lab_world import save
from benchmarks.pipeline import payloads
from drctl.appliance.esx import address as esx_address
from drctl.hypervisor.esx.host import EsxHost
from drctl.model.extent import MiB, parse_bytes
from tests.esxsim.host import EsxSim
from tests.esxsim.sites import Sites, until


class Counting:
    """A shell whose commands are counted, and timed from their begin to their end."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self.count, self.seconds = 0, 0.0

    def run(self, argv: Any, **more: Any) -> Any:
        begun = time.monotonic()
        try:
            return self._shell.run(argv, **more)
        finally:
            self.count += 1
            self.seconds += time.monotonic() - begun


def inventory(machines: int, rounds: int) -> dict[str, Any]:
    sim = EsxSim()
    try:
        for number in range(machines):
            sim.add_vm(f"vm{number:03}", (8 * MiB,), on=number % 3 > 0)
        sim.start()
        shell = Counting(sim.shell())
        host = EsxHost("esx1", shell)
        host.version()  # the login is not part of it
        taken = []
        for _ in range(rounds):
            shell.count = 0
            begun = time.monotonic()
            assert len(host.inventory().machines) == machines
            taken.append(time.monotonic() - begun)
        return {"machines": machines, "seconds": median(taken), "worst": max(taken), "round_trips": shell.count}
    finally:
        sim.close()


def protected(size: int) -> tuple[EsxSim, Sites, Any]:
    sim = EsxSim()
    vm = sim.add_vm("vm0", (size,), on=True)
    sites = Sites(sim)
    sim.start()
    sites.start_receiver()
    return sim, sites, vm


def cycle(rounds: int) -> dict[str, Any]:
    sim, sites, vm = protected(64 * MiB)
    try:
        shell = Counting(sim.shell())
        sites.start_appliance(shell)
        sites.protect("vm0")
        sites.live()
        dice = random.Random(1)
        rows = []
        for _ in range(rounds):
            for _ in range(64):
                sim.write(vm, dice.randrange(64 * MiB // 65536 - 1) * 65536, dice.randbytes(65536))
            shell.count, shell.seconds = 0, 0.0
            begun = time.monotonic()
            sites.checkpoint()
            whole = time.monotonic() - begun
            rows.append((whole, whole - shell.seconds, shell.count, sites.status()["cycle"]["shipped"]))
        return {
            "seconds": median(row[0] for row in rows),
            "rest": median(row[1] for row in rows),
            "worst_rest": max(row[1] for row in rows),
            "round_trips": median(row[2] for row in rows),
            "shipped_bytes": median(row[3] for row in rows),
        }
    finally:
        sites.close()
        sim.close()


def fill(path: Path, size: int) -> None:
    """Half of it: random and text by turns, in pieces of 1 MiB; the rest is a hole."""
    text = (b"".join(payloads(65536, "compressible")) * 17)[:MiB]
    with path.open("r+b") as file:
        for at in range(0, size // 2, MiB):
            file.seek(at)
            file.write(text if at // MiB % 2 else os.urandom(MiB))


def first_sync(size: int, rate: int) -> dict[str, Any]:
    sim, sites, vm = protected(size)
    try:
        flat = vm.place("vm0-flat.vmdk")
        fill(flat, size)
        inside = f"/vmfs/volumes/datastore1/vm0/{flat.name}"
        sim.run("vim-cmd", "vmsvc/power.off", "1")  # a file that a machine holds is not read by scp
        by_scp = scp(sim, inside, sites.place / "copy", rate)
        assert (sites.place / "copy").stat().st_size == size
        (sites.place / "copy").unlink()
        sim.run("vim-cmd", "vmsvc/power.on", "1")
        sites.start_process(esx_address.render(sim.login()))
        if rate:
            sites.call("link.limit", group="", site="beta", rate=rate, seconds=0)
        begun = time.monotonic()
        sites.protect("vm0")
        until(lambda: sites.status()["phase"] == "live", 600)
        seconds = time.monotonic() - begun
        sent = int(sites.call("link.list")[0]["groups"][0]["sent_bytes"])
        assert sites.image("vm0.sda", sites.checkpoints()[-1].number) == flat.read_bytes()
        return {"size": size, "seconds": seconds, "sent_bytes": sent, "scp_seconds": by_scp, "scp_bytes": size}
    finally:
        sites.close()
        sim.close()


def scp(sim: EsxSim, source: str, target: Path, rate: int) -> float:
    """The file by SSH as scp does it (its old protocol has no program in the simulator's root: cat has its place)."""
    login = sim.login()
    argv = ["ssh", "-p", str(login.port), "-i", login.identity, "-o", f"UserKnownHostsFile={login.known_hosts}"]
    argv += ["-o", "BatchMode=yes", f"{login.user}@127.0.0.1", f"cat '{source}'"]
    begun = time.monotonic()
    with target.open("wb") as file, subprocess.Popen(argv, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        done = 0
        while data := process.stdout.read(65536):
            file.write(data)
            done += len(data)
            if rate and (ahead := done / rate - (time.monotonic() - begun)) > 0:
                time.sleep(ahead)
        os.fsync(file.fileno())
    assert process.returncode == 0
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=300)
    parser.add_argument("--size", default="512MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=int, default=100, help="Mbit/s of the link (default 100)")
    options = parser.parse_args()
    found = {"inventory": inventory(options.machines, options.rounds), "cycle": cycle(options.rounds)}
    found["sync"] = first_sync(parse_bytes(options.size), options.rate * 125_000)
    found["free"] = first_sync(parse_bytes(options.size), 0)
    for name, row in found.items():
        print(
            name,
            ", ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            ),
        )
    save("esx", found)


if __name__ == "__main__":
    main()
