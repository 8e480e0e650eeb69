"""Overlays as qemu-img makes and tells them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from drctl.appliance.recovery.images import QemuImages
from drctl.errors import StepFailed
from drctl.model.extent import MiB

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is absent")


@pytest.fixture
def images():
    return QemuImages()


def qemu_io(path, *commands):
    argv = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        argv += ["-c", command]
    return subprocess.run([*argv, str(path)], check=True, capture_output=True, text=True).stdout


def test_an_overlay_names_its_view_which_need_not_answer_yet(images, tmp_path):
    overlay = tmp_path / "scratch" / "web.vda.qcow2"
    images.create(overlay, "nbd+unix:///web.vda?socket=/nowhere/v.sock", 8 * MiB)
    assert images.exists(overlay)
    assert "web.vda" in images.backing(overlay)
    assert "/nowhere/v.sock" in images.backing(overlay)
    assert [path.name for path in overlay.parent.iterdir()] == ["web.vda.qcow2"]
    assert 0 < images.allocated(overlay) < MiB
    assert images.allocated(tmp_path / "none") == 0


def test_localizing_copies_what_is_below_and_cuts_the_tie(images, tmp_path):
    base, overlay = tmp_path / "base.raw", tmp_path / "o.qcow2"
    base.write_bytes(b"a" * MiB + bytes(MiB))
    images.create(overlay, str(base), 2 * MiB)
    qemu_io(overlay, "write -P 98 0 64k")
    assert images.backing(overlay) == str(base)
    images.localize(overlay)
    assert images.backing(overlay) is None
    images.localize(overlay)
    base.unlink()
    qemu_io(overlay, "read -P 98 0 64k", "read -P 97 64k 960k", "read -P 0 1M 1M")


def test_asking_about_an_overlay_in_use_disturbs_nobody(images, tmp_path):
    base, overlay = tmp_path / "base.raw", tmp_path / "o.qcow2"
    base.write_bytes(bytes(MiB))
    images.create(overlay, str(base), MiB)
    user = subprocess.Popen(["qemu-io", "-f", "qcow2", str(overlay)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        user.stdin.write(b"write -P 1 0 64k\n")
        user.stdin.flush()
        assert b"wrote" in user.stdout.readline()
        assert images.backing(overlay) == str(base)
        with pytest.raises(StepFailed, match="lock"):
            images.localize(overlay)
    finally:
        user.communicate(b"quit\n")


def test_removal_takes_files_and_directories_and_may_be_repeated(images, tmp_path):
    overlay = tmp_path / "scratch" / "a" / "o.qcow2"
    images.create(overlay, "x.raw", MiB)
    images.remove(overlay)
    images.remove(overlay)
    assert not overlay.exists()
    images.remove(overlay.parent)
    images.remove(overlay.parent)
    assert not overlay.parent.exists()
    assert images.free(overlay.parent) > 0
