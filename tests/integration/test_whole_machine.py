"""All of a machine: UEFI variables, a TPM's state and a seed come with it: test, switchover, rollback, failover.

The guest's own word is what counts: it boots by an entry that it wrote itself, and opens what it sealed (uefi_rig)."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drctl.lab import user
from tests.integration import uefi_rig
from tests.integration.uefi_rig import SECRET

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(3600)]
NAME, GROUP = "uefi-1", "uefi"
#: OVMF, the kernel and five calls of tpm2 under TCG.
UP = 900.0
PROOF = f"entry=custom current=060000009900 secret=[{SECRET}] nv=[sentinel] seed=[#cloud-config seed 7]"
#: After the guest was shut down in order: its last act is to write to its TPM.
PARTED = PROOF.replace("sentinel", "farewell")


class Sites:
    """A lab whose one guest of interest is ours."""

    def __init__(self, rig):
        self.rig = rig
        self.alpha, self.beta = rig.layout.site("alpha"), rig.layout.site("beta")

    def drctl(self, *arguments, code=0):
        command = [sys.executable, "-m", "drctl.cli", "--config", str(self.rig.directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def make(self):
        entry = pwd.getpwnam(user.name())
        kernel = next((user.cache() if os.geteuid() else Path("/var/cache/drctl-lab")).glob("linux-image-*/unpacked"))
        images = self.alpha.images
        uefi_rig.make_disk(images / f"{NAME}.vda.raw", kernel)
        (images / f"{NAME}.vdb.raw").write_bytes(bytes(8 << 20))
        uefi_rig.make_seed(images / f"{NAME}.seed.iso")
        for path in images.glob(f"{NAME}.*"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
        for site in (self.alpha, self.beta):
            self._prepare_swtpm(site, entry)
        path = self.rig.directory / f"{NAME}.xml"
        path.write_text(uefi_rig.definition(NAME, images, self.rig.layout.serial(NAME)))
        path.chmod(0o644)
        self.rig.virsh("alpha", "define", str(path))

    @staticmethod
    def _prepare_swtpm(site, entry):
        """swtpm_setup of a plain user looks for its configuration in that user's home."""
        for base in (site.root / ".config", site.config):
            environment = {"HOME": str(site.root), "XDG_CONFIG_HOME": str(base), "PATH": "/usr/sbin:/usr/bin:/bin"}
            command = ["/usr/share/swtpm/swtpm-create-user-config-files", "--overwrite"]
            as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
            subprocess.run(command, env=environment, cwd="/", check=True, capture_output=True, **as_user)

    def await_line(self, read, text, after=0):
        """The serial port's text from `after` on, once `text` is in it."""
        end = time.monotonic() + UP
        while text not in (said := read()[after:]):
            assert time.monotonic() < end, f"no {text!r} in:\n{said[-3000:]}"
            time.sleep(1)
        return said

    def await_live(self):
        end = time.monotonic() + UP
        while not re.search(r"\blive\b", shown := self.drctl("status", GROUP)):
            assert time.monotonic() < end, shown
            time.sleep(1)

    def serial(self):
        path = self.rig.layout.serial(NAME)
        return path.read_text(errors="replace") if path.exists() else ""


def proof(said):
    """What it found at its boots since then, none of which was a machine's first."""
    assert "DRCTL first boot" not in said, said
    return re.findall(r"DRCTL (entry=.*)", said.replace("\r", ""))


@pytest.fixture(scope="module")
def sites(make_lab):
    if lacking := uefi_rig.lacking():
        pytest.skip(f"needs {lacking}: apt install ovmf swtpm swtpm-tools tpm2-tools")
    rig = make_lab(guests=1, start=False, agent=False)
    sites = Sites(rig)
    sites.make()
    rig.virsh("alpha", "start", NAME)
    said = sites.await_line(sites.serial, "DRCTL up")
    first, _, second = said.partition("DRCTL first boot")
    assert second
    assert proof(first + second) == [PROOF]
    (rig.directory / "groups" / "web.toml").unlink()
    (rig.directory / "groups" / f"{GROUP}.toml").write_text(
        f'name = "{GROUP}"\nsource = "alpha"\nrecovery = "beta"\nmachines = ["{NAME}"]\ncheckpoint_interval = "5s"\n'
    )
    sites.drctl("apply", "--yes")
    started = sites.drctl("replicate", "start", GROUP, "--yes", "--wait", "--timeout", "300s")
    assert "WILL NOT RUN" not in started
    return sites


def store_files(sites):
    command = [sys.executable, "-c", _NEWEST, str(sites.beta.home / "store" / GROUP)]
    definition = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return definition["machines"][0]["files"]


_NEWEST = """
import json, sys
from contextlib import closing
from pathlib import Path
from drctl.store.group_store import GroupStore
with closing(GroupStore.open(Path(sys.argv[1]))) as store:
    print(json.dumps(store.definition()))
"""


def test_what_is_beside_the_disks_is_in_the_store(sites):
    files = store_files(sites)
    assert files["nvram"]["size"] == 528 * 1024
    assert "tpm2-00.permall" in files["tpm"]["files"]
    assert files["media"].keys() == {"sda"}
    assert files["firmware"]["known"]
    assert files["firmware"]["loader"] == "/usr/share/OVMF/OVMF_CODE_4M.fd"
    assert "left_out" not in files


def test_a_test_boots_by_the_guest_s_own_entry_and_opens_what_it_sealed(sites):
    """Nothing of the site is asked: swtpm makes no state, libvirt copies no template."""
    sites.drctl("test", "start", GROUP, "--yes")
    name = next(n for n in sites.rig.virsh("beta", "list", "--name").split() if n.startswith(f"{NAME}-test-"))
    uuid = sites.rig.virsh("beta", "domuuid", name).strip()
    state = sites.beta.config / "libvirt" / "qemu" / "swtpm" / uuid
    assert state.exists()
    serial = next((sites.beta.home / "scratch").glob(f"*/{NAME}.{NAME}.log"))
    said = sites.await_line(lambda: serial.read_text(errors="replace"), "DRCTL up")
    assert proof(said) == [PROOF]
    sites.drctl("test", "stop", name.rpartition("-")[2], "--yes")
    assert not state.exists()
    assert not list((sites.beta.home / "scratch").glob("*/*"))


def test_a_switchover_takes_what_the_guest_wrote_last(sites):
    before = len(sites.serial())
    sites.drctl("switchover", GROUP, "--yes")
    assert proof(sites.await_line(sites.serial, "DRCTL up", before)) == [PARTED]
    assert sites.rig.state("beta", NAME) == "running"
    uuid = sites.rig.virsh("beta", "domuuid", NAME).strip()
    assert (sites.beta.config / "libvirt" / "qemu" / "swtpm" / uuid).exists()
    assert list((sites.beta.home / "images" / GROUP).glob("*.nvram-g*.fd"))
    before = len(sites.serial())
    sites.drctl("rollback", GROUP, "--yes")
    assert proof(sites.await_line(sites.serial, "DRCTL up", before)) == [PARTED]
    assert sites.rig.state("alpha", NAME) == "running"
    assert not (sites.beta.config / "libvirt" / "qemu" / "swtpm" / uuid).exists()


def test_a_failover_does_too(sites):
    sites.await_live()
    sites.rig.virsh("alpha", "destroy", NAME)
    before = len(sites.serial())
    sites.drctl("failover", GROUP, "--source-is-down", "pulled its plug", "--confirm", GROUP, "--yes")
    assert proof(sites.await_line(sites.serial, "DRCTL up", before)) == [PARTED]
    assert sites.rig.state("beta", NAME) == "running"


def test_a_failback_brings_it_home(sites):
    """The way back is made of the same parts; the old machine at home, its variables and its TPM make room."""
    sites.drctl("commit", GROUP, "--yes")
    before = len(sites.serial())
    sites.drctl("failback", GROUP, "--go-home", "--yes")
    assert proof(sites.await_line(sites.serial, "DRCTL up", before)) == [PARTED]
    assert sites.rig.state("alpha", NAME) == "running"
    assert sites.rig.state("beta", NAME) in ("", "shut off")
    uuid = sites.rig.virsh("alpha", "domuuid", NAME).strip()
    assert (sites.alpha.config / "libvirt" / "qemu" / "swtpm" / uuid).exists()
    sites.await_live()
