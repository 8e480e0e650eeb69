"""A NoCloud seed as an ISO 9660 image with Joliet names, made in memory: cloud-init reads it at a boot. Pure.

Sectors of 2048 bytes: 16 primary descriptor, 17 Joliet's, 18 terminator, 19 and 20 path tables (little and big endian)
of ISO 9660, 21 and 22 of Joliet, 23 and 24 the two root directories, from 25 on the files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence

from drctl.model.address import CardAddress, family

SECTOR = 2048
#: What cloud-init looks for.
LABEL = "cidata"
_PRIMARY, _JOLIET, _TABLES, _JOLIET_TABLES, _ROOT, _JOLIET_ROOT, _FILES = 16, 17, 19, 21, 23, 24, 25
#: Joliet level 3: names in UCS-2, big endian.
_ESCAPE = b"%/E"
_NO_TIME = b"0" * 16 + b"\0"


def network_config(cards: Sequence[tuple[str, CardAddress]]) -> dict[str, object]:
    """cloud-init's network configuration, version 2, for cards by their MAC addresses.

    An `interface` is stated as the card's name to be: renderers other than netplan's need one."""
    ethernets: dict[str, object] = {}
    for mac, card in cards:
        settings: dict[str, object] = {"match": {"macaddress": mac.lower()}, "dhcp4": False, "dhcp6": False}
        if card.interface:
            settings["set-name"] = card.interface
        settings["addresses"] = list(card.ip)
        # Not `routes`: of "::/0" cloud-init 22.4 makes "::/64" for every renderer but netplan's.
        settings |= {f"gateway{family(one)}": one for one in card.gateway}
        servers = {key: list(told) for key, told in (("addresses", card.dns), ("search", card.search)) if told}
        if servers:
            settings["nameservers"] = servers
        ethernets[card.interface or f"card{card.card}"] = settings
    return {"version": 2, "ethernets": ethernets}


def user_data() -> dict[str, object]:
    """What keeps cloud-init from doing to a known machine what it does to a new one: no module of it runs.

    It sees a new instance, else it would not look at the network at all; that it does before any module."""
    return {
        "cloud_init_modules": [],
        "cloud_config_modules": [],
        "cloud_final_modules": [],
        "ssh_deletekeys": False,
        "preserve_hostname": True,
    }


def seed_image(instance: str, cards: Sequence[tuple[str, CardAddress]]) -> bytes:
    """The image. `instance` has to be another one at each recovery."""
    return iso_image(
        {
            "meta-data": json.dumps({"instance-id": instance}).encode() + b"\n",
            "network-config": json.dumps(network_config(cards), indent=1).encode() + b"\n",
            "user-data": b"#cloud-config\n" + json.dumps(user_data(), indent=1).encode() + b"\n",
        }
    )


def iso_image(files: Mapping[str, bytes], label: str = LABEL) -> bytes:
    """Files in one directory, at most as many as its sector has room for."""
    places, at = {}, _FILES
    for name, data in files.items():
        places[name] = (at, len(data))
        at += _sectors(len(data))
    body = b"".join(_padded(data) for data in files.values())
    plain = {_plain(name): place for name, place in places.items()}
    wide = {name.encode("utf-16-be"): place for name, place in places.items()}
    parts = [
        bytes(SECTOR * _PRIMARY),
        _descriptor(1, label.encode().ljust(32), b" ", _ROOT, _TABLES, at),
        _descriptor(2, _wide(label), b"\0 ", _JOLIET_ROOT, _JOLIET_TABLES, at),
        _padded(b"\xffCD001\x01"),
        _path_table("<", _ROOT),
        _path_table(">", _ROOT),
        _path_table("<", _JOLIET_ROOT),
        _path_table(">", _JOLIET_ROOT),
        _directory(_ROOT, plain),
        _directory(_JOLIET_ROOT, wide),
        body,
    ]
    return b"".join(parts)


def _wide(label: str) -> bytes:
    return label.ljust(16).encode("utf-16-be")


def _plain(name: str) -> bytes:
    """A name that ISO 9660 allows; nobody reads it where there are Joliet names."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.upper()).encode()[:8] + b".;1"


def _sectors(size: int) -> int:
    return -(-size // SECTOR)


def _padded(data: bytes) -> bytes:
    return data.ljust(_sectors(len(data)) * SECTOR, b"\0")


def _both(number: int, kind: str = "I") -> bytes:
    """Little and big endian, one after the other, as ISO 9660 wants numbers."""
    return struct.pack(f"<{kind}", number) + struct.pack(f">{kind}", number)


def _record(name: bytes, place: int, size: int, *, directory: bool = False) -> bytes:
    flags = 2 if directory else 0
    fields = _both(place) + _both(size) + bytes(7) + bytes([flags, 0, 0]) + _both(1, "H") + bytes([len(name)]) + name
    pad = b"" if (2 + len(fields)) % 2 == 0 else b"\0"
    length = 2 + len(fields) + len(pad)
    return bytes([length, 0]) + fields + pad


def _directory(place: int, files: Mapping[bytes, tuple[int, int]]) -> bytes:
    dots = [_record(dot, place, SECTOR, directory=True) for dot in (b"\0", b"\1")]
    names = [name if b";" in name else name + ";1".encode("utf-16-be") for name in files]
    rows = [_record(name, *where) for name, where in sorted(zip(names, files.values(), strict=True))]
    whole = _padded(b"".join([*dots, *rows]))
    if len(whole) != SECTOR:
        raise ValueError(f"{len(files)} files are too many for one sector")
    return whole


def _path_table(order: str, root: int) -> bytes:
    return _padded(struct.pack(f"{order}BBIH", 1, 0, root, 1) + b"\0\0")


def _descriptor(kind: int, label: bytes, blank: bytes, root: int, tables: int, sectors: int) -> bytes:
    def text(length: int) -> bytes:
        return (blank * length)[:length]

    return _padded(
        b"".join(
            [
                bytes([kind]) + b"CD001\x01\0",
                text(32) + label[:32] + bytes(8),
                _both(sectors),
                (_ESCAPE if kind == 2 else b"").ljust(32, b"\0"),
                _both(1, "H") + _both(1, "H") + _both(SECTOR, "H"),
                _both(10) + struct.pack("<II", tables, 0) + struct.pack(">II", tables + 1, 0),
                _record(b"\0", root, SECTOR, directory=True),
                text(128) * 4,
                text(37) * 3,
                _NO_TIME * 4,
                b"\x01\0",
            ]
        )
    )
