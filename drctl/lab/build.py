"""`lab up`, done as the lab user. Every step looks whether it is done already, so that `up` may be repeated."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from drctl.errors import PreconditionFailed
from drctl.lab import accelerator, configuration, guest, image, layout, process, site, user
from drctl.lab.domain import DiskFile, GuestDefinition, domain_xml
from drctl.lab.guest import Kit
from drctl.lab.layout import SITES, Guest, Layout, Options, State
from drctl.lab.observer import Observer
from drctl.lab.process import Process
from drctl.lab.record import Superblock

Progress = Callable[[str], None]
_APPLIANCE = "drctl.appliance.daemon"
#: A guest under TCG is up within 6 s when two boot on two idle cores; a loaded machine takes a multiple.
_UP_SECONDS = 180.0


def build(directory: Path, options: Options, progress: Progress) -> None:
    """Makes the lab, or what is missing of it, and returns when its guests write. Raises SetupFailed or StepFailed."""
    directory.mkdir(parents=True, exist_ok=True)
    state = layout.load(directory) or _new_state(directory, options, progress)
    places = Layout(directory, Path(state.run))
    places.run.mkdir(exist_ok=True, mode=0o700)
    _start_daemons(places, state, progress)
    _make_guests(places, state, progress)
    configuration.write(places, state)
    configuration.write_identities(places, state)
    if state.options.appliances:
        _start_appliances(places, state, progress)
    if state.options.start:
        _start_guests(places, state, progress)


def _new_state(directory: Path, options: Options, progress: Progress) -> State:
    left = [path.name for path in directory.iterdir()]
    if left:
        raise PreconditionFailed(f"{directory} is not empty and holds no lab ({', '.join(sorted(left)[:5])})")
    kit = guest.prepare(user.cache(), options.agent, progress)
    chosen = accelerator.choose(options.accelerator, kit, user.cache(), progress)
    run = tempfile.mkdtemp(prefix=layout.RUN_PREFIX, dir="/tmp")
    state = State(uuid.uuid4().hex, run, user.name(), chosen, options)
    state.guests = [Guest(f"web-{number}", str(uuid.uuid4())) for number in range(1, options.guests + 1)]
    state.links = dict(zip(SITES, _free_ports(len(SITES)), strict=True))
    layout.save(directory, state)
    return state


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _ensure(places: Layout, state: State, name: str, start: Callable[[], Process], progress: Progress) -> Process:
    """The named process, started if it doesn't run, and remembered before anything else happens."""
    known = state.process(name)
    if known and process.alive(known):
        return known
    progress(f"starting {name}")
    started = start()
    state.remember(started)
    layout.save(places.directory, state)
    return started


def _start_daemons(places: Layout, state: State, progress: Progress) -> None:
    daemons = []
    for place in places.sites:
        site.prepare(place)
        site.seed_capabilities(place, user.cache())
        daemons.append(_ensure(places, state, f"{place.name}/libvirtd", partial(site.start_libvirtd, place), progress))
    argv = [sys.executable, "-m", "drctl.lab.recorder", str(places.directory)]
    log = places.directory / "recorder.log"
    environment = site.environment(places.sites[0])
    _ensure(places, state, "recorder", partial(process.spawn, "recorder", argv, environment, log), progress)
    for place, daemon in zip(places.sites, daemons, strict=True):
        site.await_libvirtd(place, daemon)


def _make_guests(places: Layout, state: State, progress: Progress) -> None:
    home = places.sites[0]
    defined = site.domains(home, "--all")
    missing = [known for known in state.guests if known.name not in defined and known.name not in state.started]
    if not missing:
        return
    kit = guest.prepare(user.cache(), state.options.agent, progress)
    places.serial("").parent.mkdir(exist_ok=True)
    cache = "none" if _knows_direct(home.images) else "writeback"
    for known in missing:
        progress(f"making {known.name} at {home.name}")
        disks = image.make_disks(
            Path(kit.template), home.images, _superblock(state, known, kit), state.options.image_format
        )
        files = tuple(
            DiskFile(target, str(path), state.options.image_format, cache)
            for target, path in zip(("vda", "vdb"), disks, strict=True)
        )
        definition = GuestDefinition(
            known.name,
            known.uuid,
            state.options.memory_mib,
            state.accelerator,
            files,
            str(places.serial(known.name)),
            state.options.bus,
            state.options.iothread,
        )
        site.define(home, domain_xml(definition), known.name)
    site.keep_capabilities(home, user.cache())


def _superblock(state: State, known: Guest, kit: Kit) -> Superblock:
    options = state.options
    return Superblock(
        lab=state.lab,
        guest=known.name,
        chains=options.chains,
        slots=options.slots,
        payload_sum=kit.payload_sum,
        rate=options.rate,
        sync_every=options.sync_every,
        tokens=len(state.guests) > 1,
    )


def _knows_direct(directory: Path) -> bool:
    """Whether the file system there takes O_DIRECT (tmpfs before Linux 6.6 does not)."""
    path = directory / ".direct"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def _start_guests(places: Layout, state: State, progress: Progress) -> None:
    home = places.sites[0]
    fresh = [known for known in state.guests if known.name not in state.started]
    begun = time.time_ns()
    for known in fresh:
        progress(f"booting {known.name} ({state.accelerator})")
        site.virsh(home, "start", known.name)
        state.started.append(known.name)
        layout.save(places.directory, state)
    observer = Observer(places.directory)
    for known in fresh:
        observer.await_up(known.name, home.name, after_ns=begun, timeout=_UP_SECONDS)
        observer.await_records(known.name, home.name, 1, timeout=_UP_SECONDS)


def _start_appliances(places: Layout, state: State, progress: Progress) -> None:
    if find_spec(_APPLIANCE) is None:
        progress("no appliance in this build: none started")
        return
    for place in places.sites:
        argv = [sys.executable, "-m", _APPLIANCE, "--home", str(place.home)]
        log = place.logs / "appliance.log"
        environment = site.environment(place)
        name = f"{place.name}/appliance"
        _ensure(
            places,
            state,
            name,
            partial(process.spawn, name, argv, environment, log),
            progress,
        )
