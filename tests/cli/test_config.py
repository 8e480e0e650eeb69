"""drctl.toml and groups/*.toml: what is read, what is refused and how, where it is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.cli.app import run
from drctl.cli.config import load_config
from drctl.cli.context import Context, Settings
from drctl.cli.group_file import read_group, read_groups, render_group, spec_changes, spec_json
from drctl.errors import ConfigInvalid, NotFound, Refused
from drctl.model.extent import GiB, MiB
from drctl.model.group import GroupSpec, Rung
from drctl.model.site import HostKind
from tests.cli.conftest import CONFIG, WEB


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "groups").mkdir()
    (tmp_path / "drctl.toml").write_text(CONFIG)
    return tmp_path


def write_group(place: Path, text: str, name: str = "web") -> None:
    (place / "groups" / f"{name}.toml").write_text(text)


def problem(place: Path) -> str:
    with pytest.raises(ConfigInvalid) as caught:
        read_groups(load_config(place))
    return str(caught.value).replace(f"{place}/", "") + (f" | {caught.value.hint}" if caught.value.hint else "")


def test_sites_and_hosts(place: Path) -> None:
    config = load_config(place / "drctl.toml")
    assert [site.name for site in config.sites] == ["alpha", "beta"]
    host = config.host("b1")
    assert (host.site, host.kind, host.control, host.link) == (
        "beta",
        HostKind.LIBVIRT,
        "unix:/nowhere/b1.sock",
        "127.0.0.1:7002",
    )
    with pytest.raises(NotFound, match="no host named 'b2'"):
        config.host("b2")


def test_a_whole_group(place: Path) -> None:
    write_group(
        place,
        WEB.replace("5s", "500ms").replace(
            "[networks]",
            """ring_size = "64 MiB"
[retention]
history = "2d"
journal_limit = "10 GiB"
ladder = [{within = "1h", every = "0s"}, {within = "1d", every = "1m"}]
[test_networks]
lan = "lab-lan"
[networks]""",
        ),
    )
    spec = read_group(load_config(place), "web")
    assert spec.checkpoint_interval == 0.5
    assert spec.ring_size == 64 * MiB
    assert (spec.retention.history, spec.retention.journal_limit) == (2 * 86400, 10 * GiB)
    assert spec.retention.ladder == (Rung(3600, 0), Rung(86400, 60))
    assert (spec.source_host, spec.recovery_host) == ("a1", "b1")
    assert (spec.networks, spec.test_networks) == ((("lan", "lan-b"),), (("lan", "lab-lan"),))


def test_defaults_of_the_configuration_reach_the_groups(place: Path) -> None:
    (place / "drctl.toml").write_text(
        CONFIG + '[defaults]\ncheckpoint_interval = "2s"\nhistory = "3d"\nring_size = "32 MiB"\nspill_size = "2 GiB"\n'
    )
    write_group(place, WEB.replace('checkpoint_interval = "5s"\n', ""))
    spec = read_group(load_config(place), "web")
    assert (spec.checkpoint_interval, spec.retention.history, spec.ring_size) == (2.0, 3 * 86400, 32 * MiB)
    assert spec.spill_size == 2048 * MiB


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "alpha"', 'source = "alhpa"', "groups/web.toml:2: source: 'alhpa' is not one of alpha, beta | did you mean 'alpha'?"),
        ('recovery = "beta"', 'recovery = "alpha"', "groups/web.toml:3: recovery: is 'alpha', the source too | a group is recovered at another site"),
        ('"db", "front"', "", "groups/web.toml:4: machines: names no machine | e.g. machines = [\"db\", \"web\"]; see: drctl vm list"),
        ('"front"]', '"db"]', "groups/web.toml:4: machines: names 'db' twice"),
        ('"5s"', '"100ms"', "groups/web.toml:5: checkpoint_interval: 100 ms is out of range | at least 500 ms, at most 1m"),
        ('"5s"', '"2m"', "groups/web.toml:5: checkpoint_interval: 2m is out of range | at least 500 ms, at most 1m"),
        ('"5s"', "5", "groups/web.toml:5: checkpoint_interval: '5' is not a duration; write e.g. 500ms, 5s, 10m, 1h30m, 7d"),
        ('"5s"', '"5s"\nspill_size = "1 MiB"', 'groups/web.toml:6: spill_size: 1.0 MiB is too small | at least 64.0 MiB, or "0 B" for none'),
        ("[networks]", "[netwroks]", "groups/web.toml:7: netwroks: unknown key | did you mean 'networks'?"),
        ('name = "web"', 'name = "shop"', "groups/web.toml:1: name: is 'shop', but the file is web.toml | rename it to shop.toml"),
        ('name = "web"', 'name = "we b"', "groups/web.toml:1: name: 'we b' is not allowed | write e.g. web"),
        ('source = "alpha"\n', "", "groups/web.toml: key 'source' is missing"),
        ("[networks]", '[retention]\nhistroy = "1d"', "groups/web.toml:8: retention.histroy: unknown key | did you mean 'history'?"),
        (
            "[networks]",
            '[retention]\nladder = [{within = "1d", every = "1m"}, {within = "1h", every = "0s"}]\n[networks]',
            "groups/web.toml:8: retention.ladder[1].within: must reach further back and keep no more than the rung before | order rungs from young to old",
        ),
        ('source = "alpha"', 'source = "alpha"\nsource_host = "b1"', "groups/web.toml:3: source_host: 'b1' is not one of a1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_group_names_file_line_and_key(place: Path, old: str, new: str, message: str) -> None:
    assert old in WEB
    write_group(place, WEB.replace(old, new))
    assert problem(place).startswith(message)


def test_a_machine_in_two_groups(place: Path) -> None:
    write_group(place, WEB)
    write_group(place, WEB.replace("web", "shop").replace('"front"', '"till"'), "shop")
    assert problem(place) == (
        "groups/web.toml:4: machines: 'db' is in group 'shop' already | "
        "a machine belongs to one group; take it out of groups/shop.toml"
    )


def test_a_site_with_two_hosts_needs_the_host_named(place: Path) -> None:
    (place / "drctl.toml").write_text(CONFIG + '\n[[host]]\nname = "a2"\nsite = "alpha"\n')
    write_group(place, WEB)
    assert problem(place) == "groups/web.toml: source_host is missing: site 'alpha' has 2 hosts | one of a1, a2"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "beta"', 'name = "alpha"', "drctl.toml:5: site[1].name: site 'alpha' is there twice"),
        ('name = "b1"', 'name = "a1"', "drctl.toml:13: host[1].name: host 'a1' is there twice"),
        ('site = "beta"', 'site = "gamma"', "drctl.toml:14: host[1].site: 'gamma' is not one of alpha, beta"),
        ("unix:/nowhere/b1.sock", "ssh:root@b1", "drctl.toml:15: host[1].control: 'ssh:root@b1' is not unix:PATH with an absolute path"),
        ("unix:/nowhere/b1.sock", "unix:b1.sock", "drctl.toml:15: host[1].control: 'unix:b1.sock' is not unix:PATH"),
        ('"127.0.0.1:7002"', '"127.0.0.1"', "drctl.toml:16: host[1].link: '127.0.0.1' is not allowed"),
        ('link = "127.0.0.1:7002"', 'kind = "xen"', "drctl.toml:16: host[1].kind: 'xen' is not one of libvirt, esx"),
        ('link = "127.0.0.1:7002"', 'kind = "esx"', "drctl.toml:12: host[1].ssh: is missing: an ESX host is reached over SSH"),
        ('link = "127.0.0.1:7002"', 'lnik = "x"', "drctl.toml:16: host[1].lnik: unknown key"),
        ("[[site]]", "[site]", "drctl.toml:4: not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_drctl_toml(place: Path, old: str, new: str, message: str) -> None:
    assert old in CONFIG
    (place / "drctl.toml").write_text(CONFIG.replace(old, new))
    assert problem(place).startswith(message)


def test_written_group_is_read_back(place: Path) -> None:
    spec = GroupSpec("web", "alpha", "beta", ("db",), "a1", "b1", 2.5, networks=(("a b", "c"),))
    write_group(place, render_group(spec))
    assert read_group(load_config(place), "web") == spec


def test_changes_are_named_by_their_nested_keys() -> None:
    old = spec_json(GroupSpec("web", "alpha", "beta", ("db",)))
    new = spec_json(GroupSpec("web", "alpha", "beta", ("db", "front"), checkpoint_interval=2))
    new["retention"]["history"] = 60
    assert spec_changes(old, old) == []
    assert [key for key, _, _ in spec_changes(old, new)] == ["machines", "checkpoint_interval", "retention.history"]


def locate(environment: dict[str, str], **options: Path) -> Path:
    return Settings(environment=environment, **options).locate()


def test_the_order_in_which_a_configuration_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    (home / ".config/drctl").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("drctl.cli.context.HOME", tmp_path / "lib")
    environment = {"HOME": str(home)}
    with pytest.raises(
        ConfigInvalid, match=r"not found; looked at drctl.toml, .*/home/.config/drctl/drctl.toml, /etc/drctl"
    ):
        locate(environment)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/appliance.toml").touch()
    assert locate(environment) == tmp_path / "lib"
    (home / ".config/drctl/drctl.toml").touch()
    assert locate(environment) == home / ".config/drctl/drctl.toml"
    (here / "drctl.toml").touch()
    assert locate(environment) == Path("drctl.toml")
    assert locate(environment | {"DRCTL_HOME": "/h"}) == Path("/h")
    assert locate(environment | {"DRCTL_HOME": "/h", "DRCTL_CONFIG": "/c"}) == Path("/c")
    assert locate(environment | {"DRCTL_CONFIG": "/c"}, home=Path("/x")) == Path("/x")
    assert locate(environment, config=Path("/y")) == Path("/y")
    with pytest.raises(Refused):
        locate(environment, config=Path("/y"), home=Path("/x"))


def test_no_configuration_at_all_uses_the_local_appliance(tmp_path: Path) -> None:
    lines = [
        'site = "beta"',
        'host = "b1"',
        'uri = "qemu:///system"',
        'link = "127.0.0.1:7002"',
        'uuid = "u"',
        'run = "/r"',
    ]
    (tmp_path / "appliance.toml").write_text("\n".join(lines))
    config = Context(Settings(home=tmp_path)).config
    assert config.origin == f"site beta, local appliance at {tmp_path}; no config"
    assert [(host.name, host.control) for host in config.hosts] == [("b1", "unix:/r/control.sock")]
    assert config.directory is None


def test_the_header_says_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert run(["status", "--config", str(place)]) == 3
    assert f"config {place}/drctl.toml; sites alpha, beta" in capsys.readouterr().err


def test_a_configuration_error_reaches_the_operator(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "drctl.toml").write_text(CONFIG + "\nhots = 1\n")
    assert run(["status", "--config", str(place)]) == 10
    err = capsys.readouterr().err
    assert f"drctl: {place}/drctl.toml:18: host[1].hots: unknown key" in err
    assert "what to do: known here: control" in err


def test_a_home_that_only_root_may_enter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from drctl.cli.config import nothing_found

    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "sudo drctl" in nothing_found([], tmp_path).hint
    assert "drctl init" in nothing_found([], tmp_path / "absent").hint
