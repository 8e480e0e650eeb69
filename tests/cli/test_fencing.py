"""The fence command: an argument list that is run as it stands, within its time; only exit code 0 counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from drctl.cli.config import load_config
from drctl.cli.fencing import fence, unusable
from drctl.errors import ConfigInvalid
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
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


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
