"""What an appliance tells Prometheus: gauges of its groups and of itself, in the text format. Pure.

No port listens for it: node_exporter's textfile collector reads the file that metrics_file.py writes, or
`drctl metrics` prints it. What is not known has no sample; it is never 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from drctl.model.phase import Phase

Facts = Mapping[str, Any]

#: name → help. The unit is in the name, as Prometheus wants it.
HELP = {
    "drctl_appliance_info": "The appliance: always 1.",
    "drctl_certificate_expiry_timestamp_seconds": "When the appliance's certificate ends.",
    "drctl_space_bytes": "Size of the file system of the store and of the run directory.",
    "drctl_space_free_bytes": "What is free there.",
    "drctl_findings": "What the appliance finds wrong with itself, by severity.",
    "drctl_group_info": "A group that is known here: always 1.",
    "drctl_group_generation": "The group's generation.",
    "drctl_group_phase": "1 for the phase that the source side is in.",
    "drctl_group_failed_over": "1 when the group reigns at this recovery site.",
    "drctl_group_strays": "Guests that run at the source though the group reigns at the other site.",
    "drctl_group_boot_unfinished": "1 while guests of the group wait to be started since the host's boot, or were not.",
    "drctl_checkpoint_interval_seconds": "What the group's RPO should be.",
    "drctl_recovery_point_timestamp_seconds": "When the newest checkpoint that can be restored here was cut.",
    "drctl_recovery_point_age_seconds": "Its age when this was written. Alert on the timestamp: it ages by itself.",
    "drctl_checkpoints": "Checkpoints that can be restored here.",
    "drctl_journal_bytes": "Size of the journal.",
    "drctl_journal_limit_bytes": "What it may take.",
    "drctl_history_seconds": "How far back can be restored.",
    "drctl_history_target_seconds": "How far back it should be.",
    "drctl_history_falls_short": "1 when the journal's limit will cut history below its target.",
    "drctl_link_connected": "1 while the link to the other site stands.",
    "drctl_clock_offset_seconds": "The other site's clock minus this one's, as the link measures it.",
    "drctl_backlog_bytes": "Acknowledged to guests, not yet by the other site.",
    "drctl_ring_bytes": "Size of the group's ring.",
    "drctl_ring_used_bytes": "What is in it and not yet at the other site, nor in the spill.",
    "drctl_spill_limit_bytes": "What the group's spill may take on disk; 0: there is none.",
    "drctl_spill_bytes": "What it takes.",
    "drctl_spill_failed": "1 while the spill's disk refuses.",
    "drctl_dirty_map_bytes": "Dropped blocks that have to be read again from the disks.",
    "drctl_dirty_map_limit_bytes": "All that can be: the group's disks.",
    "drctl_sync_done_bytes": "How far the pass of the reader is.",
    "drctl_sync_total_bytes": "How far it has to go.",
    "drctl_recoveries": "Tests and failovers here, by kind and state.",
    "drctl_written_timestamp_seconds": "When this was written; alert when it stands still.",
}


@dataclass(slots=True)
class Text:
    """Samples by metric; `str` is the exposition."""

    samples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, value: float | None, **labels: str) -> None:
        """One sample; none for what is not known."""
        if value is None:
            return
        inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        self.samples.setdefault(name, []).append(
            f"{name}{{{inner}}} {float(value)!r}" if inner else f"{name} {float(value)!r}"
        )

    def __str__(self) -> str:
        lines: list[str] = []
        for name, help_text in HELP.items():
            if found := self.samples.get(name):
                lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge", *found]
        return "".join(f"{line}\n" for line in lines)


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render(info: Facts, sources: Iterable[Facts], recoveries: Iterable[Facts], now: float) -> str:
    """The exposition of `appliance.info` and the `group.status` of both roles. `now` is wall time in seconds."""
    text = Text()
    _appliance(text, info)
    for status in sources:
        _source(text, status)
    for status in recoveries:
        _recovery(text, status)
    text.add("drctl_written_timestamp_seconds", now)
    return str(text)


def _appliance(text: Text, info: Facts) -> None:
    text.add("drctl_appliance_info", 1, site=info["site"], host=info["host"], version=info["version"])
    text.add("drctl_certificate_expiry_timestamp_seconds", (info.get("certificate") or {}).get("not_after"))
    for name, place in (info.get("space") or {}).items():
        text.add("drctl_space_bytes", place.get("total"), place=name)
        text.add("drctl_space_free_bytes", place.get("free"), place=name)
    for severity in ("error", "warning"):
        count = sum(1 for row in info.get("findings") or [] if row.get("severity") == severity)
        text.add("drctl_findings", count, severity=severity)


def _source(text: Text, status: Facts) -> None:
    group = str(status["group"])
    text.add("drctl_group_info", 1, group=group, role="source")
    text.add("drctl_group_generation", status.get("generation"), group=group, role="source")
    for phase in Phase:
        text.add("drctl_group_phase", float(status.get("phase") == phase.value), group=group, phase=phase.value)
    if status.get("strays") is not None:
        text.add("drctl_group_strays", len(status["strays"]), group=group)
    boot = (status.get("boot") or {}).get("state")
    text.add("drctl_group_boot_unfinished", float(boot in ("waiting", "denied")), group=group)
    text.add("drctl_checkpoint_interval_seconds", status.get("interval"), group=group, role="source")
    link, ring, sync = (status.get(key) or {} for key in ("link", "ring", "sync"))
    if link.get("state") not in (None, "unknown"):
        text.add("drctl_link_connected", float(link["state"] == "connected"), group=group)
    if link.get("offset_ms") is not None:
        text.add("drctl_clock_offset_seconds", float(link["offset_ms"]) / 1000, group=group)
    text.add("drctl_backlog_bytes", status.get("backlog_bytes"), group=group)
    spill, dirty = (status.get(key) or {} for key in ("spill", "dirty_map"))
    text.add("drctl_ring_bytes", ring.get("size"), group=group)
    text.add("drctl_ring_used_bytes", ring.get("used"), group=group)
    text.add("drctl_spill_limit_bytes", spill.get("size"), group=group)
    text.add("drctl_spill_bytes", spill.get("used"), group=group)
    if spill.get("state") is not None:
        text.add("drctl_spill_failed", float(spill["state"] == "failed"), group=group)
    text.add("drctl_dirty_map_bytes", dirty.get("used"), group=group)
    text.add("drctl_dirty_map_limit_bytes", dirty.get("size"), group=group)
    text.add("drctl_sync_done_bytes", sync.get("done_bytes"), group=group)
    text.add("drctl_sync_total_bytes", sync.get("total_bytes"), group=group)


def _recovery(text: Text, status: Facts) -> None:
    group, reigns = str(status["group"]), status.get("mode") == "failed-over"
    text.add("drctl_group_info", 1, group=group, role="recovery")
    text.add("drctl_group_generation", status.get("generation"), group=group, role="recovery")
    text.add("drctl_group_failed_over", float(reigns), group=group)
    text.add("drctl_checkpoint_interval_seconds", status.get("interval"), group=group, role="recovery")
    points, found, history = (status.get(key) or {} for key in ("checkpoints", "journal", "history"))
    newest = (points.get("newest") or {}).get("time")
    # What runs here since a failover is replicated nowhere: old checkpoints are no recovery point of it.
    if newest is not None and not reigns:
        text.add("drctl_recovery_point_timestamp_seconds", newest, group=group)
        text.add("drctl_recovery_point_age_seconds", max(0.0, status["wall_ns"] / 1e9 - newest), group=group)
    text.add("drctl_checkpoints", points.get("count"), group=group)
    text.add("drctl_journal_bytes", found.get("bytes"), group=group)
    text.add("drctl_journal_limit_bytes", found.get("limit"), group=group)
    text.add("drctl_history_seconds", history.get("seconds"), group=group)
    text.add("drctl_history_target_seconds", history.get("target"), group=group)
    if isinstance(history.get("forecast"), dict):
        text.add("drctl_history_falls_short", float(bool(history["forecast"].get("falls_short"))), group=group)
    counts: dict[tuple[str, str], int] = {}
    for one in status.get("recoveries") or []:
        key = (str(one.get("kind")), str(one.get("state")))
        counts[key] = counts.get(key, 0) + 1
    for (kind, state), count in sorted(counts.items()):
        text.add("drctl_recoveries", count, group=group, kind=kind, state=state)
