"""A guest that a processor barely notices: a boot sector that writes its two disks, and powers off by the power button.

Twenty Linux guests need minutes of two emulating cores to boot, and a measurement of drctl would be one of them. This
one is up as soon as SeaBIOS is. It waits, as a system does that loads its kernel before it writes anything, and then
writes a counter to a sector of vda, vdb, vda… for ever, at the ticks of the PC's clock (18.2 a second)."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

SECTOR = 512
TICK_SECONDS = 1 / 18.2065
SIZE = 16 << 20
#: Where the counters go: 1,024 places, a page each, so that no write hits the one before it.
FIRST, PLACES, STEP = 2048, 1024, 8
TARGETS = ("vda", "vdb")
#: What precedes a counter.
MAGIC = 0x7944D2C7

_SOURCE = f"""
.code16
.globl _start
_start: cli
        xorw %ax, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movw $0x7c00, %sp
        movw $0x602, %dx            # PM1 enable of the PIIX4, where SeaBIOS puts it: the power button
        movw $0x0100, %ax
        outw %ax, %dx
        sti
        movw delay, %cx
        jcxz 2f
1:      call tick
        loop 1b
2:      incl counter
        movl counter, %eax
        movl %eax, %ebx
        andl ${PLACES - 1}, %ebx
        shll $3, %ebx
        addl ${FIRST}, %ebx
        movl %ebx, place
        movb $0x80, %dl
        testb $1, %al
        jz 3f
        incb %dl
3:      movw $packet, %si
        movw $0x4300, %ax           # extended write
        int $0x13
        movw pause, %cx
4:      call tick
        loop 4b
        jmp 2b

tick:   hlt
        movw $0x600, %dx            # PM1 status: pressed?
        inw %dx, %ax
        testb $1, %ah
        jz 5f
        movw $0x604, %dx            # PM1 control: soft off
        movw $0x2000, %ax
        outw %ax, %dx
        cli
        hlt
5:      ret

.org 400
packet: .byte 16, 0
        .word 1, block, 0
place:  .long 0, 0
delay:  .word 0
pause:  .word 1
.org 440
block:  .long {MAGIC:#x}
counter: .long 0
.org 510
        .byte 0x55, 0xaa
"""
_DELAY, _PAUSE = 416, 418


def boot_sector(delay_seconds: float, rate: float) -> bytes:
    """The program; `delay_seconds` from its start to the first write, `rate` writes a second at most 18."""
    with tempfile.TemporaryDirectory() as directory:
        source, made, flat = (Path(directory) / name for name in ("boot.s", "boot.o", "boot.bin"))
        source.write_text(_SOURCE)
        subprocess.run(["as", "--32", "-o", str(made), str(source)], check=True)
        command = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", str(flat), str(made)]
        subprocess.run(command, check=True)
        code = bytearray(flat.read_bytes())
    assert len(code) == SECTOR, len(code)
    ticks = round(delay_seconds / TICK_SECONDS), max(1, round(1 / rate / TICK_SECONDS))
    struct.pack_into("<HH", code, _DELAY, *ticks)
    return bytes(code)


def make_disks(images: Path, name: str, sector: bytes) -> list[Path]:
    """The two raw images of a guest."""
    paths = [images / f"{name}.{target}.raw" for target in TARGETS]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(SIZE)
    with paths[0].open("r+b") as file:
        file.write(sector)
    return paths


def newest(image: Path) -> int:
    """The newest counter on an image; 0: none."""
    with image.open("rb") as file:
        file.seek(FIRST * SECTOR)
        area = file.read(PLACES * STEP * SECTOR)
    # The sector is read into memory at 0x7c00, and written from there: counter and magic are what `block` points to.
    found = (struct.unpack_from("<II", area, at * STEP * SECTOR) for at in range(PLACES))
    return max((counter for magic, counter in found if magic == MAGIC), default=0)


def domain_xml(name: str, uuid: str, images: Path) -> str:
    disks = "".join(
        f"""<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>
        <source file='{images}/{name}.{target}.raw'/><target dev='{target}' bus='virtio'/>
        <boot order='{order}'/></disk>"""
        for order, target in enumerate(TARGETS, 1)  # SeaBIOS knows no disks but those that it may boot from
    )
    return f"""<domain type='qemu'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>16</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>
      <on_poweroff>destroy</on_poweroff>
      <devices>{disks}<controller type='usb' model='none'/><video><model type='none'/></video>
      <memballoon model='none'/></devices></domain>"""
