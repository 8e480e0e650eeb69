"""The guest's initramfs: busybox, some kernel modules, witness and guest agent, as a cpio archive made in memory."""

from __future__ import annotations

import gzip
import lzma
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from drctl.errors import SetupFailed
from drctl.lab import record
from drctl.lab.command import need, run

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

HERE = Path(__file__).parent / "guest_files"
#: Modules the guest needs where they aren't built in; what they depend on comes along.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4", "button", "evdev")
#: For guests whose disks are SCSI ones; loaded where there is no virtio disk.
_SCSI_MODULES = ("virtio_scsi", "sd_mod")
_SIGNATURE_MARK = b"~Module signature appended~\n"
#: How long the witness gathers acknowledgements before it tells the host, at most (its judgement of loss is as coarse).
REPORT_MILLISECONDS = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of the archive. `mode` has the file type; `device` is (major, minor) of a node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def cpio(entries: Iterable[Entry]) -> bytes:
    """The entries as a `newc` archive, owned by root, dated 1970: equal input makes equal bytes."""
    parts: list[bytes] = []
    end = Entry("TRAILER!!!", 0)
    for number, entry in enumerate([*entries, end], 1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), entry.data, bytes(-len(entry.data) % 4)]
    return b"".join(parts)


def build_witness(target: Path) -> None:
    """Compiles the witness, static, with the geometry of record.py."""
    macros = {
        "VDA_AREA": record.AREA_OFFSETS[0],
        "VDB_AREA": record.AREA_OFFSETS[1],
        "VDA_LENGTH": record.AREA_SIZES[0],
        "VDB_LENGTH": record.AREA_SIZES[1],
        "SLOTS_DISTANCE": record.SLOTS_DISTANCE,
        "REPORT_MILLISECONDS": REPORT_MILLISECONDS,
    }
    defines = [f"-D{name}={value}ull" if value > 2**31 else f"-D{name}={value}" for name, value in macros.items()]
    flags = ["-std=gnu17", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    run(["gcc", *flags, *defines, "-o", str(target), str(HERE / "witness.c")])


def build(kernel: Path, agent: Path | None, witness: Path) -> bytes:
    """The gzipped archive. `kernel` and `agent` are unpacked packages; without an agent the guest has none."""
    entries = [
        *_directories("bin", "sbin", "dev", "proc", "sys", "data", "etc", "etc/acpi", "modules", "usr", "usr/sbin"),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _program("bin/busybox", Path(need("busybox"))),
        _program("witness", witness),
        _program("init", HERE / "init.sh"),
        _program("agent.sh", HERE / "agent.sh"),
        _program("sbin/shutdown", HERE / "shutdown.sh"),
        Entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox"),
        Entry("etc/acpi/PWRF", stat.S_IFLNK | 0o777, b"/sbin/shutdown"),
    ]
    modules, scsi = list(_modules(kernel, _MODULES)), list(_modules(kernel, _SCSI_MODULES))
    known = {name for name, _ in modules}
    scsi = [(name, data) for name, data in scsi if name not in known]
    entries += [Entry(f"modules/{name}", stat.S_IFREG | 0o644, data) for name, data in (*modules, *scsi)]
    for title, listed in (("order", modules), ("scsi", scsi)):
        order = "".join(f"{name}\n" for name, _ in listed).encode()
        entries.append(Entry(f"modules/{title}", stat.S_IFREG | 0o644, order))
    if agent:
        entries += _with_libraries(agent / "usr/sbin/qemu-ga", "usr/sbin/qemu-ga")
    return gzip.compress(cpio(entries), 6, mtime=0)


def _directories(*names: str) -> list[Entry]:
    return [Entry(name, stat.S_IFDIR | 0o755) for name in names]


def _program(name: str, source: Path) -> Entry:
    return Entry(name, stat.S_IFREG | 0o755, source.read_bytes())


def _modules(kernel: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """The modules as (file name, bytes), each after those it depends on."""
    # Packages since Debian 13 hold them below usr, where the merged file system has /lib.
    places = (kernel / "lib/modules", kernel / "usr/lib/modules")
    files = {_module_name(path): path for place in places for path in place.rglob("*.ko*")}
    if not files:
        raise SetupFailed(f"{kernel} holds no kernel modules")
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, bytes]]:
        if name in done or name not in files:  # absent: built into the kernel
            return
        done.add(name)
        data = _decompressed(files[name])
        match = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in match[1].decode().split(",") if match else ():
            yield from visit(needed.replace("-", "_"))
        yield f"{name}.ko", _unsigned(data)

    for wanted in names:
        yield from visit(wanted)


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return bytes(zstd.decompress(data))
    return data


def _unsigned(data: bytes) -> bytes:
    """The module without its signature (at its end: signature, 12 bytes with the length last, a mark): checking one
    costs a tenth of a second under TCG, and this kernel does not insist."""
    if not data.endswith(_SIGNATURE_MARK):
        return data
    info = len(data) - len(_SIGNATURE_MARK)
    length = int.from_bytes(data[info - 4 : info], "big")
    return data[: info - 12 - length]


def _with_libraries(program: Path, name: str) -> list[Entry]:
    """The program and the shared libraries that this machine's loader finds for it."""
    listing = run(["ldd", str(program)])
    if "not found" in listing:
        raise SetupFailed(f"libraries of {program.name} are absent here:\n{listing}", hint="run: make setup")
    libraries = sorted({Path(found) for found in re.findall(r"(/\S+) \(0x", listing)})
    parents = {str(parent) for library in libraries for parent in library.parents if str(parent) != "/"}
    entries = _directories(*sorted(parent.lstrip("/") for parent in parents))
    entries += [_program(str(library).lstrip("/"), library) for library in libraries]
    return [*entries, _program(name, program)]
