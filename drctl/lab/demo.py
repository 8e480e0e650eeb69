"""The demo: drctl's main job on two real libvirt sites, told as it happens. `make demo` runs it.

Everything a newcomer would type is run as the very command that is shown. What is claimed is judged by the witness:
guests that note, at the host's clock, what they had acknowledged when."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from drctl.appliance import config
from drctl.appliance.client import Client
from drctl.errors import DrctlError, StepFailed
from drctl.lab import lab
from drctl.lab.disaster import destroy_site
from drctl.lab.judge import Verdict, judge, loss
from drctl.lab.layout import Options
from drctl.lab.observer import Observer
from drctl.model.duration import parse_duration
from drctl.store.group_store import GroupStore

DIRECTORY = Path("/var/tmp/drctl-demo")
GROUP = "web"
MACHINES = ("web-1", "web-2")
ACTS = 6
REASON = "fire at alpha"
NEXT = (
    ("drctl lab up", "the same two sites, for yourself"),
    ("export DRCTL_CONFIG=/var/tmp/drctl-lab", ""),
    ("drctl apply", ""),
    ("drctl replicate start web", "on a terminal it waits until web is live"),
    ("drctl status web --watch", ""),
    ("drctl checkpoint create web --quiesce", "file systems frozen for the moment of the mark"),
    ("drctl test start web --checkpoint -1m", "a trial boot, a minute ago"),
    ("drctl failover web --dry-run", "what would be lost, now"),
    ("drctl doctor", "what would stand in the way"),
    ("drctl lab down", "removes all of it"),
)
#: Short, so that a newcomer sees checkpoints come; the default of the product is 5 s.
INTERVAL = "2s"
_HISTORY_SECONDS = 16.0
#: A loaded machine without KVM boots a guest in minutes, an idle one in seconds.
_PATIENCE = 300.0


@dataclass(slots=True)
class Demo:
    """One run. `environment` is how its commands find their sites: a configuration first, a bare home at the end."""

    directory: Path
    environment: dict[str, str]
    home: Path
    started: float = field(default_factory=time.monotonic)
    act: int = 0
    headers: set[str] = field(default_factory=set)

    def say(self, text: str = "") -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def title(self, text: str, *explanation: str) -> None:
        self.act += 1
        self.say()
        self.say(f"== {self.act} of {ACTS}: {text}  [{time.monotonic() - self.started:.0f} s]")
        for line in explanation:
            self.say(f"   {line}")
        self.say()

    def drctl(self, *arguments: str, last: int = 0) -> None:
        """Run a command as a person would, show it and what it says. Raises StepFailed when it fails.

        With `last` only that many lines are shown, as `tail` would."""
        self.say(f"$ drctl {' '.join(_quoted(arguments))}" + (f" | tail -{last}" if last else ""))
        command = [sys.executable, "-m", "drctl.cli", *arguments]
        environment = {**_clean(), **self.environment, "COLUMNS": "110"}
        kept: deque[str] = deque(maxlen=last or None)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
        ) as process:
            assert process.stdout is not None
            for number, line in enumerate(process.stdout):
                header = number == 0
                if header and self._is_known_header(line):
                    continue
                if last and not header:
                    kept.append(line)
                else:
                    self.say(f"  {line.rstrip()}".rstrip())
        for line in kept:
            self.say(f"  {line.rstrip()}")
        if process.returncode:
            raise StepFailed(f"drctl {' '.join(arguments)} ended with {process.returncode}")

    def _is_known_header(self, line: str) -> bool:
        """Every command says first which configuration and sites it read; here once for each is enough."""
        known = line in self.headers
        self.headers.add(line)
        return known

    # -- the acts ---------------------------------------------------------------------------------------------------

    def raise_lab(self) -> None:
        self.say(
            "drctl's main job, done for real on this machine: protect, look back, lose a site, recover. Lines that"
        )
        self.say("begin with $ are the commands an operator types, and what follows is what they said just now.")
        self.title(
            "Two sites",
            "alpha and beta: a libvirtd and a drctl appliance each. At alpha two guests boot from their own disks and",
            "write without end. Each write is noted by the witness, outside of both sites, when it was acknowledged.",
        )
        lab.down(self.directory)
        report = lab.up(self.directory, Options(guests=2), lambda text: self.say(f"  {text}"))
        self.say(f"  guests run under {report.accelerator}; everything lies in {self.directory}")

    def protect(self) -> None:
        self.title(
            "Protect both machines as one group",
            "One TOML file says what is protected. Their disks are tapped while they run; all writes go to beta.",
        )
        toml = self.directory / "groups" / f"{GROUP}.toml"
        toml.write_text(toml.read_text().replace('"5s"', f'"{INTERVAL}"'))
        self.say(f"$ export DRCTL_CONFIG={self.directory}")
        self.drctl("apply", "--yes")
        self.drctl("replicate", "start", GROUP, "--yes", "--wait")
        self.say()
        self.say(
            f"   A checkpoint follows each {INTERVAL}, of all disks of both guests at one moment. It is listed when"
        )
        self.say("   it is proven to be in order and is on disk at beta, never before.")
        self.say()
        time.sleep(_HISTORY_SECONDS)
        self.drctl("checkpoint", "list", GROUP, "--last", "4")
        self.drctl("status", GROUP)

    def survive_corruption(self) -> None:
        self.title(
            "Ransomware",
            "Something encrypts a file on web-2. That is replicated like any write: the newest checkpoint has it.",
        )
        observer = Observer(self.directory)
        moment = time.time()
        observer.send("encrypt", guest="web-2", site="alpha", wait=30)
        # The damage is replicated like every other write, so it has to be in a checkpoint before it can be avoided.
        self._await_checkpoint_after(time.time())
        number = self._newest()
        self.say(f"   checkpoint #{number}, as the witness judges it: {_verdict(self._judge(number))}")
        self.say()
        self.say("   So boot the last one before it, at beta, cut off from everything, while replication goes on.")
        self.say()
        stamp = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
        begun = time.time_ns()
        self.drctl("test", "start", GROUP, "--checkpoint", stamp, "--yes")
        self.say()
        test = self._one_test()
        for machine in MACHINES:
            # A guest reads and sums its whole file before its first word: what says it is up has it whole.
            up = observer.await_up(machine, "beta", after_ns=begun, timeout=_PATIENCE)
            self.say(f"   {machine}: has booted, and read its file whole, {(up - begun) / 1e9:.1f} s after the command")
        number = int(test["checkpoint"]["number"])
        self.say(f"   checkpoint #{number}, as the witness judges it: {_verdict(self._prove(number))}")
        self.say()
        self.drctl("test", "stop", str(test["id"]), "--yes")
        observer.send("decrypt", guest="web-2", site="alpha", wait=30)
        self.say("   (the file is put right at alpha, and work goes on)")

    def lose_the_site(self) -> None:
        self._await_checkpoint_after(time.time())
        self.title(
            "Disaster",
            "alpha is gone without a word: SIGKILL to its QEMUs, libvirtd and appliance, then its disks are deleted,",
            "and the operator's configuration with them.",
        )
        # Not right after a checkpoint, which would flatter the RPO: at a random moment of the interval.
        time.sleep(random.uniform(0.0, parse_duration(INTERVAL)))
        moment = destroy_site(self.directory, "alpha", lambda text: self.say(f"  {text}"))
        time.sleep(1.0)
        self.title(
            "Failover, from what beta alone has",
            "No configuration, no manager: beta's own store knows the group, its machines and its checkpoints.",
        )
        self.environment = {"DRCTL_HOME": str(self.home)}
        self.say(f"$ export DRCTL_HOME={self.home}")
        self.drctl("failover", GROUP, "--candidates", last=4)
        self.drctl("failover", GROUP, "--dry-run", "--source-is-down", REASON)
        ordered = time.time_ns()
        self.drctl("failover", GROUP, "--source-is-down", REASON, "--confirm", GROUP, "--yes")
        self._account(moment, ordered)

    def _account(self, moment: int, ordered: int) -> None:
        """RPO and RTO of each guest, as the witness proves them."""
        observer = Observer(self.directory)
        number = int(self._status()["checkpoints"]["newest"]["number"])
        verdict = self._prove(number)
        losses = loss(verdict, observer.logs("alpha"), moment)
        self.say()
        self.say("   What it came to, by the witness's log and the guests' own words:")
        self.say()
        self.say("            RPO: lost of what was acknowledged     RTO: from the command on, until the guest")
        self.say("   guest         time [s]   writes                    has booted [s]   writes again [s]")
        for name, lost in losses.items():
            up = (observer.await_up(name, "beta", after_ns=ordered, timeout=_PATIENCE) - ordered) / 1e9
            wrote = (observer.await_more(name, "beta", 1, timeout=_PATIENCE) - ordered) / 1e9
            self.say(f"   {name:<10}{lost.rpo_seconds:>11.1f}{sum(lost.missing):>9}{up:>34.1f}{wrote:>19.1f}")
        self.say()
        self.say(f"   checkpoint #{number}, as the witness judges it: {_verdict(verdict)}")

    def settle(self) -> None:
        self.title(
            "Make it final",
            "The guests run on layers over the replica. A commit copies what they still read from it, while they run.",
        )
        self.drctl("commit", GROUP, "--yes")
        self.drctl("status", GROUP)

    def end(self) -> None:
        self.say()
        self.say(f"== Done in {time.monotonic() - self.started:.0f} s; the lab is being removed. What to try next:")
        self.say()
        for command, what in NEXT:
            self.say(f"   {command:<44} {what}".rstrip())

    # -- looking ----------------------------------------------------------------------------------------------------

    def _client(self) -> Client:
        return Client(f"unix:{config.load(self.home).control}")

    def _status(self) -> dict[str, Any]:
        return dict(self._client().call("group.status", {"group": GROUP}))

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
        return dict(self._client().call("test.list", {"group": GROUP})[0])

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
    return f"not what the guests did, e.g. {verdict.reasons[0]}"


def _quoted(arguments: Sequence[str]) -> list[str]:
    return [f'"{each}"' if " " in each else each for each in arguments]


def _clean() -> dict[str, str]:
    """Our environment without what would send a command to another world."""
    return {key: value for key, value in os.environ.items() if key not in ("DRCTL_CONFIG", "DRCTL_HOME")}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo. It leaves nothing behind when it ends well or is interrupted; when it fails, the lab for a look."""
    directory = Path(os.environ.get("DRCTL_DEMO_DIRECTORY", str(DIRECTORY)))
    demo = Demo(directory, {"DRCTL_CONFIG": str(directory)}, directory / "beta" / "home")
    signal.signal(signal.SIGTERM, _interrupt)
    code = 0
    try:
        for act in (demo.raise_lab, demo.protect, demo.survive_corruption, demo.lose_the_site, demo.settle, demo.end):
            act()
    except DrctlError as exc:
        demo.say(f"\nthe demo stopped: {exc.message}" + (f"\n  what to do: {exc.hint}" if exc.hint else ""))
        demo.say(f"the lab is left for a look in {directory}; remove it: drctl lab down --directory {directory}")
        return exc.exit_code
    except KeyboardInterrupt:
        demo.say("\ninterrupted; removing the lab")
        code = 130
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    lab.down(directory)
    return code


if __name__ == "__main__":
    sys.exit(main())
