"""The demo: drctl's main job on two real libvirt sites, told as it happens. `make demo` runs it.

Everything a newcomer would type is run as the very command that is shown. What is claimed is judged by the witness:
guests that note, at the host's clock, what they had acknowledged when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drctl.errors import DrctlError, StepFailed
from drctl.lab import lab
from drctl.lab.disaster import destroy_site
from drctl.lab.judge import Verdict, judge, loss
from drctl.lab.layout import Options
from drctl.lab.observer import Observer
from drctl.store.group_store import GroupStore

DIRECTORY = Path("/var/tmp/drctl-demo")
GROUP = "web"
MACHINES = ("web-1", "web-2")
#: Short, so that a newcomer sees checkpoints come; the default of the product is 5 s.
INTERVAL = "2s"
_HISTORY_SECONDS = 16.0
_PATIENCE = 120.0


@dataclass(slots=True)
class Demo:
    """One run. `out` gets every line."""

    directory: Path
    config: Path
    home: Path
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str = "") -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def title(self, text: str) -> None:
        self.say()
        self.say(f"== {text}  [{time.monotonic() - self.started:.0f} s]")

    def drctl(self, *arguments: str, quiet: bool = False, show: bool = True) -> str:
        """Run a command as a person would, show it and what it says. Raises StepFailed when it fails."""
        if show:
            self.say(f"$ drctl {' '.join(_quoted(arguments))}")
        command = [sys.executable, "-m", "drctl.cli", *arguments]
        environment = {**os.environ, "DRCTL_CONFIG": str(self.config), "COLUMNS": "110"}
        errors = subprocess.DEVNULL if quiet else None
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, check=False)
        if not quiet:
            self.say(done.stdout.rstrip())
        if done.returncode:
            raise StepFailed(f"drctl {' '.join(arguments)} ended with {done.returncode}")
        return done.stdout

    def json(self, *arguments: str) -> dict[str, Any]:
        return dict(json.loads(self.drctl(*arguments, "--output", "json", quiet=True, show=False)))

    # -- the acts ---------------------------------------------------------------------------------------------------

    def raise_lab(self) -> None:
        self.title("Two sites, each a real libvirtd; two guests at alpha boot from their disks and write")
        lab.down(self.directory)
        report = lab.up(self.directory, Options(guests=2), lambda text: self.say(f"  {text}"))
        self.say(f"  guests run under {report.accelerator}; config: {self.config}")

    def protect(self) -> None:
        self.title("Protect both as one group; the guests go on writing")
        toml = self.directory / "groups" / f"{GROUP}.toml"
        toml.write_text(toml.read_text().replace('"5s"', f'"{INTERVAL}"'))
        self.drctl("apply", "--yes")
        self.drctl("replicate", "start", GROUP, "--yes", "--wait")
        self.title(f"Checkpoints: one every {INTERVAL}, each proven and on disk at beta before it is listed")
        time.sleep(_HISTORY_SECONDS)
        self.drctl("checkpoint", "list", GROUP, "--last", "6")
        self.drctl("status", GROUP)

    def survive_corruption(self) -> None:
        self.title("web-2 is hit: something encrypts a file on its disk")
        observer = Observer(self.directory)
        moment = time.time()
        observer.send("encrypt", guest="web-2", site="alpha", wait=30)
        # The damage is replicated like every other write, so it has to be in a checkpoint before it can be avoided.
        self._await_checkpoint_after(time.time())
        number = self._newest()
        self.say(f"  checkpoint #{number}, judged by the witness: {_verdict(self._judge(number))}")
        stamp = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
        self.say("  The last checkpoint before it, booted in isolation while replication goes on:")
        begun = time.time_ns()
        self.drctl("test", "start", GROUP, "--checkpoint", stamp, "--yes")
        test = self._one_test()
        number = int(test["checkpoint"]["number"])
        for machine in MACHINES:
            # A guest reads and sums its whole file before its first word: what says it is up has it whole.
            up = observer.await_up(machine, "beta", after_ns=begun, timeout=_PATIENCE)
            self.say(f"  {machine}: first own output {(up - begun) / 1e9:.1f} s after the command")
        self.say(f"  checkpoint #{number}, judged by the witness: {_verdict(self._prove(number))}")
        self.drctl("test", "stop", str(test["id"]), "--yes")
        self.say("  (the file is put right at alpha)")
        observer.send("decrypt", guest="web-2", site="alpha", wait=30)

    def lose_the_site(self) -> None:
        self.title("Disaster: alpha's QEMUs, libvirtd and appliance are killed, its disks and your config deleted")
        self._await_checkpoint_after(time.time())
        moment = destroy_site(self.directory, "alpha", lambda text: self.say(f"  {text}"))
        time.sleep(1.0)
        self.title("All that is left is beta's own store: fail the group over from there")
        self.config = self.home / "none"
        os.environ["DRCTL_HOME"] = str(self.home)
        self.drctl("--home", str(self.home), "failover", GROUP, "--dry-run", "--source-is-down", "fire at alpha")
        ordered = time.time_ns()
        self.drctl(
            "--home",
            str(self.home),
            "failover",
            GROUP,
            "--source-is-down",
            "fire at alpha",
            "--confirm",
            GROUP,
            "--yes",
        )
        self._account(moment, ordered)

    def _account(self, moment: int, ordered: int) -> None:
        """RPO and RTO of each guest, as the witness proves them."""
        observer = Observer(self.directory)
        number = int(self._status()["checkpoints"]["newest"]["number"])
        verdict = self._prove(number)
        losses = loss(verdict, observer.logs("alpha"), moment)
        self.say()
        self.say(f"  checkpoint #{number}: {_verdict(verdict)}")
        self.say("  guest   lost at the disaster (RPO)          back after the command (RTO)   writes again after")
        for name, lost in losses.items():
            up = observer.await_up(name, "beta", after_ns=ordered, timeout=_PATIENCE)
            wrote = observer.await_more(name, "beta", 1, timeout=_PATIENCE)
            missing = f"{lost.rpo_seconds:.1f} s, {sum(lost.missing)} records"
            self.say(f"  {name:<7} {missing:<35} {(up - ordered) / 1e9:<30.1f} {(wrote - ordered) / 1e9:.1f} s")

    def settle(self) -> None:
        self.title("Make it final: the disks are pulled out of the journal while the guests run")
        self.drctl("--home", str(self.home), "commit", GROUP, "--yes")
        self.drctl("--home", str(self.home), "status", GROUP)

    def end(self) -> None:
        self.title("Done")
        self.say("What to try next:")
        self.say("  drctl lab up                                     the same two sites for yourself")
        self.say("  export DRCTL_CONFIG=/var/tmp/drctl-lab/drctl.toml")
        self.say("  drctl apply && drctl replicate start web         then: drctl status web --watch")
        self.say("  drctl checkpoint create web --quiesce            file systems frozen for the moment of the mark")
        self.say("  drctl test start web --checkpoint -1m            a trial boot, a minute ago")
        self.say("  drctl lab down                                   removes all of it")

    # -- looking ----------------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, Any]:
        from drctl.appliance import config
        from drctl.appliance.client import Client

        address = f"unix:{config.load(self.home).control}"
        return dict(Client(address).call("group.status", {"group": GROUP}))

    def _newest(self) -> int:
        return int(self._status()["checkpoints"]["newest"]["number"])

    def _await_checkpoint_after(self, moment: float) -> None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            newest = self._status()["checkpoints"]["newest"]
            if newest and newest["time"] > moment:
                return
            time.sleep(0.2)
        raise StepFailed(f"no checkpoint came within {_PATIENCE:.0f} s")

    def _one_test(self) -> dict[str, Any]:
        tests = self.json("test", "list")
        found = next(value for value in tests.values() if isinstance(value, list) and value and "id" in value[0])
        return dict(found[0])

    def _judge(self, number: int) -> Verdict:
        with closing(GroupStore.open(self.home / "store" / GROUP)) as store, closing(store.open_view(number)) as view:
            machines = sorted({disk.machine for disk in view.disks})
            return judge(
                {name: [view.disk(f"{name}.vda"), view.disk(f"{name}.vdb")] for name in machines}, payload=True
            )

    def _prove(self, number: int) -> Verdict:
        verdict = self._judge(number)
        if not verdict.true_prefix:
            raise StepFailed(f"checkpoint #{number} is not what the guests did: {verdict.reasons[0]}")
        return verdict


def _verdict(verdict: Verdict) -> str:
    if verdict.true_prefix:
        return "one true point in the life of both guests, every record whole and linked"
    return f"not what the guests did ({len(verdict.reasons)} contradictions, e.g. {verdict.reasons[0]})"


def _quoted(arguments: Sequence[str]) -> list[str]:
    return [f'"{each}"' if " " in each else each for each in arguments]


def main() -> int:
    """Run the demo; leaves nothing behind when it ends well, the lab for a look when it does not."""
    directory = Path(os.environ.get("DRCTL_DEMO_DIRECTORY", str(DIRECTORY)))
    demo = Demo(directory, directory / "drctl.toml", directory / "beta" / "home")
    try:
        demo.raise_lab()
        demo.protect()
        demo.survive_corruption()
        demo.lose_the_site()
        demo.settle()
        demo.end()
    except DrctlError as exc:
        demo.say(f"\nthe demo stopped: {exc.message}\n{exc.hint}\nthe lab is left as it is in {directory}")
        return exc.exit_code
    lab.down(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
