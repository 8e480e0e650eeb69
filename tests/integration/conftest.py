"""Fixtures that several files share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.link_rig import LinkRig
from tests.integration.tap_rig import Make, TapRig


@pytest.fixture
def make_rig(tmp_path):
    """Makes rigs of a whole stream without a hypervisor; all are closed after the test."""
    short = Path(tempfile.mkdtemp(prefix="dl-", dir="/tmp"))
    rigs = []

    def make(**options):
        rig = LinkRig(tmp_path, short, **options)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.close()
    shutil.rmtree(short)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes taps on rings of their own; all are closed after the test."""
    rigs: list[TapRig] = []

    def made(**options: int) -> TapRig:
        rigs.append(TapRig(**options))  # type: ignore[arg-type]
        return rigs[-1]

    yield made
    for rig in rigs:
        rig.close()
