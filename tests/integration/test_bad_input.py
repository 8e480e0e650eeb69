"""What people and machines get wrong: each has a clear error, an exit code of its own, and loses nothing.

Damaged catalogs and a full journal are with the store's own tests; clocks that differ with those of `drctl doctor`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drctl.appliance.client import Client
from drctl.appliance.config import load
from drctl.appliance.source.demands import demand_room
from drctl.errors import ApplianceUnreachable, OutOfSpace
from drctl.replication import identity
from tests.cli.conftest import CONFIG, WEB

WHO = 65534  # nobody


def drctl(config: Path, *arguments: str, module: str = "drctl.cli", **options):
    argv = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "DRCTL_CONFIG": str(config), "HOME": "/nonexistent"}
    return subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120, check=False, **options)


def says(done, code: int, *texts: str) -> None:
    assert done.returncode == code, done.stderr
    for text in texts:
        assert text in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "groups").mkdir()
    (tmp_path / "drctl.toml").write_text(CONFIG)
    (tmp_path / "groups" / "web.toml").write_text(WEB)
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ("checkpoint_interval", "checkpoint_intervall", ("groups/web.toml:5: checkpoint_intervall", "checkpoint_interval")),
        ('"5s"', '"100ms"', ("groups/web.toml:5: checkpoint_interval: 100 ms is out of range", "at least 500 ms")),
        ("[networks]", 'ring_size = "1 MiB"\n[networks]', ("groups/web.toml:7: ring_size", "at least 16.0 MiB")),
        ("[networks]", "[networks", ("groups/web.toml:7",)),
        ('"beta"', '"gamma"', ("groups/web.toml:3: recovery: 'gamma'", "alpha, beta")),
    ],
    ids=["unknown-key", "interval", "ring-too-small", "no-toml", "unknown-site"],
)  # fmt: skip
def test_a_group_file_that_is_wrong(config: Path, old: str, new: str, texts: tuple[str, ...]) -> None:
    file = config / "groups" / "web.toml"
    file.write_text(WEB.replace(old, new, 1))
    says(drctl(config, "apply", "--dry-run"), 10, *texts)


def test_a_machine_in_two_group_files(config: Path) -> None:
    (config / "groups" / "xyz.toml").write_text(WEB.replace('"web"', '"xyz"'))
    says(drctl(config, "apply", "--dry-run"), 10, "groups/xyz.toml:4: machines: 'db' is in group 'web' already")


@pytest.mark.parametrize("module", ["drctl.cli", "drctl.appliance.daemon"])
def test_an_appliance_toml_that_is_wrong(tmp_path: Path, module: str) -> None:
    (tmp_path / "appliance.toml").write_text('site = "alpha"\nhosst = "a1"\n')
    verb = ["status"] if module == "drctl.cli" else []
    says(drctl(tmp_path, *verb, "--home", str(tmp_path), module=module), 10, "appliance.toml", "host")
    assert not (tmp_path / "store").exists()


def test_a_ring_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace, match="does not fit"):
        demand_room(tmp_path, 1 << 60)
    demand_room(tmp_path, 1 << 20)


def test_a_control_socket_of_somebody_else(short: Path) -> None:
    path = short / "c"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0)
        code = f"from drctl.appliance.client import Client; Client('unix:{path}').call('appliance.info')"
        options = {"user": WHO} if os.geteuid() == 0 else {}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert "is not open to you" in done.stderr
    assert ApplianceUnreachable.__name__ in done.stderr


@pytest.fixture
def short(tmp_path_factory):
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="dbi-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


# -- a real lab, one guest ---------------------------------------------------------------------------------------------

lab = pytest.mark.lab


@pytest.fixture(scope="module")
def rig(make_lab):
    return make_lab(guests=1, agent=False, rate=5)


def group_file(rig, name: str, *machines: str, **keys: str) -> None:
    text = f'name = "{name}"\nsource = "alpha"\nrecovery = "beta"\nmachines = {json.dumps(machines)}\n'
    text += "".join(f'{key} = "{value}"\n' for key, value in keys.items())
    (rig.directory / "groups").mkdir(exist_ok=True)
    (rig.directory / "groups" / f"{name}.toml").write_text(text)


def on(rig, *arguments: str):
    return drctl(rig.directory, *arguments)


def spec(name: str, *machines: str) -> dict[str, object]:
    sites = {"source": "alpha", "recovery": "beta", "source_host": "alpha-1", "recovery_host": "beta-1"}
    return {"name": name, "machines": list(machines), **sites}


@lab
def test_names_that_nobody_knows(rig) -> None:
    says(on(rig, "apply", "--yes"), 0)
    says(on(rig, "status", "wbe"), 11, "no group named 'wbe'", "did you mean web?")
    says(on(rig, "replicate", "start", "wbe", "--yes"), 11, "did you mean web?")
    says(on(rig, "vm", "show", "web1"), 11, "did you mean web-1?")


@lab
def test_the_wrong_order(rig) -> None:
    says(on(rig, "checkpoint", "create", "web"), 12, "web is unprotected", "drctl replicate start web")
    says(on(rig, "replicate", "resume", "web", "--yes"), 12, "drctl replicate start web")
    says(on(rig, "replicate", "pause", "web", "--yes"), 12, "drctl replicate start web")
    says(on(rig, "commit", "web", "--yes"), 12, "nothing to commit")
    says(on(rig, "test", "start", "web", "--yes"), 11, "no restorable checkpoint yet")
    says(on(rig, "failover", "web", "--dry-run"), 11, "no restorable checkpoint yet")
    says(on(rig, "test", "stop", "nope", "--yes"), 11, "no test runs")


@lab
def test_a_machine_that_does_not_exist(rig) -> None:
    group_file(rig, "ghost", "web-9")
    says(on(rig, "apply", "--yes"), 0)
    says(on(rig, "replicate", "start", "ghost", "--yes"), 11, "web-9")
    says(on(rig, "group", "delete", "ghost", "--confirm", "ghost", "--yes"), 0)


@lab
def test_a_machine_of_another_group(rig) -> None:
    """Told by another operator's configuration: the appliance itself has to see it."""
    control = f"unix:{rig.layout.site('alpha').control}"
    with pytest.raises(Exception, match="web-1 of second is in group web already") as caught:
        Client(control).call("group.put", {"spec": spec("second", "web-1")})
    assert caught.value.exit_code == 12


@lab
@pytest.mark.parametrize(
    ("mark", "word"),
    [("<shareable/>", "shareable"), ("<readonly/>", "read")],
    ids=["shareable", "readonly"],
)
def test_a_disk_that_cannot_be_tapped(rig, mark: str, word: str) -> None:
    name = f"bad-{word}"
    xml = f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
      <os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{rig.images("web-1")[1]}'/><target dev='vda' bus='virtio'/>{mark}
      </disk></devices></domain>"""
    file = rig.directory / f"{name}.xml"
    file.write_text(xml)
    rig.virsh("alpha", "define", str(file))
    group_file(rig, name, name)
    says(on(rig, "apply", "--yes"), 0)
    says(on(rig, "replicate", "start", name, "--yes"), 42, f"{name}: disk vda can't be tapped", word)
    says(on(rig, "group", "delete", name, "--confirm", name, "--yes"), 0)
    rig.virsh("alpha", "undefine", name)


@lab
def test_a_ring_larger_than_run(rig) -> None:
    group_file(rig, "web", "web-1", ring_size="4000 TiB", checkpoint_interval="1s")
    says(on(rig, "apply", "--yes"), 0)
    says(on(rig, "replicate", "start", "web", "--yes"), 32, "does not fit", "lower ring_size")
    group_file(rig, "web", "web-1", ring_size="32 MiB", checkpoint_interval="1s")
    says(on(rig, "apply", "--yes"), 0)


@lab
def test_a_foreign_certificate_is_named_and_mended_without_loss(rig, tmp_path: Path) -> None:
    home = load(rig.layout.site("alpha").home)
    good = {name: (home.tls / name).read_bytes() for name in ("cert.pem", "key.pem")}
    identity.create_ca(tmp_path / "ca")
    identity.issue(tmp_path / "ca", home.config.uuid, tmp_path / "tls")
    for name in good:
        (home.tls / name).write_bytes((tmp_path / "tls" / name).read_bytes())
    says(on(rig, "replicate", "start", "web", "--yes"), 0)
    seen = ""
    for _ in range(60):
        seen = on(rig, "status", "web").stdout
        if "right after the handshake" in seen:
            break
        time.sleep(0.5)
    assert "certificate" in seen, seen
    says(on(rig, "doctor"), 42, "was rejected", "certificate")
    for name, data in good.items():
        (home.tls / name).write_bytes(data)
    says(on(rig, "replicate", "start", "web", "--yes", "--wait", "--timeout", "90s"), 0, "web is live")


@lab
def test_a_store_of_a_newer_version_hides_nothing_else(rig) -> None:
    stores = load(rig.layout.site("beta").home).store
    store = stores / "newer"
    store.mkdir()
    (store / "group.json").write_text('{"format": 99}')
    for path in (store, store / "group.json"):
        os.chown(path, stores.stat().st_uid, stores.stat().st_gid)
    says(on(rig, "status", "newer"), 3, "format 99")
    says(on(rig, "status"), 3, "format 99")
    says(on(rig, "checkpoint", "list", "newer"), 31, "format 99")
    says(on(rig, "status", "web"), 0, "live")
    assert (store / "group.json").read_text() == '{"format": 99}'
    while store.exists():  # maintenance may be putting its lock there right now
        shutil.rmtree(store, ignore_errors=True)


@lab
def test_a_store_that_cannot_be_written(rig) -> None:
    store = load(rig.layout.site("beta").home).store
    store.chmod(0o500)
    try:
        with pytest.raises(Exception, match="Permission denied") as caught:
            Client(f"unix:{rig.layout.site('beta').control}").call("group.put", {"spec": spec("other", "web-7")})
        assert caught.value.exit_code == 42
        says(on(rig, "status", "web"), 0, "live")
    finally:
        store.chmod(0o700)


@lab
def test_a_second_supervisor_of_the_same_home(rig) -> None:
    home = rig.layout.site("alpha").home
    says(drctl(home, "--home", str(home), module="drctl.appliance.daemon"), 13, "another appliance")
    says(on(rig, "status", "web"), 0, "live")
