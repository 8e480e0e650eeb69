"""A bootable Debian with cloud-init, made by debootstrap as this machine's apt would get it: no cloud image is downloaded.

Its kernel is Debian's for clouds, which knows no AHCI; it boots by BIOS, syslinux and an initramfs from a FAT partition. It is
a machine that cloud-init has set up before, as instance `first` with OLD_ADDRESS, and tells its addresses on its serial
port whenever they change."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

MIB = 2**20
OLD_ADDRESS = "10.8.0.5/24"
MAC = "52:54:00:0a:0b:0c"
# The last one is behind a virtual package, which debootstrap does not look into.
_PACKAGES = (
    "systemd-sysv,udev,dbus,cloud-init,netplan.io,iproute2,initramfs-tools,linux-image-cloud-amd64,python3-cffi-backend"
)
_TOOLS = ("debootstrap", "syslinux", "mcopy", "mke2fs", "sfdisk", "mkfs.vfat")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_MIB, _ROOT_MIB = 96, 1600
_SYSLINUX = (
    "DEFAULT debian\nPROMPT 0\nLABEL debian\n KERNEL vmlinuz\n INITRD initrd\n"
    " APPEND root=/dev/vda2 rw console=ttyS0 quiet loglevel=3 panic=1 mitigations=off no_timer_check tsc=reliable "
    "random.trust_cpu=on\n"
)
_TELL = """#!/bin/sh
while sleep 1; do
    now=$(ip -o addr show scope global | awk '{print $2, $4}' | sort | tr '\\n' ';')
    [ "$now" = "$before" ] || echo "$(hostname) has addresses: $now" >/dev/ttyS0
    before=$now
done
"""
_UNIT = "[Service]\nExecStart=/usr/local/bin/tell-addresses\n[Install]\nWantedBy=multi-user.target\n"
_NETPLAN = f"network: {{version: 2, ethernets: {{any: {{match: {{name: 'e*'}}, addresses: [{OLD_ADDRESS}]}}}}}}\n"


def missing() -> str:
    lacking = [name for name in _TOOLS if not shutil.which(name, path=_PATH)]
    if os.getuid() != 0:
        return "only root makes a Debian"
    return f"needs {', '.join(lacking)}" if lacking else ""


def make_image(directory: Path) -> Path:
    """The raw disk; some minutes and 2 GB. Raises CalledProcessError where the mirror can't be reached."""
    root, disk = directory / "root", directory / "debian.raw"
    command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(root), *_mirror()]
    _run(command, log=directory / "debootstrap.log")
    _furnish(root)
    try:
        _assemble(root, disk)
    finally:
        shutil.rmtree(root)
    return disk


def _run(command: list[str], *, log: Path | None = None, data: str | None = None) -> str:
    env = {**os.environ, "PATH": _PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, env=env, input=data, capture_output=True, text=True, check=False)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def _mirror() -> list[str]:
    """The one that this machine's apt uses for the same Debian."""
    told = _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
    return [line.split()[0] for line in told.splitlines() if line.split()[1:] == ["bookworm"]][:1]


def _furnish(root: Path) -> None:
    def write(name: str, text: str, mode: int = 0o644) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    write("etc/fstab", "/dev/vda2 / ext4 defaults 0 1\n")
    write("etc/hostname", "wiki\n")
    write("etc/netplan/50-cloud-init.yaml", _NETPLAN, 0o600)
    write("usr/local/bin/tell-addresses", _TELL, 0o755)
    write("etc/systemd/system/tell-addresses.service", _UNIT)
    # On a busy machine an emulated boot takes many minutes, and nothing of it is to be given up for that.
    slow = "DefaultTimeoutStartSec=infinity\nDefaultTimeoutStopSec=infinity\nDefaultDeviceTimeoutSec=infinity\n"
    write("etc/systemd/system.conf.d/slow.conf", f"[Manager]\n{slow}")
    for unit in ("systemd-journald", "systemd-udevd", "systemd-networkd", "systemd-logind"):
        write(f"etc/systemd/system/{unit}.service.d/slow.conf", "[Service]\nWatchdogSec=0\nTimeoutStartSec=infinity\n")
    # cloud-init was here: what it looks at to tell a new instance from the old one.
    (root / "var/lib/cloud/instances/first").mkdir(parents=True)
    (root / "var/lib/cloud/instance").symlink_to("/var/lib/cloud/instances/first")
    write("var/lib/cloud/data/instance-id", "first\n")
    write("var/lib/cloud/data/previous-instance-id", "first\n")
    # A small initramfs: an emulated processor unpacks it.
    conf = root / "etc/initramfs-tools/initramfs.conf"
    conf.write_text(conf.read_text().replace("MODULES=most", "MODULES=list"))
    write("etc/initramfs-tools/modules", "virtio_pci\nvirtio_blk\next4\n")
    chroot = ["chroot", str(root)]
    _run([*chroot, "update-initramfs", "-u"])
    _run([*chroot, "systemctl", "enable", "systemd-networkd", "tell-addresses"])
    _run([*chroot, "systemctl", "mask", "apt-daily.timer", "apt-daily-upgrade.timer", "systemd-networkd-wait-online"])
    _run([*chroot, "apt-get", "clean"])
    shutil.rmtree(root / "var/lib/apt/lists")


def _assemble(root: Path, disk: Path) -> None:
    """Two partitions, made in files of their own: nothing is mounted."""
    fat, ext = disk.with_suffix(".fat"), disk.with_suffix(".ext4")
    with fat.open("wb") as file:
        file.truncate(_BOOT_MIB * MIB)
    _run(["mkfs.vfat", "-F", "32", "-s", "1", "-h", "2048", str(fat)])
    _run(["syslinux", "--install", str(fat)])
    _run(["mcopy", "-i", str(fat), "-", "::syslinux.cfg"], data=_SYSLINUX)
    for name in ("vmlinuz", "initrd"):
        (source,) = root.glob(f"boot/{name}*-cloud-amd64")
        _run(["mcopy", "-i", str(fat), str(source), f"::{name}"])
    _run(["mke2fs", "-q", "-t", "ext4", "-d", str(root), str(ext), f"{_ROOT_MIB}M"])
    with disk.open("wb") as file:
        file.truncate((2 + _BOOT_MIB + _ROOT_MIB) * MIB)
    table = f"label: dos\n2048,{_BOOT_MIB * 2048},c,*\n{2048 * (1 + _BOOT_MIB)},{_ROOT_MIB * 2048},83\n"
    _run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(disk)], data=table)
    for part, place in ((fat, 1), (ext, 1 + _BOOT_MIB)):
        _run(["dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={place}", "conv=notrunc,sparse"])
        part.unlink()
    code = next(
        path for path in map(Path, ("/usr/lib/syslinux/mbr/mbr.bin", "/usr/lib/SYSLINUX/mbr.bin")) if path.exists()
    )
    with disk.open("r+b") as file:
        file.write(code.read_bytes()[:440])


def definition(name: str, disk: Path, serial: Path) -> str:
    """A machine of today's default type, emulated, with one network card that needs no network of libvirt's."""
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>768</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='{MAC}'/><model type='virtio'/></interface>
    <serial type='file'><source path='{serial}' append='on'/><target port='0'/></serial>
    <video><model type='none'/></video>
    <memballoon model='none'/>
  </devices>
</domain>
"""
