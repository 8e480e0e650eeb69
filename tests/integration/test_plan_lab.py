"""The example plans as drills of real guests, a damage that a bisection finds, and what is restored of a checkpoint.

One lab of eight guests in four groups. A database file is damaged early on; what follows makes hundreds of checkpoints.
Only the guest with the database runs at the source: that the others are off there is no matter to their copies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from drctl.cli import guest_disk
from drctl.lab.disk import FileDisk
from drctl.lab.judge import judge
from drctl.store.group_store import GroupStore
from tests.integration.plan_rig import PATIENCE, Operator, Service, fitted, in_guest, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3600)]

PLANS = Path(__file__).resolve().parents[2] / "plans"
GROUPS = {
    "core": ["web-1"],
    "shop": ["web-2", "web-3", "web-4", "web-5", "web-6"],
    "mail": ["web-7"],
    "desktops": ["web-8"],
}
SHOP = {"shop-db": 2, "shop-reports": 3, "shop-app-1": 4, "shop-app-2": 5, "shop-front": 6}
#: Of the guest with the database: so large that memory decides how many copies a bisection boots at a time.
MEMORY_MIB = 1536
MIB = 2**20
FILE = "/data/orders.db"
#: Judges a copy by its database file: each line has its own digest. While the mark is there it can't be judged.
CHECK = """#!{python}
import base64, hashlib, json, os, subprocess, sys, time

def virsh(*words):
    done = subprocess.run(["virsh", "-q", "-c", {uri!r}, *words], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""

def ask(execute, **arguments):
    sent = json.dumps({{"execute": execute, "arguments": arguments}})
    told = virsh("qemu-agent-command", machine, sent, "--timeout", "20")
    return json.loads(told)["return"] if told else None

def run(*argv):
    begun = ask("guest-exec", path=argv[0], arg=list(argv[1:]), **{{"capture-output": True}})
    while begun:
        told = ask("guest-exec-status", pid=begun["pid"])
        if told and told["exited"]:
            return told["exitcode"], base64.b64decode(told.get("out-data", ""))
        time.sleep(0.2)
    return None, b""

machine = os.environ.get("DRCTL_MACHINES", "")
while not machine:
    names = virsh("list", "--name").split()
    machine = next((name for name in names if name.startswith(os.environ["DRCTL_VM"] + "-")), "")
    time.sleep(0.5)
code = None
while code != 0:
    code, data = run("/bin/busybox", "cat", "{file}")
    time.sleep(0.5)
if "--deep" not in sys.argv and run("/bin/busybox", "test", "-e", "/data/migrating")[0] == 0:
    print("a migration is under way")
    sys.exit(125)
for line in data.decode().splitlines():
    row, _, digest = line.rpartition(" ")
    if hashlib.sha256(row.encode()).hexdigest() != digest:
        print("damaged:", row)
        sys.exit(1)
print(len(data.splitlines()), "orders are whole")
"""


def orders(*, damaged: bool) -> str:
    rows = [f"order {number}, {number % 7 + 1} pieces" for number in range(40)]
    lines = [f"{row} {hashlib.sha256(row.encode()).hexdigest()}" for row in rows]
    if damaged:
        lines[17] = lines[17].replace("pieces", "pieceS")
    return "\n".join(lines) + "\n"


def put(rig, text: str, after: str = "") -> None:
    """Write the database file in the guest at alpha, durably."""
    script = f"printf %s '{text}' > {FILE}; {after} /bin/busybox sync"
    assert in_guest(rig, "alpha", "web-7", "/bin/sh", "-c", script)[0] == 0


def enlarge(rig, guest: str) -> None:
    """Give it more memory, and start it."""
    root = ET.fromstring(rig.virsh("alpha", "dumpxml", "--inactive", guest))
    for tag in ("memory", "currentMemory"):
        if (found := root.find(tag)) is not None:
            found.text, found.attrib["unit"] = str(MEMORY_MIB), "MiB"
    path = rig.directory / f"{guest}.large.xml"
    path.write_text(ET.tostring(root, encoding="unicode"))
    path.chmod(0o644)
    rig.virsh("alpha", "define", str(path))
    begun = time.time_ns()
    rig.virsh("alpha", "start", guest)
    rig.observer.await_up(guest, "alpha", after_ns=begun, timeout=PATIENCE)


@pytest.fixture(scope="module")
def shop(make_lab) -> Iterator[SimpleNamespace]:
    """`operator`, `rig`, and where `history` notes what was done when (wall seconds)."""
    rig = make_lab(guests=8, rate=2, chains=2, slots=256, start=False)
    enlarge(rig, "web-7")
    operator = Operator(rig, GROUPS)
    operator.drctl("apply", "--yes")
    for group in GROUPS:
        # One that is not attached within its time goes on by itself.
        operator.drctl("replicate", "start", group, "--yes", "--no-wait", code=None)
    wait_for(lambda: all(listed(operator, group) for group in GROUPS), "checkpoints of all groups")
    put(rig, orders(damaged=False))
    operator.script("orders-are-whole", CHECK.format(python=sys.executable, uri=rig.layout.site("beta").uri, file=FILE))
    operator.script("announce", '#!/bin/sh\necho "$@" >> said\n')
    yield SimpleNamespace(operator=operator, rig=rig, history={"whole": time.time()})
    operator.close()


def listed(operator: Operator, group: str) -> list[dict]:
    done = operator.drctl("checkpoint", "list", group, "-o", "json", code=None)
    return json.loads(done.stdout)["checkpoints"] if done.returncode == 0 else []


@pytest.fixture
def service(shop):
    made: list[Service] = []

    def make(guest: str) -> Service:
        made.append(Service(shop.rig.observer, guest))
        return made[-1]

    yield make
    for each in made:
        each.close()


def drill(shop, plan: str, text: str, *more: str) -> dict[str, tuple[float, float]]:
    """Run it as a test; when each step began and ended. Nothing of it is left, and the guests run on."""
    operator, rig = shop.operator, shop.rig
    operator.write(plan, text)
    operator.drctl("plan", "validate", plan)
    document = operator.json("plan", "run", plan, "--mode", "test", "--yes", *more)
    assert document["verdict"] == "passed"
    assert rig.virsh("beta", "list", "--all", "--name").split() == []
    assert [guest for guest in rig.guests() if rig.state("alpha", guest) == "running"] == ["web-7"]
    told = operator.json("run", "show", document["run"])["steps"]
    print(plan, f"{document['rto_seconds']:.1f} s", *(f"{one['id']} {one['seconds']}" for one in told), sep="\n  ")
    assert {one["outcome"] for one in told} == {"done"}
    html = operator.drctl("run", "report", document["run"], "--format", "html").stdout
    assert "✓ passed" in html
    return {one["id"]: (one["begun"], one["begun"] + one["seconds"]) for one in told}


PATIENT = "retries = 300\n"


def test_one_vm(shop, service):
    wiki = service("web-7")
    text = fitted(
        (PLANS / "one-vm.toml").read_text(),
        [
            ('groups = ["wiki"]', 'groups = ["mail"]'),
            ('[[stage.vm]]\nname = "wiki"', '[[stage.vm]]\nname = "web-7"'),
            ("http://192.0.2.10/login", f"http://127.0.0.1:{wiki.port}/login"),
            ('text = "Log in"\n', f'text = "Log in"\n{PATIENT}'),
        ],
    )
    times = drill(shop, "one-vm", text)
    assert times["stage:wiki/vm:web-7/check:http"][1] > wiki.up_ns / 1e9 > times["stage:wiki/vm:web-7/boot"][0]


def test_the_database_is_damaged_and_nobody_notices(shop):
    """While a migration is under way, so that what lies around the damage can't be judged."""
    history = shop.history
    history["migrating"] = time.time()
    assert in_guest(shop.rig, "alpha", "web-7", "/bin/sh", "-c", ": > /data/migrating; /bin/busybox sync")[0] == 0
    time.sleep(4)
    history["damage"] = time.time()
    put(shop.rig, orders(damaged=True))
    history["damaged"] = time.time()
    time.sleep(4)
    history["migrated"] = time.time()
    assert (
        in_guest(shop.rig, "alpha", "web-7", "/bin/sh", "-c", "/bin/busybox rm /data/migrating; /bin/busybox sync")[0]
        == 0
    )
    history["over"] = time.time()


def test_three_tiers_with_health_checks(shop, service):
    db, front = service("web-2"), service("web-6")
    here = shop.operator.directory / "plans"
    well = "/bin/busybox awk '/MemTotal/{exit !($2 > 250000)}' /proc/meminfo && /bin/busybox grep -q /data /proc/mounts"
    text = fitted(
        (PLANS / "three-tier.toml").read_text(),
        [
            *((f'"{name}"', f'"web-{number}"') for name, number in SHOP.items()),
            ("/usr/local/bin/announce", str(here / "announce")),
            ('memory = "8 GiB"', 'memory = "320 MiB"'),
            ('text = "login:"\nretries = 90', 'text = "DRCTL-GUEST-UP"\nretries = 300'),
            ('test_host = "192.0.2.11"\nport = 5432', f'test_host = "127.0.0.1"\nport = {db.port}\n{PATIENT}'),
            (
                '["/usr/bin/psql", "--no-password", "--command", "select 1 from orders limit 1", "shop"]',
                f'["/bin/sh", "-c", "{well}"]\n{PATIENT}',
            ),
            ('kind = "guest-agent"\n', f'kind = "guest-agent"\n{PATIENT}'),
            ('networks = { dmz = "dmz-b" }\ntest_networks = { dmz = "island" }\n', ""),  # the lab has no networks
            ("http://192.0.2.20/health", f"http://127.0.0.1:{front.port}/health"),
            ('text = "ok"\n', f'text = "ok"\n{PATIENT}'),
        ],
    )
    times = drill(shop, "three-tier", text)
    checked = times["stage:database/vm:web-2/check:query"][1]
    for number in (4, 5):
        assert times[f"stage:application/vm:web-{number}/boot"][0] >= checked - 0.1
        agent = times[f"stage:application/vm:web-{number}/check:guest-agent"][1]
        assert times["stage:front/vm:web-6/boot"][0] >= agent - 0.1
    assert not any("web-3" in step for step in times), "it is left off"
    assert (here / "said").read_text() == "recovery begins\nrecovery is done\n"


def test_a_whole_site_in_waves(shop, service):
    dns, front, mail = service("web-1"), service("web-6"), service("web-7")
    text = fitted(
        (PLANS / "whole-site.toml").read_text(),
        [
            ('name = "dns-1"', 'name = "web-1"'),
            ('test_host = "192.0.2.53"\nport = 53\n', f'test_host = "127.0.0.1"\nport = {dns.port}\n{PATIENT}'),
            ("http://192.0.2.20/health", f"http://127.0.0.1:{front.port}/health"),
            ('/health"\n\n', f'/health"\n{PATIENT}\n'),
            ('test_host = "192.0.2.25"\nport = 25\n', f'test_host = "127.0.0.1"\nport = {mail.port}\n{PATIENT}'),
        ],
    )
    times = drill(shop, "whole-site", text)
    first = times["stage:names-and-time/vm:web-1@core/check:tcp"][1]
    for guest in GROUPS["shop"]:
        assert times[f"stage:shop/vm:{guest}@shop/boot"][0] >= first - 0.1
    well = max(times["stage:shop/check:http"][1], times["stage:mail/check:tcp"][1])
    assert times["stage:desktops/vm:web-8@desktops/boot"][0] >= well - 0.1


def bisect(shop, *arguments: str, check: str = "", code: int = 0) -> dict:
    program = str(shop.operator.directory / "plans/orders-are-whole")
    more = ("--check", f"{program} {check}".strip(), "--check-timeout", "15m")
    told = shop.operator.drctl("checkpoint", "bisect", "mail", *more, "--yes", "-o", "json", *arguments, code=code)
    print(told.stderr)
    assert shop.rig.virsh("beta", "list", "--all", "--name").split() == []
    return json.loads(told.stdout)


def test_memory_decides_how_many_copies_boot_at_a_time(shop):
    told = shop.operator.drctl("checkpoint", "bisect", "mail", "--check", "true", "--parallel", "32", "--dry-run")
    found = re.search(r"(\d+) at a time \(1\.5 GiB each, ([\d.]+) GiB available\)", told.stdout + told.stderr)
    assert found, told.stdout + told.stderr
    assert int(found[1]) == max(1, min(32, int(float(found[2]) * 0.8 / 1.5)))


def test_a_bisection_passes_over_what_can_not_be_judged(shop):
    history, whole = shop.history, len(shop.operator.checkpoints("mail"))
    assert whole > 100
    found = bisect(shop, "--parallel", "2", code=3)
    assert found["good"]["time"] < history["damage"] + 1
    assert found["bad"]["time"] > history["damage"] - 1
    assert found["skipped"], "between them are some that could not be judged"
    skipped = {
        one["number"]: one["time"] for one in shop.operator.checkpoints("mail") if one["number"] in found["skipped"]
    }
    assert all(history["migrating"] - 1 < moment < history["over"] + 1 for moment in skipped.values())


def test_a_bisection_finds_the_last_checkpoint_before_the_damage(shop):
    """Two copies at a time; of hundreds of checkpoints some are booted."""
    history = shop.history
    found = bisect(shop, "--parallel", "2", "--tag", "last-good", check="--deep")
    assert found["good"]["time"] < history["damaged"] + 1
    assert found["bad"]["time"] > history["damage"] - 1
    numbers = [one["number"] for one in shop.operator.checkpoints("mail")]
    assert numbers.index(found["bad"]["number"]) == numbers.index(found["good"]["number"]) + 1
    assert len(found["tries"]) < 30
    history |= {"good": found["good"]["number"], "bad": found["bad"]["number"]}


def test_the_drill_after_ransomware_runs_at_what_was_found(shop):
    text = fitted(
        (PLANS / "ransomware.toml").read_text(),
        [
            ('groups = ["shop"]', 'groups = ["mail"]'),
            ('name = "shop-db"', 'name = "web-7"'),
            ('["./orders-are-whole"]', '["./orders-are-whole", "--deep"]'),
            ('timeout = "1m"', 'timeout = "10m"'),
            ('all_of = ["shop"]', 'all_of = ["mail"]'),
            ("/usr/local/bin/scan-for-indicators", str(shop.operator.directory / "plans/announce")),
        ],
    )
    times = drill(shop, "ransomware", text, "--checkpoint", "tag:last-good")
    assert "stage:rest/after:scan" in times


def test_a_restored_disk_is_the_checkpoint(shop, tmp_path):
    """Both disks of a guest: judged by the witness, and equal to the store's own view."""
    number = shop.history["good"]
    files = []
    for target in ("vda", "vdb"):
        files.append(tmp_path / f"{target}.raw")
        shop.operator.drctl(
            "restore", "disk", f"mail/web-7/{target}", "-k", f"#{number}", "--output", str(files[-1]), "--yes"
        )
    with ExitStack() as stack:
        disks = [stack.enter_context(FileDisk(path)) for path in files]
        verdict = judge({"web-7": disks}, payload=True)
        assert verdict.true_prefix, str(verdict)
        store = stack.enter_context(closing(GroupStore.open(shop.rig.layout.site("beta").home / "store/mail")))
        view = stack.enter_context(closing(store.open_view(number)))
        for disk, target in zip(disks, ("vda", "vdb"), strict=True):
            there = view.disk(f"web-7.{target}")
            assert disk.size == there.size
            for offset in range(0, disk.size, MIB):
                assert disk.read(offset, MIB) == bytes(there.read(offset, MIB)), f"{target}+{offset}"


@pytest.mark.skipif(
    os.geteuid() != 0 or not all(shutil.which(tool) for tool in guest_disk.TOOLS), reason="needs root and nbdfuse"
)
def test_a_restored_file_is_what_the_guest_wrote(shop, tmp_path):
    for word, damaged in (("good", False), ("bad", True)):
        out = tmp_path / word
        where = ("-k", f"#{shop.history[word]}", "--by", "kernel", "--partition", "3", "--output", str(out), "--yes")
        shop.operator.drctl("restore", "files", "mail/web-7/vda", "/orders.db", *where)
        assert (out / "orders.db").read_text() == orders(damaged=damaged)
    assert shop.rig.virsh("beta", "list", "--all", "--name").split() == []
