"""Structs and faults of vim-cmd, rendered by the simulator in each version's style, are read back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import UnsupportedFormat
from drctl.hypervisor.esx import value
from drctl.hypervisor.esx.value import Struct
from tests.esxsim import render

COMMAS = pytest.mark.parametrize("comma", [",", ", "])
texts = st.text("ab \"',[]{}()=\n", max_size=20).filter(lambda text: "\n" not in text or '"' not in text)
plain = st.one_of(texts, st.integers(-5, 10**12), st.booleans(), st.none())
keys = st.text("abcK", min_size=1, max_size=4)


def structs(inner: st.SearchStrategy) -> st.SearchStrategy:
    fields = st.lists(st.tuples(keys, inner), min_size=1, max_size=4, unique_by=lambda pair: pair[0])
    return fields.map(lambda pairs: render.Struct("vim.X", pairs))


def arrays(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3).map(lambda items: render.Array("vim.A", items))


values = st.recursive(plain, lambda inner: st.one_of(structs(inner), arrays(inner)), max_leaves=5)


def expected(what: object) -> object:
    if isinstance(what, render.Struct):
        return Struct(what.kind, {key: expected(item) for key, item in what.fields})
    return [expected(item) for item in what.items] if isinstance(what, render.Array) else what


@COMMAS
@given(structs(values))
@settings(max_examples=40)
def test_what_is_printed_is_read_back(comma: str, what: render.Struct) -> None:
    assert value.parse(f"Listsummary:\n\n{render.value(what, comma)}\n") == expected(what)


@given(structs(values), st.integers(1, 60))
@settings(max_examples=25)
def test_what_is_cut_is_refused(what: render.Struct, cut: int) -> None:
    text = render.value(what)
    cut = min(cut, len(text) - 1)
    with pytest.raises(UnsupportedFormat):
        value.parse(text[:-cut])


def test_a_note_of_many_lines_does_not_end_a_text() -> None:
    note = 'one "quoted" line,\nand "another",\n\nthe end'
    config = render.Struct("vim.C", [("annotation", note), ("uuid", "x")])
    found = value.struct(render.value(render.Struct("vim.vm.Summary", [("config", config)])), "vim.vm.Summary")
    assert found.text("config.annotation") == note
    assert found.text("config.uuid") == "x"
    with pytest.raises(UnsupportedFormat, match=r"has no config\.none"):
        found.find("config.none")


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(UnsupportedFormat):
        value.parse("(vim.X) {\n   a = 1,\n   a = 2\n}\n")


#: (fault, message, name), as the facts quote them
FAULTS = [
    ("vim.fault.NotFound", 'Unable to find a VM corresponding to "2"', {}),
    ("vim.fault.NotFound", "The object or item referred to could not be found.", {}),
    ("vim.fault.AlreadyExists", "The specified key, name, or identifier '51' already exists.", {"name": "51"}),
    (
        "vim.fault.InvalidPowerState",
        "The attempted operation cannot be performed in the current state (Powered On).",
        {"requestedState": "poweredOn", "existingState": "poweredOn"},
    ),
    ("vmodl.fault.ManagedObjectNotFound", "The object has already been deleted", {"obj": "vim.Task:3887"}),
    ("vim.fault.ToolsUnavailable", "Cannot complete operation because VMware Tools is not running.", {}),
    ("vim.fault.RestrictedVersion", "Current license or ESXi version prohibits execution of the operation.", {}),
    ("vim.fault.GenericVmConfigFault", "Module DiskEarly power on failed.\nCannot open the disk 'x.vmdk'.", {}),
]


@COMMAS
@pytest.mark.parametrize(("kind", "message", "fields"), FAULTS, ids=[f"{f[0]}-{n}" for n, f in enumerate(FAULTS)])
def test_each_fault(comma: str, kind: str, message: str, fields: dict[str, str]) -> None:
    found = value.fault("Powering on VM:\n" + render.fault(kind, message, comma, **fields))
    assert found is not None
    assert (found.kind, found.message, found.name) == (kind, message, fields.get("name", ""))


def test_a_fault_of_the_older_style() -> None:
    """Facts 1.0: before 6.5 there is `dynamicType`."""
    text = '(vim.fault.NotFound) {\n   dynamicType = <unset>,\n   faultCause = (vmodl.MethodFault) null,\n   msg = "no",\n}\n'
    found = value.fault(text)
    assert found is not None
    assert (found.kind, found.message) == ("vim.fault.NotFound", "no")


def test_no_fault() -> None:
    assert value.fault("Get Snapshot:\n--Snapshot Name        : (vim.fault.NotFound) {\n") is None
