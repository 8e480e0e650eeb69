"""RTO on the lab: command to the guest's first own output, by `drctl test start` against plain `virsh start`.

    python benchmarks/rto.py [--guests 1,8] [--rounds 3] [--history-seconds 60] [--records 10000000]

The control boots the same guests at the recovery site from local copies of their images (the boot reads and sums 64 MiB
of its disk before its first word), all at once, as `test start` does. Rounds alternate; printed are medians and the
ratio. The protected guests stand still (stopped witnesses) while it is measured. With `--records` the journal is made
longer by so many generated writes to one disk, and the disk that the guest boots from is written anew behind them, so
that the boot reads the journal, not the base."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from benchmarks.journal_generator import extend
from benchmarks.lab_world import GROUP, World, median, save, world
from drctl.lab import site
from tests.integration.link_rig import call


def measure_test(made: World, names: list[str]) -> list[float]:
    begun = time.time_ns()
    test = made.call("beta", "test.start", timeout=600, group=GROUP, checkpoint="latest")
    ups = [made.observer.await_up(name, "beta", after_ns=begun, timeout=600) for name in names]
    made.call("beta", "test.stop", timeout=600, id=test["id"])
    return [(up - begun) / 1e9 for up in ups]


def lengthen(made: World, records: int, name: str) -> None:
    """Take the store from the receiver and put generated records behind what it holds."""
    call(made.layout.site("beta").appliance_run / "receiver.sock", "group.release", group=GROUP)
    try:
        extend(made.store, records, f"{name}.vdb", f"{name}.vda", 96 << 20)
    finally:
        owner = made.store.stat()
        for path in made.store.rglob("*"):
            os.chown(path, owner.st_uid, owner.st_gid)


def prepare_control(made: World, names: list[str]) -> list[str]:
    """Define copies of the guests at beta, on copies of their images."""
    alpha, beta = made.layout.site("alpha"), made.layout.site("beta")
    beta.images.mkdir(exist_ok=True)
    copies = []
    for name in names:
        definition = site.virsh(alpha, "dumpxml", "--inactive", name)
        for target in ("vda", "vdb"):
            source, copy = alpha.images / f"{name}.{target}.raw", beta.images / f"{name}-copy.{target}.raw"
            subprocess.run(["cp", "--sparse=always", str(source), str(copy)], check=True)
            shutil.chown(copy, source.owner(), source.group())
            definition = definition.replace(str(source), str(copy))
        definition = definition.replace(f"<name>{name}</name>", f"<name>{name}-copy</name>")
        definition = re.sub(r"<uuid>.*?</uuid>", f"<uuid>{uuid.uuid4()}</uuid>", definition)
        path = beta.images / f"{name}.xml"
        path.write_text(definition)
        site.virsh(beta, "define", str(path))
        copies.append(f"{name}-copy")
    return copies


def measure_control(made: World, names: list[str], copies: list[str]) -> list[float]:
    beta = made.layout.site("beta")
    begun = time.time_ns()
    with ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(lambda copy: site.virsh(beta, "start", copy, timeout=600), copies))
    ups = [made.observer.await_up(name, "beta", after_ns=begun, timeout=600) for name in names]
    for copy in copies:
        site.virsh(beta, "destroy", copy)
    return [(up - begun) / 1e9 for up in ups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history-seconds", type=float, default=60)
    parser.add_argument("--records", type=int, default=0, help="generated writes behind the real journal")
    arguments = parser.parse_args()
    rows = []
    for count in (int(each) for each in arguments.guests.split(",")):
        with world(guests=count, rate=max(5, 100 // count)) as made:
            made.protect(1.0)
            time.sleep(arguments.history_seconds)
            names = sorted({seen.guest for seen in made.observer.seen()})
            made.observer.send("stop", site="alpha", wait=60)
            time.sleep(3)
            copies = prepare_control(made, names)
            if arguments.records:
                lengthen(made, arguments.records, names[0])
            ours: list[float] = []
            control: list[float] = []
            for _ in range(arguments.rounds):
                control.append(max(measure_control(made, names, copies)))
                ours.append(max(measure_test(made, names)))
            row = {
                "guests": count,
                "generated_records": arguments.records,
                "checkpoints": made.call("beta", "group.status", group=GROUP)["checkpoints"]["count"],
                "journal_mib": round(made.call("beta", "group.status", group=GROUP)["journal"]["bytes"] / 2**20),
                "drctl_s": round(median(ours), 2),
                "virsh_s": round(median(control), 2),
                "ratio": round(median(ours) / median(control), 2),
                "rounds": {"drctl": [round(v, 2) for v in ours], "virsh": [round(v, 2) for v in control]},
            }
            print(row, flush=True)
            rows.append(row)
    save(
        "rto" if not arguments.records else f"rto_{arguments.records}",
        {"what": "command to first own output of the last guest", "rows": rows},
    )


if __name__ == "__main__":
    main()
