"""What the programs of an ESX host print, read strictly: what is not understood is refused, never guessed. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from drctl.errors import UnsupportedFormat

_HEADER = re.compile(r"(Vmid +)(Name +)(File +)(Guest OS +)(Version +)Annotation *")
_TITLES = ("Vmid", "Name", "File", "Guest OS", "Version", "Annotation")
_SEPARATOR = "   "


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `vmsvc/getallvms`; the file is of the datastore, `dir/x.vmx`."""

    id: str
    name: str
    datastore: str
    file: str
    guest: str
    version: str
    note: str


def machines(text: str, datastores: Sequence[str]) -> list[Row]:
    """The table of `vmsvc/getallvms`. Raises UnsupportedFormat when any of it is not as hostd lays it out.

    Every record is as long as the heading, its last column being as wide as the longest note with its line ends: so
    names and notes can hold whatever they like, also what looks like another record."""
    head, line_end, body = text.partition("\n")
    if not _HEADER.fullmatch(head) or not line_end:
        raise UnsupportedFormat("vim-cmd vmsvc/getallvms did not print its table")
    step = len(head) + 1
    if len(body) % step:
        raise UnsupportedFormat("the table of vmsvc/getallvms is cut, or not laid out as it is known")
    records = [body[at : at + step] for at in range(0, len(body), step)]
    if not all(record.endswith("\n") for record in records):
        raise UnsupportedFormat("the table of vmsvc/getallvms is not laid out as it is known")
    if not records:
        return []
    found = {tuple(rows) for widths in _layouts(head) if (rows := _rows(records, widths, datastores))}
    if len(found) != 1:
        raise UnsupportedFormat("the columns of vmsvc/getallvms can't be told apart")
    return list(found.pop())


def _layouts(head: str) -> list[tuple[int, ...]]:
    """Every set of widths that would print this heading: all titles but the first are centred."""
    places = [head.index(title) for title in _TITLES[1:]]
    found = []
    for first, *odd in product(range(4, 12), (0, 1), (0, 1), (0, 1), (0, 1)):
        widths, start = [first], first + 3
        for place, title, more in zip(places, _TITLES[1:], odd, strict=False):
            widths.append(2 * (place - start) + len(title) + more)
            start += widths[-1] + 3
        last = len(head) - start
        if min(widths) > 0 and last >= 10 and start + (last - 10) // 2 == places[4]:
            found.append((*widths, last))
    return found


def _rows(records: Sequence[str], widths: Sequence[int], datastores: Sequence[str]) -> list[Row]:
    """The records cut at these widths; empty when they can't be those."""
    rows = [_row(record, widths, datastores) for record in records]
    whole = [row for row in rows if row is not None]
    if len(whole) != len(rows) or [row.id for row in whole] != sorted({row.id for row in whole}):
        return []
    columns = zip(*(_cells(record, widths) for record in records), strict=True)
    longest = [max(len(cell.rstrip(" ")) for cell in column) for column in columns]
    tight = (max(len(title), size) == width for title, size, width in zip(_TITLES, longest, widths, strict=True))
    return whole if all(list(tight)[:5]) else []


def _cells(record: str, widths: Sequence[int]) -> list[str]:
    cells, at = [], 0
    for width in widths:
        cells.append(record[at : at + width])
        at += width + 3
    return cells


def _row(record: str, widths: Sequence[int], datastores: Sequence[str]) -> Row | None:
    cells = _cells(record, widths)
    at = 0
    for width in widths[:-1]:
        at += width
        if record[at : at + 3] != _SEPARATOR:
            return None
        at += 3
    vmid, name, file, guest, version, note = (cell.rstrip(" ") for cell in cells)
    if not vmid.isdigit() or not re.fullmatch(r"\S*", guest) or not re.fullmatch(r"vmx-\d+", version):
        return None
    split = _split_path(file, datastores)
    return Row(vmid, name, *split, guest, version, note) if split else None


def _split_path(text: str, datastores: Sequence[str]) -> tuple[str, str] | None:
    """`[datastore] dir/x.vmx` by the datastores that are known: their names may hold brackets and blanks."""
    for name in sorted(datastores, key=len, reverse=True):
        rest = text.removeprefix(f"[{name}] ")
        if rest != text and rest.lower().endswith(".vmx"):
            return name, rest
    return None


def split_path(text: str, datastores: Sequence[str]) -> tuple[str, str]:
    """As `[datastore] dir/x.vmx` in a struct. Raises UnsupportedFormat."""
    found = _split_path(text, datastores)
    if found is None:
        raise UnsupportedFormat(f"{text!r} is on no datastore that is known")
    return found


def invalid_machines(text: str) -> list[str]:
    """Ids that hostd skips: machines whose .vmx it can't read."""
    return re.findall(r"^Skipping invalid VM '(\d+)'$", text, re.MULTILINE)


def table(text: str) -> list[dict[str, str]]:
    """A table of esxcli: titles, dashes that show the columns, rows. Raises UnsupportedFormat."""
    lines = text.split("\n")
    if len(lines) < 3 or lines[-1] or not re.fullmatch(r"-+(?:  -+)*", lines[1]):
        raise UnsupportedFormat("esxcli did not print a table, or it is cut")
    spans = [match.span() for match in re.finditer(r"-+", lines[1])]
    titles = [lines[0][begin:end].strip() for begin, end in spans]
    rows = []
    for line in lines[2:-1]:
        gaps = [line[before:after] for (_, before), (after, _) in pairwise(spans)]
        if any(gap.strip() for gap in gaps) or line[spans[-1][1] :].strip():
            raise UnsupportedFormat(f"a row of esxcli's table does not fit its columns: {line[:60]!r}")
        cells = [line[begin:end].strip(" ") for begin, end in spans]
        rows.append(dict(zip(titles, cells, strict=True)))
    return rows


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A datastore, or another file system. Sizes in bytes."""

    name: str
    uuid: str
    kind: str
    size: int
    free: int
    mounted: bool

    @property
    def is_datastore(self) -> bool:
        """Machines can lie there: it is none of ESXi's own."""
        return self.mounted and bool(self.name) and (self.kind.startswith(("VMFS-", "NFS")) or self.kind == "vsan")


def filesystems(text: str) -> list[Filesystem]:
    """`esxcli storage filesystem list`. Raises UnsupportedFormat."""
    found = []
    for row in table(text):
        try:
            size, free, mounted = int(row["Size"]), int(row["Free"]), row["Mounted"] == "true"
            found.append(Filesystem(row["Volume Name"], row["UUID"], row["Type"], size, free, mounted))
        except (KeyError, ValueError) as exc:
            raise UnsupportedFormat(f"a file system is not told as it is known: {exc}") from exc
    return found


_PROCESS = re.compile(
    r"\n?([^\n]+)\n   World ID: (\d+)\n   Process ID: \d+\n   VMX Cartel ID: \d+\n   UUID: [^\n]*\n"
    r"   Display Name: ([^\n]*)\n   Config File: ([^\n]+)\n"
)


def processes(text: str) -> dict[str, int]:
    """`esxcli vm process list`: the .vmx of each running machine (by UUID) and its world. Raises UnsupportedFormat."""
    found, at = {}, 0
    while match := _PROCESS.match(text, at):
        found[match[4]] = int(match[2])
        at = match.end()
    if text[at:].strip():
        raise UnsupportedFormat(f"esxcli vm process list is cut, or not as it is known: {text[at : at + 60]!r}")
    return found


def version(text: str) -> dict[str, str]:
    """`esxcli system version get`: Product, Version, Build, Update, Patch. Raises UnsupportedFormat."""
    found = dict(re.findall(r"^   (\w+): (.*)$", text, re.MULTILINE))
    if not {"Product", "Version", "Build"} <= set(found):
        raise UnsupportedFormat("esxcli system version get is not as it is known")
    return found


#: The words of `vmsvc/power.getstate`.
POWER = ("Powered on", "Powered off", "Suspended")


def power(text: str) -> str:
    """`vmsvc/power.getstate`: one of POWER. Raises UnsupportedFormat."""
    title, _, rest = text.partition("\n")
    if title != "Retrieved runtime info" or rest.strip() not in POWER:
        raise UnsupportedFormat(f"power.getstate is not as it is known: {text[:80]!r}")
    return rest.strip()


@dataclass(frozen=True, slots=True)
class Question:
    """What a machine waits for. `choices` by their numbers; `default` is one of them, -1 when none is marked."""

    id: str
    key: str
    text: str
    choices: dict[int, str]
    default: int = -1


def question(text: str) -> Question | None:
    """`vmsvc/message`. Raises UnsupportedFormat."""
    if text.strip() == "No message.":
        return None
    match = re.fullmatch(r"Virtual machine message (\w+):\n(.+?)\n((?:\d+\. [^\n]*\n)+)", text, re.DOTALL)
    if match is None:
        raise UnsupportedFormat(f"vmsvc/message is not as it is known: {text[:80]!r}")
    lines = re.findall(r"^(\d+)\. (.*?)( \[default\])?$", match[3], re.MULTILINE)
    default = [int(number) for number, _, mark in lines if mark]
    key, _, body = match[2].partition(":")
    known = key.startswith("msg.")
    choices = {int(number): words for number, words, _ in lines}
    return Question(match[1], key if known else "", body if known else match[2], choices, default[0] if default else -1)


def tasks(text: str) -> list[str]:
    """`vmsvc/get.tasklist`: whole names of tasks. Raises UnsupportedFormat."""
    match = re.fullmatch(r"\(ManagedObjectReference\) \[((?:\n   'vim\.Task:[^'\n]+',? ?)*)\n?\]", text.strip())
    if match is None:
        raise UnsupportedFormat(f"get.tasklist is not as it is known: {text[:80]!r}")
    return re.findall(r"'vim\.Task:([^']+)'", match[1])


@dataclass(frozen=True, slots=True)
class Snapshot:
    id: str
    name: str
    description: str
    created: str
    depth: int


_SNAPSHOT = (
    r"(?P<pad>-*)\|-(?:ROOT|CHILD)\n"
    r"(?P=pad)--Snapshot Name +: ?(?P<name>[^\n]*)\n(?P=pad)--Snapshot Id +: (?P<id>\d+)\n"
    r"(?P=pad)--Snapshot Des\w+ +: ?(?P<text>.*?)\n(?P=pad)--Snapshot Created On +: (?P<made>[\d/]+ [\d:]+)\n"
    r"(?P=pad)--Snapshot State +: [\w ]+\n"
)
_ENTRY = re.compile(_SNAPSHOT, re.DOTALL)


def snapshots(text: str, title: str = "Get Snapshot:") -> list[Snapshot]:
    """The tree that `vmsvc/snapshot.get` and others print, root first. Raises UnsupportedFormat.

    A description may hold anything; one that looks like entries of the tree may add some here, so only a name that
    nobody could know is proof."""
    head, _, rest = text.partition("\n")
    if head.strip() != title:
        raise UnsupportedFormat(f"the tree of snapshots is not as it is known: {text[:80]!r}")
    found, at = [], 0
    while match := _ENTRY.match(rest, at):
        depth = len(match["pad"]) // 2
        found.append(Snapshot(match["id"], match["name"], match["text"], match["made"], depth))
        at = match.end()
    if rest[at:].strip():
        raise UnsupportedFormat(f"the tree of snapshots is cut, or not as it is known: {rest[at : at + 60]!r}")
    return found
