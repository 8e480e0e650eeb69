"""Old disks are sealed and become the beginning of the way back; killed anywhere, it goes on; nothing of an old reign may
be left that could act."""

from __future__ import annotations

import asyncio
import random
import subprocess
import threading
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from types import SimpleNamespace

import msgspec
import pytest

from drctl.appliance.failback import service as failback_service
from drctl.appliance.failback.ports import Deps
from drctl.appliance.failback.record import KEEP_SECONDS, TAG, FailbackPhase
from drctl.appliance.failback.reign import FailbackReign
from drctl.appliance.failback.service import FailbackService
from drctl.appliance.failback.turn import spec_back, turned
from drctl.appliance.source.group_state import Desired, GroupState
from drctl.appliance.source.handover_record import Handover, HandoverFiles, HandoverPhase
from drctl.errors import NotFound, PreconditionFailed, Refused, WrongPhase
from drctl.hypervisor.libvirt_files import LibvirtFiles
from drctl.model.group import GroupDisk, GroupSpec, Retention, turned_around
from drctl.model.machine import Disk, Machine, MachineState
from drctl.model.phase import Phase
from drctl.replication import seeding
from drctl.store import atomic
from drctl.store.group_info import StoreMode, read_info
from drctl.store.group_store import GroupStore

MIB = 2**20
SPEC = GroupSpec(
    "erp",
    "alpha",
    "beta",
    ("db",),
    "alpha-1",
    "beta-1",
    networks=(("lan", "lan-b"), ("dmz", "lan-b")),
    test_networks=(("lan", "lab"),),
)
BACK = turned_around(SPEC)
DISKS = [GroupDisk(0, "db", "vda", 2 * MIB), GroupDisk(3, "db", "vdb", MIB)]
XML = "<domain><name>db</name><uuid>u-db</uuid><devices/></domain>"


class Host:
    def __init__(self):
        self.known = {}
        self.states = {}

    def put(self, *disks, name="db"):
        self.known[name] = Machine(name, f"u-{name}", MachineState.SHUT_OFF, disks)
        self.states[name] = MachineState.SHUT_OFF

    def machine(self, name):
        if name not in self.known:
            raise NotFound("machine", name)
        return self.known[name]

    def definition(self, name):
        self.machine(name)
        return XML

    live_definition = definition

    def files(self):
        return LibvirtFiles(SimpleNamespace(uri="qemu:///session"))

    def secrets(self):
        return {}

    def undefine(self, name):
        del self.known[name]

    def state(self, name):
        self.machine(name)
        return self.states[name]


class Sources:
    def __init__(self):
        self.states = {}

    def names(self):
        return sorted(self.states)

    def state(self, name):
        return self.states[name]

    def turn(self, name, change):
        self.states[name] = change(self.states.get(name))


class Seeds:
    """Disks that are served, and the receiver that lets go."""

    def __init__(self):
        self.holding = False

    @contextmanager
    def serve(self, group, disks):
        yield {disk.number: disk.path for disk in disks}

    @contextmanager
    def held(self, group):
        self.holding = True
        yield
        self.holding = False

    @staticmethod
    @asynccontextmanager
    async def connected(path):
        with open(path, "rb") as file:
            data = file.read()

        async def read(offset, length):
            return bytearray(data[offset : offset + length])

        async def first_holes(offset, length):
            return length, False

        try:
            async with asyncio.TaskGroup() as tasks:
                ready = SimpleNamespace(size=len(data))
                yield SimpleNamespace(ready=ready, read=read, first_holes=first_holes), tasks
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures


class Site:
    """A site as a failback sees it."""

    def __init__(self, directory, site="alpha"):
        self.directory = directory
        self.random = random.Random(3)
        self.host, self.sources, self.seeds = Host(), Sources(), Seeds()
        self.reign = "committed"
        self.home = SimpleNamespace(
            path=directory,
            store=directory / "store",
            groups=directory / "groups",
            run=directory,
            config=SimpleNamespace(site=site, host=f"{site}-1"),
            peer=lambda _: None,
        )
        for path in (self.home.store, self.home.groups, directory / "images" / "erp"):
            path.mkdir(parents=True, exist_ok=True)
        self.open()

    def open(self):
        expiry = SimpleNamespace(forget=lambda _: None)
        deps = Deps(self.host, self.sources, self.seeds, self.seeds, expiry, lambda _: self.reign)
        self.service, self.reigning = FailbackService(self.home, deps), FailbackReign(self.home, deps)

    @property
    def root(self):
        return self.home.store / "erp"

    def image(self, name, size, form="raw"):
        path = self.directory / name
        data = self.random.randbytes(size // 4) + bytes(size - size // 2) + self.random.randbytes(size // 4)
        path.write_bytes(data)
        if form != "raw":
            raw = path.rename(path.with_suffix(".tmp"))
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, raw, path], check=True)
            raw.unlink()
        return path, data

    def superseded(self, generation=1):
        """The site as it is after the other one has taken over: its disks lie there."""
        one, self.vda = self.image("db.vda.raw", 2 * MIB)
        two, self.vdb = self.image("db.vdb.raw", MIB)
        self.host.put(Disk("vda", str(one), "raw", 2 * MIB), Disk("vdb", str(two), "raw", MIB))
        self.sources.states["erp"] = GroupState(SPEC, phase=Phase.FAILED_OVER, generation=generation)
        return one, two

    def prepare(self, generation=3, number=40, disks=DISKS):
        order = {
            "group": "erp",
            "generation": generation,
            "number": number,
            "disks": [msgspec.to_builtins(disk) for disk in disks],
            "spec": msgspec.to_builtins(BACK),
        }
        return self.service.prepare(order, lambda _: None)

    def look(self, disks=DISKS):
        return self.service.disks({"group": "erp", "disks": [msgspec.to_builtins(d) for d in disks]}, lambda _: None)

    def content(self, number):
        with closing(GroupStore.open(self.root)) as store, closing(store.open_view(number)) as view:
            return {disk.name: bytes(view.disk(disk.name).read(0, disk.size)) for disk in view.disks}

    def checkpoints(self):
        with closing(GroupStore.open(self.root)) as store:
            return store.checkpoints()

    def stream(self, generation, epoch):
        """What a stream from the other site is told."""
        with closing(GroupStore.open(self.root, writer=True)) as store:
            return store.begin_stream("beta-1", generation, epoch)


@pytest.fixture
def alpha(tmp_path, monkeypatch):
    monkeypatch.setattr(seeding, "connected", Seeds.connected)
    monkeypatch.setattr(failback_service, "DETACH_SECONDS", 0.3)
    yield Site(tmp_path)
    atomic.set_fault(None)


def test_old_disks_are_sealed_and_their_images_are_the_bases(alpha):
    one, two = alpha.superseded()
    told = alpha.look()
    assert [(disk["name"], disk["way"]) for disk in told["old"]] == [("db.vda", "move"), ("db.vdb", "move")]
    assert (told["reasons"], told["left_out"], told["needed"], told["generation"]) == ([], [], 0, 1)
    record = alpha.prepare()
    assert (record["phase"], record["checkpoint"], record["generation"]) == ("open", 41, 3)
    assert not one.exists()
    assert not two.exists()
    assert alpha.content(41) == {"db.vda": alpha.vda, "db.vdb": alpha.vdb}
    (sealed,) = alpha.checkpoints()
    assert (sealed.tags, sealed.generation) == ((TAG,), 1)
    assert alpha.host.known == {}
    assert (alpha.directory / "failbacks/erp/db.xml").read_text() == XML
    # The stream that is let in is the new one alone, and all of it is compared.
    with pytest.raises(Refused, match="superseded"):
        alpha.stream(2, "b" * 32)
    assert alpha.stream(3, "b" * 32).needs == "full"
    assert alpha.prepare()["checkpoint"] == 41
    assert not alpha.seeds.holding


def test_what_is_sealed_can_be_recovered(alpha):
    alpha.superseded()
    alpha.prepare()
    with closing(GroupStore.open(alpha.root)) as store:
        definition = store.definition(41)
    assert [machine["definition"] for machine in definition["machines"]] == [XML]
    assert [(disk["number"], disk["target"]) for disk in definition["disks"]] == [(0, "vda"), (3, "vdb")]
    assert (definition["source_site"], definition["spec"]["source"]) == ("alpha", "beta")


def test_a_disk_of_another_size_is_left_alone_and_sent_in_full(alpha):
    _, two = alpha.superseded()
    grown = [DISKS[0], GroupDisk(3, "db", "vdb", 4 * MIB), GroupDisk(4, "db", "vdc", MIB)]
    record = alpha.prepare(disks=grown)
    assert [one["name"] for one in record["left_out"]] == ["db.vdb", "db.vdc"]
    assert "it is no seed of that disk" in record["left_out"][0]["reason"]
    assert two.read_bytes() == alpha.vdb
    assert alpha.content(41) == {"db.vda": alpha.vda}


def test_a_site_without_any_old_disk_takes_a_first_sync(alpha):
    alpha.sources.states["erp"] = GroupState(SPEC, phase=Phase.FAILED_OVER)
    record = alpha.prepare()
    assert (record["phase"], record["checkpoint"], len(record["left_out"])) == ("open", 0, 2)
    assert read_info(alpha.root).mode is StoreMode.INITIAL
    assert alpha.stream(3, "b" * 32).needs == "initial"


def test_a_site_that_was_built_anew_takes_one_too(alpha):
    record = alpha.prepare()
    assert record["phase"] == "open"
    assert alpha.stream(3, "b" * 32).needs == "initial"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda site: site.host.states.update(db=MachineState.RUNNING), "db is running"),
        (lambda site: site.sources.states.update(erp=GroupState(SPEC, phase=Phase.LIVE)), "has not heard yet"),
        (
            lambda site: site.sources.states.update(erp=GroupState(SPEC, phase=Phase.FAILED_OVER, epoch="e" * 32)),
            "not detached",
        ),
    ],
)
def test_what_stands_in_the_way_is_named_and_nothing_is_done(alpha, spoil, text):
    one, _ = alpha.superseded()
    spoil(alpha)
    assert any(text in reason for reason in alpha.look()["reasons"])
    with pytest.raises(PreconditionFailed, match=text):
        alpha.prepare()
    assert one.exists()
    assert not alpha.root.exists()
    assert alpha.service.told("erp") is None


def test_disks_that_are_being_detached_are_waited_for(alpha):
    alpha.superseded()
    state = alpha.sources.states["erp"]
    alpha.sources.states["erp"] = msgspec.structs.replace(state, epoch="e" * 32)
    threading.Timer(0.1, lambda: alpha.sources.states.update(erp=state)).start()
    assert alpha.look()["reasons"] == []


def test_a_generation_that_is_not_new_is_refused(alpha):
    alpha.superseded(generation=3)
    with pytest.raises(Refused, match="not above 3"):
        alpha.prepare(generation=3)


def again(site):
    """alpha has reigned again since, from images of drctl's own, and has lost the group once more."""
    with closing(GroupStore.open(site.root)) as store:
        store.set_generation(4)
        store.set_mode(StoreMode.FAILED_OVER)
    images = {}
    for disk, old in zip(DISKS, (site.vda, site.vdb), strict=True):
        path = site.directory / "images/erp" / f"{disk.name}-g4.qcow2"
        data = bytearray(old)
        data[5000:5100] = site.random.randbytes(100)
        images[disk.name] = bytes(data)
        path.write_bytes(bytes(data))
        site.host.put(
            *(site.host.known["db"].disks if "db" in site.host.known else ()),
            Disk(disk.target, str(path), "raw", disk.size),
        )
    site.sources.states["erp"] = GroupState(SPEC, phase=Phase.FAILED_OVER, generation=5)
    return images


def test_old_disks_of_a_store_with_history_are_added_to_it(alpha):
    alpha.superseded()
    alpha.prepare()
    images = again(alpha)
    told = alpha.look()
    assert {disk["way"] for disk in told["old"]} == {"compare"}
    assert told["generation"] == 5
    record = alpha.prepare(generation=6, number=90)
    assert (record["checkpoint"], record["differing"]) == (91, 2 * 4096)
    assert alpha.content(91) == images
    assert alpha.content(41) == {"db.vda": alpha.vda, "db.vdb": alpha.vdb}
    assert [(one.number, one.tags) for one in alpha.checkpoints()] == [(41, (TAG,)), (91, (TAG,))]
    assert read_info(alpha.root).generation == 6


def test_images_that_the_store_holds_go_when_it_has_gone_beyond_them(alpha):
    alpha.superseded()
    alpha.prepare()
    again(alpha)
    alpha.prepare(generation=6, number=90)
    kept = list((alpha.directory / "images/erp").iterdir())
    alpha.service.look()
    assert len(kept) == 2
    assert all(path.exists() for path in kept)
    with closing(GroupStore.open(alpha.root, writer=True)) as store:
        order = seeding.OldDisks("erp", "beta-1", 6, "c" * 32, 92, 1, {"version": 9, "machines": [], "disks": []}, ())
    del store
    seeding.put(alpha.root, order, lambda _: None)
    alpha.service._due = 0.0
    alpha.service.look()
    assert not any(path.exists() for path in kept)
    assert alpha.service.told("erp")["leftovers"] == []


def test_the_tag_goes_after_thirty_days_and_an_earlier_one_by_its_own_time(alpha, monkeypatch):
    alpha.superseded()
    alpha.prepare()
    again(alpha)
    now = failback_service.time.time()
    monkeypatch.setattr(failback_service.time, "time", lambda: now + 86400)
    alpha.prepare(generation=6, number=90)
    for days, tags in ((29, [(TAG,), (TAG,)]), (30.5, [(), (TAG,)]), (31.5, [(), ()])):
        monkeypatch.setattr(failback_service.time, "time", lambda days=days: now + days * 86400)
        alpha.service._due = 0.0
        alpha.service.look()
        assert [one.tags for one in alpha.checkpoints()] == tags
    assert KEEP_SECONDS == 30 * 86400


def test_a_journal_that_is_nearly_full_gets_the_tags_room_but_not_in_the_first_week(alpha, monkeypatch):
    alpha.superseded()
    alpha.prepare()
    again(alpha)
    alpha.prepare(generation=6, number=90)
    now = failback_service.time.time()

    def look(days, full):
        monkeypatch.setattr(failback_service.time, "time", lambda: now + days * 86400)
        monkeypatch.setattr(GroupStore, "used", lambda store: int(full * store.info.retention.journal_limit))
        alpha.service._due = 0.0
        alpha.service.look()
        return [one.tags for one in alpha.checkpoints()], alpha.service.told("erp")["given_up"]

    assert look(6.9, 0.99) == ([(TAG,), (TAG,)], 0.0)
    assert look(7.1, 0.85) == ([(TAG,), (TAG,)], 0.0)
    assert look(7.2, 0.86) == ([(), ()], now + 7.2 * 86400)
    assert alpha.service.told("erp")["kept_until"] is None


class Killed(BaseException):
    pass


@pytest.mark.parametrize("every", [31, pytest.param(1, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
@pytest.mark.parametrize("history", [False, True])
def test_killed_at_any_step_a_new_supervisor_finishes_it(tmp_path, monkeypatch, history, every):
    monkeypatch.setattr(seeding, "connected", Seeds.connected)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for die_at in range(7 if every > 1 else 1, 600, every):
        site = Site(tmp_path / f"{die_at}")
        site.superseded()
        expected, number, generation = {"db.vda": site.vda, "db.vdb": site.vdb}, 41, 3
        if history:
            site.prepare()
            expected, number, generation = again(site), 91, 6
        steps = 0

        def fault(_name, die_at=die_at):
            nonlocal steps
            steps += 1
            if steps == die_at:
                raise Killed

        atomic.set_fault(fault)
        with suppress(Killed):
            finish(site, generation, number)
        died = steps >= die_at
        atomic.set_fault(None)
        site.open()
        site.service.resume()
        for thread in threading.enumerate():
            if thread.name == "failback-erp":
                thread.join(20)
        record = site.prepare(generation=generation, number=number - 1)
        assert record["phase"] == "open"
        assert site.content(number) == expected
        assert site.host.known == {}
        if not died:
            return
    pytest.fail("more steps than were tried")


def finish(site, generation, number):
    """`prepare`, in this thread, so that it can be killed."""
    service = site.service
    monkey = service._begin

    def begin(name, record, params):
        told = failback_service.queue.Queue()
        service._work(record, params, told)
        return told

    service._begin = begin
    try:
        site.prepare(generation=generation, number=number - 1)
    finally:
        service._begin = monkey


# -- where it reigns --------------------------------------------------------------------------------------------------


@pytest.fixture
def beta(tmp_path, monkeypatch):
    """It has taken the group over, and is committed."""
    monkeypatch.setattr(seeding, "connected", Seeds.connected)
    site = Site(tmp_path, "beta")
    GroupStore.create(site.root, "erp", 1, DISKS, Retention()).close()
    definition = {
        "version": 7,
        "spec": msgspec.to_builtins(SPEC),
        "machines": [{"name": "db", "uuid": "u", "definition": XML, "files": {}}],
        "disks": [msgspec.to_builtins(disk) for disk in DISKS],
    }
    with closing(GroupStore.open(site.root)) as store:
        store.set_mode(StoreMode.JOURNAL)
    seeding.put(site.root, seeding.OldDisks("erp", "alpha-1", 1, "a" * 32, 12, 10**18, definition, ()), lambda _: None)
    with closing(GroupStore.open(site.root)) as store:
        store.set_generation(2)
        store.set_mode(StoreMode.FAILED_OVER)
    site.host.put(
        Disk("vda", "/i/a", "qcow2", 2 * MIB), Disk("vdb", "/i/b", "qcow2", MIB), Disk("vdc", "/i/c", "raw", MIB)
    )
    return site


def test_the_plan_turns_the_group_around_and_goes_on_with_its_numbers(beta):
    plan = beta.reigning.plan({"group": "erp"}, lambda _: None)
    assert (plan["generation"], plan["protected"], plan["newest"], plan["reasons"]) == (2, False, 12, [])
    assert [(disk["number"], disk["target"]) for disk in plan["disks"]] == [(0, "vda"), (3, "vdb"), (4, "vdc")]
    spec = plan["spec"]
    assert (spec["source"], spec["recovery"], spec["source_host"], spec["recovery_host"]) == (
        "beta",
        "alpha",
        "beta-1",
        "alpha-1",
    )
    assert [list(pair) for pair in spec["networks"]] == [["lan-b", "lan"]]
    assert not spec["test_networks"]


def test_it_becomes_the_source_under_a_new_generation(beta):
    files = HandoverFiles(beta.directory / "handovers")
    files.save(Handover("erp", HandoverPhase.HANDED_OVER, 2, ["db"]))
    order = {"group": "erp", "generation": 3, "definition_version": 7}
    assert beta.reigning.protect(order, lambda _: None) == {"group": "erp", "generation": 3, "phase": "syncing"}
    state = beta.sources.states["erp"]
    assert (state.desired, state.next_number, state.epoch) == (Desired.PROTECTED, 5, "")
    assert all(disk.pass_needed for disk in state.disks)
    assert files.load("erp") is None
    assert msgspec.json.decode((beta.home.groups / "erp.definition").read_bytes()) == {"version": 7}
    beta.reigning.protect(order, lambda _: None)
    plan = beta.reigning.plan({"group": "erp"}, lambda _: None)
    assert (plan["protected"], plan["phase"], plan["generation"]) == (True, "syncing", 3)


def test_not_before_it_is_committed_nor_under_an_old_generation(beta):
    with pytest.raises(Refused, match="not above 2"):
        beta.reigning.protect({"group": "erp", "generation": 2}, lambda _: None)
    beta.reign = "running"
    with pytest.raises(PreconditionFailed, match="drctl commit erp"):
        beta.reigning.protect({"group": "erp", "generation": 3}, lambda _: None)
    with closing(GroupStore.open(beta.root)) as store:
        store.set_mode(StoreMode.JOURNAL)
    assert "does not run at this site" in beta.reigning.plan({"group": "erp"}, lambda _: None)["reasons"][0]
    assert beta.sources.states == {}


# -- pure -------------------------------------------------------------------------------------------------------------


def test_turned_twice_it_is_protected_as_it_was():
    assert spec_back(None, SPEC) == BACK
    assert spec_back(SPEC, BACK) == SPEC
    assert turned_around(BACK).networks == (("lan", "lan-b"),)


def test_a_state_that_was_not_superseded_or_is_attached_is_not_turned():
    live = GroupState(SPEC, phase=Phase.LIVE)
    with pytest.raises(WrongPhase):
        turned(live, SPEC, 5, DISKS, 9)
    attached = GroupState(SPEC, phase=Phase.FAILED_OVER, epoch="e" * 32)
    with pytest.raises(WrongPhase, match="not detached"):
        turned(attached, SPEC, 5, DISKS, 9)
    away = turned(GroupState(SPEC, phase=Phase.FAILED_OVER, next_number=20), SPEC, 5, DISKS, 9)
    assert (away.phase, away.generation, away.next_number) == (Phase.CATCHING_UP, 5, 20)


def test_phases_of_the_record_are_words():
    assert {phase.value for phase in FailbackPhase} == {"sealing", "open"}
