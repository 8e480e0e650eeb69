"""What an ESX host answers, anonymised: fixtures that tests replay. Only commands that change nothing are given.

Every word of a value is replaced, but those that VMware's programs use themselves: by letters of the same kind, the
same for the same word, so that lengths, tables and references stay what they were; addresses and UUIDs likewise. Other
numbers stay. The key of the replacement is not kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from drctl.errors import DrctlError
from drctl.hypervisor.esx import inventory
from drctl.hypervisor.esx.batch import Answer, Command
from drctl.hypervisor.esx.inventory import EsxMachine
from drctl.hypervisor.esx.session import Runner, Session

FORMAT = 1
#: Machines of which everything is asked; each costs some ten calls of vim-cmd.
MACHINES = 5
_OF_HOST: tuple[Command, ...] = (
    ["vmware", "-vl"],
    ["uname", "-a"],
    ["esxcli", "--formatter=csv", "storage", "filesystem", "list"],
    ["esxcli", "--formatter=json", "system", "version", "get"],
    ["esxcli", "network", "vswitch", "standard", "portgroup", "list"],
    ["esxcli", "system", "settings", "advanced", "list", "-o", "/User/execInstalledOnly"],
    ["vim-cmd", "hostsvc/datastore/listsummary"],
    ["vim-cmd", "vmsvc/snapshot.remove"],
    ["which", "tr", "setsid", "nohup", "stat", "find", "xargs", "grep", "dd", "pigz", "python3", "base64", "truncate"],
)
_OF_MACHINE = (
    "power.getstate",
    "get.summary",
    "get.filelayout",
    "device.getdevices",
    "snapshot.get",
    "get.tasklist",
    "message",
)
_WORDS = """
vmfs volumes vmx vmdk vmsd nvram flat delta sesparse rdm rdmp ctk vswp dev disks esxcli vim cmd vmsvc hostsvc grep
dd vmware ESXi VMkernel Releasebuild build Update GA x86_64 true false TRUE FALSE unset null yes no on off Powered
Suspended poweredOn poweredOff suspended Retrieved runtime info VMFS NFS NFS41 vfat VFFS VMFSOS vsan UTF encoding
Skipping invalid VM persistent independent nonpersistent dependent append lsilogic pvscsi buslogic lsisas1068 scsi
sata ide nvme ahci hardDisk cdrom image disk thin zeroedthick vmxnet3 e1000 e1000e generated static assigned vpx
bios efi none multi writer seSparse vmfsSparse vmfsRawDeviceMap vmfsPassthroughRawDeviceMap RW VMFSSPARSE SESPARSE
VMFSRDM FLAT Disk DescriptorFile Extent description The Data Base DDB Change Tracking File msg uuid altered No
message Virtual machine Get Snapshot ROOT CHILD powered Guest guest other Linux linux64 toolsOk toolsOld
toolsNotInstalled toolsNotRunning guestToolsRunning guestToolsNotRunning green yellow red gray Hard Listsummary
Insufficient arguments Usage Unable find option Error Unknown command or namespace formatter Available formatters
xml csv keyvalue json snapshot remove vmid snapshotId Enabled Disabled haTask ManagedObjectReference not found
fffffffe ffffffff bin sbin usr lib busybox which setsid nohup stat xargs pigz python3 base64 truncate uname Product
Version Build Patch Network vSwitch0 Could Failed Permission denied such file directory KB bytes default vml naa mpx
eui t10 vmhba BOOTBANK1 BOOTBANK2 OSDATA pcieRootPort VMware Space Copyright
"""
KEEP = frozenset(_WORDS.split())
_WORD = re.compile(
    r"(?:[0-9A-Fa-f]{2}[ :-]){5,15}[0-9A-Fa-f]{2}(?![^\W_])"  # MAC addresses, UUIDs of a .vmx
    r"|\d{1,3}(?:\.\d{1,3}){3}(?![\d.])"  # IPv4
    r"|[^\W\d_][^\W_]*|\d+[^\W\d_][^\W_]*"
)
_STRUCT = re.compile(r"( *\w+ = )?(\([\w.]+\))?(.*)", re.DOTALL)
_PAIR = re.compile(r"([A-Za-z0-9_.:]+ ?= ?)(.*)", re.DOTALL)
_TREE = re.compile(r"(-*(?:\|-(?:ROOT|CHILD)|Snapshot (?:Name|Id|Des\w+|Created On|State) +: ?))(.*)", re.DOTALL)
_FACT = re.compile(r"(   [A-Z][A-Za-z ]*: )(.*)", re.DOTALL)
_GUEST = re.compile(r"\w+Guest\b|vmx-\d+")


class Recorder(Session):
    """A session that remembers every answer."""

    def __init__(self, name: str, shell: Runner) -> None:
        super().__init__(name, shell)
        self.answers: list[Answer] = []

    def run(self, *commands: Command, timeout: float = 300.0) -> list[Answer]:
        told = super().run(*commands, timeout=timeout)
        self.answers += told
        return told


def capture(name: str, shell: Runner, key: bytes, *, machines: int = MACHINES) -> dict[str, Any]:
    """Look at a host, and what it answered as a document without names. Raises HostUnreachable.

    What is not understood is in it all the same: that is what it is for; `problem` says so."""
    recorder, problem = Recorder(name, shell), ""
    some: Sequence[EsxMachine] = ()
    try:
        some = _varied(inventory.gather(recorder).machines)[:machines]
    except DrctlError as exc:
        problem = type(exc).__name__
    recorder.run(*_OF_HOST)
    for machine in some:
        recorder.run(*(["vim-cmd", f"vmsvc/{verb}", machine.id] for verb in _OF_MACHINE))
    veil = Veil(key)
    files: dict[str, str] = {}
    for answer in recorder.answers:
        if answer.command[:2] == ("grep", "-H"):
            found = inventory.split_files(answer.out, answer.command[3:])
            files |= {veil.words(path): veil.lines(text, "pairs") for path, text in found.items()}
    commands = [asdict(veil.answer(answer)) for answer in recorder.answers if answer.command[0] != "grep"]
    return {"format": FORMAT, "problem": problem, "answers": commands, "files": files}


def render(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=True, sort_keys=True) + "\n"


def _varied(machines: Sequence[EsxMachine]) -> list[EsxMachine]:
    """Machines with snapshots, refused disks and several disks first: they teach most."""
    return sorted(
        machines,
        key=lambda one: (not one.has_snapshots, not any(disk.disk.refusal for disk in one.disks), -len(one.disks)),
    )


class Veil:
    """Replaces words, each always by the same."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def answer(self, answer: Answer) -> Answer:
        command = tuple(self.words(word) if word.startswith("/vmfs") else word for word in answer.command)
        kind = _kind(answer.command)
        return Answer(command, answer.code, self.lines(answer.out, kind), self.lines(answer.err, "words"))

    def lines(self, text: str, kind: str) -> str:
        """Keys that programs print stay, by the kind of output; their values don't."""
        pattern = {"struct": _STRUCT, "pairs": _PAIR, "tree": _TREE, "facts": _FACT}.get(kind)
        heading = {"table": 2, "machines": 1}.get(kind, 0)
        every = text.split("\n")
        return "\n".join([*every[:heading], *(self._line(line, pattern) for line in every[heading:])])

    def _line(self, line: str, pattern: re.Pattern[str] | None) -> str:
        """The groups of the pattern but its last stay."""
        match = pattern.fullmatch(line) if pattern else None
        if match is None:
            return self.words(line)
        *kept, value = match.groups()
        return "".join(group or "" for group in kept) + self.words(value)

    def words(self, text: str) -> str:
        kept = [match.span() for match in _GUEST.finditer(text)]
        return _WORD.sub(lambda match: self._word(match, kept), text)

    def _word(self, match: re.Match[str], kept: Sequence[tuple[int, int]]) -> str:
        word = match[0]
        if word in KEEP or any(begin <= match.start() < end for begin, end in kept):
            return word
        digest = hashlib.blake2b(word.encode("utf-8", "surrogateescape"), key=self._key, digest_size=64).digest()
        hexadecimal = bool(re.fullmatch(r"[0-9A-Fa-f :-]+", word))
        return "".join(_other(char, digest[index % 64], hexadecimal) for index, char in enumerate(word))


def _other(char: str, number: int, hexadecimal: bool) -> str:
    """A character of the same kind."""
    if not char.isalnum():
        return char
    if char.isdigit():
        return str(number % 10)
    letters = "abcdef" if hexadecimal else "abcdefghijklmnopqrstuvwxyz"
    found = letters[number % len(letters)]
    return found.upper() if char.isupper() else found


def _kind(command: Sequence[str]) -> str:
    text = " ".join(command)
    kinds = {
        "esxcli storage filesystem list": "table",
        "esxcli network": "table",
        "vim-cmd vmsvc/getallvms": "machines",
        "vim-cmd vmsvc/snapshot.get": "tree",
        "esxcli vm process": "facts",
        "esxcli system": "facts",
        "vim-cmd vmsvc/get": "struct",
        "vim-cmd vmsvc/device": "struct",
        "vim-cmd hostsvc": "struct",
    }
    return next((kind for begin, kind in kinds.items() if text.startswith(begin)), "words")
