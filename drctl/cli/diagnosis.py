"""What stands in the way of a recovery: findings made of what appliances tell. Pure.

`error`: a recovery would fail or lose more than it should; `warning`: it will come to that; `info`: good to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from drctl.errors import CertificateRejected, ClockSkew
from drctl.model.duration import format_duration
from drctl.model.extent import format_bytes

#: Order of checkpoints is told by sequence, ages by one clock; beyond this, times in two sites' logs don't match up.
SKEW_WARNING = 1.0
#: Certificates and the link's offset measurement stand this much at most.
SKEW_ERROR = 30.0
FREE_WARNING = 0.10
FREE_ERROR = 0.02
#: A checkpoint is late when this many intervals have passed since the newest.
LATE = 3.0


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found. `subject` is a file, host, group or machine; `hint` says what to do; `error` is the name of the
    error (drctl explain) that it would come to, where there is one."""

    severity: Severity
    subject: str
    message: str
    hint: str = ""
    error: str = ""


def error(subject: str, message: str, hint: str = "") -> Finding:
    return Finding(Severity.ERROR, subject, message, hint)


def warning(subject: str, message: str, hint: str = "") -> Finding:
    return Finding(Severity.WARNING, subject, message, hint)


def info(subject: str, message: str, hint: str = "") -> Finding:
    return Finding(Severity.INFO, subject, message, hint)


def examine_host(host: str, facts: Mapping[str, Any], version: str, now: float, patience: float) -> list[Finding]:
    """Findings about one appliance from its `appliance.info`.

    `now` is our wall clock in the middle of the call, `patience` the half of its round trip: what the clocks may differ
    by without anybody being wrong."""
    found = [
        Finding(
            Severity(row["severity"]),
            f"{host}: {row['subject']}",
            row["message"],
            row.get("hint") or "",
            row.get("error") or "",
        )
        for row in facts.get("findings") or []
    ]
    if facts.get("version") not in (None, version):
        found.append(
            warning(
                host,
                f"the appliance is of version {facts['version']}, this program of {version}",
                "upgrade the older one",
            )
        )
    if wall_ns := facts.get("wall_ns"):
        found += _clock(host, abs(wall_ns / 1e9 - now) - patience)
    if "authority" in facts and facts["authority"] is None:
        text = "keeps no sealed copy of the CA's key: without the operator's machine no certificate could be renewed"
        found.append(info(host, text, f"drctl certificate seal {host}"))
    told = {row["subject"] for row in facts.get("findings") or []}
    for name, place in (facts.get("space") or {}).items():
        found += _space(host, name, place) if place.get("path") not in told else []
    return found


def _clock(host: str, skew: float) -> list[Finding]:
    return _skew(host, "its clock differs from this machine's", skew)


def _skew(subject: str, what: str, skew: float) -> list[Finding]:
    if skew <= SKEW_WARNING:
        return []
    severity = Severity.ERROR if skew > SKEW_ERROR else Severity.WARNING
    hint = "mend time synchronisation at both ends (chronyc tracking, timedatectl)"
    return [Finding(severity, subject, f"{what} by {format_duration(skew)}", hint, ClockSkew.slug)]


def _link(group: str, link: Mapping[str, Any], see: str) -> list[Finding]:
    """What is wrong between the sites: certificates, clocks, or no connection at all."""
    found = _skew(group, "the clocks of its two sites differ", abs(float(link.get("offset_ms") or 0)) / 1000)
    state = link.get("state")
    if state in ("connected", None):
        return found
    reason = link.get("error")
    text = str(reason.get("message") if isinstance(reason, dict) else reason or "")
    message = f"the link is {state}" + (f": {text}" if text else "")
    if state == "rejected":
        hint = "both must be signed by one CA and be on each other's list (tls/peers.json)"
        return [*found, Finding(Severity.ERROR, group, message, hint, CertificateRejected.slug)]
    return [*found, error(group, message, see)]


def _space(host: str, name: str, place: Mapping[str, Any]) -> list[Finding]:
    total, free = place.get("total"), place.get("free")
    if not total or free is None:
        return []
    message = f"{format_bytes(free)} of {format_bytes(total)} are free in {place.get('path') or name}"
    if free / total < FREE_ERROR:
        return [error(host, message, "free space there; at the limit replication stops")]
    return [warning(host, message, "free space there")] if free / total < FREE_WARNING else []


def examine_group(picture: Mapping[str, Any]) -> list[Finding]:
    """Findings about one group from its picture (protection.merge)."""
    group, phase = str(picture["group"]), picture["phase"]
    see = f"see: drctl status {group}"
    if picture["recovery_mode"] == "failed-over" or (phase == "failed-over" and picture["recovery_mode"] is None):
        return _failed_over(picture)
    return [*_boot(picture), *_examine_protected(picture, see)]


def _examine_protected(picture: Mapping[str, Any], see: str) -> list[Finding]:
    group, phase = str(picture["group"]), picture["phase"]
    if phase is None:
        place = "/".join(str(value) for value in (picture["source"] or {}).values()) or "its source"
        hint = f"if that site is lost: drctl failover {group} --dry-run"
        return [info(group, f"{place} was not asked or does not answer", hint), *_keeping(picture, see)]
    if phase == "broken":
        return [error(group, f"is broken: {picture['reason']}", f"mend it, then: drctl replicate resume {group}")]
    if phase in ("unprotected", "paused"):
        verb = "start" if phase == "unprotected" else "resume"
        return [warning(group, f"is {phase}", f"drctl replicate {verb} {group}")]
    return [*_recovery_point(picture, see), *_keeping(picture, see), *_link(group, picture["link"] or {}, see)]


def _failed_over(picture: Mapping[str, Any]) -> list[Finding]:
    """A group that reigns at the recovery site: is it final, and does the old source keep still?"""
    group = str(picture["group"])
    source = picture["source"] or {}
    found = [
        error(
            f"{group}.{name}",
            f"runs at {source.get('site')}/{source.get('host')}, though {group} reigns at the other site: two of one",
            "power it off there: whatever it writes is lost",
        )
        for name in _running_at_source(picture)
    ]
    if any(one.get("state") == "committed" for one in picture["recoveries"]):
        hint = f"replicate it back to where it came from: drctl failback {group}"
        return [*found, warning(group, "is failed over and committed; nothing protects it at its new site", hint)]
    return [*found, info(group, "is failed over", f"when it is healthy: drctl commit {group}")]


def _running_at_source(picture: Mapping[str, Any]) -> list[str]:
    """A superseded source looks for strays; an older one tells the states that it saw last."""
    strays: Sequence[str] | None = picture.get("strays")
    if strays is not None:
        return list(strays)
    return [str(machine["name"]) for machine in picture["machines"] if machine.get("state") == "running"]


def _boot(picture: Mapping[str, Any]) -> list[Finding]:
    """Guests that the host's boot should have brought up."""
    boot = picture.get("boot") or {}
    group, reason = str(picture["group"]), str(boot.get("reason") or "")
    guests = ", ".join(boot.get("autostart") or ()) or "its guests"
    match boot.get("state"):
        case "waiting":
            hint = (
                f"is the other site up? if its link is lost for long: boot_without_peer of {group}, or what virsh says"
            )
            return [error(group, f"{guests} wait to be started since the host's boot: {reason}", hint)]
        case "denied":
            return [
                error(group, f"{guests} were not started at the host's boot: {reason}", "start them by hand: virsh")
            ]
        case "allowed":
            text = f"{guests} were started at the host's boot without the other site's word: {reason}"
            return [warning(group, text, "make sure that they don't run there too")]
        case "started" if reason:
            return [error(group, f"not all guests could be started at the host's boot: {reason}", "see: virsh start")]
    return []


def _recovery_point(picture: Mapping[str, Any], see: str) -> list[Finding]:
    group, rpo, interval = str(picture["group"]), picture["rpo_seconds"], picture["interval_seconds"]
    if picture["phase"] == "syncing":
        return [warning(group, "nothing can be recovered until the first sync is done", see)]
    if rpo is None:
        return [error(group, "its recovery point is unknown", "the recovery site doesn't answer, or has no checkpoint")]
    if interval and rpo > LATE * interval:
        return [warning(group, f"RPO is {format_duration(rpo)}, the interval is {format_duration(interval)}", see)]
    return []


def _keeping(picture: Mapping[str, Any], see: str) -> list[Finding]:
    group, found = str(picture["group"]), []
    journal, history = picture["journal"] or {}, picture["history"] or {}
    if journal.get("limit") and (journal.get("bytes") or 0) > 0.9 * journal["limit"]:
        used = f"{format_bytes(journal['bytes'])} of {format_bytes(journal['limit'])}"
        found.append(warning(group, f"its journal holds {used}", "raise retention.journal_limit, or shorten history"))
    forecast, target = history.get("forecast"), history.get("target_seconds")
    if isinstance(forecast, (int, float)) and target and forecast < target:
        message = f"history will be {format_duration(forecast)}, wanted are {format_duration(target)}"
        found.append(warning(group, message, "raise retention.journal_limit"))
    return found


def examine_coverage(machines: Iterable[Mapping[str, Any]], pictures: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Findings about machines and disks that no group carries, though one might think so."""
    found: list[Finding] = []
    carried = {
        (picture["group"], machine["name"]): {
            disk["target"] for disk in machine.get("disks", []) if disk.get("state") != "not protected"
        }
        for picture in pictures
        for machine in picture["machines"]
    }
    free: list[str] = []
    for machine in machines:
        if machine["test"]:
            continue
        if not machine["group"]:
            free += [machine["machine"]] if machine["state"] == "running" else []
            continue
        disks = carried.get((machine["group"], machine["machine"]))
        found += _disks(machine, disks) if disks is not None else []
    if free:
        names = ", ".join(free[:8]) + (", …" if len(free) > 8 else "")
        found.append(
            info("coverage", f"running machines in no group ({len(free)}): {names}", "drctl vm list --unprotected")
        )
    return found


def _disks(machine: Mapping[str, Any], carried: set[str]) -> list[Finding]:
    found = []
    for disk in machine["disks"]:
        name = f"{machine['machine']}.{disk['target']}"
        if disk.get("refusal"):
            found.append(
                error(name, f"can't be replicated: {disk['refusal']}", "change the disk, or take the machine out")
            )
        elif disk["target"] not in carried:
            again = f"drctl replicate start {machine['group']} takes it up"
            found.append(
                error(name, f"was added after group {machine['group']} was started; it is not replicated", again)
            )
    return found


def exit_code(findings: Sequence[Finding]) -> int:
    """3 with warnings; with errors 42, or their own code when they are all clocks or all certificates."""
    names = {finding.error for finding in findings if finding.severity is Severity.ERROR}
    if not names:
        return 3 if any(finding.severity is Severity.WARNING for finding in findings) else 0
    own = {cls.slug: cls.exit_code for cls in (ClockSkew, CertificateRejected)}
    return own.get(names.pop(), 42) if len(names) == 1 else 42
