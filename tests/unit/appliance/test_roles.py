"""A host that knows a group twice plays one role: that of the higher generation."""

from __future__ import annotations

import pytest

from drctl.appliance.roles import RECOVERY, SOURCE, Roles
from drctl.errors import IntegrityError, NotFound


class Half:
    def __init__(self, **generations):
        self.generations = generations

    def names(self):
        return sorted(self.generations)

    def generation(self, name):
        found = self.generations[name]
        if isinstance(found, Exception):
            raise found
        return found

    def status(self, name):
        return {}


@pytest.mark.parametrize(
    ("source", "store", "role"),
    [
        ({"erp": 1}, {}, SOURCE),
        ({}, {"erp": 1}, RECOVERY),
        ({"erp": 1}, {"erp": 1}, SOURCE),  # its old disks are being sealed: it is a superseded source still
        ({"erp": 1}, {"erp": 3}, RECOVERY),  # the group came back
        ({"erp": 3}, {"erp": 2}, SOURCE),  # it went from here; the store is what it came by
        ({"erp": 3}, {"erp": IntegrityError("damaged")}, SOURCE),
    ],
)
def test_the_higher_generation_decides(source, store, role):
    roles = Roles(Half(**source), Half(**store))
    assert roles.of("erp") == role
    assert (roles.names(SOURCE), roles.names(RECOVERY)) == ((["erp"], []) if role == SOURCE else ([], ["erp"]))


def test_a_group_that_is_not_known_is_named():
    with pytest.raises(NotFound, match="crm"):
        Roles(Half(erp=1), Half(web=1)).of("crm")
