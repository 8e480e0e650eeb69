"""`drctl status` over a fleet: sixty appliances and 1,300 machines behind real SSH.

    python benchmarks/fleet.py [--appliances 60] [--machines 1300] [--rounds 5] [--round-trip 0]

Each appliance is a control socket that answers as the real one does (the command line's own tests hold its shape), at
the far end of a login of its own: one OpenSSH server that listens on a loopback port per appliance, host keys checked,
a new connection, a new login and a new `drctl.appliance.connect` for each. `status` is the real program in a process of
its own. Both ends share this machine's processors, which in a real fleet only the command line's would be: `remote_cpu`
says how much of the time was theirs. `--round-trip` (ms) is what tc netem adds to the loopback (needs root)."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lab_world import median, save
from drctl.appliance.control import ControlServer

GOAL_SECONDS = 3.0
GROUP_SIZE = 10
#: OpenSSH listens on sixteen addresses at most (MAX_LISTEN_SOCKS).
LISTEN = 15
GiB = 1 << 30


class Fake:
    """One host's appliance: the groups of its machines as their source, another host's as their recovery side."""

    #: Answer as appliances did before listings told statuses: each is asked for by itself.
    plain = False

    def __init__(self, index: int, site: str, sources: list[dict[str, Any]], recoveries: list[dict[str, Any]]) -> None:
        self.host, self.site = f"{site}{index}", site
        self._roles = [(spec, "source") for spec in sources] + [(spec, "recovery") for spec in recoveries]

    def handlers(self) -> dict[str, Any]:
        return {
            "group.list": self._list,
            "group.status": lambda params, _: self._status(*self._find(params["group"])),
            "machine.list": lambda params, _: [],
        }

    def _find(self, group: str) -> tuple[dict[str, Any], str]:
        return next((spec, role) for spec, role in self._roles if spec["name"] == group)

    def _list(self, params: dict[str, Any], _: Any) -> list[dict[str, Any]]:
        rows = []
        for spec, role in self._roles:
            state = {"phase": "live"} if role == "source" else {"mode": "journal"}
            row = {"group": spec["name"], "role": role, "generation": 1, "spec": spec, **state}
            rows.append(row | {"status": self._status(spec, role)} if params.get("status") and not self.plain else row)
        return rows

    def _status(self, spec: dict[str, Any], role: str) -> dict[str, Any]:
        now = time.time()
        if role == "recovery":
            newest, oldest = {"number": 5000, "time": now - 3}, {"number": 1, "time": now - 86400}
            return {
                "group": spec["name"], "role": role, "mode": "journal", "generation": 1, "wall_ns": int(now * 1e9),
                "checkpoints": {"count": 5000, "oldest": oldest, "newest": newest},
                "journal": {"bytes": 20 * GiB, "limit": 64 * GiB}, "recoveries": [], "kept_until": None,
                "history": {"seconds": 86397.0, "target": 604800.0, "forecast": None}, "interval": 5.0,
                "source": {"site": "alpha", "host": "alpha1"},
            }  # fmt: skip
        disks = [{"target": target, "size": 40 * GiB, "state": "attached"} for target in ("vda", "vdb")]
        return {
            "group": spec["name"], "role": role, "phase": "live", "desired": "protected", "reason": "", "generation": 1,
            "epoch": "a" * 32, "interval": 5.0, "rpo_seconds": 3.0,
            "last_checkpoint": {"number": 5000, "time": now - 3},
            "link": {"state": "connected", "offset_ms": 0.2, "error": None, "limit": None}, "backlog_bytes": 4096,
            "sync": None, "machines": [{"name": name, "state": "running", "disks": disks} for name in spec["machines"]],
            "changes": [], "ring": {"size": 1 << 28, "used": 4096, "dropping": False}, "boot": None, "strays": [],
        }  # fmt: skip


def fleet(appliances: int, machines: int) -> list[Fake]:
    """Half of the appliances at each site; groups of ten machines, their replicas at the other site."""
    half = appliances // 2
    names = [f"vm{number:04d}" for number in range(machines)]
    specs = []
    for index in range(0, machines, GROUP_SIZE):
        own = index // GROUP_SIZE
        ends = ("alpha", "beta") if own % 2 == 0 else ("beta", "alpha")
        specs.append({
            "name": f"group{own:03d}", "source": ends[0], "recovery": ends[1],
            "source_host": f"{ends[0]}{own // 2 % half + 1}", "recovery_host": f"{ends[1]}{own // 2 % half + 1}",
            "machines": names[index : index + GROUP_SIZE], "checkpoint_interval": 5.0,
        })  # fmt: skip
    made = []
    for site in ("alpha", "beta"):
        for index in range(1, half + 1):
            host = f"{site}{index}"
            sources = [spec for spec in specs if spec["source_host"] == host]
            made.append(Fake(index, site, sources, [spec for spec in specs if spec["recovery_host"] == host]))
    return made


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def sshd(directory: Path, ports: list[int]) -> Iterator[None]:
    for name in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    key = (directory / "host_key.pub").read_text().strip()
    (directory / "known_hosts").write_text("".join(f"[127.0.0.1]:{port} {key}\n" for port in ports))
    shutil.copy(directory / "id.pub", directory / "authorized_keys")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    servers = [_listen(directory, number, ports[number : number + LISTEN]) for number in range(0, len(ports), LISTEN)]
    try:
        deadline = time.monotonic() + 30
        while not all(map(_answers, ports)):
            if any(server.poll() is not None for server in servers) or time.monotonic() > deadline:
                told = "".join(path.read_text()[-500:] for path in directory.glob("sshd*.log"))
                raise SystemExit(f"sshd did not start: {told}")
            time.sleep(0.05)
        yield
    finally:
        for server in servers:
            server.terminate()
            server.wait(10)


def _listen(directory: Path, number: int, ports: list[int]) -> subprocess.Popen[bytes]:
    config = directory / f"sshd{number}_config"
    config.write_text(
        "".join(f"ListenAddress 127.0.0.1:{port}\n" for port in ports)
        + f"HostKey {directory}/host_key\nAuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\n"
        "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        # One server stands for fifteen: its limit for logins under way would be each one's own.
        "PidFile none\nMaxStartups 500\nPerSourceMaxStartups none\nSetEnv SHLVL=2\n"
    )
    with (directory / f"sshd{number}.log").open("wb") as log:
        return subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", config], stderr=log)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def round_trip(milliseconds: float) -> Iterator[None]:
    if not milliseconds:
        yield
        return
    half = f"{milliseconds / 2}ms"
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", half, "limit", "100000"], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def configure(directory: Path, fakes: list[Fake], ports: list[int]) -> None:
    """drctl.toml, and a prefix whose Python is this one."""
    program = directory / "prefix" / "current" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    text = '[[site]]\nname = "alpha"\n[[site]]\nname = "beta"\n'
    for fake, port in zip(fakes, ports, strict=True):
        text += (
            f'[[host]]\nname = "{fake.host}"\nsite = "{fake.site}"\nkind = "libvirt"\nuri = "qemu:///system"\n'
            f'ssh = "root@127.0.0.1:{port}"\nssh_identity = "{directory}/id"\n'
            f'ssh_known_hosts = "{directory}/known_hosts"\nprefix = "{directory}/prefix"\n'
            f'control = "unix:{directory}/{fake.host}.sock"\nlink = "127.0.0.1:{port}"\n'
        )
    (directory / "drctl.toml").write_text(text)


def measure(directory: Path, rounds: int) -> dict[str, Any]:
    drctl = str(Path(sys.executable).parent / "drctl")
    command = [drctl, "--config", str(directory), "status", "--output", "json"]
    times, own = [], []
    for _ in range(rounds):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        own.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode:
            raise SystemExit(f"status ended with {done.returncode}: {done.stderr[-800:]}")
        told = json.loads(done.stdout)
        live = sum(1 for group in told["groups"] if group["phase"] == "live" and group["rpo_seconds"] is not None)
        machines = sum(len(group["machines"]) for group in told["groups"])
    return {
        "seconds": [round(each, 2) for each in times],
        "median_seconds": round(median(times), 2),
        "cpu_seconds_of_drctl": round(median(own), 2),
        "groups_live": live,
        "machines_told": machines,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--appliances", type=int, default=60)
    parser.add_argument("--machines", type=int, default=1300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-trip", type=float, default=0.0, help="milliseconds that netem adds to the loopback")
    parser.add_argument("--plain", action="store_true", help="a question per group, as with older appliances")
    arguments = parser.parse_args()
    Fake.plain = arguments.plain
    fakes = fleet(arguments.appliances, arguments.machines)
    with tempfile.TemporaryDirectory(prefix="drctl-fleet-", dir="/var/tmp") as name:
        directory = Path(name)
        ports = free_ports(len(fakes))
        servers = [ControlServer(directory / f"{fake.host}.sock", fake.handlers()) for fake in fakes]
        for server in servers:
            server.start()
        configure(directory, fakes, ports)
        load = round(os.getloadavg()[0], 1)
        with sshd(directory, ports), round_trip(arguments.round_trip):
            result = measure(directory, arguments.rounds)
        for server in servers:
            server.stop()
    result |= {
        "appliances": len(fakes),
        "machines": arguments.machines,
        "round_trip_ms": arguments.round_trip,
        "plain": arguments.plain,
        "goal_seconds": GOAL_SECONDS,
        "load_at_start": load,
        "processors": os.cpu_count(),
    }
    print(json.dumps(result))
    if not arguments.plain:
        save("fleet" if not arguments.round_trip else f"fleet_{arguments.round_trip:g}ms", result)
    return 0 if result["median_seconds"] <= GOAL_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
