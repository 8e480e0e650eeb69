"""A stopped replica is kept as long as was said, and never deleted while somebody holds it."""

import time
from pathlib import Path

import pytest

from drctl.appliance.replica import expiry as store_expiry
from drctl.appliance.replica.expiry import StoreExpiry
from drctl.model.group import GroupDisk
from drctl.store.group_store import GroupStore


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    GroupStore.create(tmp_path / "web", "web", 1, (GroupDisk(0, "web-1", "vda", 1 << 20),)).close()
    return tmp_path


def _expiry(stores: Path) -> StoreExpiry:
    return StoreExpiry(stores, stores / "no-receiver.sock")


def test_nothing_goes_before_its_time(stores: Path) -> None:
    expiry = _expiry(stores)
    until = expiry.keep("web", 3600, "stopped")
    assert abs(until - time.time() - 3600) < 5
    assert expiry.sweep() == []
    assert (stores / "web" / "group.json").exists()


def test_what_has_expired_goes_whole(stores: Path) -> None:
    expiry = _expiry(stores)
    expiry.keep("web", -1, "stopped")
    assert expiry.sweep() == ["web"]
    assert list(stores.iterdir()) == []


def test_a_group_that_is_wanted_again_is_kept(stores: Path) -> None:
    expiry = _expiry(stores)
    expiry.keep("web", -1, "stopped")
    expiry.forget("web")
    assert expiry.sweep() == []


def test_a_store_with_a_pin_waits(stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expiry = _expiry(stores)
    expiry.keep("web", -1, "stopped")
    monkeypatch.setattr(GroupStore, "pins", lambda self: {"view": None})
    assert expiry.sweep() == []
    monkeypatch.undo()
    monkeypatch.setattr(store_expiry, "SWEEP_SECONDS", 0.0)
    assert expiry.sweep() == ["web"]
