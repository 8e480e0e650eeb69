"""How long the command line takes to start: `drctl --help` and `drctl status` against `python -c pass`.

    python benchmarks/startup.py [--rounds 15]

Rounds alternate; medians. `status` asks an appliance that answers at once with no groups (a real control socket)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.lab_world import median, save
from drctl.appliance.control import ControlServer

GOAL_MS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="drctl-bench-") as name:
        directory = Path(name)
        handlers = {"group.list": lambda params, progress: [], "appliance.info": lambda params, progress: {}}
        server = ControlServer(directory / "c.sock", handlers)
        server.start()
        (directory / "drctl.toml").write_text(
            '[[site]]\nname = "a"\n[[host]]\nname = "a-1"\nsite = "a"\nkind = "libvirt"\nuri = "test:///default"\n'
            f'control = "unix:{directory}/c.sock"\nlink = "127.0.0.1:1"\n'
        )
        environment = {**os.environ, "DRCTL_CONFIG": str(directory / "drctl.toml")}
        drctl = str(Path(sys.executable).parent / "drctl")
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [drctl, "--help"],
            "status": [drctl, "status"],
        }
        times: dict[str, list[float]] = {key: [] for key in commands}
        for _ in range(rounds):
            for key, command in commands.items():
                begun = time.perf_counter()
                subprocess.run(command, env=environment, capture_output=True, check=False)
                times[key].append((time.perf_counter() - begun) * 1e3)
        server.stop()
    base = median(times["python"])
    result = {key: round(median(values), 1) for key, values in times.items()}
    over = {key: round(result[key] - base, 1) for key in ("help", "status")}
    print({"median_ms": result, "over_python_ms": over, "goal_ms": GOAL_MS})
    save("startup", {"median_ms": result, "over_python_ms": over, "goal_ms": GOAL_MS})


if __name__ == "__main__":
    main()
