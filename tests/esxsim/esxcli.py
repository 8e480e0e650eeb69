"""esxcli of a simulated host (facts 3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from tests.esxsim import render
from tests.esxsim.call import Call


def run(call: Call) -> int:
    words, formatter = list(call.words), ""
    while words and words[0].startswith("--"):
        option = words.pop(0)
        if option.startswith("--formatter="):
            formatter = option.partition("=")[2]
    known = ("", "csv", "json") if call.host.profile.json else ("", "csv")
    if formatter not in known:
        call.out(f"Error: Unknown formatter {formatter}.  Available formatters: xml, csv, keyvalue.\n")
        return 1
    if call.host.hostd_down:
        call.out("Connect to localhost failed: Connection failure\n")
        return 1
    function = next((COMMANDS[key] for key in COMMANDS if words[: len(key.split())] == key.split()), None)
    if function is None:
        call.out(f"Error: Unknown command or namespace {' '.join(words)}\n")
        return 1
    key = next(key for key in COMMANDS if words[: len(key.split())] == key.split())
    return function(call, formatter, words[len(key.split()) :]) or 0


def _rows(
    call: Call, formatter: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    if formatter == "csv":
        call.out(render.csv(head, rows))
    elif formatter == "json":
        call.out(json.dumps([dict(zip(head, row, strict=True)) for row in rows]) + "\n")
    else:
        call.out(render.table(head, rows, right))


def _facts(call: Call, formatter: str, facts: Sequence[tuple[str, str]]) -> None:
    if formatter:
        _rows(call, formatter, [key for key, _ in facts], [[value for _, value in facts]])
    else:
        call.out("".join(f"   {key}: {value}\n" for key, value in facts))


def version(call: Call, formatter: str, _: list[str]) -> None:
    own = call.host.profile
    facts = [("Product", "VMware ESXi"), ("Version", own.version), ("Build", f"Releasebuild-{own.build}")]
    _facts(call, formatter, [*facts, ("Update", str(own.update)), ("Patch", "0")])


def filesystems(call: Call, formatter: str, _: list[str]) -> None:
    host = call.host
    head = ("Mount Point", "Volume Name", "UUID", "Mounted", "Type", "Size", "Free")
    rows = []
    for store in host.datastores:
        if store.mounted:
            sizes = ("true", store.type, str(store.size), str(host.free(store)))
            rows.append((f"/vmfs/volumes/{store.uuid}", store.name, store.uuid, *sizes))
        else:
            rows.append(("", store.name, store.uuid, "false", "VMFS-unknown version", "0", "0"))
    if kind := host.profile.osdata:
        uuid = "6a91690d-eac44959-2d46-001b21e7d76e"
        rows.append((f"/vmfs/volumes/{uuid}", f"OSDATA-{uuid}", uuid, "true", kind, "128580583424", "124127281152"))
    uuid = "b67455de-254faef7-f8ae-2f039b5dad25"
    label = "BOOTBANK1" if host.profile.osdata else ""
    rows.append((f"/vmfs/volumes/{uuid}", label, uuid, "true", "vfat", "4293591040", "3796778496"))
    _rows(call, formatter, head, rows, ("Mounted", "Size", "Free"))


def processes(call: Call, formatter: str, _: list[str]) -> None:
    host = call.host
    head = ("Name", "WorldID", "ProcessID", "VMXCartelID", "UUID", "DisplayName", "ConfigFile")
    with host.lock:
        running = [vm for vm in host.vms.values() if vm.power == "on"]
        rows = [
            (
                vm.name,
                str(vm.world),
                "0",
                str(vm.world - 1),
                vm.config.get("uuid.bios", ""),
                vm.name,
                host.inside(vm.vmx),
            )
            for vm in running
        ]
    if formatter:
        _rows(call, formatter, head, rows)
        return
    names = ("World ID", "Process ID", "VMX Cartel ID", "UUID", "Display Name", "Config File")
    for row in rows:
        facts = "".join(f"   {key}: {value}\n" for key, value in zip(names, row[1:], strict=True))
        call.out(f"\n{row[0]}\n{facts}")


def kill(call: Call, _: str, words: list[str]) -> int:
    given = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
    with call.host.lock:
        for vm in call.host.vms.values():
            if vm.power == "on" and str(vm.world) == given.get("world-id"):
                vm.power = "off"
                call.host.stopped(vm)
                return 0
    call.out("Unable to find a world with the specified ID.\n")
    return 1


def maintenance(call: Call, _: str, __: list[str]) -> None:
    call.out("Enabled\n" if call.host.maintenance else "Disabled\n")


def portgroups(call: Call, formatter: str, _: list[str]) -> None:
    head = ("Name", "Virtual Switch", "Active Clients", "VLAN ID")
    rows = [(name, "vSwitch0", "1", str(vlan)) for name, vlan in call.host.networks.items()]
    _rows(call, formatter, head, rows, ("Active Clients", "VLAN ID"))


def settings(call: Call, _: str, words: list[str]) -> int:
    option = next((word for word in words if word.startswith("/")), "")
    if option == "/User/execInstalledOnly" and call.host.profile.executes_own_only:
        call.out("   Path: /User/execInstalledOnly\n   Type: integer\n   Int Value: 1\n")
        return 0
    call.out(f"Unable to find option {option.rpartition('/')[2]}\n")
    return 1


COMMANDS: dict[str, Callable[[Call, str, list[str]], int | None]] = {
    "system version get": version,
    "storage filesystem list": filesystems,
    "vm process list": processes,
    "vm process kill": kill,
    "system maintenanceMode get": maintenance,
    "network vswitch standard portgroup list": portgroups,
    "system settings advanced list": settings,
}
