"""appliance.toml: what an appliance knows of itself; wrong files are refused by line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.appliance.config import Peer, load
from drctl.errors import ConfigInvalid, NotFound

TEXT = """\
site = "beta"
host = "b1"
uri = "qemu:///system"
link = "127.0.0.1:7002"
uuid = "u-b1"
run = "/run/x"

[[peer]]
site = "alpha"
host = "a1"
link = "127.0.0.1:7001"
uuid = "u-a1"
"""


def write(home: Path, text: str = TEXT) -> Path:
    (home / "appliance.toml").write_text(text)
    return home


def test_a_whole_file(tmp_path: Path) -> None:
    home = load(write(tmp_path))
    assert (home.config.site, home.config.host, home.config.uuid) == ("beta", "b1", "u-b1")
    assert home.control == Path("/run/x/control.sock")
    assert home.peer("alpha") == Peer("alpha", "a1", "127.0.0.1:7001", "u-a1")
    with pytest.raises(NotFound, match="no peer site named 'gamma'"):
        home.peer("gamma")


def test_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, TEXT.replace('run = "/run/x"\n', 'scratch_limit = "1 GiB"\n'))).config
    assert (config.run, config.scratch_limit) == ("/run/drctl", 2**30)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('site = "alpha"', 'siet = "alpha"', ":8: peer[0]: site is missing"),
        ("[[peer]]", "[[pear]]", ":8: pear: unknown key"),
        ('"127.0.0.1:7002"', "7002", ":4: link: is an integer, must be a string"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(write(tmp_path, TEXT.replace(old, new)))
    assert str(caught.value) == f"{tmp_path}/appliance.toml{message}"


def test_no_appliance_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="is not there"):
        load(tmp_path / "absent")
