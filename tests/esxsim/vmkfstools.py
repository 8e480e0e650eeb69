"""vmkfstools of a simulated host (facts 2). Errors are glued to the last progress; numbers are errno<<16 | 9."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
from pathlib import Path

from tests.esxsim import formats
from tests.esxsim.call import Call

WITH_VALUE = "cdairzXxPDqteW"
NAMES = {
    "thin": "VMFS thin-provisioned",
    "zeroedthick": "VMFS zeroedthick",
    "eagerzeroedthick": "VMFS eagerzeroedthick",
}
UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
STEP = 1 << 20


class Failed(Exception):
    pass


def code(number: int) -> str:
    return f"{os.strerror(number)} ({number << 16 | 9})"


def run(call: Call) -> int:
    options, rest = parse(call.words)
    verb = next((letter for letter in "ciUEXqPDxez" if letter in options), "")
    if verb not in VERBS or (verb in "ciEz" and not rest):
        call.out("OPTIONS FOR FILE SYSTEMS:\n\nvmkfstools -C --createfs [vmfs5|vmfs6|vfat]\n")
        return 1
    if "vmkfstools" in call.host.faults:
        call.err(f"{call.host.faults.pop('vmkfstools').message}\n")
        return 255
    try:
        VERBS[verb](call, options, rest)
        return 0
    except Failed as failed:
        call.err(f"{failed}\n")
        return 255


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """`-c 16G x`, `-i src -d thin dst`: in any order."""
    options: dict[str, str] = {}
    rest = []
    words = list(words)
    while words:
        word = words.pop(0)
        if re.fullmatch(r"-[A-Za-z]", word):
            letter = word[1]
            options[letter] = words.pop(0) if letter in WITH_VALUE and words and letter not in "UE" else ""
        else:
            rest.append(word)
    return options, rest


def _disk(call: Call, text: str) -> Path:
    path = call.host.real(text, call.cwd)
    if not path.exists():
        raise Failed(f"Failed to open '{text}': The system cannot find the file specified (25).")
    if path.stat().st_size > 65536 or not path.read_bytes().startswith(b"# Disk DescriptorFile"):
        raise Failed(f"Failed to open '{text}': The file specified is not a virtual disk (15).")
    return path


def _free(call: Call, text: str, *, create: bool = True) -> Path:
    path = call.host.real(text, call.cwd)
    if path.exists():
        raise Failed("Failed to create virtual disk: The file already exists (39).")
    if not path.parent.is_dir():
        raise Failed(f"Failed to create virtual disk: {code(errno.ENOENT)}.")
    if create and call.host.datastore_of(path).read_only:
        raise Failed(f"Failed to create virtual disk: {code(errno.EROFS)}.")
    return path


def create(call: Call, options: dict[str, str], rest: list[str]) -> None:
    match = re.fullmatch(r"(\d+)([bkmgtBKMGT]?)", options["c"])
    if not match:
        raise Failed(f"Invalid size {options['c']}")
    size = int(match[1]) * UNITS[match[2].lower()]
    path = _free(call, rest[0])
    kind = options.get("d", "zeroedthick")
    if kind != "thin" and size > call.host.free(call.host.datastore_of(path)):
        raise Failed(
            "Failed to create virtual disk: There is not enough space on the file system for the selected operation (13)."
        )
    _flat(path, size, kind)
    call.out("Create: 100% done.\n")


def _flat(path: Path, size: int, kind: str) -> None:
    extent = path.with_name(f"{path.stem}-flat.vmdk")
    with extent.open("wb") as file:
        file.truncate(size)
        if kind != "thin":
            os.posix_fallocate(file.fileno(), 0, size)
    path.write_text(formats.descriptor("vmfs", size // 512, extent.name, thin=kind == "thin"))


def clone(call: Call, options: dict[str, str], rest: list[str]) -> None:
    """Flattens the chain. What is frozen can be cloned while the machine runs; what is written can't."""
    host = call.host
    if _is_hosted(host.real(options["i"], call.cwd)):
        _import(call, options, rest)
        return
    source = _disk(call, options["i"])
    kind = options.get("d", "zeroedthick")
    if "a" in options:
        call.out("Option --adaptertype is deprecated and hence will be ignored\n")
    layers = formats.chain(source)
    locks = [host.locked(formats.extent(each)) for each in layers]
    if "exclusive" in locks or ("shared" in locks and host.switches.clone_of_frozen_fails):
        name = host.inside(layers[0])
        raise Failed(f"Failed to open '{name}': Failed to lock the file (16392).")
    target = _free(call, rest[0])
    call.out(f"Destination disk format: {NAMES[kind]}\nCloning disk '{options['i']}'...\n")
    size = formats.sectors(source) * 512
    _flat(target, size, "thin")
    stack = [formats.layer(each) for each in layers]
    store = host.datastore_of(target)
    host.cloning |= {layer.path for layer in stack}
    try:
        _copy(call, stack, formats.extent(target), size, host.free(store), kind)
    finally:
        host.cloning -= {layer.path for layer in stack}
    call.out("\rClone: 100% done.\n")


def _is_hosted(path: Path) -> bool:
    """What hosted products write into one file: sparse, or compressed as a stream."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"KDMV"


def _import(call: Call, options: dict[str, str], rest: list[str]) -> None:
    """Such a disk as one of this host (facts 6, what ESXi accepts); qemu-img reads it."""
    source, target = call.host.real(options["i"], call.cwd), _free(call, rest[0])
    call.out(f"Destination disk format: {NAMES[options.get('d', 'zeroedthick')]}\nCloning disk '{options['i']}'...\n")
    flat = target.with_name(f"{target.stem}-flat.vmdk")
    argv = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(source), str(flat)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        flat.unlink(missing_ok=True)
        raise Failed(f"Failed to open '{options['i']}': The file specified is not a virtual disk (15).")
    target.write_text(formats.descriptor("vmfs", flat.stat().st_size // 512, flat.name, thin=True))
    call.out("\rClone: 100% done.\n")


def _copy(call: Call, stack: list, target: Path, size: int, free: int, kind: str) -> None:
    with target.open("r+b") as file:
        for at in range(0, size, STEP):
            call.out(f"\rClone: {100 * at // size}% done.")
            data = formats.read(stack, at, min(STEP, size - at))
            if kind == "thin" and data.count(0) == len(data):
                continue
            free -= len(data)
            if free < 0:
                raise Failed(f"Failed to clone disk: {code(errno.ENOSPC)}.")
            file.seek(at)
            file.write(data)


def delete(call: Call, _: dict[str, str], rest: list[str]) -> None:
    path = _disk(call, rest[0])
    extent = formats.extent(path)
    if call.host.locked(extent):
        raise Failed(f"Failed to delete virtual disk: {code(errno.EBUSY)}.")
    extent.unlink(missing_ok=True)
    path.unlink()


def rename(call: Call, _: dict[str, str], rest: list[str]) -> None:
    source, target = _disk(call, rest[0]), _free(call, rest[1])
    old = formats.extent(source)
    if call.host.locked(old):
        raise Failed(f"Failed to rename virtual disk: {code(errno.EBUSY)}.")
    new = target.with_name(f"{target.stem}-flat.vmdk")
    target.write_text(source.read_text().replace(f'"{old.name}"', f'"{new.name}"'))
    old.rename(new)
    source.unlink()


def extend(call: Call, options: dict[str, str], rest: list[str]) -> None:
    path = _disk(call, rest[0])
    match = re.fullmatch(r"(\d+)([bkmgtBKMGT]?)", options["X"])
    if not match or formats.field(path.read_text(), "parentFileNameHint"):
        raise Failed("Failed to extend disk: One of the parameters supplied is invalid (1).")
    if call.host.locked(formats.extent(path)):
        raise Failed("Failed to extend disk: Failed to lock the file (16392).")
    size = int(match[1]) * UNITS[match[2].lower()]
    os.truncate(formats.extent(path), size)
    path.write_text(re.sub(r"^RW \d+", f"RW {size // 512}", path.read_text(), flags=re.MULTILINE))
    call.out("Grow: 100% done.\n")


def query(call: Call, options: dict[str, str], _: list[str]) -> None:
    path = formats.chain(_disk(call, options["q"]))[-1]
    kind = formats.field(path.read_text(), "createType")
    names = {"vmfsRawDeviceMap": "Non-passthrough", "vmfsPassthroughRawDeviceMap": "Passthrough"}
    if kind not in names:
        raise Failed(f"Disk {options['q']} is not an rdm")
    article = "a " if names[kind] else ""
    call.out(f"Disk {options['q']} is {article}{names[kind]} Raw Device Mapping\nMaps to: vml.02000000006001405\n")


def filesystem(call: Call, options: dict[str, str], _: list[str]) -> None:
    host = call.host
    store = host.datastore_of(host.real(options["P"], call.cwd))
    blocks, free = store.size >> 20, host.free(store) >> 20
    call.out(
        f"{store.type}.82 file system spanning 1 partitions.\nFile system label (if any): {store.name}\nMode: public\n"
        f"Capacity {store.size} ({blocks} file blocks * 1048576), {free << 20} ({free} blocks) avail, "
        f'max supported file size 70368744177664\nUUID: {store.uuid}\nPartitions spanned (on "lvm"):\n'
        "\tnaa.6001405:1\nIs Native Snapshot Capable: NO\n"
    )


def lock(call: Call, options: dict[str, str], _: list[str]) -> None:
    path = call.host.real(options["D"], call.cwd)
    state = call.host.locked(path)
    mode = {"exclusive": 1, "shared": 2}.get(state, 0)
    owner = "4fbbf995-325ce3c2-e7ee-bcaec58ad83d" if mode == 1 else "00000000-00000000-0000-000000000000"
    readers = "RO Owner[0] HB Offset 3907584 4fbbf995-325ce3c2-e7ee-bcaec58ad83d\n" if mode == 2 else ""
    call.out(
        "Lock [type 10c00001 offset 138997760 v 589, hb offset 3907584\n"
        f"gen 4851, mode {mode}, owner {owner} mtime 730751 nHld {int(mode == 2)} nOvf 0]\n{readers}"
        "Addr <4, 310, 46>, gen 584, links 1, type reg, flags 0, uid 0, gid 0, mode 600\n"
    )


def check(call: Call, _: dict[str, str], rest: list[str]) -> None:
    _disk(call, rest[0])
    call.out("Disk is error free\n")


def consistent(call: Call, options: dict[str, str], _: list[str]) -> None:
    layers = formats.chain(_disk(call, options["e"]))
    for upper, lower in itertools.pairwise(layers):
        if formats.field(upper.read_text(), "parentCID") != formats.field(lower.read_text(), "CID"):
            raise Failed(
                "Disk chain is not consistent : The parent virtual disk has been modified since the child was created. The content ID of the parent virtual disk does not match the corresponding parent content ID in the child (18)"
            )
    call.out("Disk chain is consistent.\n")


VERBS = {
    "c": create,
    "i": clone,
    "U": delete,
    "E": rename,
    "X": extend,
    "q": query,
    "P": filesystem,
    "D": lock,
    "x": check,
    "e": consistent,
}
