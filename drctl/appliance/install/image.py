"""The appliance as the image of a machine: Debian, with drctl inside and no password. Made by mmdebstrap and mke2fs.

Same wheels, same packages, same bytes: whatever differs from build to build (dates, random numbers, the order of
directories) is set or taken out. `manifest.json` tells all of what it was made of, and the files' checksums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from drctl.appliance.install.bundle import Bundle, read_list
from drctl.appliance.install.ext4 import used_inodes
from drctl.errors import IntegrityError, SetupFailed
from drctl.model.extent import GiB, MiB

FORMAT = 1
MANIFEST = "manifest.json"
RAW, VMDK = "appliance.raw", "appliance.vmdk"
#: Debian's release with that Python.
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
MIRROR = "http://deb.debian.org/debian"
SECURITY = "http://deb.debian.org/debian-security"
#: What files are dated with at most, unless SOURCE_DATE_EPOCH says another: 2025-01-01.
EPOCH = 1735689600
SIZE = 4 * GiB
#: The partition's first byte; GRUB's core lies before it.
_OFFSET = MiB
_SECTOR = 512
_PACKAGES = (
    "systemd-sysv udev kmod linux-image-cloud-amd64 initramfs-tools grub-pc-bin openssh-server systemd-resolved"
    " systemd-timesyncd iproute2 fdisk e2fsprogs python3 libvirt0 qemu-utils ca-certificates"
)
_PROGRAMS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs", "qemu-img": "qemu-utils"}
#: Ours, so that what a machine's own /etc/mke2fs.conf says makes no difference. GRUB 2.06 knows all of these.
_MKE2FS = """[defaults]
base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
blocksize = 4096
inode_size = 256
inode_ratio = 16384
[fs_types]
ext4 = {
    features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
}
"""
BUILD_SECONDS = 3600.0

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Image:
    """A directory with an image. `identity` is that of the wheels inside; `size` the disk's, in bytes."""

    directory: Path
    identity: str
    suite: str
    size: int
    files: dict[str, str]

    @property
    def vmdk(self) -> Path:
        return self.directory / VMDK

    @property
    def sha256(self) -> str:
        """Of the file that is sent to a host."""
        return self.files[VMDK]


@dataclass(frozen=True, slots=True)
class Source:
    """Where Debian comes from. `mirror` may be one of snapshot.debian.org's, for the same packages at any time."""

    mirror: str = MIRROR
    security: str = SECURITY
    epoch: int = EPOCH


def build_image(directory: Path, bundle: Bundle, source: Source, progress: Progress) -> Image:
    """Make the image and its list. Raises SetupFailed: root, a program, the network or room is missing."""
    suite = SUITES.get(bundle.python)
    if suite is None:
        hint = f"wheels for one of Python {', '.join(SUITES)}: --wheels DIR"
        raise SetupFailed(f"no release of Debian is known that has Python {bundle.python}", hint=hint)
    _demand_programs()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".drctl-image-", dir=directory) as temporary:
        build = _Build(Path(temporary), bundle, suite, source)
        progress("Debian, and drctl in it")
        build.make_root()
        progress("file system")
        build.make_raw()
        progress("VMDK")
        build.make_vmdk()
        return build.publish(directory)


def load_image(directory: Path) -> Image:
    """An image made before; what is sent is checked. Raises NotFound, UnsupportedFormat, IntegrityError."""
    data = read_list(directory / MANIFEST, FORMAT, "image", "make one: drctl appliance build DIR")
    files = {row["name"]: row["sha256"] for row in data["files"]}
    image = Image(directory, data["identity"], data["suite"], data["size"], files)
    if not image.vmdk.is_file() or _digest(image.vmdk) != files.get(VMDK):
        raise IntegrityError(f"{image.vmdk} is not the file that {MANIFEST} lists", hint="make the image anew")
    return image


class _Build:
    """One build, in a directory of its own."""

    def __init__(self, place: Path, bundle: Bundle, suite: str, source: Source) -> None:
        self._place = place
        self._bundle = bundle
        self._suite = suite
        self._source = source
        self._root = place / "root"
        self._stage = place / "stage"
        #: The root's file system's; the same for the same wheels.
        self._uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, f"drctl appliance {bundle.identity} {suite}"))
        self._environment = {**os.environ, "SOURCE_DATE_EPOCH": str(source.epoch), "LC_ALL": "C.UTF-8"}

    def make_root(self) -> None:
        """The root directory. Raises SetupFailed with the program's last words."""
        own = resources.files(__package__).joinpath("files/image")
        (self._stage / "wheels").mkdir(parents=True)
        for wheel in self._bundle.wheels:
            shutil.copyfile(self._bundle.directory / wheel.name, self._stage / "wheels" / wheel.name)
        _copy_overlay(own.joinpath("overlay"), self._stage / "overlay")
        # Before the initramfs is made, so that it takes fsck along.
        (self._stage / "overlay/etc/fstab").write_text(f"UUID={self._uuid} / ext4 defaults,errors=remount-ro 0 1\n")
        (self._stage / "customize.sh").write_text(own.joinpath("customize.sh").read_text("utf-8"))
        stage, suite = self._stage, self._suite
        words = f'"$1" {stage} {self._bundle.identity} {self._uuid}'
        sources = [f"deb {self._source.mirror} {suite} main", f"deb {self._source.mirror} {suite}-updates main"]
        sources.append(f"deb {self._source.security} {suite}-security main")
        argv = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"]
        argv += ['--aptopt=Apt::Install-Recommends "false"', "--dpkgopt=path-exclude=/usr/share/man/*"]
        argv += ["--dpkgopt=path-exclude=/usr/share/locale/*", f"--include={','.join(_PACKAGES.split())}"]
        argv += [f'--essential-hook=cp -r {stage}/overlay/. "$1"', f"--customize-hook=sh {stage}/customize.sh {words}"]
        # Its mounts are in a namespace of their own: whatever ends it, none is left below a directory that is deleted.
        self._run(["unshare", "--mount", "--propagation", "private", *argv, suite, str(self._root), *sources])
        self._date()

    def _date(self) -> None:
        """No file is newer than the epoch, and none was read since."""
        epoch = self._source.epoch
        for place, directories, files in os.walk(self._root):
            for name in [*directories, *files, "."]:
                path = Path(place) / name
                dated = min(int(path.lstat().st_mtime), epoch)
                os.utime(path, (dated, dated), follow_symlinks=False)

    def make_raw(self) -> None:
        """A disk with a partition table, GRUB, and the root's file system."""
        raw, config = self._place / RAW, self._place / "mke2fs.conf"
        config.write_text(_MKE2FS)
        self._environment |= {"MKE2FS_CONFIG": str(config), "E2FSPROGS_FAKE_TIME": str(self._source.epoch)}
        with raw.open("wb") as file:
            file.truncate(SIZE)
        extended = f"offset={_OFFSET},hash_seed={self._uuid},lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "drctl", "-U", self._uuid, "-m", "1", "-E", extended]
        self._run([*argv, "-d", str(self._root), str(raw), f"{(SIZE - _OFFSET) // 1024}k"])
        self._date_inodes(raw)
        core = (self._stage / "core.img").read_bytes()
        if len(core) > _OFFSET - _SECTOR:
            raise SetupFailed("GRUB's core does not fit before the partition")
        with raw.open("r+b") as file:
            file.write(boot_sector((self._stage / "boot.img").read_bytes(), self._uuid) + core)

    def _date_inodes(self, raw: Path) -> None:
        """mke2fs takes over when files were changed and read, which nobody can set: made equal afterwards."""
        with raw.open("rb") as file:
            inodes = used_inodes(file, _OFFSET)
        fields = ("atime", "ctime", "crtime")
        script = "".join(f"sif <{one}> {field} @{self._source.epoch}\n" for one in inodes for field in fields)
        (self._place / "dates").write_text(script)
        self._run(["debugfs", "-w", "-f", str(self._place / "dates"), f"{raw}?offset={_OFFSET}"])

    def make_vmdk(self) -> None:
        """The same disk, compressed. QEMU draws a number for it: ours is made of its content."""
        raw, vmdk = self._place / RAW, self._place / VMDK
        options = "subformat=streamOptimized,adapter_type=lsilogic"
        # One request at a time: grains lie in the order in which they are written.
        self._run(["qemu-img", "convert", "-m", "1", "-f", "raw", "-O", "vmdk", "-o", options, str(raw), str(vmdk)])
        set_content_id(vmdk, _digest(raw)[:8])

    def publish(self, directory: Path) -> Image:
        """All of it under its names; the list last."""
        packages = (self._stage / "packages").read_text().splitlines()
        rows = [self._row(name) for name in (RAW, VMDK)]
        fields = {"format": FORMAT, "identity": self._bundle.identity, "version": self._bundle.version}
        fields |= {"suite": self._suite, "size": SIZE, "epoch": self._source.epoch, "mirror": self._source.mirror}
        (directory / MANIFEST).unlink(missing_ok=True)
        for name in (RAW, VMDK):
            (self._place / name).replace(directory / name)
        text = json.dumps({**fields, "files": rows, "packages": sorted(packages)}, indent=1) + "\n"
        (directory / MANIFEST).write_text(text, "utf-8")
        return load_image(directory)

    def _row(self, name: str) -> dict[str, object]:
        path = self._place / name
        return {"name": name, "size": path.stat().st_size, "sha256": _digest(path)}

    def _run(self, argv: Sequence[str]) -> None:
        done = subprocess.run(
            argv,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            told = " / ".join(lines[-3:]) or f"exit code {done.returncode}"
            raise SetupFailed(
                f"{argv[0]}: {told}", hint="are the mirror and room there? the command can be given again"
            )


def boot_sector(boot: bytes, seed: str) -> bytes:
    """GRUB's boot.img with a partition table: one Linux partition, bootable, to the disk's end."""
    first, count = _OFFSET // _SECTOR, (SIZE - _OFFSET) // _SECTOR
    entry = b"\x80\xfe\xff\xff\x83\xfe\xff\xff" + first.to_bytes(4, "little") + count.to_bytes(4, "little")
    signature = hashlib.sha256(seed.encode()).digest()[:4]
    return boot[:440] + signature + b"\0\0" + entry.ljust(64, b"\0") + b"\x55\xaa"


def set_content_id(vmdk: Path, number: str) -> None:
    """Give a sparse VMDK's descriptor, in its first 64 KiB, this CID (eight digits)."""
    with vmdk.open("r+b") as file:
        head = file.read(65536)
        at = head.find(b"\nCID=")
        if at < 0:
            raise SetupFailed(f"{vmdk.name}: qemu-img wrote no descriptor that is known")
        file.seek(at + len(b"\nCID="))
        # The last two mean that there is none.
        file.write(b"fffffffd" if number in ("fffffffe", "ffffffff") else number.encode())


def _copy_overlay(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True)
    for child in source.iterdir():
        place = target / child.name
        if child.is_dir():
            _copy_overlay(child, place)
        else:
            place.write_bytes(child.read_bytes())
            place.chmod(0o755 if target.name == "sbin" else 0o644)


def _demand_programs() -> None:
    if os.geteuid() != 0:
        raise SetupFailed("an image is built by root alone", hint="sudo drctl appliance build DIR")
    missing = sorted({package for program, package in _PROGRAMS.items() if not shutil.which(program)})
    if missing:
        raise SetupFailed(f"there is no {', '.join(missing)}", hint=f"apt install {' '.join(missing)}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
