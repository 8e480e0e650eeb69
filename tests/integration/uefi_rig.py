"""A guest that boots by UEFI and has a TPM: it makes a boot entry of its own, seals a secret, and says what it finds.

Its first boot comes by the UEFI shell's `startup.nsh`; the guest then writes the variable Boot0099 and boots again. From
then on only that variable leads to a kernel with `drctl.entry=custom`, and only the TPM's state opens what it sealed."""

from __future__ import annotations

import gzip
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from drctl.appliance.recovery.seed_image import iso_image
from drctl.lab.initramfs import Entry, _directories, _modules, _program, _with_libraries, cpio

MIB = 2**20
SECTOR = 512
FIRST = 2048
DISK_ID = 0xD4C71AB0
SECRET = "what only this TPM opens"
#: As tpm2-tools and their TCTI need them.
_TPM2, _TCTI = Path("/usr/bin/tpm2"), "libtss2-tcti-device.so.0"
_MODULES_WANTED = ("virtio_pci", "virtio_blk", "virtio_scsi", "sr_mod", "isofs", "efivarfs", "button", "evdev")
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_NON_VOLATILE = 7  # non-volatile, at boot time, at run time
_KERNEL, _INITRD = "\\EFI\\drctl\\linux.efi", "\\EFI\\drctl\\initrd.img"

_INIT = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t tmpfs tmp /tmp
while read -r module; do $b insmod "/modules/$module"; done </modules/order
efi=/sys/firmware/efi/efivars
$b mount -t efivarfs efivarfs $efi
export TPM2TOOLS_TCTI=device:/dev/tpmrm0 PATH=/bin:/usr/bin HOME=/tmp
say() {{ echo "DRCTL $*" >/dev/console; }}
seal() {{
    tpm2 createprimary -Q -C o -c p && echo -n '{SECRET}' | tpm2 create -Q -C p -i - -u pub -r priv &&
        tpm2 nvdefine -Q 0x1500001 -s 8 -C o -a "ownerread|ownerwrite" &&
        echo -n sentinel | tpm2 nvwrite -Q 0x1500001 -C o -i - && $b tar c pub priv | $b dd of=/dev/vdb conv=fsync
}}
unseal() {{
    $b tar xf /dev/vdb && tpm2 createprimary -Q -C o -c p && tpm2 load -Q -C p -u pub -r priv -c k && tpm2 unseal -c k
}}
cd /tmp
entry=$($b sed -n 's/.*drctl.entry=\\([a-z]*\\).*/\\1/p' /proc/cmdline)
current=$($b od -An -tx1 -j4 $efi/BootCurrent-{_GLOBAL} | $b tr -d ' ')
case $entry in
shell)
    say "first boot"
    seal 2>/dev/console >&2 || say "not sealed"
    $b cat /boot0099 >$efi/Boot0099-{_GLOBAL}
    $b cat /bootorder >$efi/BootOrder-{_GLOBAL}
    $b sync
    $b reboot -f
    ;;
*)
    $b mount -t iso9660 -o ro /dev/sr0 /media 2>/dev/console
    say "entry=$entry current=$current secret=[$(unseal 2>/dev/console)] nv=[$(tpm2 nvread 0x1500001 -C o)] \\
seed=[$($b cat /media/user-data)]"
    say "up"
    $b acpid -d -c /etc/acpi >/dev/null 2>&1 &
    ;;
esac
while :; do $b sleep 60; done
"""
#: The last thing that the guest does is to write to its TPM.
_POWER_BUTTON = """#!/bin/busybox sh
export TPM2TOOLS_TCTI=device:/dev/tpmrm0 PATH=/bin:/usr/bin HOME=/tmp
echo -n farewell | tpm2 nvwrite -Q 0x1500001 -C o -i - 2>/dev/console
/bin/busybox sync
/bin/busybox poweroff -f
"""


def lacking() -> str:
    """What this machine lacks for such a guest."""
    needed = [
        "/usr/bin/tpm2",
        "/usr/bin/swtpm",
        "/usr/bin/swtpm_setup",
        "/usr/share/OVMF/OVMF_CODE_4M.fd",
        "/usr/share/swtpm/swtpm-create-user-config-files",
    ]
    return ", ".join(path for path in needed if not Path(path).exists())


def boot_entry(sectors: int) -> bytes:
    """EFI_LOAD_OPTION: first partition of a disk with that signature, the kernel in it, the kernel's command line."""

    def text(string: str) -> bytes:
        return string.encode("utf-16-le") + b"\0\0"

    disk = struct.pack("<IQQ16sBB", 1, FIRST, sectors, struct.pack("<I", DISK_ID), 1, 1)
    nodes = b"\x04\x01" + struct.pack("<H", 4 + len(disk)) + disk
    path = text(_KERNEL)
    nodes += b"\x04\x04" + struct.pack("<H", 4 + len(path)) + path + b"\x7f\xff\x04\x00"
    options = text(f"initrd={_INITRD} console=ttyS0 quiet drctl.entry=custom")
    return struct.pack("<IH", 1, len(nodes)) + text("drctl") + nodes + options


def initramfs(kernel: Path, sectors: int) -> bytes:
    entries = [
        *_directories(
            "bin", "dev", "proc", "sys", "tmp", "media", "modules", "usr", "usr/bin", "etc", "etc/acpi", "etc/acpi/PWRF"
        ),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _program("bin/busybox", Path("/bin/busybox")),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
        Entry("init", stat.S_IFREG | 0o755, _INIT.encode()),
        Entry("etc/acpi/PWRF/00000080", stat.S_IFREG | 0o755, _POWER_BUTTON.encode()),
        Entry("boot0099", stat.S_IFREG | 0o644, struct.pack("<I", _NON_VOLATILE) + boot_entry(sectors)),
        Entry("bootorder", stat.S_IFREG | 0o644, struct.pack("<IH", _NON_VOLATILE, 0x0099)),
        *_programs(),
    ]
    modules = list(_modules(kernel, _MODULES_WANTED))
    entries += [Entry(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, data in modules]
    order = "".join(f"{name}\n" for name, _ in modules).encode()
    return gzip.compress(cpio([*entries, Entry("modules/order", stat.S_IFREG | 0o644, order)]), 6, mtime=0)


def _programs() -> Iterator[Entry]:
    """tpm2 and the library that it opens by name, each file and directory once."""
    tcti = next(Path("/usr/lib").glob(f"*/{_TCTI}"))
    seen: set[str] = set()
    for program, name in ((_TPM2.resolve(), "usr/bin/tpm2"), (tcti.resolve(), f"usr/lib/{tcti.parent.name}/{_TCTI}")):
        for entry in _with_libraries(program, name):
            for parent in reversed(Path(entry.name).parents):
                if str(parent) != "." and str(parent) not in seen:
                    seen.add(str(parent))
                    yield from _directories(str(parent))
            if entry.name not in seen:
                seen.add(entry.name)
                yield entry


def make_disk(path: Path, kernel: Path) -> None:
    """A disk with an EFI system partition: kernel, initramfs and `startup.nsh`, but no EFI/BOOT: nothing boots by itself."""
    size, sectors = 96 * MIB, (96 * MIB) // SECTOR - FIRST
    work = path.with_suffix(".part")
    with work.open("wb") as file:
        file.truncate(size - FIRST * SECTOR)
    _run("mkfs.vfat", "-F", "32", str(work))
    files = {
        "linux.efi": next((kernel / "boot").glob("vmlinuz-*")).read_bytes(),
        "initrd.img": initramfs(kernel, sectors),
    }
    _run("mmd", "-i", str(work), "::EFI", "::EFI/drctl")
    for name, data in files.items():
        _run("mcopy", "-i", str(work), "-", f"::EFI/drctl/{name}", data=data)
    script = f"fs0:\r\n{_KERNEL} initrd={_INITRD} console=ttyS0 quiet drctl.entry=shell\r\n"
    _run("mcopy", "-i", str(work), "-", "::startup.nsh", data=script.encode())
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(FIRST * SECTOR)
        file.write(work.read_bytes())
    work.unlink()
    table = f"label: dos\nlabel-id: 0x{DISK_ID:08x}\nstart={FIRST}, size={sectors}, type=ef\n"
    _run("sfdisk", "-q", str(path), data=table.encode())


def make_seed(path: Path) -> None:
    """A cloud-init seed."""
    files = {"user-data": b"#cloud-config seed 7", "meta-data": b"instance-id: i-7\n"}
    path.write_bytes(iso_image(files))


def definition(name: str, images: Path, serial: Path) -> str:
    """Firmware is left to libvirt; the processor is one that TCG can give."""
    return f"""<domain type='qemu'><name>{name}</name>
      <memory unit='MiB'>384</memory><vcpu>1</vcpu>
      <os firmware='efi'><type arch='x86_64' machine='q35'>hvm</type>
        <firmware><feature enabled='no' name='secure-boot'/><feature enabled='no' name='enrolled-keys'/></firmware>
      </os>
      <features><acpi/></features><cpu mode='maximum'/><on_reboot>restart</on_reboot>
      <devices>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{images}/{name}.vda.raw'/>
          <target dev='vda' bus='virtio'/></disk>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{images}/{name}.vdb.raw'/>
          <target dev='vdb' bus='virtio'/></disk>
        <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{images}/{name}.seed.iso'/>
          <target dev='sda' bus='scsi'/><readonly/></disk>
        <controller type='scsi' model='virtio-scsi'/><controller type='usb' model='none'/>
        <serial type='file'><source path='{serial}' append='on'/><target port='0'/></serial>
        <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
        <video><model type='none'/></video><memballoon model='none'/>
      </devices></domain>"""


def _run(*command: str, data: bytes | None = None) -> None:
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stderr.decode(errors="replace"))
