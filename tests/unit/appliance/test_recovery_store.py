"""The stores as recovery sees them: who may stream before, during and after a reign."""

from __future__ import annotations

import uuid
from contextlib import closing

import pytest

from drctl.appliance.recovery.store import GroupStores
from drctl.errors import NotFound, Refused
from drctl.model.group import GroupDisk
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore

EPOCH = uuid.uuid4().hex


@pytest.fixture
def stores(tmp_path):
    disks = (GroupDisk(1, "db", "vda", 1 << 20),)
    with closing(GroupStore.create(tmp_path / "erp", "erp", 1, disks)) as store:
        store.set_mode(StoreMode.JOURNAL)
    return GroupStores(tmp_path)


def begin(stores, generation):
    with closing(GroupStore.open(stores._directory / "erp", writer=True)) as store:
        return store.begin_stream("a1", generation, EPOCH)


def test_a_reign_that_was_given_back_takes_streams_of_the_new_generation_alone(stores):
    begin(stores, 1)
    stores.reign("erp", 2)
    for generation in (1, 2):
        with pytest.raises(Refused):
            begin(stores, generation)
    stores.give_back("erp", 3)
    stores.give_back("erp", 3)
    for generation in (1, 2, 4):
        with pytest.raises(Refused):
            begin(stores, generation)
    assert begin(stores, 3).needs == "full"
    assert stores.generation("erp") == 3


def test_a_generation_never_goes_down(stores):
    stores.reign("erp", 5)
    with pytest.raises(Refused):
        stores.give_back("erp", 4)


def test_a_group_without_a_checkpoint_has_none_to_choose(stores):
    with pytest.raises(NotFound):
        stores.choose("erp", "latest", 0.0)
