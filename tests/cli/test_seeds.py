"""`replicate start --seed`: which file is which disk's, told before it is asked, refused before anything is done."""

from __future__ import annotations

import pytest

from drctl.cli.seeds import which
from drctl.errors import NotFound, Refused

DISKS = ["web-1.vda", "web-1.vdb"]


@pytest.mark.parametrize(
    ("named", "disks", "expected"),
    [
        ("web-1.vda=/srv/a.raw", DISKS, ("web-1.vda", "/srv/a.raw")),
        ("web-1.vda=/srv/a=b.raw", DISKS, ("web-1.vda", "/srv/a=b.raw")),
        ("/srv/web-1.vdb.qcow2", DISKS, ("web-1.vdb", "/srv/web-1.vdb.qcow2")),
        ("/srv/web-1.vdb", DISKS, ("web-1.vdb", "/srv/web-1.vdb")),
        ("/srv/x=y/web-1.vdb.img", DISKS, ("web-1.vdb", "/srv/x=y/web-1.vdb.img")),
        ("/dev/vg/lv7", ["db.sda"], ("db.sda", "/dev/vg/lv7")),
    ],
)
def test_a_seed_names_its_disk(named, disks, expected) -> None:
    assert which(named, disks) == expected


@pytest.mark.parametrize("named", ["web-1.vdc=/srv/a.raw", "/srv/a.raw", "=/srv/a.raw"])
def test_a_seed_of_no_disk_is_refused(named) -> None:
    with pytest.raises(NotFound) as caught:
        which(named, DISKS)
    assert "web-1.vda, web-1.vdb" in str(caught.value.hint)


@pytest.fixture
def web(world):
    group = world.applied("unprotected")
    group.beta.replies["replicate.seed"] = {
        "group": "web",
        "seeds": [{"disk": "db.vda", "path": "/srv/db.qcow2", "way": "copy", "bytes": 2**20}],
        "unseeded": ["front.vda"],
    }
    group.alpha.replies["replicate.start"] = {"group": "web", "phase": "syncing"}
    return group


def test_seeds_are_told_taken_first_and_then_it_starts(web) -> None:
    result = web("replicate", "start", "web", "--seed", "db.vda=/srv/db.qcow2", "--yes")
    assert result.code == 0
    assert "will take /srv/db.qcow2 at beta/b1 as db.vda (1.0 MiB, copied into the replica)" in result.err
    assert "will send front.vda in full" in result.err
    tried, taken = web.beta.called("replicate.seed")
    assert tried["dry_run"]
    assert "dry_run" not in taken
    assert taken["seeds"] == [{"disk": "db.vda", "path": "/srv/db.qcow2"}]
    assert [(disk["machine"], disk["target"], disk["size"]) for disk in taken["disks"]] == [
        ("db", "vda", 2**30),
        ("front", "vda", 2**30),
    ]
    assert web.alpha.called("replicate.start")


def test_a_dry_run_takes_nothing(web) -> None:
    assert web("replicate", "start", "web", "--seed", "db.vda=/srv/db.qcow2", "--dry-run").code == 0
    assert len(web.beta.called("replicate.seed")) == 1
    assert not web.alpha.called("replicate.start")


def test_a_refused_seed_starts_nothing(web) -> None:
    web.beta.replies["replicate.seed"] = Refused("/srv/db.qcow2 has 5 bytes")
    result = web("replicate", "start", "web", "--seed", "db.vda=/srv/db.qcow2", "--yes")
    assert result.code == 14
    assert not web.alpha.called("replicate.start")


def test_a_seed_for_a_group_that_replicates_comes_too_late(world) -> None:
    group = world.applied("live")
    result = group("replicate", "start", "web", "--seed", "db.vda=/srv/db.qcow2", "--yes")
    assert result.code == 12
    assert "drctl resync web" in result.err
