"""`checkpoint verify --source`: what is asked of the source, how its findings are told, and what the exit code says."""

from __future__ import annotations

import pytest

SOUND = {
    "group": "web",
    "total_bytes": 2**31,
    "done_bytes": 2**31,
    "read_bytes": 2**30,
    "suspect_bytes": 0,
    "undecided_bytes": 0,
    "repaired_bytes": 0,
    "wrong_bytes": 0,
    "wrong": [],
    "seconds": 4.0,
}


def answers(world, **changes) -> None:
    world.applied()
    world.alpha.replies["source.verify"] = {**SOUND, **changes}


def test_both_sides_are_equal(world) -> None:
    answers(world, undecided_bytes=65536)
    result = world("checkpoint", "verify", "web", "--source")
    assert result.code == 0
    assert "web: 2.0 GiB compared, 0 B wrong, 0 B repaired" in result.out
    assert "64.0 KiB were written too often to be told" in result.err
    sent = world.alpha.called("source.verify")[0]
    assert (sent["group"], sent["share"], sent["rate"], sent["repair"]) == ("web", 1.0, 0, False)
    assert not world.beta.called("checkpoint.verify")
    assert not world.beta.called("lease.take")


def test_what_is_wrong_is_named_and_exits_with_31(world) -> None:
    wrong = [{"disk": "db.vda", "offset": 4096 * n, "length": 4096} for n in range(30)]
    answers(world, wrong=wrong, wrong_bytes=30 * 4096)
    result = world("checkpoint", "verify", "web", "--source")
    assert result.code == 31
    assert "wrong: db.vda at 8192, 4.0 KiB" in result.out
    assert "and 10 more" in result.out
    assert "--source --repair" in result.err
    document = world("checkpoint", "verify", "web", "--source", "-o", "json").json
    assert document["kind"] == "source-verification"
    assert document["wrong"] == wrong


def test_a_repair_is_asked_for_and_leased(world) -> None:
    answers(world, repaired_bytes=8192)
    assert world("checkpoint", "verify", "web", "--source", "--repair").code == 14
    assert not world.alpha.called("source.verify")
    result = world("checkpoint", "verify", "web", "--source", "--repair", "--yes")
    assert result.code == 3
    assert "8.0 KiB repaired" in result.out
    assert world.alpha.called("source.verify")[0]["lease"] == "t"
    assert world.beta.called("lease.release")


def test_a_sample_at_a_pace(world) -> None:
    answers(world)
    result = world("checkpoint", "verify", "web", "--source", "--sample", "5%", "--rate", "50 MB/s", "--dry-run")
    assert "would read 5% of the disks of web at alpha/a1" in result.err
    assert not world.alpha.called("source.verify")
    assert world("checkpoint", "verify", "web", "--source", "--sample", "5%", "--rate", "50 MB/s").code == 0
    sent = world.alpha.called("source.verify")[0]
    assert (sent["share"], sent["rate"]) == (0.05, 50_000_000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--source", "--sample", "5"), "write e.g. 5%"),
        (("--source", "--sample", "0%"), "write e.g. 5%"),
        (("--source", "--sample", "500%"), "write e.g. 5%"),
        (("--source", "--rate", "fast"), "is not a rate"),
        (("#11", "--source"), "name no checkpoint"),
        (("--repair",), "go with --source"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(world, words: tuple[str, ...], said: str) -> None:
    answers(world)
    result = world("checkpoint", "verify", "web", *words)
    assert result.code == 2
    assert said in result.err
    assert not world.alpha.called("source.verify")
