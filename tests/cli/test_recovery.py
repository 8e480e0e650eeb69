"""Checkpoints, tests, failover, commit: what is named is echoed, what is dangerous needs the typed name."""

from __future__ import annotations

import pytest

from drctl.cli.config import Config
from drctl.cli.context import Context
from drctl.cli.render import Screen
from drctl.model.site import Host, HostKind, Site
from tests.cli.appliance import checkpoint, machine, recovery


@pytest.fixture
def web(world):
    return world.applied()


def numbers(result) -> list[int]:
    return [row["number"] for row in result.json["checkpoints"]]


def test_list_shows_the_newest_and_says_so(web) -> None:
    web.beta.checkpoints = [checkpoint(number, 1000 - number) for number in range(1, 41)]
    text = web("checkpoint", "list", "web")
    assert len(text.out.splitlines()) == 31
    assert text.out.splitlines()[-1].startswith("#40 ")
    assert "the newest 30; all: --last 0" in text.err
    assert len(web("checkpoint", "list", "web", "--last", "0").out.splitlines()) == 41
    assert len(numbers(web("checkpoint", "list", "web", "-o", "json"))) == 40
    assert numbers(web("checkpoint", "list", "web", "--last", "2", "-o", "json")) == [39, 40]


def test_an_empty_list_is_said_not_printed(web) -> None:
    web.beta.checkpoints = []
    result = web("checkpoint", "list", "web")
    assert (result.code, result.out) == (0, "")
    assert "web has no restorable checkpoint yet" in result.err


@pytest.mark.parametrize(
    ("selector", "number"), [("latest", 12), ("-8s", 11), ("-10m", 10), ("#11", 11), ("tag:upgrade", 11)]
)
def test_selectors_are_echoed_with_time_and_age(web, selector: str, number: int) -> None:
    result = web("checkpoint", "show", "web", selector, "-o", "json")
    assert result.json["checkpoint"]["number"] == number
    assert f"checkpoint {selector}: #{number} at 2027-01-15T07:" in result.err
    assert " ago, crash-consistent" in result.err


@pytest.mark.parametrize("selector", ["#99", "tag:no", "-1d"])
def test_a_selector_without_a_checkpoint_is_11(web, selector: str) -> None:
    result = web("checkpoint", "show", "web", selector)
    assert result.code == 11
    assert "restorable: #10 of 2027-01-15T07:49:56Z to #12 of 2027-01-15T07:59:56Z; tags: upgrade" in result.err


def test_create_with_tags_and_freeze(web) -> None:
    result = web("checkpoint", "create", "web", "--quiesce", "-t", "a", "-t", "b")
    assert result.code == 0
    assert web.alpha.called("checkpoint.create")[0] | {"by": ""} == {
        "group": "web",
        "kind": "quiesced",
        "tags": ["a", "b"],
        "by": "",
    }
    assert result.out.startswith("#13 at ")


def test_tag_and_untag(web) -> None:
    assert "tags upgrade, x" in web("checkpoint", "tag", "web", "tag:upgrade", "x").out
    assert "tags x" in web("checkpoint", "tag", "web", "#11", "upgrade", "--remove").out


def test_a_damaged_checkpoint_is_31_and_named(web) -> None:
    web.beta.replies["checkpoint.verify"] = {"number": 12, "bytes": 5, "damaged": ["db.vda: frame at 4096"]}
    result = web("checkpoint", "verify", "web")
    assert result.code == 31
    assert "db.vda: frame at 4096" in result.err
    assert "1 damaged" in result.out


def test_a_test_is_told_then_started(web) -> None:
    result = web("test", "start", "web", "--checkpoint", "-10m", "-m", "db", "--yes")
    assert result.code == 0
    assert "will boot db of web at beta/b1 in isolation, as of #10" in result.err
    call = web.beta.called("test.start")[0]
    assert (call["checkpoint"], call["machines"]) == ("#10", ["db"])
    assert "end it with: drctl test stop t1" in result.err


def test_latest_stays_latest_for_the_appliance(web) -> None:
    web("test", "start", "web", "--yes")
    assert web.beta.called("test.start")[0]["checkpoint"] == "latest"


@pytest.mark.parametrize(("state", "code"), [("running", 0), ("partly", 3), ("failed", 40)])
@pytest.mark.parametrize("verb", ["test start web --yes", "failover web --source-is-down x --confirm web"])
def test_how_a_recovery_went_is_the_exit_code(web, verb: str, state: str, code: int) -> None:
    machines = [{"name": "db", "state": "failed", "reason": "no network lan"}]
    for method in ("test.start", "failover.run"):
        web.beta.replies[method] = recovery("test", "web", state=state, machines=machines)
    result = web(*verb.split())
    assert result.code == code
    assert "no network lan" in result.out
    if code == 40:
        assert "failed: no network lan" in result.err


def test_steps_are_told_as_they_happen(web) -> None:
    def run(params, progress):
        progress({"step": "machine", "machine": "db", "state": "running"})
        return recovery("failover", "web")

    web.beta.replies["failover.run"] = run
    assert "  db: running\n" in web("failover", "web", "--source-is-down", "x", "--confirm", "web").err


def test_tests_are_listed_and_stopped_by_their_id(web) -> None:
    web("test", "start", "web", "--yes")
    assert web("test", "list").out.splitlines()[1].startswith("t1  test  web")
    assert web("test", "stop", "t9", "--yes").code == 11
    assert web("test", "stop", "t1", "--yes").out == "t1 is gone\n"
    assert web("test", "stop", "t1", "--yes").code == 11


def test_failover_dry_run_shows_loss_and_changes_nothing(web) -> None:
    result = web("failover", "web", "--dry-run")
    assert result.code == 0
    for text in (
        "generation 2",
        "#12 at 2027-01-15T07:59:56",
        "loss: 4.0 s",
        "before: alpha/a1 (source): live, generation 1; db running, front running",
        "source alpha/a1 answers, and the group is live there; db, front run there",
        "lan -> lan-b",
    ):
        assert text in result.err
    assert not web.beta.called("failover.run")


def test_failover_dry_run_forecasts_failures(web) -> None:
    plan = web.beta.call("failover.plan", {"group": "web"})
    error = {"severity": "error", "subject": "db", "message": "name taken", "hint": "rename it"}
    web.beta.replies["failover.plan"] = plan | {"findings": [error]}
    result = web("failover", "web", "--dry-run")
    assert result.code == 3
    assert "error: db: name taken (rename it)" in result.err
    web.beta.replies["failover.plan"] = plan | {"findings": [error, error | {"subject": "front"}]}
    assert web("failover", "web", "--dry-run").code == 42


@pytest.mark.parametrize(
    ("words", "typed", "code", "message"),
    [
        ((), None, 15, "db, front run there"),
        (("--yes",), None, 15, "drctl switchover web"),
        (("--confirm", "web"), None, 15, '--source-is-down "REASON"'),
        (("--source-is-down", "fire"), None, 14, "add --confirm web; --yes alone is not enough here"),
        (("--source-is-down", "fire", "--yes"), None, 14, "add --confirm web; --yes alone is not enough here"),
        (("--source-is-down", "fire", "--confirm", "shop"), None, 14, "is not the group's name 'web'"),
        (("--source-is-down", "fire"), "y\n", 41, "another name was typed"),
        (("--source-is-down", "fire"), "", 41, "another name was typed"),
    ],
)
def test_failover_is_not_started_without_reason_and_name(web, words, typed, code: int, message: str) -> None:
    result = web("failover", "web", *words, typed=typed)
    assert result.code == code
    assert message in result.err
    assert not web.beta.called("failover.run")


@pytest.mark.parametrize(("words", "typed"), [(("--confirm", "web"), None), ((), "web\n")])
def test_failover_with_reason_and_name(web, words, typed) -> None:
    result = web("failover", "web", "--checkpoint", "latest", "--source-is-down", "fire in hall 2", *words, typed=typed)
    assert result.code == 0
    (call,) = web.beta.called("failover.run")
    assert (call["group"], call["checkpoint"], call["confirmed"]) == ("web", "latest", "web")
    assert call["source_is_down"] == "fire in hall 2"
    assert "started in  6.5 s" in result.out
    assert result.err.index("loss: 4.0 s") < len(result.err)


def test_failover_goes_to_the_checkpoint_that_was_shown(web) -> None:
    plan = web.beta.call("failover.plan", {"group": "web"})
    web.beta.replies["failover.plan"] = plan | {"checkpoint": web.beta.checkpoints[0]}
    web("failover", "web", "-k", "-10m", "--source-is-down", "x", "--confirm", "web")
    assert web.beta.called("failover.run")[0]["checkpoint"] == "#10"


def test_candidates_keep_tagged_ones(web) -> None:
    web.beta.checkpoints = [checkpoint(number, 1000 - number) for number in range(1, 41)]
    web.beta.checkpoints[4]["tags"] = ["good"]
    result = web("failover", "web", "--candidates")
    rows = [line.split()[0] for line in result.out.splitlines()[1:]]
    assert rows == ["#5", *(f"#{number}" for number in range(21, 41))]


def test_the_surviving_site_alone_can_fail_over(web, capsys, monkeypatch) -> None:
    """No configuration, no source site: what `sudo drctl` on a recovery host has."""
    from drctl.cli.app import run

    host = Host("b1", "beta", HostKind.LIBVIRT, "qemu:///system", "unix:/r/control.sock", "")
    config = Config("site beta, local appliance at /var/lib/drctl; no config", None, (Site("beta", (host,)),))
    context = Context(
        config=config, clients={"b1": web.beta}, screen=Screen(interactive=False, terminal=False), clock=web.clock
    )
    assert run(["status"], context) == 0
    out, err = capsys.readouterr()
    assert "site beta, local appliance at /var/lib/drctl; no config; this site alone" in err
    assert "unknown" in out
    assert run(["failover", "web", "--source-is-down", "gone", "--confirm", "web"], context) == 0
    assert run(["commit", "web", "--yes"], context) == 0
    assert run(["apply", "--yes"], context) == 10
    assert "there are no group files" in capsys.readouterr().err


def test_commit_shows_progress_and_result(web) -> None:
    def commit(params, progress):
        progress({"step": "localize", "machine": "db", "disk": "vda", "done_bytes": 50, "total_bytes": 100})
        return recovery("failover", "web", state="committed")

    web.beta.failovers = [recovery("failover", "web")]
    web.beta.replies["commit"] = commit
    result = web("commit", "web", "--yes")
    assert result.code == 0
    assert "commit web: 50 % localize db.vda, 50 B of 100 B" in result.err
    assert "state       committed" in result.out


def test_the_operator_is_named_to_the_appliance(web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "ann")
    web.beta.failovers = [recovery("failover", "web")]
    web("commit", "web", "--yes")
    assert web.beta.called("commit")[0]["by"] == "ann"


def test_a_source_that_answers_is_no_disaster_and_that_is_said(web) -> None:
    warning = "WARNING: if its machines run on there will be two of each"
    assert warning in web("failover", "web", "--dry-run").err
    web.alpha.phases["web"] = "failed-over"
    assert warning not in web("failover", "web", "--dry-run").err
    web.alpha.down = True
    assert warning not in web("failover", "web", "--dry-run").err


def test_a_failover_beside_a_live_source_is_recorded_with_what_was_seen(web) -> None:
    assert web("failover", "web", "--source-is-down", "cut off", "--confirm", "web").code == 0
    (call,) = web.beta.called("failover.run")
    assert call["source_seen"] == "answers, and the group is live there; db, front run there"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"reachable": True}, "is alive: its stream reaches the recovery site at this moment"),
        ({"silent_seconds": 70.0}, "was last heard 1m 10s ago; it does not answer this machine"),
        ({}, "has not been heard since the receiver was started; it does not answer this machine"),
    ],
)
def test_a_source_that_this_machine_cannot_ask_is_known_by_its_stream(web, told, words: str) -> None:
    plan = web.beta.call("failover.plan", {"group": "web"})
    web.beta.replies["failover.plan"] = plan | {"source": plan["source"] | told}
    web.alpha.down = True
    assert words in web("failover", "web", "--dry-run").err
    assert web("failover", "web").code == (15 if told.get("reachable") else 14)


def test_a_failover_given_twice_says_so_and_does_nothing(web) -> None:
    order = ("failover", "web", "--source-is-down", "fire", "--confirm", "web")
    assert web(*order).code == 0
    again = web(*order)
    assert again.code == 0
    assert "web is failed over to beta/b1 already" in again.err
    assert len(web.beta.called("failover.run")) == 1
    web.beta.failovers[0]["state"] = "partly"
    web(*order)
    assert len(web.beta.called("failover.run")) == 2, "what failed is tried again"


def test_commit_before_failover_and_commit_twice(web) -> None:
    early = web("commit", "web", "--dry-run")
    assert early.code == 12
    assert "there is nothing to commit" in early.err
    web.beta.failovers = [recovery("failover", "web", state="committed")]
    again = web("commit", "web", "--yes")
    assert again.code == 0
    assert "web is committed already" in again.err
    assert not web.beta.called("commit")


def test_tags_given_or_taken_twice(web) -> None:
    for words in (("upgrade",), ("gone", "--remove")):
        result = web("checkpoint", "tag", "web", "#11", *words)
        assert result.code == 0
        assert "carr" in result.out
    assert not web.beta.called("checkpoint.tag")


def test_copies_of_a_test_are_no_unprotected_machines(web) -> None:
    web.beta.machines = [machine("db-test-1")]
    web.beta.tests = [recovery("test", "web", machines=[{"name": "db", "recovery_name": "db-test-1"}])]
    assert "test t1" in web("vm", "list").out
    assert "db-test-1" not in web("vm", "list", "--unprotected").out
    assert "db-test-1" not in web("doctor").out
