"""Records of runs that a site keeps: lines that follow, leases that end, names that are no paths."""

from __future__ import annotations

import pytest

from drctl.errors import IntegrityError, Locked, NotFound, Refused
from drctl.store.run_archive import RunArchive
from drctl.store.run_log import GENESIS, RunLog, encode_event, head_at

RUN, PLAN = "20260131T021005Z-shop-3f9c", "shop"


class Site:
    """An archive that may be started anew, and a run's lines as the operator's machine has them."""

    def __init__(self, directory):
        self.directory = directory
        self.now = 1000.0
        self.start()
        self.token = self.archive.begin(RUN, PLAN, "ann", 30)["token"]
        with RunLog.create(directory / "own" / f"{RUN}.jsonl") as log:
            self.lines = [encode_event(log.append({"event": f"e{n}"}, float(n))).decode() for n in range(6)]

    def start(self):
        self.archive = RunArchive(self.directory / "runs", lambda: self.now)

    def append(self, first, *lines):
        return self.archive.append(PLAN, self.token, first, lines)


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.archive.close()


def test_lines_arrive_once_whatever_is_sent_again(site):
    assert site.append(1, *site.lines[:2])["lines"] == 2
    assert site.append(1, *site.lines[:4])["lines"] == 4
    assert site.append(3, *site.lines[2:])["lines"] == 6
    whole = "".join(f"{line}\n" for line in site.lines)
    assert site.archive.read(RUN, 0) == {"text": whole, "size": len(whole)}
    assert site.archive.read(RUN, len(whole) - 1)["text"] == "\n"


def test_lines_that_do_not_follow_are_not_taken_and_none_of_their_batch(site):
    site.append(1, *site.lines[:2])
    with pytest.raises(IntegrityError, match="lines 3 to 3 are missing"):
        site.append(4, site.lines[3])
    with pytest.raises(IntegrityError, match="line 4 is not taken"):
        site.append(3, site.lines[2], site.lines[4])
    with pytest.raises(IntegrityError):
        site.append(3, "no JSON")
    assert site.append(3, *site.lines[2:])["lines"] == 6


def test_a_restarted_site_goes_on_also_behind_a_torn_line(site):
    site.append(1, *site.lines[:2])
    site.archive.close()
    path = site.directory / "runs" / f"{RUN}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"n":3,"ti')
    site.start()
    assert site.append(3, *site.lines[2:])["lines"] == 6


def test_a_plan_is_held_until_it_is_given_back_or_not_renewed(site):
    with pytest.raises(Locked, match="run by ann"):
        site.archive.begin("r2", PLAN, "bob", 30)
    site.now += 20
    site.archive.renew(PLAN, site.token, 30)
    site.now += 20
    with pytest.raises(Locked):
        site.archive.begin("r2", PLAN, "bob", 30)
    site.now += 20
    assert site.archive.begin("r2", PLAN, "bob", 30)["lines"] == 0
    with pytest.raises(Locked, match="is lost"):
        site.append(1, site.lines[0])
    assert not site.archive.end(PLAN, site.token)


def test_a_clock_that_was_set_back_blocks_nobody(site):
    site.now -= 3600
    site.archive.begin("r2", PLAN, "bob", 30)


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 200, "a\nb"])
def test_names_are_no_paths(site, name):
    for act in (
        lambda: site.archive.read(name, 0),
        lambda: site.archive.begin(name, PLAN, "ann", 30),
        lambda: site.archive.begin(RUN, name, "ann", 30),
        lambda: site.archive.anchor(name, 1, "0" * 64, "ann"),
    ):
        with pytest.raises(Refused):
            act()


def test_heads_are_kept_and_found(site):
    data = "".join(f"{line}\n" for line in site.lines).encode()
    site.archive.anchor(RUN, 6, head_at(data, 6), "ann")
    site.archive.anchor("other", 1, "1" * 64, "ann")
    (row,) = site.archive.anchors(RUN)
    assert (row["lines"], row["head"]) == (6, head_at(data, 6))
    assert (head_at(data, 0), head_at(data, 7), head_at(data + b"torn", 6)) == (GENESIS, "", row["head"])
    with pytest.raises(Refused):
        site.archive.anchor(RUN, 1, "no hash", "ann")
    with pytest.raises(NotFound):
        site.archive.read("unknown", 0)
