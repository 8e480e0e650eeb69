"""Text scripts of a whole stream on a lossy link, and any interleaving of what can happen to one.

A script is verbs and their exact output; `pytest tests/scenario --rewrite` writes the output anew: only commit what
changed when you understand why. Verbs are the methods of stream_model.Stream; `all VERB` repeats it until it says
`nothing`, `settle` lets everything reach the other side.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scenario.stream_model import BLOCKS, Stream

SCRIPTS = sorted(Path(__file__).parent.glob("*.txt"))


def settle(stream: Stream) -> list[str]:
    """Send, deliver, make durable, hear, attest, read, until nothing moves."""
    said = []
    for _ in range(200):
        told = stream.send()
        if told != "nothing":
            said.append(told)
            continue
        moved = bool(stream.wire)
        stream.deliver(1000)
        stream.fsync()
        stream.hear()
        sync = stream.core.sync
        if sync is not None and sync.active:
            stream.read()
            while stream.reading:
                stream.arrive()
            moved = True
        if stream.core.marks.to_attest():
            stream.attest()
            moved = True
        if not moved:
            break
    return said


def run_line(stream: Stream, line: str) -> str:
    verb, *words = line.split()
    if verb == "write":
        blocks = {int(word.partition("=")[0]): int(word.partition("=")[2]) for word in words if "=" in word}
        parts = next((int(word[6:]) for word in words if word.startswith("parts:")), 1)
        return stream.write(blocks, parts)
    if verb == "settle":
        return "\n".join(settle(stream)) or "nothing"
    if verb == "all":
        said = []
        while (told := run_line(stream, " ".join(words))) not in ("nothing", "0 delivered"):
            said.append(told)
        return "\n".join(said) or "nothing"
    if verb == "check":
        stream.check()
        found = stream.receiver.checkpoints()
        return "\n".join(f"{number}: #{at} {disk}" for number, (at, disk) in found.items()) or "no checkpoints"
    arguments = [int(word) if word.lstrip("-").isdigit() else word for word in words]
    return str(getattr(stream, verb.replace("-", "_"))(*arguments))


def run_script(text: str) -> str:
    """The script with its outputs as they are now. The first line may say `ring N`."""
    stream = Stream()
    out = []
    for block in text.strip().split("\n\n"):
        commands = [line for line in block.split("\n----")[0].splitlines() if line]
        notes = [line for line in commands if line.startswith("#")]
        said = []
        for line in commands:
            if line.startswith("ring "):
                stream = Stream(int(line[5:]))
            elif not line.startswith("#"):
                said.append(run_line(stream, line))
        body = "\n".join(commands)
        out.append(body if len(notes) == len(commands) or not said else body + "\n----\n" + "\n".join(said))
    return "\n\n".join(out) + "\n"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script(path, request):
    text = path.read_text()
    now = run_script(text)
    if request.config.getoption("--rewrite"):
        path.write_text(now)
    assert now == path.read_text()


ACTIONS = st.one_of(
    st.tuples(
        st.just("write"),
        st.dictionaries(st.integers(0, BLOCKS - 1), st.integers(1, 99), min_size=1, max_size=3),
        st.integers(1, 3),
    ),
    st.tuples(
        st.sampled_from(
            [
                "connect",
                "connect_kept",
                "disconnect",
                "crash_receiver",
                "crash_shipper",
                "lose_order",
                "reconnect_disk",
                "prove_order",
                "prove_order",
                "send",
                "send",
                "send",
                "send",
                "fsync",
                "hear",
                "mark",
                "mark",
                "attest",
                "attest",
                "start_sync",
                "start_sync",
                "read",
                "read",
                "settle",
                "settle",
                "limit",
            ]
        )
    ),
    st.tuples(st.just("deliver"), st.integers(1, 5)),
    st.tuples(st.sampled_from(["arrive", "arrive_early", "arrive_early"]), st.integers(0, 3)),
    st.tuples(st.just("flood"), st.integers(100, 999)),
    st.tuples(st.just("attest"), st.just("the job is gone")),
)


def play(stream: Stream, actions) -> int:
    count = 0
    for name, *arguments in actions:
        if name == "settle":
            settle(stream)
        elif name == "start_sync" and not stream.core.connected:
            continue
        else:
            getattr(stream, name)(*arguments)
        count = stream.check()
    return count


@settings(max_examples=250, deadline=None)
@given(st.lists(ACTIONS, min_size=20, max_size=80), st.sampled_from([3, 6, 1000]))
def test_every_checkpoint_is_a_true_prefix(actions, capacity):
    play(Stream(capacity), actions)


@settings(max_examples=250, deadline=None)
@given(st.lists(ACTIONS, min_size=20, max_size=60), st.sampled_from([4, 1000]))
def test_a_live_stream_stays_true_and_comes_back(actions, capacity):
    """From a live stream; and whatever happened, a quiet while later there is a checkpoint of now."""
    stream = Stream(capacity)
    stream.connect()
    stream.start_sync()
    settle(stream)
    stream.mark()
    settle(stream)
    assert stream.check() == 1
    play(stream, actions)
    stream.connect()
    for _ in range(6):
        settle(stream)
        stream.start_sync()
        settle(stream)
    stream.prove_order()
    told = stream.mark()
    settle(stream)
    stream.check()
    found = stream.receiver.checkpoints()
    assert found, told
    assert found[max(found)][1] == stream.disk


def test_an_older_record_does_not_win_over_a_dropped_write():
    """Of a block that has a record in the ring and was then written without one, what is read must come after both."""
    stream = Stream(6)
    stream.connect()
    stream.start_sync()
    settle(stream)
    stream.mark()
    settle(stream)
    for value in range(1, 7):
        stream.write({value: value} if value < 6 else {0: 50})
    assert stream.write({0: 60}) == "dropped"
    for _ in range(3):
        stream.send()
    stream.deliver(10)
    stream.fsync()
    stream.hear()
    assert stream.start_sync() == "dirty sync of [0]"
    stream.send()
    stream.read()
    stream.arrive()
    for _ in range(3):
        settle(stream)
        stream.start_sync()
    stream.prove_order()
    stream.mark()
    settle(stream)
    found = stream.receiver.checkpoints()
    assert found[max(found)][1] == stream.disk
