"""A batch goes through a real shell and comes back as it was; what is cut or forged is not believed."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HostUnreachable
from drctl.hypervisor.esx import batch
from drctl.hypervisor.esx.inventory import split_files

TOKEN = "0123456789abcdef"
words = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12)


def through_sh(commands: list[list[str]]) -> tuple[bytes, bytes]:
    done = subprocess.run(["sh", "-s"], input=batch.script(commands, TOKEN), capture_output=True, check=False)
    return done.stdout, done.stderr


@given(st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=25)
def test_words_arrive_as_they_are(lines: list[list[str]]) -> None:
    commands = [["printf", "%s\n", *line] for line in lines]
    found = batch.parse(commands, TOKEN, *through_sh(commands))
    assert [answer.out for answer in found] == ["".join(f"{word}\n" for word in line) for line in lines]


def test_codes_and_both_streams() -> None:
    commands = [["sh", "-c", "printf out; printf err >&2; exit 7"], ["cat"], ["not-there"]]
    first, second, third = batch.parse(commands, TOKEN, *through_sh(commands))
    assert (first.code, first.out, first.err) == (7, "out", "err")
    assert (second.code, second.out) == (0, "")
    assert (third.code, "not found" in third.told) == (127, True)


def test_what_is_cut_anywhere_is_not_believed() -> None:
    commands = [["echo", "one"], ["echo", "two"]]
    out, err = through_sh(commands)
    for cut in range(len(out)):
        with pytest.raises(HostUnreachable):
            batch.parse(commands, TOKEN, out[:cut], err)
    for cut in range(len(err)):
        with pytest.raises(HostUnreachable):
            batch.parse(commands, TOKEN, out, err[:cut])


def test_outputs_that_were_swapped_are_not_believed() -> None:
    commands = [["echo", "one"], ["echo", "two"]]
    out, err = through_sh(commands)
    swapped = out.replace(b" 0\n", b" x\n").replace(b" 1\n", b" 0\n").replace(b" x\n", b" 1\n")
    with pytest.raises(HostUnreachable):
        batch.parse(commands, TOKEN, swapped, err)


@given(
    st.dictionaries(
        words.filter(lambda w: w and "\n" not in w), st.lists(words.filter(lambda w: "\n" not in w)), min_size=1
    )
)
@settings(max_examples=60)
def test_files_are_told_apart(files: dict[str, list[str]]) -> None:
    """`grep -H ''` prints `path:line`; a path may be the beginning of another, a line may look like a path."""
    text = "".join(f"/{path}/x:{line}\n" for path, lines in files.items() for line in lines)
    expected = {f"/{path}/x": "\n".join(lines) + "\n" for path, lines in files.items() if lines}
    assert split_files(text, [f"/{path}/x" for path in files]) == expected
