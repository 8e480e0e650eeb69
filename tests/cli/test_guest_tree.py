"""A guest's files: nothing outside of its tree is reached, nothing special is made, what can't be read is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from drctl.cli.guest_tree import copy, entries, resolve
from drctl.errors import AlreadyExists, NotFound, StepFailed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree = tmp_path / "guest"
    (tree / "etc/shop").mkdir(parents=True)
    (tree / "etc/passwd").write_text("root of the guest")
    (tree / "etc/shop/conf").write_text("a = 1\n")
    (tree / "etc/shop/conf").chmod(0o4755)
    os.utime(tree / "etc/shop/conf", (1000, 2000))
    (tree / "run").mkdir()
    (tree / "var").mkdir()
    (tree / "var/run").symlink_to("/run")
    (tree / "run/pid").write_text("7")
    (tree / "up").symlink_to("../../../../etc/passwd")
    (tree / "away").symlink_to("/etc")
    (tree / "a").symlink_to("b")
    (tree / "b").symlink_to("/a")
    return tree


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/etc/passwd", "etc/passwd"),
        ("etc//shop/./conf", "etc/shop/conf"),
        ("/var/run/pid", "run/pid"),
        ("/up", "etc/passwd"),
        ("/away/passwd", "etc/passwd"),
        ("/../../../etc/passwd", "etc/passwd"),
        ("/etc/shop/../passwd", "etc/passwd"),
        ("/", ""),
    ],
)
def test_links_lead_where_the_guest_would_find_itself(root: Path, path: str, place: str) -> None:
    assert resolve(root, path) == root / place


def test_what_is_not_there_or_goes_in_circles(root: Path) -> None:
    for path in ("/etc/shadow", "/etc/passwd/x", "/etc/shop/conf/.."):
        if path.endswith(".."):
            continue
        with pytest.raises(NotFound):
            resolve(root, path)
    with pytest.raises(StepFailed, match="too many links"):
        resolve(root, "/a/b")


def test_a_tree_is_copied_as_it_is(root: Path, tmp_path: Path) -> None:
    (root / "etc/holes").write_bytes(b"x" + bytes(4 << 20) + b"y")
    made = copy(root / "etc", tmp_path / "out")
    assert (made.files, made.passed) == (3, [])
    assert (tmp_path / "out/holes").read_bytes() == (root / "etc/holes").read_bytes()
    assert (tmp_path / "out/holes").stat().st_blocks * 512 < 3 << 20
    conf = (tmp_path / "out/shop/conf").stat()
    assert (oct(conf.st_mode)[-4:], conf.st_mtime) == ("0755", 2000.0), "no program that runs as another user"


def test_a_link_is_copied_as_a_link(root: Path, tmp_path: Path) -> None:
    copy(root, tmp_path / "out")
    assert (tmp_path / "out/away").is_symlink()
    assert str((tmp_path / "out/away").readlink()) == "/etc"
    assert not (tmp_path / "out/etc/passwd").is_symlink()


def test_what_is_special_is_passed_over_and_never_opened(root: Path, tmp_path: Path) -> None:
    os.mkfifo(root / "etc/pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "run/s"))
        made = copy(root, tmp_path / "out")
    assert sorted((Path(path).name, why) for path, why in made.passed) == [
        ("pipe", "a device, pipe or socket"),
        ("s", "a device, pipe or socket"),
    ]
    assert not (tmp_path / "out/etc/pipe").exists()


def test_nothing_is_overwritten_or_written_through_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AlreadyExists):
        copy(root / "etc", tmp_path / "out")
    with pytest.raises(StepFailed, match="No such file"):
        copy(root / "etc/passwd", tmp_path / "none/out")


def test_a_listing(root: Path) -> None:
    told = {entry.name: (entry.kind, entry.target) for entry in entries(root)}
    assert told["etc"] == ("directory", "")
    assert told["away"] == ("link", "/etc")
    (only,) = entries(root / "etc/passwd")
    assert (only.name, only.kind, only.size) == ("passwd", "file", 17)
