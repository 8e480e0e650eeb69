"""Small files beside a machine's disks, as libvirt's host has them: UEFI variables, TPM states, CD-ROM images.

They are read and written directly where this user may, else through libvirt's storage driver (a pool of the directory
for the moment), which has the host's own rights: of `qemu:///system` the files belong to QEMU's and swtpm's users."""

from __future__ import annotations

import hashlib
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

import libvirt

from drctl.errors import HypervisorRefused, IntegrityError, NotFound
from drctl.hypervisor.libvirt_connection import Connection
from drctl.hypervisor.volume_xml import volume_facts

#: swtpm's locks are its process's, and no state.
_NO_STATE: Final = (".lock",)
_CHUNK: Final = 256 * 1024
#: libvirt's users for swtpm, in the order in which distributions have them.
_TPM_USERS: Final = ("tss", "swtpm")


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file is written: size in bytes, time of the last change in nanoseconds."""

    size: int
    changed_ns: int


class LibvirtFiles:
    """Files of one libvirt host. Methods raise HypervisorRefused when neither way leads there, HostUnreachable."""

    def __init__(self, connection: Connection, *, direct: bool = True) -> None:
        """`direct` False: always through libvirt."""
        self._connection = connection
        self._direct = direct
        #: There TPM states belong to a user of their own, also where the appliance is root.
        self._system = "/session" not in connection.uri

    def costly(self, path: Path) -> bool:
        """Whether a look at the file goes through libvirt, and should not be made every few seconds."""
        with suppress(OSError):
            return not self._direct or not os.access(path if path.exists() else path.parent, os.R_OK)
        return True

    def stamp(self, path: Path) -> FileStamp | None:
        """None when it is not there."""
        return self.stamps(path.parent, [path.name]).get(path.name)

    def stamps(self, directory: Path, names: list[str] | None = None) -> dict[str, FileStamp]:
        """The regular files of a directory (those named) with their stamps; none where there is no directory."""
        if self._direct:
            with suppress(PermissionError):
                return _stamps(directory, names)
        try:
            with self._pool(directory) as pool:
                wanted = pool.listVolumes() if names is None else [n for n in pool.listVolumes() if n in names]
                found = {name: volume_facts(pool.storageVolLookupByName(name).XMLDesc(0)) for name in wanted}
        except NotFound:
            return {}
        return {n: FileStamp(f.size, f.changed_ns) for n, f in found.items() if f.file and not n.endswith(_NO_STATE)}

    def read(self, path: Path, limit: int) -> bytes:
        """The whole file. Raises NotFound; IntegrityError when it is larger than `limit`, or is written meanwhile."""
        before = self.stamp(path)
        if before is None:
            raise NotFound("file", str(path))
        if before.size > limit:
            raise IntegrityError(f"{path}: {before.size} bytes are more than the {limit} that are taken along")
        data = self._read(path, limit)
        if self.stamp(path) != before or len(data) != before.size:
            raise IntegrityError(f"{path} is being written at this moment")
        return data

    def _read(self, path: Path, limit: int) -> bytes:
        if self._direct:
            with suppress(PermissionError):
                try:
                    with path.open("rb") as file:
                        return file.read(limit + 1)
                except FileNotFoundError:
                    raise NotFound("file", str(path)) from None
        with self._pool(path.parent) as pool:
            return self._download(pool.storageVolLookupByName(path.name))

    def _download(self, volume: libvirt.virStorageVol) -> bytes:
        stream = self._connection.get().newStream(0)
        parts = []
        volume.download(stream, 0, 0, 0)
        while part := stream.recv(_CHUNK):
            parts.append(part)
        stream.finish()
        return b"".join(parts)

    # -- what libvirt places ------------------------------------------------------------------------------------------

    def tpm_directory(self, uuid: str, version: str) -> Path:
        """Where libvirt keeps the state of a machine's emulated TPM, unless its definition says otherwise."""
        return tpm_root(self._connection.uri) / uuid / ("tpm1.2" if version == "1.2" else "tpm2")

    def nvram_path(self, name: str) -> Path:
        """Where libvirt puts the UEFI variables of a machine whose definition names no place."""
        beside = tpm_root(self._connection.uri).parent
        return (beside / "qemu" if self._system else beside) / "nvram" / f"{name}_VARS.fd"

    def put_directory(self, directory: Path, files: Mapping[str, bytes]) -> None:
        """Make a directory of exactly these files, for swtpm's user alone. What was in it is gone."""
        if self._direct and not self._system:
            _put(directory, files)
            return
        owner = _tpm_owner() if self._system else None
        with self._pool(directory, build=True, owner=owner) as pool:
            for name in pool.listVolumes():
                if name not in files:
                    pool.storageVolLookupByName(name).delete(0)
            for name, data in files.items():
                self._upload(pool, name, data, owner)

    def remove_directory(self, directory: Path) -> None:
        """Nothing happens when it is not there."""
        if self._direct and not self._system:
            for name in _stamps(directory, None, every=True):
                (directory / name).unlink(missing_ok=True)
            for path in (directory, directory.parent):
                with suppress(OSError):
                    path.rmdir()
            return
        with suppress(NotFound), self._pool(directory) as pool:
            for name in pool.listVolumes():
                pool.storageVolLookupByName(name).delete(0)

    def _upload(self, pool: libvirt.virStoragePool, name: str, data: bytes, owner: tuple[int, int] | None) -> None:
        with suppress(libvirt.libvirtError):
            pool.storageVolLookupByName(name).delete(0)
        volume = pool.createXML(_volume(name, len(data), owner), 0)
        stream = self._connection.get().newStream(0)
        volume.upload(stream, 0, len(data), 0)
        for offset in range(0, len(data), _CHUNK):
            part = data[offset : offset + _CHUNK]
            while part:
                part = part[stream.send(part) :]
        stream.finish()

    # -- pools --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _pool(
        self, directory: Path, *, build: bool = False, owner: tuple[int, int] | None = None
    ) -> Iterator[libvirt.virStoragePool]:
        """A pool of the directory: one that is there, or one for the moment. `build`: the directory is made.

        Raises NotFound when there is no such directory."""
        with self._connection.translated():
            connection = self._connection.get()
            pool = _known_pool(connection, directory)
            ours = pool is None
            if pool is None:
                flags = libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD if build else 0
                try:
                    pool = connection.storagePoolCreateXML(_pool_xml(directory, owner), flags)
                except libvirt.libvirtError as exc:
                    if "No such file" in str(exc) or "cannot open" in str(exc):
                        raise NotFound("directory", str(directory)) from exc
                    raise
            try:
                pool.refresh(0)
                yield pool
            except libvirt.libvirtError as exc:
                if exc.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL:
                    raise NotFound("file", str(directory)) from exc
                raise
            finally:
                if ours:
                    with suppress(libvirt.libvirtError):
                        pool.destroy()


def _known_pool(connection: Any, directory: Path) -> Any:
    try:
        pool = connection.storagePoolLookupByTargetPath(str(directory))
    except libvirt.libvirtError:
        return None
    return pool if pool.isActive() else None


def _pool_xml(directory: Path, owner: tuple[int, int] | None) -> str:
    name = f"drctl-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]}"
    target = f"<path>{escape(str(directory))}</path>{_permissions('0700', owner)}"
    return f"<pool type='dir'><name>{name}</name><target>{target}</target></pool>"


def _volume(name: str, size: int, owner: tuple[int, int] | None) -> str:
    target = f"<format type='raw'/>{_permissions('0600', owner)}"
    return (
        f"<volume><name>{escape(name)}</name><capacity unit='bytes'>{size}</capacity>"
        f"<allocation unit='bytes'>{size}</allocation><target>{target}</target></volume>"
    )


def _permissions(mode: str, owner: tuple[int, int] | None) -> str:
    whose = f"<owner>{owner[0]}</owner><group>{owner[1]}</group>" if owner is not None else ""
    return f"<permissions><mode>{mode}</mode>{whose}</permissions>"


def tpm_root(uri: str) -> Path:
    """libvirt's directory for TPM states."""
    if "/session" not in uri:
        return Path("/var/lib/libvirt/swtpm")
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "libvirt" / "qemu" / "swtpm"


def _tpm_owner() -> tuple[int, int]:
    """The user as whom libvirt's swtpm runs here: what libvirt takes where qemu.conf says nothing; else root."""
    for name in _TPM_USERS:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    return 0, 0


def _stamps(directory: Path, names: list[str] | None, *, every: bool = False) -> dict[str, FileStamp]:
    found = {}
    try:
        wanted = [path.name for path in directory.iterdir()] if names is None else names
    except FileNotFoundError:
        return {}
    for name in wanted:
        with suppress(FileNotFoundError):
            status = (directory / name).stat()
            if stat.S_ISREG(status.st_mode) and (every or not name.endswith(_NO_STATE)):
                found[name] = FileStamp(status.st_size, status.st_mtime_ns)
    return found


def _put(directory: Path, files: Mapping[str, bytes]) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _stamps(directory, None, every=True):
            (directory / name).unlink(missing_ok=True)
        for name, data in files.items():
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as exc:
        raise HypervisorRefused(f"{directory}: {exc.strerror}") from exc
