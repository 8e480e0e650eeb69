"""Records of runs at the recovery site: kept while the operator's machine dies, signed, anchored, one run at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from drctl.appliance.run_service import RunService
from drctl.errors import ApplianceUnreachable
from drctl.replication import identity
from drctl.store.run_archive import RunArchive
from tests.cli.appliance import recovery
from tests.cli.conftest import World
from tests.cli.test_plan import PLAN, runs_of, write

UUIDS = {"alpha": "a" * 8 + "-0000-4000-8000-000000000000", "beta": "b" * 8 + "-0000-4000-8000-000000000000"}
CUT = "no appliance answers"


class Sites:
    """The two appliances with archives of their own, certificates by one CA, and a clock that tests move."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.now = world.clock.now
        (directory / "ca").mkdir()
        identity.create_ca(world.directory / "ca")
        self.archives: dict[str, RunArchive] = {}
        for site, fake in (("alpha", world.alpha), ("beta", world.beta)):
            tls = directory / site / "tls"
            identity.issue(world.directory / "ca", UUIDS[site], tls)
            self.archives[site] = archive = RunArchive(directory / site / "runs", lambda: self.now)
            place = {"site": site, "host": fake.host, "appliance": UUIDS[site]}
            fake.replies |= RunService(archive, tls, place, lambda: self.now).handlers()

    def run(self, *more: str, code: int = 0) -> dict:
        result = self.world("plan", "run", "web", "--mode", "test", "--yes", "-o", "json", *more)
        assert result.code == code, result.err
        return result.json

    def record(self, site: str, run: str) -> Path:
        return self.archives[site]._directory / f"{run}.jsonl"

    def verify(self, run: str, code: int = 0) -> dict:
        result = self.world("run", "verify", run, "-o", "json")
        assert result.code == code, result.err
        return result.json


@pytest.fixture
def sites(world, tmp_path_factory):
    (world.directory / "plans").mkdir()
    write(world, PLAN)
    made = Sites(world.applied(), tmp_path_factory.mktemp("sites"))
    yield made
    for archive in made.archives.values():
        archive.close()


def test_the_sites_record_is_the_operators_and_everybody_vouches_for_it(sites) -> None:
    run = sites.run()["run"]
    own = sites.world.directory / "runs" / f"{run}.jsonl"
    assert sites.record("beta", run).read_bytes() == own.read_bytes()
    proof = sites.verify(run)
    lines = proof["lines"]
    assert (proof["kept"], proof["differing"]) == (["beta/b1"], [])
    assert [(one["by"], one["lines"], one["problem"]) for one in proof["signatures"]] == [("beta/b1", lines, "")]
    assert [(one["by"], one["lines"], one["problem"]) for one in proof["anchors"]] == [("alpha/a1", lines, "")]
    shown = sites.world("run", "verify", run).out
    assert "signed:   beta/b1: all" in shown
    assert "anchored: alpha/a1: all" in shown


def test_each_step_is_at_the_site_before_it_begins(sites) -> None:
    seen: list[str] = []

    def start(params, progress):
        run = params["label"]
        seen.append(sites.record("beta", run).read_text().splitlines()[-1])
        sites.world.beta.tests.append(recovery("test", "web", label=run))
        return sites.world.beta.tests[-1]

    sites.world.beta.replies["test.start"] = start
    sites.run()
    last = json.loads(seen[0])
    assert (last["event"], last["step"]) == ("begin", "group:web/recover")


def test_the_operators_machine_is_lost_and_another_one_tells_and_goes_on(sites) -> None:
    run = sites.run()["run"]
    record = sites.record("beta", run)
    lines = record.read_bytes().splitlines(keepends=True)
    begin = next(number for number, line in enumerate(lines, 1) if b'"group:web/recover"' in line and b"begin" in line)
    record.write_bytes(b"".join(lines[:begin]))
    sites.world.beta.tests = [recovery("test", "web", label=run)]
    shutil.rmtree(sites.world.directory / "runs")
    assert [(row["run"], row["state"], row["kept"]) for row in runs_of(sites.world)] == [
        (run, "unfinished", ["beta/b1"])
    ]
    assert "unfinished" in sites.world("run", "show", run).out
    result = sites.world("run", "resume", run, "--yes", "-o", "json")
    assert (result.code, result.json["verdict"], sites.world.beta.tests) == (0, "passed", []), result.err
    assert f"{run}: {begin} lines taken from the site" in result.err
    assert sites.verify(run)["signatures"][0]["lines"] == sites.verify(run)["lines"]
    assert (sites.world.directory / "runs" / f"{run}.jsonl").read_bytes() == record.read_bytes()


def test_what_the_site_missed_is_brought_there_as_soon_as_it_answers(sites) -> None:
    keep, failures = sites.world.beta.replies["run.append"], iter([False, True, True, True, False])

    def append(params, progress):
        if next(failures, False):
            raise ApplianceUnreachable(CUT)
        return keep(params, progress)

    sites.world.beta.replies["run.append"] = append
    run = sites.run()["run"]
    own = sites.world.directory / "runs" / f"{run}.jsonl"
    assert sites.record("beta", run).read_bytes() == own.read_bytes()


def test_an_answer_that_is_lost_is_no_second_line(sites) -> None:
    keep, lost = sites.world.beta.replies["run.append"], iter([True, False, True])

    def append(params, progress):
        told = keep(params, progress)
        if next(lost, False):
            raise ApplianceUnreachable(CUT)
        return told

    sites.world.beta.replies["run.append"] = append
    run = sites.run()["run"]
    assert sites.verify(run)["kept"] == ["beta/b1"]
    own = sites.world.directory / "runs" / f"{run}.jsonl"
    assert sites.record("beta", run).read_bytes() == own.read_bytes()


def test_a_run_that_ends_while_the_site_is_silent_says_what_is_missing_there(sites) -> None:
    def append(params, progress):
        raise ApplianceUnreachable(CUT)

    sites.world.beta.replies["run.append"] = append
    result = sites.world("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, result.err.count("the record is not kept at b1 now")) == (0, 1)
    assert "lines of the record are not at b1" in result.err


def test_an_other_site_that_is_silent_is_said(sites) -> None:
    def anchor(params, progress):
        raise ApplianceUnreachable(CUT)

    sites.world.alpha.replies["run.anchor"] = anchor
    result = sites.world("plan", "run", "web", "--mode", "test", "--yes", "-o", "json")
    assert (result.code, "head is not noted at a1" in result.err) == (0, True)
    assert sites.verify(result.json["run"])["anchors"] == []
    assert "no other site keeps its head" in sites.world("run", "verify", result.json["run"]).out


def test_two_operators_on_two_machines_can_not_run_one_plan(sites, tmp_path_factory, capsys, monkeypatch) -> None:
    other = World(tmp_path_factory.mktemp("elsewhere"), capsys, monkeypatch)
    other.alpha, other.beta, other.clock = sites.world.alpha, sites.world.beta, sites.world.clock
    (other.directory / "plans").mkdir()
    write(other, PLAN)
    inner: list = []

    def start(params, progress):
        inner.append(other("plan", "run", "web", "--mode", "test", "--yes"))
        sites.world.beta.tests.append(recovery("test", "web", label=params["label"]))
        return sites.world.beta.tests[-1]

    sites.world.beta.replies["test.start"] = start
    sites.run()
    assert (inner[0].code, "plan web is run by" in inner[0].err) == (13, True)
    assert not (other.directory / "runs").exists() or not list((other.directory / "runs").glob("*.jsonl"))
    del sites.world.beta.replies["test.start"]
    assert other("plan", "run", "web", "--mode", "test", "--yes").code == 0


def test_a_machine_that_died_blocks_a_plan_for_half_a_minute_only(sites) -> None:
    sites.archives["beta"].begin("20260131T000000Z-web-dead", "web", "ann@desk", 30)
    blocked = sites.world("plan", "run", "web", "--mode", "test", "--yes")
    assert (blocked.code, "ann@desk" in blocked.err) == (13, True)
    sites.now += 31
    sites.run()


@pytest.mark.parametrize("site", ["here", "there"])
def test_a_line_that_was_rewritten_anywhere_is_found(sites, site: str) -> None:
    run = sites.run()["run"]
    path = sites.world.directory / "runs" / f"{run}.jsonl" if site == "here" else sites.record("beta", run)
    path.write_bytes(path.read_bytes().replace(b'"passed"', b'"failed"', 1))
    assert sites.verify(run, code=31)["differing"] == ["beta/b1"]


def rewritten(path: Path) -> None:
    """The whole record, every hash made anew, with another operator's name."""
    import hashlib

    previous, made = "0" * 64, []
    for line in path.read_text().splitlines():
        event = json.loads(line) | {"previous": previous}
        if event["event"] == "run":
            event["operator"] = "nobody"
        made.append(json.dumps(event, separators=(",", ":")))
        previous = hashlib.sha256(made[-1].encode()).hexdigest()
    path.write_text("\n".join(made) + "\n")


def test_a_record_that_was_rewritten_as_a_whole_is_found_by_signature_and_anchor(sites) -> None:
    run = sites.run()["run"]
    for path in (sites.world.directory / "runs" / f"{run}.jsonl", sites.record("beta", run)):
        rewritten(path)
    proof = sites.verify(run, code=31)
    assert proof["sound"], "its own chain says nothing"
    assert "signed another line" in proof["signatures"][0]["problem"]
    assert "keeps another hash" in proof["anchors"][0]["problem"]


def test_a_signature_by_somebody_else_is_none(sites, tmp_path) -> None:
    run = sites.run()["run"]
    path = sites.record("beta", run).with_suffix(".sig")
    told = json.loads(path.read_text())
    identity.create_ca(tmp_path / "ca2")
    identity.issue(tmp_path / "ca2", UUIDS["beta"], tmp_path / "tls2")
    path.write_text(json.dumps(told | {"certificate": (tmp_path / "tls2" / "cert.pem").read_text()}))
    assert "not by this project's CA" in sites.verify(run, code=31)["signatures"][0]["problem"]
    path.write_text(json.dumps(told | {"time": told["time"] - 86400}))
    assert sites.verify(run, code=31)["signatures"][0]["problem"] == "the signature does not fit"
    path.write_text(json.dumps(told))
    shutil.rmtree(sites.world.directory / "ca")
    assert "CA is not here" in sites.verify(run)["signatures"][0]["doubt"]


def test_a_site_without_a_certificate_keeps_it_unsigned_and_says_so(sites) -> None:
    for name in ("key.pem", "cert.pem"):
        (sites.archives["beta"]._directory.parent / "tls" / name).unlink()
    result = sites.world("plan", "run", "web", "--mode", "test", "--yes", "-o", "json")
    assert (result.code, result.err.count("the record is not signed")) == (0, 1)
    assert sites.verify(result.json["run"])["signatures"] == []
