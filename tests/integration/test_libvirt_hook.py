"""The hook under the system's libvirtd, in mount and process namespaces of its own.

Its directories are tmpfs there; nothing of the machine's libvirt is touched. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from drctl.appliance import libvirt_hook
from tests.integration.libvirt_rig import libvirt_missing

pytestmark = [pytest.mark.lab, pytest.mark.long]

REASON = "drctl: web-1 of group web may not run here: generation 1 is superseded, the group reigns at beta"

#: $1: a directory with `hook` (the script). Prints what virsh says, between marks.
SCRIPT = r"""
set -e
work=$1
# The packages without their postinst leave out the users that libvirtd looks for.
for file in passwd group; do cp /etc/$file $work/$file; done
grep -q ^libvirt-qemu: $work/passwd || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >> $work/passwd
grep -q ^libvirt-qemu: $work/group || echo 'libvirt-qemu:x:64055:' >> $work/group
for file in passwd group; do mount --bind $work/$file /etc/$file; done
cp -a /etc/libvirt $work/etc
mkdir -p $work/lib && mount --bind $work/lib /var/lib
mkdir -p $work/log $work/cache && mount --bind $work/log /var/log && mount --bind $work/cache /var/cache
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/libvirt
cp -a $work/etc/. /etc/libvirt/
rm -rf /etc/libvirt/qemu /etc/libvirt/hooks
mkdir -p /etc/libvirt/hooks/qemu.d
cp $work/hook /etc/libvirt/hooks/qemu.d/drctl
chmod 755 /etc/libvirt/hooks/qemu.d/drctl
printf 'security_driver = "none"\nuser = "root"\ngroup = "root"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = "file"\n' > /etc/libvirt/qemu.conf
printf 'auth_unix_rw = "none"\nlog_outputs = "3:file:/run/lv.log"\n' > /run/lv.conf
v() { virsh -q -c qemu:///system "$@" 2>&1; }
begin() {
    libvirtd --config /run/lv.conf & daemon=$!
    n=0
    until v version > /dev/null; do
        n=$((n + 1)); [ $n -lt 150 ] || { cat /run/lv.log; exit 9; }
        sleep 0.2
    done
}
begin
for name in web-1 other; do
    printf '%s' "<domain type='qemu'><name>$name</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices><emulator>/usr/bin/qemu-system-x86_64</emulator><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>" > /run/$name.xml
    v define /run/$name.xml
done
uuid=$(v domuuid web-1)
mkdir -p $work/home/guard
echo "$REASON" > $work/home/guard/$uuid
echo "refused: $(v start web-1)"
v start other && echo "other started"
v autostart web-1 > /dev/null
kill $daemon; wait $daemon || true
begin
sleep 1
echo "after a restart: $(v domstate web-1) $(v domstate other)"
rm $work/home/guard/$uuid
v start web-1 && echo "web-1 started"
v destroy web-1 > /dev/null; v destroy other > /dev/null
kill $daemon; wait $daemon || true
"""


def test_libvirtd_refuses_a_superseded_guest_and_no_other(tmp_path):
    if lacking := libvirt_missing():
        pytest.skip(lacking)
    if os.getuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root, and unshare, for a libvirtd in namespaces of its own")
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    if subprocess.run([*namespaces, "true"], capture_output=True).returncode:
        pytest.skip("this kernel or container gives no namespaces")
    (tmp_path / "hook").write_text(libvirt_hook.script(tmp_path / "home"))
    done = subprocess.run(
        [*namespaces, "sh", "-c", SCRIPT, "sh", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"REASON": REASON},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout
    assert "refused: error: Failed to start domain 'web-1'" in said
    assert REASON in said
    assert "other started" in said
    # Neither libvirt's own autostart nor a restart of libvirtd gets round it, and a running guest is left alone.
    assert "after a restart: shut off running" in said
    assert "web-1 started" in said
