"""UEFI firmware of another host: which one reads a machine's variables, and the definition that names it."""

import json
import xml.etree.ElementTree as ET

import pytest

from drctl.errors import HypervisorRefused
from drctl.hypervisor.firmware import ENROLLED_KEYS, REQUIRES_SMM, SECURE_BOOT, Firmware, Wanted, choose, installed
from drctl.hypervisor.guest_state import is_uefi, media, tpm, variables
from drctl.hypervisor.recovery_firmware import Flash, rewrite_firmware, rewrite_tpm

KIB = 1024
Q35 = (("x86_64", ("pc-q35-*",)),)
PC = (("x86_64", ("pc-i440fx-*", "pc-q35-*")),)
SECURE = frozenset({SECURE_BOOT, REQUIRES_SMM})
FOUR = Firmware("/f/CODE_4M.fd", "/f/VARS_4M.fd", 528 * KIB, frozenset(), PC)
TWO = Firmware("/f/CODE.fd", "/f/VARS.fd", 128 * KIB, frozenset(), PC)
SECURE_4M = Firmware("/f/CODE_4M.secboot.fd", "/f/VARS_4M.fd", 528 * KIB, SECURE, Q35)
KEYS_4M = Firmware("/f/CODE_4M.ms.fd", "/f/VARS_4M.ms.fd", 528 * KIB, SECURE | {ENROLLED_KEYS}, Q35)
QCOW2 = Firmware("/f/CODE.qcow2", "/f/VARS.qcow2", 200, frozenset(), PC, "qcow2", "qcow2")
ALL = [KEYS_4M, SECURE_4M, QCOW2, FOUR, TWO]


def wanted(size=528 * KIB, features=frozenset(), loader="", machine="pc-q35-7.2", form="raw"):
    return Wanted("x86_64", machine, size, form, features, loader)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (wanted(), FOUR),
        (wanted(128 * KIB), TWO),
        (wanted(features=SECURE), SECURE_4M),
        (wanted(features=SECURE | {ENROLLED_KEYS}), KEYS_4M),
        (wanted(loader=SECURE_4M.loader), SECURE_4M),
        (wanted(200, form="qcow2"), QCOW2),
        (wanted(999), None),
        (wanted(128 * KIB, SECURE), None),
        (wanted(features=SECURE, machine="pc-i440fx-7.2"), None),
        (Wanted("aarch64", "virt-7.2", 0, "raw", frozenset()), None),
    ],
)
def test_the_firmware_that_reads_the_same_variables(asked, expected):
    assert choose(ALL, asked) == expected


def descriptor(name, **more):
    return {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": f"/f/{name}.fd", "format": "raw"},
            "nvram-template": {"filename": more.pop("template", "/f/none"), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-q35-*"]}],
        "features": ["secure-boot"],
        **more,
    }


def test_descriptors_of_the_administrator_come_before_the_distribution_s(tmp_path):
    system, admin = tmp_path / "system", tmp_path / "admin"
    system.mkdir()
    admin.mkdir()
    (tmp_path / "VARS").write_bytes(b"v" * 100)
    (system / "50-b.json").write_text(json.dumps(descriptor("b", template=str(tmp_path / "VARS"))))
    (system / "40-a.json").write_text(json.dumps(descriptor("a")))
    (system / "60-c.json").write_text(json.dumps(descriptor("c")))
    (system / "70-bios.json").write_text(json.dumps(descriptor("bios") | {"interface-types": ["bios"]}))
    (system / "80-broken.json").write_text("{")
    (system / "90-odd.json").write_text("[]")
    (admin / "40-a.json").write_text("")  # as QEMU says: an empty file hides it
    (admin / "60-c.json").write_text(json.dumps(descriptor("mine")))
    found = installed((system, admin, tmp_path / "none"))
    assert [(one.loader, one.template_size) for one in found] == [("/f/b.fd", 100), ("/f/mine.fd", 0)]
    assert found[0].features == {"secure-boot"}
    assert found[0].runs("x86_64", "pc-q35-7.2")


def system(os, features=""):
    return ET.fromstring(f"<domain><name>x</name>{os}{features}<devices/></domain>")


TYPE = "<type arch='x86_64' machine='pc-q35-7.2'>hvm</type>"


def flash(**more):
    return Flash(more.pop("offered", ALL), "/here/web.nvram.fd", **more)


def test_libvirt_s_own_choice_becomes_a_firmware_by_name():
    root, notes = system(f"<os firmware='efi'>{TYPE}<boot dev='hd'/></os>"), []
    assert rewrite_firmware(root, flash(size=528 * KIB, loader=FOUR.loader), notes)
    assert notes == []
    assert ET.tostring(root.find("os")).decode() == (
        f'<os><type arch="x86_64" machine="pc-q35-7.2">hvm</type><loader readonly="yes" type="pflash">{FOUR.loader}'
        f'</loader><nvram template="{FOUR.template}">/here/web.nvram.fd</nvram><boot dev="hd" /></os>'
    )


def test_another_distribution_s_path_is_mapped_and_told():
    manual = "<loader readonly='yes' type='pflash' secure='yes'>/usr/share/edk2/OVMF_CODE.secboot.fd</loader>"
    root, notes = system(f"<os>{TYPE}{manual}<nvram>/old</nvram></os>", "<features><acpi/></features>"), []
    assert rewrite_firmware(root, flash(size=528 * KIB, features=SECURE), notes)
    assert notes == [f"firmware: /usr/share/edk2/OVMF_CODE.secboot.fd becomes {SECURE_4M.loader}"]
    assert root.find("os/loader").get("secure") == "yes"
    assert root.find("features/smm").get("state") == "on"
    assert root.findtext("os/nvram") == "/here/web.nvram.fd"


def test_features_are_guessed_where_the_source_told_none():
    root = system(f"<os>{TYPE}<loader type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.ms.fd</loader></os>")
    rewrite_firmware(root, flash(size=528 * KIB), [])
    assert root.findtext("os/loader") == KEYS_4M.loader


def test_variables_that_nothing_reads_are_told_and_replaced():
    root, notes = system(f"<os firmware='efi'>{TYPE}</os>"), []
    assert not rewrite_firmware(root, flash(offered=[TWO], size=528 * KIB), notes)
    assert "nothing here reads variables of 528 KiB (raw)" in notes[0]
    assert root.findtext("os/loader") == TWO.loader


def test_variables_that_did_not_travel_are_told():
    root, notes = system(f"<os firmware='efi'>{TYPE}</os>"), []
    assert not rewrite_firmware(root, flash(), notes)
    assert "did not travel" in notes[0]


def test_secure_boot_is_not_given_up():
    root = system(f"<os firmware='efi'>{TYPE}</os>")
    with pytest.raises(HypervisorRefused, match=r"no UEFI firmware with secure boot for pc-q35-7\.2"):
        rewrite_firmware(root, flash(offered=[FOUR, TWO], size=528 * KIB, features=SECURE), [])


def test_a_machine_with_bios_is_left_alone():
    root = system(f"<os>{TYPE}</os>")
    before = ET.tostring(root)
    assert not rewrite_firmware(root, flash(), [])
    assert ET.tostring(root) == before
    assert not is_uefi(root)
    assert variables(root) is None


@pytest.mark.parametrize(
    ("os", "path", "refused"),
    [
        (f"<os firmware='efi'>{TYPE}</os>", "", False),
        (f"<os>{TYPE}<nvram>/a</nvram></os>", "/a", False),
        (f"<os>{TYPE}<nvram type='file'><source file='/b'/></nvram></os>", "/b", False),
        (f"<os>{TYPE}<nvram type='network'><source protocol='iscsi'/></nvram></os>", "", True),
        (f"<os>{TYPE}<loader type='pflash'>/c</loader></os>", "", False),
    ],
)
def test_where_variables_are(os, path, refused):
    found = variables(system(os))
    assert (found.path, bool(found.refusal)) == (path, refused)


def test_a_stateless_firmware_has_no_variables():
    assert variables(system(f"<os firmware='efi'>{TYPE}<loader stateless='yes'/></os>")) is None


def with_devices(devices):
    return ET.fromstring(f"<domain><name>x</name><devices>{devices}</devices></domain>")


def test_an_emulated_tpm_stays_and_moves_to_libvirt_s_place():
    backend = "<backend type='emulator' version='2.0'><source type='dir' path='/their'/></backend>"
    root, notes = with_devices(f"<tpm model='tpm-crb'>{backend}</tpm>"), []
    assert tpm(root).directory == "/their"
    rewrite_tpm(root, travelled=True, notes=notes)
    assert notes == []
    assert root.find("devices/tpm/backend/source") is None
    rewrite_tpm(root, travelled=False, notes=notes)
    assert "did not travel" in notes[0]


def test_a_chip_of_the_source_host_goes():
    root, notes = with_devices("<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"), []
    rewrite_tpm(root, travelled=False, notes=notes)
    assert root.find("devices/tpm") is None
    assert notes == ["tpm: dropped, the TPM is a chip of the source host: its state can't be had"]


def test_empty_drives_have_no_media():
    root = with_devices("<disk type='file' device='cdrom'><target dev='sda'/></disk><disk><source file='/d'/></disk>")
    assert list(media(root)) == []
