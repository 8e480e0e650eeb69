"""The fence command: an argument list that is run as it stands, within its time; only exit code 0 counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from drctl.cli.config import load_config
from drctl.cli.fencing import fence, unusable
from drctl.errors import ApplianceUnreachable, ConfigInvalid, Locked
from drctl.model.site import Host, HostKind


def host(*command, limit=5.0):
    return Host("a1", "alpha", HostKind.LIBVIRT, "", "unix:/x", "", fence=command, fence_timeout=limit)


def test_no_command_no_answer():
    assert fence(host()) is None


def test_exit_code_0_is_fenced_and_nothing_goes_through_a_shell(tmp_path):
    out = tmp_path / "args"
    script = tmp_path / "off"
    script.write_text(
        f'#!/bin/sh\nprintf "%s|" "$@" "$DRCTL_HOST" "$DRCTL_GROUP" "$DRCTL_REASON" > {out}\necho powered off\n'
    )
    script.chmod(0o755)
    done = fence(host(str(script), "--ip=1.2.3.4", "; touch x", "$HOME", "-v", "-v"), group="web", reason="fire; $(id)")
    assert done is not None
    assert done.fenced
    assert str(done).startswith("off fenced it after ")
    assert str(done).endswith(": powered off")
    assert out.read_text() == "--ip=1.2.3.4|; touch x|$HOME|-v|-v|a1|web|fire; $(id)|"


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["/bin/sh", "-c", "echo no route; exit 3"], "failed with exit code 3"),
        (["/bin/sh", "-c", "kill -9 $$"], "failed with exit code -9"),
        (["/nonexistent/fence"], "can't be run (No such file or directory)"),
        (["/etc/passwd"], "can't be run (Permission denied)"),
    ],
)
def test_everything_else_is_not(command, problem):
    done = fence(host(*command))
    assert done is not None
    assert not done.fenced
    assert done.problem == problem


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path):
    child = tmp_path / "pid"
    begun = time.monotonic()
    done = fence(host("/bin/sh", "-c", f"sleep 60 & echo $! > {child}; wait", limit=0.5))
    assert done is not None
    assert done.problem == "did not end in time"
    assert time.monotonic() - begun < 5
    stat = Path(f"/proc/{child.read_text().strip()}/stat")
    end = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.02)


def test_whether_it_could_be_run():
    assert unusable([]) == ""
    assert unusable(["sh", "-c"]) == ""
    assert "no-such-fence is not there" in unusable(["no-such-fence"])


def test_it_is_read_from_the_configuration(tmp_path):
    text = '[[site]]\nname = "a"\n[[host]]\nname = "a1"\nsite = "a"\nfence = ["f", "-v", "-v"]\nfence_timeout = "5s"\n'
    (tmp_path / "drctl.toml").write_text(text)
    found = load_config(tmp_path).host("a1")
    assert (found.fence, found.fence_timeout) == (("f", "-v", "-v"), 5.0)
    (tmp_path / "drctl.toml").write_text(text.replace('["f", "-v", "-v"]', '"f -v"'))
    with pytest.raises(ConfigInvalid, match="fence: is a string, must be an array"):
        load_config(tmp_path)


@pytest.fixture
def web(world):
    """The group, whose source is silent, in a configuration with a fence command of the tests' own."""
    world.applied()
    world.alpha.down = True

    def fenced_by(*command):
        config = world.directory / "drctl.toml"
        listed = ", ".join(f'"{word}"' for word in command)
        config.write_text(config.read_text().replace('name = "a1"\n', f'name = "a1"\nfence = [{listed}]\n'))
        plan = world.beta.call("failover.plan", {"group": "web"})
        world.beta.replies["failover.plan"] = plan | {"source": {"site": "alpha", "host": "a1", "reachable": False}}
        return world

    return fenced_by


def test_a_fenced_source_needs_no_word_of_the_operators(web):
    world = web("/bin/sh", "-c", "echo off")
    result = world("failover", "web", "--confirm", "web")
    assert result.code == 0, result.err
    assert "sh fenced it after" in result.err
    (call,) = world.beta.called("failover.run")
    assert call["source_is_down"].startswith("it was fenced: sh fenced it after")
    (note,) = world.beta.called("fence.note")
    assert note["fence"].endswith(": off")


def test_one_that_could_not_be_fenced_is_not_failed_over_and_that_is_noted(web):
    world = web("/bin/sh", "-c", "exit 1")
    result = world("failover", "web", "--confirm", "web")
    assert result.code == 14
    assert "could not be fenced: failed with exit code 1" in result.err
    assert not world.beta.called("failover.run")
    assert "failed with exit code 1" in world.beta.called("fence.note")[0]["fence"]


def test_the_operators_word_stands_where_fencing_fails(web):
    world = web("/bin/sh", "-c", "exit 1")
    assert world("failover", "web", "--source-is-down", "fire", "--confirm", "web").code == 0
    assert world.beta.called("failover.run")[0]["source_is_down"] == "fire"


def test_nothing_is_fenced_by_a_dry_run_or_without_the_typed_name(web, tmp_path):
    mark = tmp_path / "fenced"
    world = web("/bin/sh", "-c", f"touch {mark}")
    world("failover", "web", "--dry-run")
    assert world("failover", "web", "--confirm", "shop").code == 14
    assert not mark.exists()


def test_a_live_source_is_not_fenced_without_a_reason(web, tmp_path):
    mark = tmp_path / "fenced"
    world = web("/bin/sh", "-c", f"touch {mark}")
    world.alpha.down = False
    assert world("failover", "web", "--confirm", "web").code == 15
    assert not mark.exists()
    assert world("failover", "web", "--source-is-down", "cut it off", "--confirm", "web").code == 0
    assert mark.exists()


def test_a_history_that_can_not_be_written_stops_no_failover(web):
    from drctl.errors import OutOfSpace

    world = web("/bin/true")
    world.beta.replies["fence.note"] = OutOfSpace("full")
    assert world("failover", "web", "--confirm", "web").code == 0


def _order(world):
    wanted = ("lease.take", "fence.note", "failover.run", "lease.release")
    return [method for method, _ in world.beta.calls if method in wanted]


def test_the_lease_is_taken_before_anything_is_fenced_and_held_to_the_end(web):
    world = web("/bin/true")
    assert world("failover", "web", "--confirm", "web").code == 0
    assert _order(world) == ["lease.take", "fence.note", "failover.run", "lease.release"]


def test_a_second_operator_fences_nothing_and_is_told_of_the_first(web, tmp_path):
    mark = tmp_path / "fenced"
    world = web("/bin/sh", "-c", f"touch {mark}")
    world.beta.replies["lease.take"] = Locked(
        "web is being worked on: ann@desk (pid 7), failover, its lease ends in 20 s"
    )
    result = world("failover", "web", "--source-is-down", "fire", "--confirm", "web")
    assert (result.code, "ann@desk (pid 7), failover" in result.err) == (13, True)
    assert not mark.exists()
    assert _order(world) == ["lease.take"]


def test_without_a_lease_nothing_is_fenced(web, tmp_path):
    mark = tmp_path / "fenced"
    world = web("/bin/sh", "-c", f"touch {mark}")
    world.beta.replies["lease.take"] = ApplianceUnreachable("b1 hung up")
    assert world("failover", "web", "--confirm", "web").code == ApplianceUnreachable.exit_code
    assert not mark.exists()


def test_a_group_that_was_moved_and_brought_back_meanwhile_is_not_fenced(web, tmp_path):
    """Between what was shown and the lease another operator failed over and rolled back."""
    mark = tmp_path / "fenced"
    world = web("/bin/sh", "-c", f"touch {mark}")
    plan = world.beta.replies["failover.plan"]
    world.beta.replies["failover.plan"] = plan | {"generation": plan["generation"] - 1}
    result = world("failover", "web", "--source-is-down", "fire", "--confirm", "web")
    assert (result.code, "was changed meanwhile" in result.err) == (14, True)
    assert not mark.exists()
    assert _order(world) == ["lease.take", "lease.release"]
