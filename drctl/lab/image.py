"""The guests' disks: a template of vda that boots by BIOS and holds payload and ext4, and each guest's copies of it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

from drctl.lab import record
from drctl.lab.command import run
from drctl.lab.record import Superblock
from drctl.model.extent import KiB, MiB

#: Kernel arguments: quiet, since a byte of serial output costs an emulated exit; `panic=1` so that a panic reboots.
_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=3 panic=1 nokaslr mitigations=off no_timer_check tsc=reliable "
    "random.trust_cpu=on rcupdate.rcu_expedited=1 8250.nr_uarts=1 audit=0 selinux=0 apparmor=0 "
    "cryptomgr.notests initcall_blacklist=init_kprobe_trace,crypto_kdf108_init"
)
_SYSLINUX = f"DEFAULT lab\nPROMPT 0\nLABEL lab\n KERNEL vmlinuz\n INITRD initrd\n APPEND {_ARGUMENTS}\n"
_MBR = (Path("/usr/lib/syslinux/mbr/mbr.bin"), Path("/usr/lib/SYSLINUX/mbr.bin"))


def payload() -> bytes:
    """What every guest reads and sums before its first line: noise, the same each time."""
    return random.Random("drctl lab payload").randbytes(record.PAYLOAD_SIZE)


def make_template(target: Path, vmlinuz: Path, initramfs: bytes) -> int:
    """Writes vda's template (raw, sparse); returns the payload's sum."""
    part = target.with_suffix(".part")
    part.unlink(missing_ok=True)
    with part.open("wb") as file:
        file.truncate(record.VDA_SIZE)
    _partition(part)
    _make_bootable(part, vmlinuz, initramfs)
    offset, size = record.DATA_OFFSET, record.DATA_SIZE // KiB
    features = "^metadata_csum_seed,^orphan_file" if _knows_orphan_file() else "^metadata_csum_seed"
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", features, "-E", f"offset={offset},nodiscard", str(part), f"{size}k"])
    data = payload()
    with part.open("r+b") as file:
        file.seek(record.PAYLOAD_OFFSET)
        file.write(data)
    part.rename(target)
    return record.payload_sum(data)


def _knows_orphan_file() -> bool:
    """e2fsprogs 1.47 makes `orphan_file` by default, which a 6.1 kernel mounts but older e2fsck can't check."""
    return "orphan_file" in Path("/etc/mke2fs.conf").read_text() if Path("/etc/mke2fs.conf").exists() else False


def _partition(image: Path) -> None:
    parts = (
        (record.BOOT_OFFSET, record.BOOT_SIZE, "c,*"),
        (record.PAYLOAD_OFFSET, record.PAYLOAD_SIZE, "da"),
        (record.DATA_OFFSET, record.DATA_SIZE, "83"),
        (record.AREA_OFFSETS[0], record.AREA_SIZES[0], "da"),
    )
    table = "label: dos\n" + "".join(f"{at // 512},{size // 512},{kind}\n" for at, size, kind in parts)
    run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", str(image)], data=table.encode())


def _make_bootable(image: Path, vmlinuz: Path, initramfs: bytes) -> None:
    fat = image.with_suffix(".fat")
    try:
        with fat.open("wb") as file:
            file.truncate(record.BOOT_SIZE)
        run(["mkfs.vfat", "-F", "32", "-s", "1", "-n", "DRCTLLAB", "-h", str(record.BOOT_OFFSET // 512), str(fat)])
        run(["syslinux", "--install", str(fat)])
        run(["mcopy", "-i", str(fat), "-", "::syslinux.cfg"], data=_SYSLINUX.encode())
        run(["mcopy", "-i", str(fat), str(vmlinuz), "::vmlinuz"])
        run(["mcopy", "-i", str(fat), "-", "::initrd"], data=initramfs)
        code = next(path for path in _MBR if path.exists()).read_bytes()[:440]
        with image.open("r+b") as disk, fat.open("rb") as file:
            disk.write(code)
            disk.seek(record.BOOT_OFFSET)
            shutil.copyfileobj(file, disk, MiB)
    finally:
        fat.unlink(missing_ok=True)


def make_disks(template: Path, directory: Path, superblock: Superblock, image_format: str) -> tuple[Path, Path]:
    """The two disks of one guest, `NAME.vda.FORMAT` and `NAME.vdb.FORMAT`, with their superblocks."""
    directory.mkdir(parents=True, exist_ok=True)
    targets = []
    for index, target in enumerate(("vda", "vdb")):
        raw = directory / f"{superblock.guest}.{target}.raw"
        if target == "vda":
            run(["cp", "--sparse=always", "--reflink=auto", str(template), str(raw)])
        else:
            with raw.open("wb") as file:
                file.truncate(record.VDB_SIZE)
        with raw.open("r+b") as file:
            file.seek(record.AREA_OFFSETS[index])
            file.write(superblock.on(index).pack())
            file.flush()
            os.fsync(file.fileno())
        targets.append(raw if image_format == "raw" else _converted(raw, image_format))
    return targets[0], targets[1]


def _converted(raw: Path, image_format: str) -> Path:
    target = raw.with_suffix(f".{image_format}")
    run(["qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(target)])
    raw.unlink()
    return target
