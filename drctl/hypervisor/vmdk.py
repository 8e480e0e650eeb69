"""VMware's disk descriptors (the text of a .vmdk): extents, parent, identity. Pure; redo_log reads what they name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from drctl.errors import UnsupportedFormat
from drctl.model.extent import SECTOR

#: A descriptor is below 2 KiB; what is larger is the data of a disk.
LIMIT = 64 * 1024
MAGIC = "# Disk DescriptorFile"
NO_PARENT = "ffffffff"
_EXTENT = re.compile(r'(RW|RDONLY|NOACCESS) (\d+) (\w+)(?: "([^"]*)")?(?: (\d+))?')
_FACT = re.compile(r'([A-Za-z][\w.]*)\s*=\s*(?:"(.*)"|(\S+))')
#: createType → what stands before each of its extents. RDMs of both kinds say VMFSRDM.
KEYWORDS = {
    "vmfs": "VMFS",
    "vmfsSparse": "VMFSSPARSE",
    "seSparse": "SESPARSE",
    "vmfsRawDeviceMap": "VMFSRDM",
    "vmfsPassthroughRawDeviceMap": "VMFSRDM",
    "monolithicFlat": "FLAT",
    "twoGbMaxExtentFlat": "FLAT",
    "twoGbMaxExtentSparse": "SPARSE",
    "monolithicSparse": "SPARSE",
    "streamOptimized": "SPARSE",
}
REDO_LOGS = ("seSparse", "vmfsSparse")
PHYSICAL_RDM = "vmfsPassthroughRawDeviceMap"
VIRTUAL_RDM = "vmfsRawDeviceMap"


@dataclass(frozen=True, slots=True)
class Piece:
    """One extent; `sectors` of 512 bytes, whatever the disk."""

    access: str
    sectors: int
    keyword: str
    file: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One layer of a disk. `parent` is the file of the layer below as it is written there, empty for a base."""

    kind: str
    identity: str
    parent_identity: str
    parent: str
    pieces: tuple[Piece, ...]
    facts: tuple[tuple[str, str], ...] = ()
    change_tracking: str = ""
    version: int = 1

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return sum(piece.sectors for piece in self.pieces) * SECTOR

    @property
    def is_redo_log(self) -> bool:
        return self.kind in REDO_LOGS

    @property
    def is_thin(self) -> bool:
        return ("ddb.thinProvisioned", "1") in self.facts


def parse(text: str) -> Descriptor:
    """Read a descriptor. Raises UnsupportedFormat when it is none, is cut, or has what is not known."""
    if len(text) > LIMIT or not text.startswith(MAGIC):
        raise UnsupportedFormat("not a disk descriptor")
    facts: dict[str, str] = {}
    pieces: list[Piece] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if match := _EXTENT.fullmatch(stripped):
            pieces.append(Piece(match[1], int(match[2]), match[3], match[4] or "", int(match[5] or 0)))
        elif match := _FACT.fullmatch(stripped):
            if match[1] in facts:
                raise UnsupportedFormat(f"descriptor line {number}: {match[1]!r} is there twice", line=number)
            facts[match[1]] = match[3] if match[2] is None else match[2]
        else:
            raise UnsupportedFormat(f"descriptor line {number} is not understood: {stripped[:80]!r}", line=number)
    return _checked(facts, pieces)


def _checked(facts: dict[str, str], pieces: list[Piece]) -> Descriptor:
    missing = [key for key in ("version", "CID", "parentCID", "createType") if key not in facts]
    if missing or not pieces:
        raise UnsupportedFormat(f"a descriptor without {', '.join(missing) or 'extents'}")
    kind = facts["createType"]
    if kind not in KEYWORDS:
        raise UnsupportedFormat(f"a disk of createType {kind!r} is not known", kind=kind)
    if any(piece.keyword not in (KEYWORDS[kind], "ZERO") for piece in pieces):
        raise UnsupportedFormat(f"a disk of createType {kind!r} has extents of another kind")
    if not facts["version"].isdigit():
        raise UnsupportedFormat(f"a descriptor of version {facts['version']!r}")
    parent, parent_identity = facts.get("parentFileNameHint", ""), facts["parentCID"].lower()
    if (parent_identity != NO_PARENT) != bool(parent):
        raise UnsupportedFormat("a descriptor whose parentCID and parentFileNameHint do not agree")
    own = tuple((key, value) for key, value in facts.items() if key.startswith("ddb."))
    tracking = facts.get("changeTrackPath", "")
    identity = facts["CID"].lower()
    return Descriptor(kind, identity, parent_identity, parent, tuple(pieces), own, tracking, int(facts["version"]))


def render(disk: Descriptor) -> str:
    """The text of a descriptor, laid out as ESXi does."""
    hint = f'parentFileNameHint="{disk.parent}"\n' if disk.parent else ""
    pieces = "".join(_piece(piece) for piece in disk.pieces)
    facts = "".join(f'{key} = "{value}"\n' for key, value in disk.facts)
    tracking = f'# Change Tracking File\nchangeTrackPath="{disk.change_tracking}"\n\n' if disk.change_tracking else ""
    return (
        f'{MAGIC}\nversion={disk.version}\nencoding="UTF-8"\nCID={disk.identity}\nparentCID={disk.parent_identity}\n'
        f'createType="{disk.kind}"\n{hint}\n# Extent description\n{pieces}\n{tracking}'
        f"# The Disk Data Base \n#DDB\n\n{facts}"
    )


def _piece(piece: Piece) -> str:
    name = f' "{piece.file}"' if piece.file else ""
    start = f" {piece.start}" if piece.start else ""
    return f"{piece.access} {piece.sectors} {piece.keyword}{name}{start}\n"


def flat(file: str, size: int, *, adapter: str = "lsilogic", thin: bool = True, hardware: int = 14) -> Descriptor:
    """The descriptor of a base whose bytes lie in `file`. `size` is a multiple of a sector. Raises ValueError."""
    if size % SECTOR or '"' in file:
        raise ValueError(f"no disk of {size} bytes in {file!r}")
    geometry = {"adapterType": adapter, "virtualHWVersion": str(hardware)}
    if thin:
        geometry["thinProvisioned"] = "1"
    facts = tuple((f"ddb.{key}", value) for key, value in geometry.items())
    return Descriptor("vmfs", "fffffffe", NO_PARENT, "", (Piece("RW", size // SECTOR, "VMFS", file),), facts)
