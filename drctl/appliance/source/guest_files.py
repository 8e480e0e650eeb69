"""What a machine is besides its disks, as it travels in a DEFINITION frame: `files` of each machine. Pure.

    nvram     the UEFI variable store
    firmware  what the source's firmware is and can, so that the other site finds one that reads the same variables
    tpm       the state of an emulated TPM (swtpm), file by file
    media     small CD-ROM images by the drive's target: a cloud-init seed, an answer file
    secrets   names of libvirt secrets that the definition refers to, never their values
    left_out  what stays behind, and why

Contents are zlib streams in base64: the frame itself is compressed as well, but its raw size has a bound."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from drctl.errors import IntegrityError, UnsupportedFormat
from drctl.model.extent import KiB, MiB

FORMAT = 1
#: UEFI variables of ARM machines are padded to this; x86 has 128 or 528 KiB.
NVRAM_LIMIT = 64 * MiB
#: swtpm's permanent state is below 100 KiB for any profile known.
TPM_LIMIT = 1 * MiB
#: A seed image is some hundred KiB; installation media are GiB.
MEDIA_LIMIT = 16 * MiB
#: All contents of a group, packed: a DEFINITION crosses the link as one message of at most 4 MiB, and the XML needs
#: room, too.
GROUP_BUDGET = 3 * MiB - 64 * KiB


class Packed(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file: where it was at the source, its size in bytes, and its packed contents."""

    path: str
    size: int
    data: str

    def contents(self) -> bytes:
        """Raises IntegrityError when it is not what was packed."""
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(self.data, validate=True), self.size + 1)
        except (binascii.Error, ValueError, zlib.error) as exc:
            raise IntegrityError(f"the contents of {self.path} are damaged: {exc}") from exc
        if len(data) != self.size or not unpacker.eof:
            raise IntegrityError(f"the contents of {self.path} are not of the size that was told")
        return data


def pack(path: str, data: bytes) -> Packed:
    return Packed(path, len(data), base64.b64encode(zlib.compress(data, 6)).decode())


class Firmware(msgspec.Struct, frozen=True, omit_defaults=True):
    """The source's firmware, as its descriptor tells it; `known` is False where no descriptor names the file."""

    loader: str = ""
    format: str = "raw"
    template: str = ""
    features: tuple[str, ...] = ()
    known: bool = False


class Tpm(msgspec.Struct, frozen=True, omit_defaults=True):
    """Files of the state's directory by name."""

    files: dict[str, Packed]


class Secret(msgspec.Struct, frozen=True, omit_defaults=True):
    """The name of a libvirt secret, and what of the machine needs it."""

    needed_by: str
    uuid: str = ""
    kind: str = ""
    usage: str = ""


class LeftOut(msgspec.Struct, frozen=True):
    what: str
    reason: str


class MachineFiles(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of one machine. An older version's `files` is empty: nothing of it travelled."""

    nvram: Packed | None = None
    firmware: Firmware | None = None
    tpm: Tpm | None = None
    media: dict[str, Packed] = {}
    secrets: tuple[Secret, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    format: int = 0

    def packed(self) -> int:
        """Bytes that its contents take in a DEFINITION."""
        return sum(len(one.data) for one in self.contents())

    def contents(self) -> list[Packed]:
        single = [self.nvram] if self.nvram is not None else []
        return [*single, *(self.tpm.files.values() if self.tpm else ()), *self.media.values()]

    def described(self) -> MachineFiles:
        """The same without contents: what may be shown."""

        def bare(one: Packed) -> Packed:
            return Packed(one.path, one.size, "")

        return msgspec.structs.replace(
            self,
            nvram=bare(self.nvram) if self.nvram is not None else None,
            tpm=Tpm({name: bare(one) for name, one in self.tpm.files.items()}) if self.tpm else None,
            media={target: bare(one) for target, one in self.media.items()},
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON would bring it back: what was written and what was read compare."""
        fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return fields


def files_from(fields: Mapping[str, Any] | None) -> MachineFiles:
    """`files` of a DEFINITION's machine. Raises IntegrityError, UnsupportedFormat."""
    try:
        files = msgspec.convert(dict(fields or {}), MachineFiles)
    except (msgspec.ValidationError, TypeError, ValueError) as exc:
        raise IntegrityError(f"the files of a machine are malformed: {exc}") from exc
    if files.format > FORMAT:
        raise UnsupportedFormat(f"a machine's files are of format {files.format}; known are up to {FORMAT}")
    limits = [(files.nvram, NVRAM_LIMIT), *((one, MEDIA_LIMIT) for one in files.media.values())]
    limits += [(one, TPM_LIMIT) for one in (files.tpm.files.values() if files.tpm else ())]
    for one, limit in limits:
        if one is not None and not 0 <= one.size <= limit:
            raise IntegrityError(f"{one.path}: {one.size} bytes are more than {limit}")
    for name in files.tpm.files if files.tpm else ():
        if "/" in name or name in ("", ".", ".."):
            raise IntegrityError(f"{name!r} is no name of a file of a TPM's state")
    return files


def fit_budget(machines: Mapping[str, MachineFiles], budget: int = GROUP_BUDGET) -> dict[str, MachineFiles]:
    """The same, with what does not fit left out: media first, the largest first; then TPM states and variables."""
    fitted = dict(machines)
    total = sum(files.packed() for files in fitted.values())
    media = [(len(one.data), name, target) for name, files in fitted.items() for target, one in files.media.items()]
    for size, name, target in sorted(media, reverse=True):
        if total <= budget:
            return fitted
        fitted[name] = _without_medium(fitted[name], target)
        total -= size
    for name in sorted(fitted, key=lambda each: -fitted[each].packed()):
        if total <= budget:
            break
        total -= fitted[name].packed()
        fitted[name] = _without_states(fitted[name])
    return fitted


_NO_ROOM = "the small files of its group are too many to travel with its definitions"


def _without_medium(files: MachineFiles, target: str) -> MachineFiles:
    media = {key: one for key, one in files.media.items() if key != target}
    left = LeftOut(f"medium {target}", f"{files.media[target].path}: {_NO_ROOM}")
    return msgspec.structs.replace(files, media=media, left_out=(*files.left_out, left))


def _without_states(files: MachineFiles) -> MachineFiles:
    left = list(files.left_out)
    if files.nvram is not None:
        left.append(LeftOut("nvram", _NO_ROOM))
    if files.tpm is not None:
        left.append(LeftOut("tpm", _NO_ROOM))
    return msgspec.structs.replace(files, nvram=None, tpm=None, left_out=tuple(left))
