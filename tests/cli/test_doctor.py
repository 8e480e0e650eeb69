"""The doctor: each trouble is found, graded, and said what to do about."""

from __future__ import annotations

import pytest

from drctl.cli.diagnosis import Severity, examine_coverage, examine_group, examine_host, exit_code, info
from drctl.cli.protection import merge
from tests.cli.appliance import NOW, machine


@pytest.fixture
def web(world, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("drctl.cli.doctor.NEEDED", {})
    world.alpha.machines.pop()
    return world.applied()


def findings(result) -> list[tuple[str, str, str]]:
    return [(row["severity"], row["subject"], row["message"]) for row in result.json["findings"]]


def look(world) -> tuple[int, list[tuple[str, str, str]]]:
    result = world("doctor", "-o", "json")
    return result.code, findings(result)


def test_all_is_well(web) -> None:
    assert look(web) == (0, [])
    assert "nothing found: all is well" in web("doctor").err


def test_an_appliance_that_does_not_answer_is_an_error(web) -> None:
    web.beta.down = True
    code, found = look(web)
    assert code == 42
    assert found[0][:2] == ("error", "b1")
    assert ("error", "web", "its recovery point is unknown") in found


def test_nothing_answers(web) -> None:
    web.alpha.down = web.beta.down = True
    code, found = look(web)
    assert (code, len(found)) == (42, 2)


def test_an_unprotected_machine_is_only_told(web) -> None:
    web.alpha.machines.append(machine("lonely"))
    assert look(web) == (0, [("info", "coverage", "running machines in no group (1): lonely")])


def test_a_disk_added_to_a_protected_machine(web) -> None:
    web.alpha.machines[0] = machine("db", "vda", "vdb")
    code, found = look(web)
    assert code == 42
    assert found == [("error", "db.vdb", "was added after group web was started; it is not replicated")]


def test_a_disk_that_can_not_be_replicated(web) -> None:
    web.alpha.machines[0]["disks"][0]["refusal"] = "shared"
    assert ("error", "db.vda", "can't be replicated: shared") in look(web)[1]


def test_a_file_that_is_not_applied(web) -> None:
    path = web.directory / "groups/web.toml"
    path.write_text(path.read_text().replace("5s", "9s"))
    code, found = look(web)
    assert code == 3
    assert ("warning", "web", "its file is not applied at alpha/a1") in found


def test_a_wrong_group_file_is_an_error_that_names_the_line(web) -> None:
    path = web.directory / "groups/web.toml"
    path.write_text(path.read_text() + "\n[nonsense]\n")
    code, found = look(web)
    assert code == 42
    assert found[0][2].endswith("web.toml:10: nonsense: unknown key")


def test_findings_of_the_appliance_are_passed_on(web) -> None:
    row = {"severity": "warning", "subject": "/run/drctl", "message": "is open to others", "hint": "chmod 700"}
    web.alpha.replies["appliance.info"] = web.alpha._appliance_info({}) | {"findings": [row]}
    assert look(web) == (3, [("warning", "a1: /run/drctl", "is open to others")])


def host(**facts) -> list:
    return examine_host("a1", facts, "0.1.0", NOW, 0.05)


@pytest.mark.parametrize(
    ("facts", "severity", "words"),
    [
        ({"version": "0.0.9"}, Severity.WARNING, "of version 0.0.9, this program of 0.1.0"),
        ({"wall_ns": int((NOW + 2.1) * 1e9)}, Severity.WARNING, "clock differs from this machine's by 2."),
        ({"wall_ns": int((NOW - 40) * 1e9)}, Severity.ERROR, "clock differs"),
        (
            {"space": {"store": {"total": 100, "free": 8, "path": "/s"}}},
            Severity.WARNING,
            "8 B of 100 B are free in /s",
        ),
        ({"space": {"store": {"total": 100, "free": 1}}}, Severity.ERROR, "are free in store"),
    ],
)
def test_hosts(facts, severity, words: str) -> None:
    (finding,) = host(**facts)
    assert finding.severity is severity
    assert words in finding.message
    assert finding.hint


def test_a_healthy_host_and_one_that_tells_nothing() -> None:
    assert host(version="0.1.0", wall_ns=int((NOW + 0.9) * 1e9), space={"store": {"total": 100, "free": 50}}) == []
    assert host() == []
    assert host(space={"store": {"total": None, "free": None}}) == []


def test_a_host_without_a_sealed_copy_of_the_authority() -> None:
    (one,) = host(version="0.1.0", authority=None)
    assert one.severity is Severity.INFO
    assert "keeps no sealed copy" in one.message
    assert one.hint == "drctl certificate seal a1"
    assert host(version="0.1.0", authority={"fingerprint": "ab", "kept": NOW}) == []
    assert host(version="0.1.0") == []  # an older appliance does not tell


def test_space_is_told_once() -> None:
    told = {"severity": "error", "subject": "/s", "message": "nearly full"}
    assert len(host(findings=[told], space={"store": {"total": 100, "free": 1, "path": "/s"}})) == 1


def picture(**changes) -> dict:
    source = {"phase": "live", "interval": 5.0, "link": {"state": "connected"}}
    recovery = {
        "wall_ns": int(NOW * 1e9),
        "mode": "journal",
        "checkpoints": {"count": 1, "newest": {"number": 1, "time": NOW - 4}},
    }
    return merge("web", source, recovery, NOW) | {"source": {"site": "alpha", "host": "a1"}} | changes


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"phase": "broken", "reason": "tap died"}, Severity.ERROR, "is broken: tap died"),
        ({"phase": "paused"}, Severity.WARNING, "is paused"),
        ({"phase": "unprotected"}, Severity.WARNING, "is unprotected"),
        ({"phase": "syncing", "rpo_seconds": None}, Severity.WARNING, "until the first sync is done"),
        ({"rpo_seconds": None}, Severity.ERROR, "its recovery point is unknown"),
        ({"rpo_seconds": 16.0}, Severity.WARNING, "RPO is 16.0 s, the interval is 5.0 s"),
        ({"link": {"state": "reconnecting"}}, Severity.ERROR, "the link is reconnecting"),
        ({"journal": {"bytes": 95, "limit": 100}}, Severity.WARNING, "its journal holds 95 B of 100 B"),
        (
            {"history": {"forecast": 60.0, "target_seconds": 3600.0}},
            Severity.WARNING,
            "history will be 1m, wanted are 1h",
        ),
        ({"recovery_mode": "failed-over", "phase": "broken", "source": None}, Severity.INFO, "is failed over"),
    ],
)
def test_groups(changes, severity, words: str) -> None:
    (finding,) = examine_group(picture(**changes))
    assert finding.severity is severity
    assert words in finding.message


def test_a_machine_that_runs_at_both_sites_is_an_error() -> None:
    source = {"site": "alpha", "host": "a1"}
    machines = [{"name": "db", "state": "running"}, {"name": "front", "state": "shut-off"}]
    both = picture(recovery_mode="failed-over", phase="failed-over", machines=machines, source=source)
    found = examine_group(both)
    assert [(one.severity, one.subject) for one in found] == [(Severity.ERROR, "web.db"), (Severity.INFO, "web")]
    assert found[0].message == "runs at alpha/a1, though web reigns at the other site: two of one"


def test_strays_count_where_the_source_looks_for_them() -> None:
    machines = [{"name": "db", "state": "running"}, {"name": "front", "state": "shut-off"}]
    seen = picture(recovery_mode="failed-over", phase="failed-over", machines=machines, strays=["front"])
    assert [one.subject for one in examine_group(seen)] == ["web.front", "web"]
    # A supervisor that was restarted has not looked at machines of a superseded group.
    assert [one.subject for one in examine_group(seen | {"machines": []})] == ["web.front", "web"]
    alone = picture(recovery_mode=None, phase="failed-over", machines=machines, strays=["db"])
    assert [one.subject for one in examine_group(alone)] == ["web.db", "web"]


@pytest.mark.parametrize(
    ("boot", "severity", "words"),
    [
        (
            {"state": "waiting", "reason": "no link"},
            Severity.ERROR,
            "db wait to be started since the host's boot: no link",
        ),
        ({"state": "denied", "reason": "no link"}, Severity.ERROR, "db were not started at the host's boot"),
        ({"state": "allowed", "reason": "no link"}, Severity.WARNING, "without the other site's word"),
        ({"state": "started", "reason": "db: no memory"}, Severity.ERROR, "not all guests could be started"),
    ],
)
def test_what_became_of_the_hosts_boot(boot, severity, words) -> None:
    (found,) = examine_group(picture(boot=boot | {"autostart": ["db"]}))
    assert found.severity is severity
    assert words in found.message


def test_a_boot_that_went_well_is_no_finding() -> None:
    assert examine_group(picture(boot={"state": "started", "reason": "", "autostart": ["db"]})) == []


def test_a_committed_group_is_not_protected() -> None:
    done = picture(recovery_mode="failed-over", recoveries=[{"state": "committed"}], source=None)
    assert [(one.severity, one.message) for one in examine_group(done)] == [
        (Severity.WARNING, "is failed over and committed; nothing protects it at its new site")
    ]


def test_a_group_seen_from_the_recovery_site_alone() -> None:
    (finding,) = examine_group(picture(phase=None))
    assert finding.severity is Severity.INFO


def test_a_healthy_group() -> None:
    assert examine_group(picture()) == []
    assert examine_group(picture(rpo_seconds=14.9)) == []


def test_coverage_of_a_group_whose_source_is_silent_is_not_judged() -> None:
    row = {"machine": "db", "group": "web", "test": "", "state": "running", "disks": [{"target": "vda"}]}
    assert examine_coverage([row], [picture(machines=[])]) == []


def test_old_programs_of_this_machine(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from drctl.cli.doctor import _this_machine

    program = tmp_path / "virsh"
    program.write_text("#!/bin/sh\necho 8.5.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (old,) = _this_machine({"virsh": (9, 0)})
    assert (old.severity, old.message) == (Severity.ERROR, "virsh is 8.5, older than 9.0")
    assert _this_machine({"virsh": (8, 5)}) == []
    assert [one.severity for one in _this_machine({"qemu-system-x86_64": (7, 2)})] == [Severity.INFO]


def test_exit_codes() -> None:
    assert exit_code([]) == 0
    assert exit_code([info("a", "b")]) == 0


def test_clocks_an_hour_apart_end_with_34_and_status_says_it(world) -> None:
    world.applied()
    status = world.alpha.call("group.status", {"group": "web"})
    world.alpha.replies["group.status"] = status | {"link": {"state": "connected", "offset_ms": -3_600_000.0}}
    world.alpha.machines = world.alpha.machines[:2]
    result = world("doctor")
    assert "the clocks of its two sites differ by 1h" in result.out
    assert result.code == 34
    assert "the two sites' clocks differ by 1h" in world("status", "web").out


def test_a_rejected_certificate_ends_with_35_and_is_named(world) -> None:
    world.applied()
    link = {"state": "rejected", "offset_ms": None, "error": {"message": "the certificate is foreign"}}
    world.alpha.replies["group.status"] = world.alpha.call("group.status", {"group": "web"}) | {"link": link}
    result = world("doctor")
    assert "the link is rejected: the certificate is foreign" in result.out
    assert "tls/peers.json" in result.out
    assert result.code == 35
    assert "rejected: the certificate is foreign" in world("status", "web").out


# -- the authority ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [None, b"geheim"])
def test_the_authoritys_key_is_looked_at(world, passphrase) -> None:
    from drctl.replication.identity import create_ca

    create_ca(world.directory / "ca", passphrase)
    key = world.directory / "ca" / "ca-key.pem"

    def found():
        told = world("doctor", "--output", "json").json["findings"]
        return [(one["severity"], one["message"].split(":")[0]) for one in told if one["subject"] == str(key)]

    plain = [] if passphrase else [("info", "has no passphrase")]
    assert found() == plain
    key.chmod(0o644)
    assert found() == [("error", "may be read by others (mode 044)"), *plain]
