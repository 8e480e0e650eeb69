"""vim-cmd of a simulated host (facts 1)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

from tests.esxsim import formats, render
from tests.esxsim.call import Call
from tests.esxsim.render import Array, Null, Ref, Struct
from tests.esxsim.state import Fault, Question, Snapshot, State, Vm

POWER = {"on": "Powered on", "off": "Powered off", "suspended": "Suspended"}
STATES = {"on": "poweredOn", "off": "poweredOff", "suspended": "suspended"}
ALTERED = (
    "msg.uuid.altered:This virtual machine may have been moved or copied.\n\n"
    "In order to configure certain management and networking features VMware ESX needs to know which.\n\n"
    'Did you move this virtual machine, or did you copy it?\nIf you don\'t know, answer "I copied it".'
)
KEYS = {"scsi": 2000, "ide": 3000, "sata": 16000, "nvme": 32000}
BACKING = {
    "seSparse": "SeSparseBackingInfo",
    "vmfsSparse": "SparseVer2BackingInfo",
    "vmfsRawDeviceMap": "RawDiskMappingVer1BackingInfo",
    "vmfsPassthroughRawDeviceMap": "RawDiskMappingVer1BackingInfo",
}


def run(call: Call) -> int:
    """One vim-cmd. Faults are printed on stdout, with exit code 1 (facts 1.0)."""
    host = call.host
    if host.hostd_down:
        call.out(host.hostd_down + "\n")
        return 1
    if not call.words or call.words[0] not in COMMANDS:
        call.out("Invalid command.\n" if call.words else "Commands available under /:\nhostsvc/ solo/ vmsvc/\n")
        return 255
    name, *words = call.words
    usage, function = COMMANDS[name]
    if len(words) < usage.count(" <"):
        call.out(f"Insufficient arguments.\nUsage: {usage}\n")
        return 255
    try:
        if name in host.faults:
            raise host.faults.pop(name)
        return function(call, *words) or 0
    except Fault as fault:
        call.out(render.fault(fault.kind, fault.message, host.profile.comma, **fault.fields))
        return 1


def getallvms(call: Call) -> None:
    host = call.host
    with host.lock:
        rows = []
        for vm in host.vms.values():
            if vm.invalid:
                call.err(f"Skipping invalid VM '{vm.id}'\n")
                continue
            guest = vm.config.get("guestos", "other").replace("-", "_") + "Guest"
            version = f"vmx-{int(vm.config.get('virtualhw.version', host.profile.hardware)):02d}"
            rows.append((str(vm.id), vm.name, host.bracket(vm.vmx), guest, version, vm.config.get("annotation", "")))
    told = render.getallvms(rows)
    if not host.switches.trailing_blanks:
        told = "".join(f"{line.rstrip()}\n" for line in told.splitlines())
    call.out(told)


def getstate(call: Call, which: str) -> None:
    call.out(f"Retrieved runtime info\n{POWER[call.host.vm(which).power]}\n")


def _power(call: Call, which: str, title: str, wanted: str, allowed: tuple[str, ...]) -> int:
    host = call.host
    with host.lock:
        vm = host.vm(which)
        call.out(f"{title} VM:\n")
        if vm.power not in allowed:
            if host.switches.power_fault:
                kinds = {"requestedState": STATES[wanted], "existingState": STATES[vm.power]}
                text = f"The attempted operation cannot be performed in the current state ({POWER[vm.power]})."
                raise Fault("vim.fault.InvalidPowerState", text, **kinds)
            call.out({"on": "Power on failed", "off": "Power off failed"}.get(wanted, "Suspend failed") + "\n")
            return 1
        if wanted == "on":
            return power_on(call, vm)
        vm.power = wanted
        host.stopped(vm)
        if wanted == "suspended":
            vm.config["checkpoint.vmstate"] = f"{vm.vmx.stem}.vmss"
            host.save(vm)
    return 0


def power_on(call: Call, vm: Vm) -> int:
    """Blocks while a question is open (facts 1.2). Called under the lock, which it gives up while it waits."""
    host = call.host
    if host.maintenance:
        raise Fault("vim.fault.InvalidState", "The operation is not allowed in the current state of the host.")
    for name in vm.disks().values():
        for layer in formats.chain(vm.place(name)):
            if not formats.extent(layer).exists():
                raise Fault("vim.fault.FileNotFound", f"File {name} was not found")
            if host.locked(formats.extent(layer)) or formats.extent(layer) in host.cloning:
                text = f"Module DiskEarly power on failed.\nCannot open the disk '{host.inside(layer)}' or one of the "
                raise Fault(
                    "vim.fault.GenericVmConfigFault",
                    text + "snapshot disks it depends on.\nFailed to lock the file",
                )
    recorded, action = vm.config.get("uuid.location", ""), vm.config.get("uuid.action", "")
    if recorded and recorded != host.location(vm) and not action:
        choices = ("Cancel (Cancel)", "I _moved it (I _moved it)", "I _copied it (I _copied it)")
        vm.question = Question(str(len(host.tasks)), ALTERED, choices, 2)
        task = host.begin_task(vm.id, "powerOn")
        host.lock.release()
        try:
            vm.question.answered.wait(60)
        finally:
            host.lock.acquire()
        choice, vm.question, task.state = vm.question.choice, None, "success"
        if choice == 0:
            call.out("Power on failed\n")
            return 1
    vm.config["uuid.location"] = host.location(vm)
    vm.config.pop("uuid.action", None)
    vm.config.pop("checkpoint.vmstate", None)
    host.started(vm)
    host.save(vm)
    if host.switches.power_on_lies:
        call.out("Power on failed\n")
        return 1
    return 0


def shutdown(call: Call, which: str) -> None:
    host = call.host
    vm = host.vm(which)
    if vm.power != "on" or not vm.tools:
        raise Fault(
            "vim.fault.ToolsUnavailable",
            "Cannot complete operation because VMware Tools is not running in this virtual machine.",
        )

    def end() -> None:
        with host.lock:
            if vm.power == "on":
                vm.power = "off"
                host.stopped(vm)

    threading.Timer(vm.shutdown_seconds, end).start() if vm.shutdown_seconds else end()


def message(call: Call, which: str, identity: str = "", choice: str = "") -> None:
    vm = call.host.vm(which)
    question = vm.question
    if question is None:
        call.out("No message.\n")
    elif identity:
        if identity != question.id or not choice.isdigit() or int(choice) >= len(question.choices):
            raise Fault("vmodl.fault.InvalidArgument", "A specified parameter was not correct: ")
        question.choice = int(choice)
        question.answered.set()
    else:
        lines = [f"{n}. {text}" for n, text in enumerate(question.choices)]
        lines[question.default] += " [default]"
        call.out(f"Virtual machine message {question.id}:\n{question.text}\n" + "\n".join(lines) + "\n")


def snapshot_create(call: Call, which: str, *words: str) -> int:
    """`[name] [description] [memory] [quiesced]`, by position: what is left out shifts the rest (facts 1.6)."""
    host = call.host
    name, description, memory, quiesced = (*words, *("", "", "0", "0")[len(words) :])[:4]
    vm = host.vm(which)
    call.out("Create Snapshot:\n")
    if quiesced == "1" and not (vm.tools and host.switches.quiesce_works):
        raise Fault("vim.fault.ApplicationQuiesceFault", "An error occurred while quiescing the virtual machine.")
    task = host.begin_task(vm.id, "createSnapshot")

    def work() -> None:
        time.sleep(host.switches.snapshot_seconds)
        try:
            with host.lock:
                host.create_snapshot(vm, name, description, memory == "1")
            task.state = "success"
        except BaseException:
            task.state = "error"
            raise

    if host.switches.create_waits:
        work()
    else:
        host.background(work)
    return 0


def snapshot_get(call: Call, which: str) -> None:
    call.out("Get Snapshot:\n")
    _tree(call, call.host.vm(which))


def _tree(call: Call, vm: Vm) -> None:
    def tell(parent: int, depth: int) -> None:
        for one in vm.snapshots:
            if one.parent == parent:
                _tell(call, one, depth)
                tell(one.id, depth + 1)

    tell(0, 0)


def _tell(call: Call, one: Snapshot, depth: int) -> None:
    dashes, made = "--" * depth, datetime.fromtimestamp(one.created)
    when = f"{made.month}/{made.day}/{made.year} {made.hour}:{made.minute}:{made.second}"
    call.out(f"{dashes}|-{'CHILD' if depth else 'ROOT'}\n")
    facts = (("Snapshot Name        ", one.name), ("Snapshot Id        ", str(one.id)))
    facts += (("Snapshot Desciption  ", one.description), ("Snapshot Created On  ", when))
    for key, value in (*facts, ("Snapshot State       ", one.state)):
        call.out(f"{dashes}--{key}: {value}\n")


def snapshot_remove(call: Call, which: str, identity: str) -> int:
    host = call.host
    vm = host.vm(which)
    call.out("Remove Snapshot:\n")
    found = next((one for one in vm.snapshots if str(one.id) == identity), None)
    if found is None:
        raise Fault("vim.fault.NotFound", f'Unable to find a snapshot corresponding to "{identity}"')
    _remove(host, vm, [found])
    _tree(call, vm)
    return 0


def snapshot_removeall(call: Call, which: str) -> int:
    vm = call.host.vm(which)
    call.out("Remove All Snapshots:\n")
    _remove(call.host, vm, list(reversed(vm.snapshots)))
    return 0


def _remove(host: State, vm: Vm, snapshots: list[Snapshot]) -> None:
    task = host.begin_task(vm.id, "removeSnapshot")

    def work() -> None:
        time.sleep(host.switches.merge_seconds)
        with host.lock:
            for one in snapshots:
                if one in vm.snapshots:
                    host.remove_snapshot(vm, one)
            task.state = "success"

    if host.switches.remove_waits:
        work()
    else:
        host.background(work)


def registervm(call: Call, path: str, name: str = "", *_: str) -> None:
    host = call.host
    with host.lock:
        vmx = host.real(path)
        if not vmx.is_file():
            raise Fault("vim.fault.NotFound", "The object or item referred to could not be found.")
        vm = host.register(vmx)
        if name:
            vm.config["displayname"] = name
            host.save(vm)
    if host.switches.register_prints_id:
        call.out(f"{vm.id}\n")


def unregister(call: Call, which: str) -> None:
    host = call.host
    with host.lock:
        vm = next((vm for vm in host.vms.values() if str(vm.id) == which), None) or host.vm(which)
        if vm.power != "off":
            text = "The attempted operation cannot be performed in the current state (Powered on)."
            raise Fault("vim.fault.InvalidPowerState", text)
        del host.vms[vm.id]


def reload(call: Call, which: str) -> None:
    from tests.esxsim.state import read_vmx

    vm = call.host.vm(which)
    vm.config = read_vmx(vm.vmx)


def destroy(call: Call, which: str) -> None:
    """Deletes the machine's disks (facts 1.7)."""
    vm = call.host.vm(which)
    for name in vm.disks().values():
        for layer in formats.chain(vm.place(name)):
            formats.extent(layer).unlink(missing_ok=True)
            layer.unlink()
    vm.vmx.unlink()
    unregister(call, which)


def tasklist(call: Call, which: str) -> None:
    host = call.host
    items = [Ref(f"vim.Task:{each}") for each in host.task_ids(host.vm(which).id)]
    call.out(render.value(Array("ManagedObjectReference", items), host.profile.comma) + "\n")


def task_info(call: Call, which: str) -> None:
    task = call.host.tasks.get(which)
    if task is None:
        text = "The object has already been deleted or has not been completely created"
        raise Fault("vmodl.fault.ManagedObjectNotFound", text, obj=f"vim.Task:{which}")
    fields = [("key", task.id), ("task", Ref(f"vim.Task:{task.id}")), ("state", task.state), ("progress", None)]
    call.out(render.value(Struct("vim.TaskInfo", fields), call.host.profile.comma) + "\n")


def summary(call: Call, which: str) -> None:
    host = call.host
    vm = host.vm(which)
    config = [
        ("name", vm.name),
        ("template", False),
        ("vmPathName", host.bracket(vm.vmx)),
        ("memorySizeMB", int(vm.config.get("memsize", 4))),
        ("numCpu", int(vm.config.get("numvcpus", 1))),
        ("numVirtualDisks", len(vm.disks())),
        ("uuid", vm.config.get("uuid.bios", "")),
        ("annotation", vm.config.get("annotation", "")),
    ]
    question: object = Null("vim.vm.QuestionInfo")
    if vm.question:
        question = Struct("vim.vm.QuestionInfo", [("id", vm.question.id), ("text", vm.question.text)])
    runtime = [("powerState", STATES[vm.power]), ("question", question), ("bootTime", None)]
    tools = "guestToolsRunning" if vm.tools and vm.power == "on" else "guestToolsNotRunning"
    guest = [("toolsStatus", "toolsOk" if vm.tools else "toolsNotInstalled"), ("toolsRunningStatus", tools)]
    fields = [
        ("vm", Ref(f"vim.VirtualMachine:{vm.id}")),
        ("runtime", Struct("vim.vm.RuntimeInfo", runtime)),
        ("guest", Struct("vim.vm.Summary.GuestSummary", [*guest, ("ipAddress", None)])),
        ("config", Struct("vim.vm.Summary.ConfigSummary", config)),
        ("overallStatus", "green"),
        ("customValue", Array("vim.CustomFieldsManager.Value")),
    ]
    call.out("Listsummary:\n\n" + render.value(Struct("vim.vm.Summary", fields), host.profile.comma) + "\n")


def filelayout(call: Call, which: str) -> None:
    host = call.host
    vm = host.vm(which)
    disks = []
    for device, name in vm.disks().items():
        files = [host.bracket(each) for each in reversed(formats.chain(vm.place(name)))]
        bus, unit = device.split(":")
        key = KEYS[bus.rstrip("0123456789")] + int(unit)
        disks.append(Struct("vim.vm.FileLayout.DiskLayout", [("key", key), ("diskFile", Array("string", files))]))
    fields = [("configFile", Array("string", [vm.vmx.name])), ("disk", Array("vim.vm.FileLayout.DiskLayout", disks))]
    call.out(render.value(Struct("vim.vm.FileLayout", [*fields, ("swapFile", None)]), host.profile.comma) + "\n")


def getdevices(call: Call, which: str) -> None:
    host = call.host
    vm = host.vm(which)
    disks = []
    for number, (device, name) in enumerate(vm.disks().items(), 1):
        top = vm.place(name)
        kind = BACKING.get(formats.field(top.read_text(), "createType"), "FlatVer2BackingInfo")
        total = formats.sectors(top) // 2
        label = [("label", f"Hard disk {number}"), ("summary", f"{total:,} KB")]
        backing = [("fileName", host.bracket(top)), ("diskMode", vm.config.get(f"{device}.mode", "persistent"))]
        fields = [
            ("key", 2000 + number - 1),
            ("deviceInfo", Struct("vim.Description", label)),
            ("backing", Struct(f"vim.vm.device.VirtualDisk.{kind}", [*backing, ("changeId", None)])),
            ("capacityInKB", total),
        ]
        disks.append(Struct("vim.vm.device.VirtualDisk", fields))
    hardware = Struct("vim.vm.VirtualHardware", [("device", Array("vim.vm.device.VirtualDevice", disks))])
    call.out(render.value(hardware, host.profile.comma) + "\n")


def datastores(call: Call) -> None:
    host = call.host
    items = []
    for store in host.datastores:
        fields = [
            ("datastore", Ref(f"vim.Datastore:{store.uuid}")),
            ("name", store.name),
            ("url", f"/vmfs/volumes/{store.uuid}"),
            ("capacity", store.size),
            ("freeSpace", host.free(store)),
            ("accessible", store.mounted),
            ("type", store.type.split("-")[0]),
        ]
        items.append(Struct("vim.Datastore.Summary", fields))
    call.out(render.value(Array("vim.Datastore.Summary", items), host.profile.comma) + "\n")


def maintenance(on: bool) -> Callable[..., None]:
    def set_it(call: Call, *_: str) -> None:
        call.host.maintenance = on
        verb = "enterMaintenanceMode" if on else "exitMaintenanceMode"
        call.out(f"'vim.Task:haTask-ha-host-vim.HostSystem.{verb}-213709113'\n")

    return set_it


#: name → (usage, what does it); a ` <` in the usage is a word that must be there
COMMANDS: dict[str, tuple[str, Callable[..., int | None]]] = {
    "vmsvc/getallvms": ("getallvms", getallvms),
    "vmsvc/power.getstate": ("power.getstate <vmid>", getstate),
    "vmsvc/power.on": ("power.on <vmid>", lambda c, w: _power(c, w, "Powering on", "on", ("off", "suspended"))),
    "vmsvc/power.off": ("power.off <vmid>", lambda c, w: _power(c, w, "Powering off", "off", ("on", "suspended"))),
    "vmsvc/power.suspend": ("power.suspend <vmid>", lambda c, w: _power(c, w, "Suspending", "suspended", ("on",))),
    "vmsvc/power.shutdown": ("power.shutdown <vmid>", shutdown),
    "vmsvc/message": ("message <vmid> [messageId] [messageChoice]", message),
    "vmsvc/snapshot.create": (
        "snapshot.create <vmid> [snapshotName] [snapshotDescription] [includeMemory] [quiesced]",
        snapshot_create,
    ),
    "vmsvc/snapshot.get": ("snapshot.get <vmid>", snapshot_get),
    "vmsvc/snapshot.remove": ("snapshot.remove <vmid> <snapshotId>", snapshot_remove),
    "vmsvc/snapshot.removeall": ("snapshot.removeall <vmid>", snapshot_removeall),
    "vmsvc/unregister": ("unregister <vmid>", unregister),
    "vmsvc/reload": ("reload <vmid>", reload),
    "vmsvc/destroy": ("destroy <vmid>", destroy),
    "vmsvc/get.tasklist": ("get.tasklist <vmid>", tasklist),
    "vmsvc/get.summary": ("get.summary <vmid>", summary),
    "vmsvc/get.filelayout": ("get.filelayout <vmid>", filelayout),
    "vmsvc/device.getdevices": ("device.getdevices <vmid>", getdevices),
    "vimsvc/task_info": ("task_info <task>", task_info),
    "solo/registervm": ("registervm <cfg> [name] [resourcepool]", registervm),
    "hostsvc/datastore/listsummary": ("datastore/listsummary", datastores),
    "hostsvc/maintenance_mode_enter": ("maintenance_mode_enter", maintenance(True)),
    "hostsvc/maintenance_mode_exit": ("maintenance_mode_exit", maintenance(False)),
}
