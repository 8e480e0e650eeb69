"""A plan's run against a bare script, what its steps cost, and large plans.

    python -m benchmarks.plans [--guests 12] [--stages 3] [--rounds 3] [--history-seconds 30] [--no-lab] [--no-large]

On the lab: so many guests in stages, each stage behind the first words of all guests of the one before. Ours is
`drctl plan run PLAN --mode test --yes` from the command to the first word of the last guest; the control starts
copies of the same guests on local copies of their images with parallel `virsh start`, stage by stage, with the same
words to wait for. Rounds alternate; printed are medians and their ratio. The protected guests are off: twelve idle ones
under emulation take both cores of a small machine, and boots beside them have no end. For the same reason a guest that
has booted writes one chain of two records a second.

A step's overhead is that of 100 scripts that do nothing, one after the other, recorded here and at the recovery site,
beyond the time that this machine takes to run `/bin/true`. `plan validate` (files alone) and the HTML report are of a
plan of 500 machines, as programs of their own, their start included."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from benchmarks.lab_world import GROUP, World, median, save, world
from benchmarks.rto import prepare_control
from drctl.errors import StepFailed
from drctl.lab import layout, site
from drctl.store import atomic
from drctl.store.run_log import RunLog

STEPS = 100
LARGE = 500
UP = "DRCTL-GUEST-UP"
CHECK = f'[[stage.vm.check]]\nkind = "console"\ntext = "{UP}"\ninterval = "100ms"\nretries = 6000\n'
GROUPS = 'name = "{name}"\nsource = "alpha"\nrecovery = "beta"\nmachines = {machines}\n'
SITE = '[[site]]\nname = "{site}"\n'
HOST = '[[host]]\nname = "{host}"\nsite = "{site}"\ncontrol = "unix:/nowhere/{host}.sock"\nlink = "127.0.0.1:{port}"\n'
CONFIG = "".join(SITE.format(site=name) for name in ("alpha", "beta")) + "".join(
    HOST.format(host=host, site=name, port=port) for host, name, port in (("a1", "alpha", 7001), ("b1", "beta", 7002))
)


def drctl(directory: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drctl.cli", "--config", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def staged(names: list[str], stages: int) -> list[list[str]]:
    return [names[place::stages] for place in range(stages)]


def plan_text(name: str, stages: list[list[str]]) -> str:
    parts = [f'plan = "{name}"\ngroups = ["{GROUP}"]\ntime_limit = "1h"\n']
    for number, machines in enumerate(stages):
        after = f'after = ["s{number - 1}"]\n' if number else ""
        parts.append(f'[[stage]]\nname = "s{number}"\n{after}')
        parts += [f'[[stage.vm]]\nname = "{machine}"\ntime_limit = "20m"\n{CHECK}' for machine in machines]
    return "".join(parts)


def idle_text(name: str, machines: list[str]) -> str:
    """Nothing is booted: scripts alone."""
    off = "".join(f'[[stage.vm]]\nname = "{machine}"\nboot = false\n' for machine in machines)
    script = '[[stage.script]]\nname = "n{number}"\nwhen = "before"\nrun = ["/bin/true"]\n'
    scripts = "".join(script.format(number=number) for number in range(STEPS))
    return f'plan = "{name}"\ngroups = ["{GROUP}"]\n[[stage]]\nname = "s"\n{scripts}{off}'


def measure_plan(made: World, directory: Path, stages: list[list[str]]) -> tuple[float, dict[str, Any]]:
    begun = time.time_ns()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(drctl, directory, "plan", "run", "shop", "--mode", "test", "--yes", "-o", "json")
        ups = [made.observer.await_up(name, "beta", after_ns=begun, timeout=1800) for name in stages[-1]]
        document: dict[str, Any] = json.loads(told.result().stdout)
    return (max(ups) - begun) / 1e9, document


def measure_control(made: World, stages: list[list[str]]) -> float:
    beta = made.layout.site("beta")
    first = begun = time.time_ns()
    for machines in stages:
        with ThreadPoolExecutor(len(machines)) as pool:
            list(pool.map(lambda name: site.virsh(beta, "start", f"{name}-copy", timeout=600), machines))
        ups = [made.observer.await_up(name, "beta", after_ns=begun, timeout=1800) for name in machines]
        begun = max(ups)
    for name in (name for machines in stages for name in machines):
        site.virsh(beta, "destroy", f"{name}-copy")
    return (begun - first) / 1e9


def measure_steps(directory: Path) -> dict[str, float]:
    """Milliseconds for each of the scripts that do nothing, and beyond a bare start of the same program."""
    run = json.loads(drctl(directory, "plan", "run", "idle", "--mode", "test", "--yes", "-o", "json").stdout)
    steps = json.loads(drctl(directory, "run", "show", run["run"], "-o", "json").stdout)["steps"]
    scripts = [one for one in steps if "/before:n" in one["id"]]
    assert len(scripts) == STEPS, f"{len(scripts)} steps"
    whole = max(one["begun"] + one["seconds"] for one in scripts) - min(one["begun"] for one in scripts)
    before = time.monotonic()
    for _ in range(STEPS):
        subprocess.run(["/bin/true"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    bare = time.monotonic() - before
    return {
        "step_ms": 1000 * whole / STEPS,
        "bare_ms": 1000 * bare / STEPS,
        "overhead_ms": 1000 * (whole - bare) / STEPS,
    }


def configure(made: World, directory: Path, names: list[str], order: list[list[str]]) -> None:
    """A configuration of our own for the lab's appliances: in its directory the lab's user could not remove it."""
    shutil.copy(made.directory / "drctl.toml", directory)
    for name in ("groups", "plans"):
        (directory / name).mkdir()
    (directory / "groups" / f"{GROUP}.toml").write_text(GROUPS.format(name=GROUP, machines=json.dumps(names)))
    (directory / "plans/shop.toml").write_text(plan_text("shop", order))
    (directory / "plans/idle.toml").write_text(idle_text("idle", names))


def tell(begun: float, what: str) -> None:
    print(f"{time.monotonic() - begun:6.0f} s  {what}; load {os.getloadavg()[0]:.1f}", flush=True)


def on_the_lab(guests: int, stages: int, rounds: int, history: float) -> dict[str, Any]:
    with ExitStack() as stack:
        begun = time.monotonic()
        made = stack.enter_context(world(guests=guests, rate=2, chains=1, slots=256, start=False))
        tell(begun, f"{guests} guests are made")
        with suppress(StepFailed):  # it is gone on with when it is not attached within its time
            made.protect(1.0)
        made.wait_live(900)
        tell(begun, "protected")
        time.sleep(history)
        state = layout.load(made.directory)
        assert state is not None
        names = [guest.name for guest in state.guests]
        prepare_control(made, names)
        order = staged(names, stages)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="drctl-bench-", dir="/var/tmp")))
        configure(made, directory, names, order)
        control, ours, told = [], [], []
        for _ in range(rounds):
            control.append(measure_control(made, order))
            seconds, document = measure_plan(made, directory, order)
            ours.append(seconds)
            told.append(document["rto_seconds"])
            tell(begun, f"virsh {control[-1]:.1f} s, drctl {seconds:.1f} s")
        steps = [measure_steps(directory) for _ in range(rounds)]
        return {
            "guests": guests,
            "stages": stages,
            "drctl_s": round(median(ours), 2),
            "virsh_s": round(median(control), 2),
            "ratio": round(median(ours) / median(control), 3),
            "told_rto_s": round(median(told), 2),
            "load": round(os.getloadavg()[0], 1),
            "rounds": {"drctl": [round(v, 2) for v in ours], "virsh": [round(v, 2) for v in control]},
            **{key: round(median([one[key] for one in steps]), 2) for key in steps[0]},
        }


def large(rounds: int) -> dict[str, Any]:
    """Wall seconds of two programs that look at a plan of LARGE machines."""
    names = [f"vm-{number}" for number in range(LARGE)]
    with tempfile.TemporaryDirectory(prefix="drctl-bench-", dir="/var/tmp") as place:
        directory = Path(place)
        for name in ("groups", "plans", "runs"):
            (directory / name).mkdir()
        (directory / "drctl.toml").write_text(CONFIG)
        (directory / "groups/big.toml").write_text(GROUPS.format(name="big", machines=json.dumps(names)))
        text = plan_text("big", staged(names, 5)).replace(f'"{GROUP}"', '"big"')
        (directory / "plans/big.toml").write_text(text)
        run = "20260102T000000Z-big-0001"
        write_record(directory / "runs" / f"{run}.jsonl", run, staged(names, 5))
        validate, report, html = [], [], directory / "big.html"
        for _ in range(rounds):
            before = time.monotonic()
            drctl(directory, "plan", "validate", "big", "--offline")
            validate.append(time.monotonic() - before)
            before = time.monotonic()
            drctl(directory, "run", "report", run, "--format", "html", "--output", str(html))
            report.append(time.monotonic() - before)
        size = html.stat().st_size
        assert re.search(r"vm-499<", html.read_text()), "the last machine is not in the report"
    return {
        "machines": LARGE,
        "validate_s": round(median(validate), 2),
        "report_s": round(median(report), 2),
        "report_mb": size / 1e6,
    }


def write_record(path: Path, run: str, stages: list[list[str]]) -> None:
    """A run of LARGE machines: boot, check and script each, a picture of some KB, 300 KB said by every script."""
    machines = [(f"s{number}", name) for number, names in enumerate(stages) for name in names]
    kinds = (("boot", "boot"), ("check", "check:console"), ("script", "after:warm"))
    rows = [
        {
            "id": f"stage:{stage}/vm:{name}/{what}",
            "kind": kind,
            "text": f"{kind} {name}",
            "stage": stage,
            "group": "big",
            "machine": name,
        }
        for stage, name in machines
        for kind, what in kinds
    ]
    png = "iVBORw0KGgo" + "A" * 3000
    consoles = [{"group": "big", "machine": name, "png": png} for _, name in machines]
    ages = {"big": {"begin": 1e9 - 86400, "end": 1e9, "worst": [float(5 + n % 7) for n in range(288)]}}
    sync, atomic.sync_data = atomic.sync_data, lambda file: None  # the record is not what is measured
    try:
        with RunLog.create(path) as log:
            first = {
                "event": "run",
                "run": run,
                "plan": "big",
                "mode": "test",
                "operator": "ann",
                "checkpoint_ages": ages,
            }
            log.append(first, 1e9)
            for place in range(0, len(rows), 1000):
                log.append({"event": "steps", "steps": rows[place : place + 1000]}, 1e9)
            for number, row in enumerate(rows):
                log.append({"event": "begin", "step": row["id"]}, 1e9 + number / 10)
                said = {"output": f"{number} <&>\n" * 6000} if row["kind"] == "script" else {"seen": "it says so"}
                end = {"event": "end", "step": row["id"], "outcome": "done", "seconds": 3.5, **said}
                log.append(end, 1e9 + number / 10 + 3.5)
            log.append({"event": "consoles", "group": "big", "consoles": consoles}, 1e9 + 300)
            log.append({"event": "over", "verdict": "passed"}, 1e9 + 300)
    finally:
        atomic.sync_data = sync


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", type=int, default=12)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history-seconds", type=float, default=30)
    parser.add_argument("--no-lab", action="store_true")
    parser.add_argument("--no-large", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"what": "plans: a run against a bare script, overhead of a step, 500 machines"}
    if not arguments.no_large:
        result["large"] = large(max(3, arguments.rounds))
        print(result["large"], flush=True)
    if not arguments.no_lab:
        result["lab"] = on_the_lab(arguments.guests, arguments.stages, arguments.rounds, arguments.history_seconds)
        print(result["lab"], flush=True)
    save("plans", result)


if __name__ == "__main__":
    main()
