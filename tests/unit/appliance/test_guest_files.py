"""What a machine is besides its disks: packed, bounded, read when it changed, laid down once."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from drctl.appliance.recovery.beside import clear, lay, without_seeds
from drctl.appliance.recovery.images import QemuImages
from drctl.appliance.recovery.ports import Beside
from drctl.appliance.recovery.seed_image import iso_image
from drctl.appliance.source.guest_files import (
    FORMAT,
    GROUP_BUDGET,
    LeftOut,
    MachineFiles,
    Packed,
    Tpm,
    files_from,
    fit_budget,
    pack,
)
from drctl.appliance.source.guest_reader import GuestReader
from drctl.errors import HypervisorRefused, IntegrityError, NotFound, UnsupportedFormat
from drctl.hypervisor.libvirt_files import LibvirtFiles


class Host:
    """A session host: its files are this user's."""

    def __init__(self, root: Path) -> None:
        self.live = ""
        self.known = {}
        self.asked = 0
        self._files = LibvirtFiles(SimpleNamespace(uri="qemu:///session"))
        self._files.tpm_directory = lambda uuid, version: root / uuid / "tpm2"

    def definition(self, name):
        raise NotImplementedError

    def live_definition(self, name):
        return self.live

    def files(self):
        return self._files

    def secrets(self):
        self.asked += 1
        return self.known


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path / "swtpm")


def definition(root, *, nvram=True, more=""):
    variables = f"<nvram>{root}/web_VARS.fd</nvram>" if nvram else ""
    return f"""<domain type='kvm'><name>web</name><uuid>u-1</uuid>
      <os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type><loader>/fw/CODE.fd</loader>{variables}</os>
      <devices>
        <disk type='file' device='cdrom'><source file='{root}/seed.iso'/><target dev='sda'/></disk>
        <disk type='block' device='cdrom'><source dev='/dev/sr0'/><target dev='sdb'/></disk>
        <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>{more}
      </devices></domain>"""


def fill(root: Path) -> None:
    (root / "web_VARS.fd").write_bytes(b"\xff" * 540672)
    (root / "seed.iso").write_bytes(b"cidata" * 1000)
    state = root / "swtpm" / "u-1" / "tpm2"
    state.mkdir(parents=True)
    (state / "tpm2-00.permall").write_bytes(os.urandom(6000))
    (state / ".lock").write_bytes(b"")


def test_all_of_a_machine_is_read_and_comes_back(host, tmp_path):
    fill(tmp_path)
    read = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    files = files_from(read.as_dict())
    assert files == read
    assert files.format == FORMAT
    assert files.nvram.contents() == (tmp_path / "web_VARS.fd").read_bytes()
    assert files.nvram.size == 540672
    assert len(files.nvram.data) < 4096
    assert files.media["sda"].contents() == b"cidata" * 1000
    assert list(files.tpm.files) == ["tpm2-00.permall"]  # a lock is no state
    assert files.left_out == (LeftOut("medium sdb", "/dev/sr0: it is no file"),)
    assert files.firmware.loader == "/fw/CODE.fd"
    assert not files.firmware.known


def test_the_description_has_no_contents(host, tmp_path):
    fill(tmp_path)
    files = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    assert files.described().packed() == 0
    assert files.described().nvram.size == files.nvram.size
    assert files.packed() > 6000


def test_a_file_is_read_again_when_it_changed_only(host, tmp_path, monkeypatch):
    fill(tmp_path)
    reader, reads, read = GuestReader(host), [], host.files().read
    monkeypatch.setattr(host.files(), "read", lambda path, limit: reads.append(path.name) or read(path, limit))
    first = reader.machines({"web": definition(tmp_path)})
    assert sorted(reads) == ["seed.iso", "tpm2-00.permall", "web_VARS.fd"]
    assert reader.machines({"web": definition(tmp_path)}) == first
    assert len(reads) == 3
    (tmp_path / "web_VARS.fd").write_bytes(b"\x00" + b"\xff" * 540671)
    assert reader.machines({"web": definition(tmp_path)})["web"].nvram.contents()[0] == 0
    assert reads[3:] == ["web_VARS.fd"]


def test_a_file_that_is_being_written_stays_as_it_was(host, tmp_path, monkeypatch):
    fill(tmp_path)
    reader = GuestReader(host)
    before = reader.machines({"web": definition(tmp_path)})["web"].nvram
    (tmp_path / "web_VARS.fd").write_bytes(b"torn")

    def refuse(path, limit):
        raise IntegrityError(f"{path} is being written at this moment")

    monkeypatch.setattr(host.files(), "read", refuse)
    assert reader.machines({"web": definition(tmp_path)})["web"].nvram == before
    fresh = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    assert fresh.nvram is None
    assert "being written" in fresh.left_out[0].reason


def test_variables_that_libvirt_has_placed_at_the_start_are_found(host, tmp_path):
    fill(tmp_path)
    host.live = definition(tmp_path)
    assert GuestReader(host).machines({"web": definition(tmp_path, nvram=False)})["web"].nvram is not None


def test_variables_of_a_machine_that_is_off_are_where_they_were_when_it_ran(host, tmp_path):
    fill(tmp_path)
    off = host.live = definition(tmp_path, nvram=False).replace("<loader>/fw/CODE.fd</loader>", "")
    host.live = definition(tmp_path)
    reader = GuestReader(host)
    ran = reader.machines({"web": off})["web"]
    host.live = off
    (tmp_path / "web_VARS.fd").write_bytes(b"\x01" * 540672)
    parted = reader.machines({"web": off}, force=True)["web"]
    assert parted.firmware == ran.firmware
    assert parted.nvram.contents() == b"\x01" * 540672
    host.files().nvram_path = lambda name: tmp_path / f"{name}_VARS.fd"
    fresh = GuestReader(host).machines({"web": off})["web"]
    assert fresh.nvram == parted.nvram
    assert fresh.firmware.loader == ""


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("qemu:///system", "/var/lib/libvirt/qemu/nvram/a_VARS.fd"),
        ("qemu+unix:///session?socket=/x", "/c/libvirt/qemu/nvram/a_VARS.fd"),
    ],
)
def test_where_libvirt_puts_variables(monkeypatch, uri, path):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    assert LibvirtFiles(SimpleNamespace(uri=uri)).nvram_path("a") == Path(path)


def test_what_is_not_there_is_no_fault(host, tmp_path):
    files = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    assert (files.nvram, files.tpm, files.media) == (None, None, {})
    assert [one.what for one in files.left_out] == ["medium sdb"]


def test_half_of_a_tpm_is_none(host, tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr("drctl.appliance.source.guest_reader.TPM_LIMIT", 100)
    files = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    assert files.tpm is None
    assert "tpm" in [one.what for one in files.left_out]


def test_large_media_are_named(host, tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr("drctl.appliance.source.guest_reader.MEDIA_LIMIT", 4096)
    files = GuestReader(host).machines({"web": definition(tmp_path)})["web"]
    assert files.media == {}
    assert "5.9 KiB are too much" in files.left_out[0].reason


def test_secrets_are_named_as_their_host_names_them(host, tmp_path):
    uuid = "11111111-2222-3333-4444-555555555555"
    host.known = {uuid: ("vtpm", "web-tpm")}
    more = f"<tpm><backend type='emulator'><encryption secret='{uuid}'/></backend></tpm>"
    text = definition(tmp_path).replace("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>", more)
    files = GuestReader(host).machines({"web": text})["web"]
    assert [(one.needed_by, one.uuid, one.kind, one.usage) for one in files.secrets] == [
        ("tpm", uuid, "vtpm", "web-tpm")
    ]
    GuestReader(host).machines({"web": definition(tmp_path)})
    assert host.asked == 1  # a machine without secrets asks nobody


def test_costly_files_are_looked_at_seldom(host, tmp_path, monkeypatch):
    fill(tmp_path)
    looks, stamp = [], host.files().stamp
    monkeypatch.setattr(host.files(), "costly", lambda path: True)
    monkeypatch.setattr(host.files(), "stamp", lambda path: looks.append(path) or stamp(path))
    reader = GuestReader(host)
    first = reader.machines({"web": definition(tmp_path)})
    seen = len(looks)
    assert reader.machines({"web": definition(tmp_path)}) == first
    assert len(looks) == seen
    reader.machines({"web": definition(tmp_path)}, force=True)
    assert len(looks) > seen


def test_contents_that_were_changed_are_found():
    packed = pack("/x", b"a" * 5000)
    assert packed.contents() == b"a" * 5000
    for wrong in (Packed("/x", 4999, packed.data), Packed("/x", 5001, packed.data), Packed("/x", 5000, "!!")):
        with pytest.raises(IntegrityError):
            wrong.contents()
    with pytest.raises(IntegrityError):
        Packed("/x", 5000, packed.data[:-8]).contents()


@pytest.mark.parametrize(
    "fields",
    [
        {"nvram": 5},
        {"format": 1, "nvram": {"path": "/x", "size": 1 << 40, "data": ""}},
        {"format": 1, "tpm": {"files": {"../../etc/passwd": {"path": "/x", "size": 1, "data": ""}}}},
        {"format": 1, "tpm": {"files": {"..": {"path": "/x", "size": 1, "data": ""}}}},
    ],
)
def test_malformed_files_are_refused(fields):
    with pytest.raises(IntegrityError):
        files_from(fields)


def test_a_newer_format_is_refused_and_none_is_empty():
    with pytest.raises(UnsupportedFormat):
        files_from({"format": FORMAT + 1})
    assert files_from({}) == files_from(None) == MachineFiles()


def test_a_group_that_is_too_large_leaves_media_first():
    data = pack("/x", os.urandom(1000))
    files = MachineFiles(nvram=data, tpm=Tpm({"a": data}), media={"sda": data}, format=FORMAT)
    size = len(data.data)
    assert fit_budget({"a": files, "b": files})["a"] == files
    fitted = fit_budget({"a": files, "b": files}, 4 * size)
    assert all(one.media == {} and one.nvram and one.tpm for one in fitted.values())
    assert all(one.left_out[0].what == "medium sda" for one in fitted.values())
    fitted = fit_budget({"a": files, "b": files}, 2 * size)
    assert sorted(one.packed() for one in fitted.values()) == [0, 2 * size]
    assert GROUP_BUDGET < 4 * 1024 * 1024


# -- laying down ------------------------------------------------------------------------------------------------------


def machine(**more):
    return SimpleNamespace(uuid="new", laid=[], **more)


def test_files_are_laid_once(host, tmp_path):
    path, packed = tmp_path / "images" / "web.nvram-g1.fd", pack("/x", b"variables")
    what = Beside(((path, packed),), Tpm({"tpm2-00.permall": pack("/y", b"state")}), "2.0")
    one = machine()
    one.laid += lay(QemuImages(), host.files(), one, what)
    state = tmp_path / "swtpm" / "new" / "tpm2" / "tpm2-00.permall"
    assert path.read_bytes() == b"variables"
    assert state.read_bytes() == b"state"
    assert state.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"the guest's own")
    state.write_bytes(b"the guest's own")
    assert lay(QemuImages(), host.files(), one, what) == []
    assert path.read_bytes() == state.read_bytes() == b"the guest's own"


def test_of_two_seeds_the_recovery_s_own_is_the_one():
    seed, other = (pack("/x", iso_image({"user-data": b"x"}, label)) for label in ("cidata", "tools"))
    files = MachineFiles(media={"sda": seed, "sdb": other})
    assert without_seeds(files).media == {"sdb": other}


def test_a_state_of_an_earlier_reign_is_replaced(host, tmp_path):
    directory = tmp_path / "swtpm" / "new" / "tpm2"
    directory.mkdir(parents=True)
    (directory / "tpm2-00.volatilestate").write_bytes(b"old")
    lay(QemuImages(), host.files(), machine(), Beside(tpm=Tpm({"tpm2-00.permall": pack("/y", b"state")})))
    assert [path.name for path in directory.iterdir()] == ["tpm2-00.permall"]


def test_a_state_is_cleared(host, tmp_path):
    one = machine()
    one.laid += lay(QemuImages(), host.files(), one, Beside(tpm=Tpm({"a": pack("/y", b"state")})))
    clear(host.files, one)
    assert not (tmp_path / "swtpm" / "new").exists()
    assert one.laid == []
    clear(host.files, one)


def test_a_directory_that_can_not_be_made_is_told(host, tmp_path):
    (tmp_path / "swtpm").write_text("a file")
    with pytest.raises(HypervisorRefused):
        lay(QemuImages(), host.files(), machine(), Beside(tpm=Tpm({"a": pack("/y", b"state")})))


def test_reading_is_bounded_and_proves_that_nothing_changed(host, tmp_path, monkeypatch):
    path = tmp_path / "file"
    with pytest.raises(NotFound):
        host.files().read(path, 10)
    path.write_bytes(b"12345678901")
    with pytest.raises(IntegrityError, match="more than the 10"):
        host.files().read(path, 10)
    monkeypatch.setattr(host.files(), "_read", lambda path, limit: path.write_bytes(b"12") and b"12345678901")
    with pytest.raises(IntegrityError, match="being written"):
        host.files().read(path, 100)
