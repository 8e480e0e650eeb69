"""What a host gives away of itself: enough to help, and no secret."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from drctl.appliance.config import ApplianceToml, Home
from drctl.appliance.support import TAIL, collect, ring_header, tail
from drctl.model.group import GroupDisk
from drctl.model.identity import StreamIdentity
from drctl.replication import identity
from drctl.store.group_store import GroupStore
from drctl.store.ring import Ring
from drctl.wire.ring import Word

UUID = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home", ApplianceToml("alpha", "a1", "u", "l", UUID, run=str(tmp_path / "run")))
    made.make_directories()
    identity.create_ca(tmp_path / "ca")
    identity.issue(tmp_path / "ca", UUID, made.tls)
    (made.path / "appliance.toml").write_text('site = "alpha"\nnotify = ["sh", "-c", "curl -u x:S3CRET"]\n')
    (made.groups / "web.json").write_text('{"phase": "live"}')
    (made.logs / "shipper-web.log").write_text("started\npassword=S3CRET\n")
    (made.path / "history.jsonl").write_text('{"method": "commit"}\n')
    GroupStore.create(made.store / "shop", "shop", 1, [GroupDisk(1, "m", "vda", 1 << 20)]).close()
    (made.store / "shop" / "lease.json").write_text('{"holder": "ann", "token": "S3CRET"}')
    ring = Ring.create(made.run / "rings" / "web.ring", StreamIdentity("web", "a1", 1, "ab" * 16), {7: 4096}, 8192, 64)
    ring.words[Word.PUBLISHED] = 42
    ring.memory[-100:-94] = b"S3CRET"  # what a guest wrote
    ring.close()
    (made.run / "pids" / "tap-web.json").write_text(json.dumps({"pid": os.getpid(), "start_time": 1, "command": ["x"]}))
    return made


def test_what_helps_is_in_it(home: Home) -> None:
    found = collect(home)
    assert {
        "appliance.toml",
        "groups/web.json",
        "logs/shipper-web.log",
        "history.jsonl",
        "store/shop/group.json",
    } < set(found)
    host = json.loads(found["host.json"])
    assert set(host["space"]) == {"home", "run"}
    assert host["tls"]["key.pem"] == "0o600"
    ring = json.loads(found["rings.json"])["web"]
    assert (ring["published"], ring["disks"][0]["number"]) == (42, 7)
    assert json.loads(found["stores.json"])["shop"]["bases"]["m.vda"]["size"] == 1 << 20
    (process,) = json.loads(found["processes.json"])
    assert (process["name"], process["alive"]) == ("tap-web", False)
    assert json.loads(found["store/shop/lease.json"])["holder"] == "ann"


def test_no_secret_is_in_it(home: Home) -> None:
    whole = json.dumps(collect(home))
    assert "S3CRET" not in whole
    key = (home.tls / "key.pem").read_text().splitlines()[1]
    assert key not in whole
    assert "BEGIN" not in whole


def test_what_can_not_be_read_is_said(home: Home) -> None:
    (home.run / "rings" / "bad.ring").write_bytes(b"x")
    (home.logs / "huge.log").write_bytes(b"line\n" * (TAIL // 4))
    found = collect(home)
    assert "problem" in json.loads(found["rings.json"])["bad"]
    assert len(found["logs/huge.log"]) < TAIL + 100
    assert found["logs/huge.log"].startswith(f"[the last {TAIL} of ")
    assert "not read" in tail(home.path / "none", 10)
    assert "problem" in ring_header(home.path / "none")
    (home.logs / "link.log").symlink_to(home.tls / "key.pem")
    assert "logs/link.log" not in collect(home)
