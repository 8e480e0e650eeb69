"""About how much a failback would send: a sample of both sites' disks, compared by the command line."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from drctl.cli import render
from drctl.cli.context import Context
from drctl.cli.inventory import in_parallel
from drctl.errors import DrctlError
from drctl.model.site import Host
from drctl.replication.sample import DIGEST, differing, stride_of
from drctl.wire.signature import KEY_SIZE, SIGNATURE_SIZE, SIGNED, blocks_of

#: A sample reads 4 GiB at each site.
SAMPLE_TIMEOUT = 3600.0


def estimate(
    context: Context, group: str, disks: list[dict[str, Any]], running: Host, old: Host, seeded: list[str]
) -> dict[str, Any]:
    """{total_bytes, sampled_bytes, differing_bytes, crossing_bytes, seconds}: what a comparison would find, about.

    `seeded`: names of the disks that lie at `old`; the others are sent in full. `crossing_bytes` is what goes over the
    link before compression, at most; `seconds` how long the disks are read, on the slower side. Raises DrctlError."""
    sizes = {f"{disk['machine']}.{disk['target']}": int(disk["size"]) for disk in disks}
    compared = [disk for disk in disks if f"{disk['machine']}.{disk['target']}" in seeded]
    stride = stride_of({name: sizes[name] for name in seeded})
    order = {"group": group, "disks": compared, "key": secrets.token_hex(KEY_SIZE), "stride": stride}
    sides = [(running, "running"), (old, "old")] if compared else []
    with context.screen.bar(f"compare a sample of {group}") as update:

        def draw(step: dict[str, Any]) -> None:
            done = int(step.get("done_bytes") or 0)
            update(done, None, f"{render.size(done)} read")

        def ask(at: tuple[Host, str]) -> Any:
            return context.call(
                at[0], "failback.sample", which=at[1], on_progress=draw, timeout=SAMPLE_TIMEOUT, **order
            )

        answers = in_parallel(ask, sides)
    return _worked_out(sizes, seeded, stride, answers)


def _worked_out(sizes: dict[str, int], seeded: list[str], stride: int, answers: list[Any]) -> dict[str, Any]:
    here, there = (answer["samples"] for answer in answers) if answers else ({}, {})
    blocks = unlike = 0
    for name in seeded:
        one, other = (base64.b64decode(samples.get(name) or "") for samples in (here, there))
        blocks += max(len(one), len(other)) // DIGEST
        unlike += differing(one, other)
    full = sum(size for name, size in sizes.items() if name not in seeded)
    differ = min(unlike * stride * SIGNED, sum(sizes[name] for name in seeded)) + full
    asked = sum(blocks_of(sizes[name]) for name in seeded) * SIGNATURE_SIZE
    return {
        "total_bytes": sum(sizes.values()),
        "sampled_bytes": blocks * SIGNED,
        "differing_bytes": differ,
        "crossing_bytes": differ + asked,
        "seconds": max((float(answer["seconds"]) for answer in answers), default=0.0) * stride,
    }


def spell(found: dict[str, Any]) -> str:
    """In one line."""
    return (
        f"about {render.size(found['differing_bytes'])} of {render.size(found['total_bytes'])} differ "
        f"(a sample of {render.size(found['sampled_bytes'])} was compared, in blocks of 64 KiB); at most "
        f"{render.size(found['crossing_bytes'])} would cross, before compression; reading takes about "
        f"{render.duration(found['seconds'])}"
    )


def tried(
    context: Context, group: str, disks: list[dict[str, Any]], running: Host, old: Host, seeded: list[str]
) -> dict[str, Any] | None:
    """The same, and said; None, and why, where it can't be had: a failback does not wait for it."""
    try:
        found = estimate(context, group, disks, running, old, seeded)
    except DrctlError as exc:
        context.screen.say(f"how much differs is not known: {exc.message}")
        return None
    context.screen.say(spell(found))
    return found
