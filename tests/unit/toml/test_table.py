"""TOML with places: every error names file, line and key, and says what would be right."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import ConfigInvalid
from drctl.toml.lines import key_lines
from drctl.toml.table import Table, parse_toml, read_toml


def table(text: str) -> Table:
    return parse_toml(text, "some.toml")


def failure(action) -> ConfigInvalid:
    with pytest.raises(ConfigInvalid) as caught:
        action()
    return caught.value


def test_lines_of_every_kind_of_key() -> None:
    text = '''# a comment with [brackets] and = signs
name = "a # no comment"
"quo\\"ted".b = """
[not a table]
k = 1
"""
machines = [
  "x", # ] not the end
  'y = 2',
]
[retention]
ladder = [ {within = "1h", every = "0s"},
           {within = "1d", every = "60s"} ]
[[host]]
name = 'q'
[host.deep.er]
z = 1979-05-27T07:32:00Z
[[host]]
name = "r"
'''
    lines = key_lines(text)
    assert lines[("name",)] == 2
    assert lines[('quo"ted', "b")] == 3
    assert lines[("machines",)] == 7
    assert lines[("machines", 1)] == 9
    assert lines[("retention",)] == 11
    assert lines[("retention", "ladder", 0, "every")] == 12
    assert lines[("retention", "ladder", 1, "within")] == 13
    assert lines[("host", 0, "name")] == 15
    assert lines[("host", 0, "deep", "er", "z")] == 17
    assert lines[("host", 1)] == 18
    assert lines[("host", 1, "name")] == 19
    assert ("k",) not in lines


_keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
_scalars = st.one_of(
    st.text(max_size=12).filter(lambda s: "\r" not in s), st.integers(-9, 9), st.booleans(), st.dates()
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=6
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_keys, _values, max_size=5))
def test_every_key_of_any_document_has_a_line_that_holds_it(data: dict) -> None:
    text = tomlkit.dumps(data)
    lines = key_lines(text)
    rows = text.split("\n")
    for key in data:
        escaped = tomlkit.dumps({key: 0}).partition(" = ")[0]
        assert escaped in rows[lines[(key,)] - 1]


def test_not_toml_names_the_line() -> None:
    error = failure(lambda: table("a = 1\nb = = 2\n"))
    assert error.message.startswith("some.toml:2: not TOML: ")
    assert "at line" not in error.message


def test_unclosed_table_is_at_the_last_line() -> None:
    assert failure(lambda: table("a = 1\n\nb = [1,")).fields["line"] == 3


def test_absent_file(tmp_path: Path) -> None:
    error = failure(lambda: read_toml(tmp_path / "no.toml"))
    assert error.message == f"{tmp_path}/no.toml: can't be read: No such file or directory"


def test_latin_1(tmp_path: Path) -> None:
    (tmp_path / "l.toml").write_bytes(b'name = "\xe4"\n')
    assert "is not UTF-8" in failure(lambda: read_toml(tmp_path / "l.toml")).message


def test_unknown_key_is_refused_with_the_nearest_known() -> None:
    top = table("\nchekpoint_interval = 3\n")
    top.text("name", "")
    top.duration("checkpoint_interval", 5.0)
    error = failure(top.finish)
    assert error.message == "some.toml:2: chekpoint_interval: unknown key"
    assert error.hint == "did you mean 'checkpoint_interval'?"


def test_unknown_key_like_no_other_lists_the_known() -> None:
    top = table("zzz = 3")
    top.text("name", "")
    assert failure(top.finish).hint == "known here: name"


@pytest.mark.parametrize(
    ("text", "read", "message"),
    [
        ("k = 3", lambda t: t.text("k"), "k: is an integer, must be a string"),
        ('k = "A B"', lambda t: t.text("k", pattern="[A-Z]+", example="AB"), "k: 'A B' is not allowed"),
        ("k = 'x'", lambda t: t.boolean("k"), "k: is a string, must be true or false"),
        ("k = true", lambda t: t.integer("k"), "k: is true or false, must be an integer"),
        ("k = 0", lambda t: t.integer("k", minimum=1), "k: 0 is below 1"),
        ("k = 'alhpa'", lambda t: t.choice("k", ["alpha", "beta"]), "k: 'alhpa' is not one of alpha, beta"),
        (
            "k = '5 parsecs'",
            lambda t: t.duration("k"),
            "k: '5 parsecs' is not a duration; write e.g. 500ms, 5s, 10m, 1h30m, 7d",
        ),
        ("k = 5", lambda t: t.duration("k"), "k: '5' is not a duration; write e.g. 500ms, 5s, 10m, 1h30m, 7d"),
        ("k = '90s'", lambda t: t.duration("k", maximum=60), "k: 1m 30s is out of range"),
        ("k = '1 GB'", lambda t: t.size("k"), "k: '1 GB' is not a size; write e.g. 256 MiB, 64 GiB, 1.5 TiB"),
        ("k = '1 KiB'", lambda t: t.size("k", minimum=4096), "k: 1.0 KiB is too small"),
        ("k = ['a', 1]", lambda t: t.strings("k"), "k: holds an integer"),
        ("k = ['a', 'a']", lambda t: t.strings("k"), "k: names 'a' twice"),
        ("k = 'a'", lambda t: t.strings("k"), "k: is a string, must be an array"),
        ("k = 1", lambda t: t.table("k"), "k: is an integer, must be a table"),
        ("k = [1]", lambda t: t.tables("k"), "k: must be an array of tables"),
        ("[k]\na = 1", lambda t: t.mapping("k"), "k.a: is an integer, must be a string"),
    ],
)
def test_wrong_values(text: str, read, message: str) -> None:
    error = failure(lambda: read(table("# first line\n" + text)))
    line = 3 if text.startswith("[k]") else 2
    assert error.message == f"some.toml:{line}: {message}"


def test_missing_key_names_its_table_and_line() -> None:
    row = table("a = 1\n[[host]]\nx = 1\n[[host]]\ny = 2\n").tables("host")[1]
    error = failure(lambda: row.text("name"))
    assert error.message == "some.toml:4: host[1]: name is missing"


def test_defaults_are_taken_and_known() -> None:
    top = table("")
    assert top.text("a", "x") == "x"
    assert top.duration("b", 2.5) == 2.5
    assert top.size("c", 7, minimum=100) == 7
    assert top.strings("d", ()) == ()
    assert top.mapping("e") == ()
    assert top.tables("f") == []
    top.finish()


def test_values_in_their_units() -> None:
    top = table('a = "1h30m"\nb = "1.5 GiB"\n[c]\nx = "y"\n')
    assert top.duration("a") == 5400
    assert top.size("b") == 3 * 2**29
    assert top.mapping("c") == (("x", "y"),)
    top.finish()


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "[" * 90 + "]" * 90,
        "a = " + "{b=" * 90 + "1" + "}" * 90,
        "x = 1\n" + ".".join("a" * 100_000) + " = 1",
        "[" + ".".join(["'q'"] * 50_000) + "]",
    ],
    ids=["open", "arrays", "inline", "dotted", "header"],
)
def test_deep_nesting_is_told_and_takes_no_time(text: str) -> None:
    before = time.process_time()
    message = failure(lambda: table(text)).message
    assert "nested deeper than 64" in message or "not TOML" in message
    assert time.process_time() - before < 2


def test_many_keys_take_time_in_proportion() -> None:
    text = "".join(f"k{number} = {number}\n" for number in range(50_000))
    before = time.process_time()
    assert table(text).line("k49999") == 50_000
    assert time.process_time() - before < 5


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "big.toml").write_text("a = 1\n" * 1_000_000)
    assert failure(lambda: read_toml(tmp_path / "big.toml")).message.endswith("is larger than 4.0 MiB")
