"""A real machine's screen, by libvirt and QEMU."""

from __future__ import annotations

import time

import pytest

from drctl.errors import HypervisorRefused
from drctl.hypervisor.picture import PNG, small_png
from tests.integration.libvirt_rig import Libvirtd, definition, libvirt_missing

pytestmark = pytest.mark.lab

DISPLAY = (
    "<graphics type='vnc' socket='{socket}'/><video><model type='vga' vram='16384' heads='1'/></video>"
    "<serial type='file'><source path='{socket}.log'/></serial>"
)


@pytest.fixture(scope="module")
def daemon():
    if lacking := libvirt_missing():
        pytest.skip(lacking)
    made = Libvirtd()
    yield made
    made.close()


def test_a_display_is_seen_and_a_machine_without_one_is_told(daemon):
    from drctl.hypervisor.libvirt import LibvirtHypervisor

    with LibvirtHypervisor(daemon.uri) as host:
        host.create(definition("seen", {}, extra=DISPLAY.format(socket=f"{daemon.directory}/home/vnc")))
        host.create(definition("blind", {}))
        deadline = time.monotonic() + 30
        while True:  # its firmware's words are in no one colour
            png = small_png(host.screenshot("seen"))
            if len(png) > 1500 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        assert png.startswith(PNG)
        assert 1500 < len(png) < 32_000
        with pytest.raises(HypervisorRefused):
            host.screenshot("blind")
        host.destroy("seen")
        host.destroy("blind")
