"""Fixtures that several files share."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.integration.link_rig import LinkRig


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
