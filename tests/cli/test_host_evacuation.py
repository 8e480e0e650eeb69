"""A host's maintenance on the command line: what is paused where, what returns, and what is said about it."""

from __future__ import annotations

import pytest

from drctl.errors import ApplianceUnreachable, HypervisorRefused, Locked


@pytest.fixture
def web(world):
    return world.applied("live")


def test_a_source_host_is_evacuated_and_returns(web) -> None:
    result = web("host", "evacuate", "a1", "--yes")
    assert result.code == 0, result.err
    assert "will pause web: no new checkpoint until drctl host return a1" in result.err
    assert result.out == "a1 is evacuated; afterwards: drctl host return a1\n"
    assert web.alpha.called("host.evacuate")[0]["recoveries"] == {}
    assert web.alpha.phases["web"] == "paused"
    assert web("host", "evacuate", "a1", "--yes").out.startswith("a1 is evacuated already")
    assert len(web.alpha.called("host.evacuate")) == 1
    back = web("host", "return", "a1", "--yes")
    assert (back.code, back.out) == (0, "a1 is back\n")
    assert web.alpha.phases["web"] == "live"
    assert web("host", "return", "a1", "--yes").out == "a1 is not evacuated\n"


def test_guests_are_shut_down_in_reverse_only_when_asked(web) -> None:
    assert "shut down" not in web("host", "evacuate", "a1", "--dry-run").err
    result = web("host", "evacuate", "a1", "--shutdown", "--shutdown-timeout", "5m", "--yes")
    assert "will shut down front, db of web" in result.err
    order = web.alpha.called("host.evacuate")[0]
    assert (order["shutdown"], order["shutdown_seconds"]) == (True, 300.0)
    assert "will resume web, and start front, db" in web("host", "return", "a1", "--yes").err


def test_a_recovery_hosts_groups_are_paused_at_their_source(web) -> None:
    result = web("host", "evacuate", "b1", "--yes")
    assert result.code == 0, result.err
    assert "will pause web at alpha/a1: it has no recovery site meanwhile" in result.err
    assert web.beta.called("host.evacuate")[0]["recoveries"] == {"web": "alpha/a1"}
    assert web.alpha.phases["web"] == "paused"
    # Recorded at the host before anything is paused: whoever comes after a crash knows what to resume.
    assert not web.alpha.called("host.evacuate")
    back = web("host", "return", "b1", "--yes")
    assert (back.code, back.out) == (0, "b1 is back\n")
    assert web.beta.called("host.return")[0]["left"] == []
    assert web.alpha.phases["web"] == "live"


def test_a_group_that_was_paused_before_stays_so(web) -> None:
    web.alpha.phases["web"] = "paused"
    assert web("host", "evacuate", "b1", "--yes").code == 0
    assert web.beta.called("host.evacuate")[0]["recoveries"] == {}
    web("host", "return", "b1", "--yes")
    assert web.alpha.phases["web"] == "paused"


def test_nobody_is_left_without_protection_unasked(web) -> None:
    assert web("host", "evacuate", "a1").code == 14
    assert web("host", "evacuate", "a1", typed="n\n").code == 41
    assert web("host", "evacuate", "a1", "--dry-run").code == 0
    assert not web.alpha.called("host.evacuate")
    assert web.alpha.phases["web"] == "live"


def test_what_is_in_the_way_is_named(web) -> None:
    web.beta.replies["host.evacuation"] = {"host": "b1", "evacuation": None, "sources": []} | {
        "reasons": ["a test of web runs here: drctl test stop t1"]
    }
    result = web("host", "evacuate", "b1", "--yes")
    assert result.code == 42
    assert "drctl test stop t1" in result.err
    assert web.alpha.phases["web"] == "live"


def test_another_operators_lease_stops_it_before_anything_is_done(web) -> None:
    web.beta.replies["lease.take"] = Locked("web is being worked on: ann@desk")
    assert web("host", "evacuate", "a1", "--yes").code == 13
    assert not web.alpha.called("host.evacuate")


def test_leases_are_given_back(web) -> None:
    web("host", "evacuate", "a1", "--yes")
    assert web.beta.called("lease.release")[0]["token"] == "t"


def test_what_could_not_be_paused_or_resumed_is_told_and_kept(web) -> None:
    web.alpha.replies["replicate.pause"] = HypervisorRefused("db is being migrated")
    result = web("host", "evacuate", "b1", "--yes")
    assert result.code == 3
    assert "web: db is being migrated" in result.err
    del web.alpha.replies["replicate.pause"]
    assert web("host", "evacuate", "b1", "--yes").code == 0
    web.alpha.replies["replicate.resume"] = ApplianceUnreachable("a1 is busy")
    assert web("host", "return", "b1", "--yes").code == 3
    assert web.beta.called("host.return")[-1]["left"] == ["web"]


def test_a_silent_source_keeps_its_group_in_the_record(web) -> None:
    web("host", "evacuate", "b1", "--yes")
    web.alpha.down = True
    result = web("host", "return", "b1", "--yes")
    assert result.code == 3
    assert "its source alpha/a1 does not answer" in result.err
    assert web.beta.called("host.return")[-1]["left"] == ["web"]


def test_status_and_host_list_show_it(web) -> None:
    web("host", "evacuate", "b1", "--yes")
    picture = web("status", "--output", "json").json["groups"][0]
    assert picture["reason"] == "host b1 is evacuated: drctl host return b1"
    assert picture["evacuated"]["phase"] == "evacuated"
    assert "running, evacuated" in web("host", "list").out
    assert "evacuated since 2027-01-15T" in web("host", "show", "b1").out
    web("host", "return", "b1", "--yes")
    assert web("status", "--output", "json").json["groups"][0]["evacuated"] is None


def test_return_waits_for_the_groups(web) -> None:
    web("host", "evacuate", "a1", "--yes")
    assert web("host", "return", "a1", "--yes", "--wait").out == "a1 is back\nweb is live\n"


def test_a_slow_guest_is_waited_for(web) -> None:
    """Nothing may be heard for as long as a guest may take; a call ends after 10 s of silence else."""
    heard: list[float | None] = []
    plain = web.alpha.call

    def call(method, params=None, *, on_progress=None, timeout=None):
        if method in ("host.evacuate", "host.return"):
            heard.append(timeout)
            on_progress({"step": "machine", "machine": "db", "state": "shutting down"})
        return plain(method, params, on_progress=on_progress, timeout=timeout)

    web.alpha.call = call
    result = web("host", "evacuate", "a1", "--shutdown", "--shutdown-timeout", "10m", "--yes")
    assert "db: shutting down" in result.err
    assert web("host", "return", "a1", "--yes").code == 0
    assert heard[0] is not None
    assert heard[1] is not None
    assert heard[0] > 600
    assert heard[1] >= 180
