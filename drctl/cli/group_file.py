"""`groups/NAME.toml`: a protection group as the operator wrote it, read and written. Knows no appliance."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from drctl.cli.config import (
    CYCLE_INTERVAL,
    MINIMUM_RING,
    NAME,
    Config,
    Defaults,
    read_cycle_interval,
    read_interval,
    read_spill,
)
from drctl.cli.limit_file import read_limits
from drctl.errors import ConfigInvalid, NotFound
from drctl.model.bandwidth import Priority
from drctl.model.extent import GiB
from drctl.model.group import BootPolicy, GroupSpec, Retention, Rung, StrayPolicy
from drctl.model.site import HostKind
from drctl.toml.table import Table, read_toml


def group_directory(config: Config) -> Path:
    """Where the group files are. Raises ConfigInvalid when there is no configuration."""
    if config.directory is None:
        raise ConfigInvalid(
            "groups/", 0, "", f"there are no group files: {config.origin}", hint="name a configuration: --config DIR"
        )
    return config.directory / "groups"


def group_path(config: Config, name: str) -> Path:
    return group_directory(config) / f"{name}.toml"


def read_groups(config: Config) -> dict[str, GroupSpec]:
    """All groups by name. Raises ConfigInvalid for the first thing wrong in any file."""
    groups: dict[str, GroupSpec] = {}
    taken: dict[tuple[str, str], str] = {}
    for path in sorted(group_directory(config).glob("*.toml")):
        spec, table = _read(path, config)
        for machine in spec.machines:
            other = taken.setdefault((spec.source, machine), spec.name)
            if other != spec.name:
                hint = f"a machine belongs to one group; take it out of groups/{other}.toml"
                raise table.error("machines", f"{machine!r} is in group {other!r} already", hint=hint)
        groups[spec.name] = spec
    return groups


def read_group(config: Config, name: str) -> GroupSpec:
    """One group. Raises NotFound or ConfigInvalid."""
    path = group_path(config, name)
    if not path.exists():
        known = sorted(file.stem for file in group_directory(config).glob("*.toml"))
        raise NotFound("group", name, known=known, hint="" if known else f"there is no file in {path.parent}")
    return _read(path, config)[0]


def _read(path: Path, config: Config) -> tuple[GroupSpec, Table]:
    table = read_toml(path)
    spec = decode_group(table, config)
    if spec.name != path.stem:
        raise table.error(
            "name", f"is {spec.name!r}, but the file is {path.name}", hint=f"rename it to {spec.name}.toml"
        )
    return spec, table


def decode_group(table: Table, config: Config) -> GroupSpec:
    """The group that a file's top table describes. Raises ConfigInvalid."""
    sites = [site.name for site in config.sites]
    source, recovery = table.choice("source", sites), table.choice("recovery", sites)
    if source == recovery:
        raise table.error("recovery", f"is {recovery!r}, the source too", hint="a group is recovered at another site")
    source_host = _host(table, "source_host", config, source)
    spec = GroupSpec(
        name=table.text("name", pattern=NAME, example="web"),
        source=source,
        recovery=recovery,
        machines=table.strings("machines"),
        source_host=source_host,
        recovery_host=_host(table, "recovery_host", config, recovery),
        checkpoint_interval=_interval(table, config, source_host),
        retention=_retention(table.table("retention"), config.defaults),
        ring_size=table.size("ring_size", config.defaults.ring_size, minimum=MINIMUM_RING),
        spill_size=read_spill(table, config.defaults.spill_size),
        networks=table.mapping("networks"),
        test_networks=table.mapping("test_networks"),
        boot_without_peer=table.choice("boot_without_peer", [*BootPolicy], BootPolicy.WAIT.value),
        superseded_guest=table.choice("superseded_guest", [*StrayPolicy], StrayPolicy.TELL.value),
        limits=read_limits(table, "limit"),
        priority=table.choice("priority", [*Priority], Priority.NORMAL.value),
    )
    table.finish()
    if not spec.machines:
        raise table.error("machines", "names no machine", hint='e.g. machines = ["db", "web"]; see: drctl vm list')
    return spec


def usual_interval(config: Config, site: str, host: str = "") -> float:
    """What a group has between checkpoints whose source is this host, or the only one of the site."""
    kinds = {each.kind for each in config.hosts if each.site == site and host in ("", each.name)}
    return CYCLE_INTERVAL if kinds == {HostKind.ESX} else config.defaults.checkpoint_interval


def _interval(table: Table, config: Config, source_host: str) -> float:
    if config.host(source_host).kind is HostKind.ESX:
        return read_cycle_interval(table)
    return read_interval(table, config.defaults.checkpoint_interval)


def _host(table: Table, key: str, config: Config, site: str) -> str:
    hosts = [host.name for host in config.site(site).hosts]
    if key in table:
        return table.choice(key, hosts)
    table.text(key, "")
    if len(hosts) != 1:
        problem = f"site {site!r} has {len(hosts)} hosts" if hosts else f"site {site!r} has no [[host]] in drctl.toml"
        raise table.error("", f"{key} is missing: {problem}", hint=f"one of {', '.join(hosts)}" if hosts else "")
    return hosts[0]


def _retention(table: Table, defaults: Defaults) -> Retention:
    base = defaults.retention
    retention = Retention(
        history=table.duration("history", base.history, minimum=60),
        ladder=_ladder(table, base.ladder),
        journal_limit=table.size("journal_limit", base.journal_limit, minimum=GiB // 4),
        lock=table.duration("lock", base.lock),
    )
    if retention.lock > retention.history:
        raise table.error("lock", "is longer than the history", hint="history must be at least as long as its lock")
    table.finish()
    return retention


def _ladder(table: Table, default: tuple[Rung, ...]) -> tuple[Rung, ...]:
    if "ladder" not in table:
        table.tables("ladder")
        return default
    rungs: list[Rung] = []
    for row in table.tables("ladder"):
        rung = Rung(within=row.duration("within", minimum=1), every=row.duration("every"))
        row.finish()
        if rungs and (rung.within <= rungs[-1].within or rung.every < rungs[-1].every):
            raise row.error(
                "within",
                "must reach further back and keep no more than the rung before",
                hint="order rungs from young to old",
            )
        rungs.append(rung)
    return tuple(rungs)


def render_group(spec: GroupSpec) -> str:
    """The TOML file of a new group: what the operator chose; the rest stays with the defaults."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(f"Protection group {spec.name}. After a change: drctl apply"))
    chosen = {"name": spec.name, "source": spec.source, "recovery": spec.recovery}
    chosen |= {"source_host": spec.source_host, "recovery_host": spec.recovery_host}
    for key, value in chosen.items():
        if value:
            document.add(key, tomlkit.item(value))
    document.add("machines", tomlkit.item(list(spec.machines)))
    document.add("checkpoint_interval", tomlkit.item(f"{spec.checkpoint_interval:g}s"))
    for title, pairs in (("networks", spec.networks), ("test_networks", spec.test_networks)):
        if pairs:
            document.add(title, tomlkit.item(dict(pairs)))
    return tomlkit.dumps(document)


def spec_json(spec: GroupSpec) -> dict[str, Any]:
    """The group as the JSON object of `group.put` and DEFINITION frames: tuples become arrays."""
    data = _plain(dataclasses.asdict(spec))
    assert isinstance(data, dict)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def spec_changes(old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """What differs, as (key, old value, new value) with nested keys spelled `retention.history`."""
    before, after = _flat(old or {}), _flat(new or {})
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
