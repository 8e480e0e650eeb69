"""The wheels that an appliance is installed from, and their list: made from the operator's own environment.

A host needs no network for it: each distribution that drctl requires is put back into a wheel as it is installed here,
so hosts run what the operator runs. It fits hosts with the same Python and processor; for others `--wheels` takes a
directory that pip filled on a machine of their kind. Same environment, same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from drctl.errors import IntegrityError, NotFound, SetupFailed, UnsupportedFormat

FORMAT = 1
LIST = "bundle.json"
#: pip runs from its own wheel on the host: a Debian without python3-venv has none.
_ROOTS = ("drctl", "pip")
#: The oldest date that a ZIP can tell; any fixed one makes the same bytes of the same files.
_DATE = (1980, 1, 1, 0, 0, 0)
_WHEEL_NAME = re.compile(
    r"(?P<name>[^-]+)-(?P<version>[^-]+)(?:-\d[^-]*)?-(?P<python>[^-]+)-(?P<abi>[^-]+)-(?P<platform>[^-]+)\.whl"
)


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of a bundle."""

    name: str
    size: int
    sha256: str

    @property
    def project(self) -> str:
        return self.name.partition("-")[0].lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory of wheels. `python` is what they are for (`3.11`), `machine` the processor."""

    directory: Path
    version: str
    python: str
    machine: str
    wheels: tuple[Wheel, ...]

    @property
    def identity(self) -> str:
        """Names these very bytes: directories on hosts are called so."""
        text = "".join(f"{wheel.name} {wheel.sha256}\n" for wheel in self.wheels)
        return f"{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def size(self) -> int:
        return sum(wheel.size for wheel in self.wheels)

    @property
    def pip(self) -> Wheel:
        return next(wheel for wheel in self.wheels if wheel.project == "pip")


def make_bundle(directory: Path, wheels: Path | None = None) -> Bundle:
    """Fill a directory with the wheels of this environment; with `wheels`, all but drctl and pip come from there.

    Raises SetupFailed when a distribution can't be put back into a wheel, NotFound when one is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    python, machine = _own_python(), platform.machine()
    if wheels is None:
        for distribution in _closure(_ROOTS):
            _repack(distribution, directory)
    else:
        python, machine = _copy(wheels, directory)
        names = {Wheel(path.name, 0, "").project for path in directory.glob("*.whl")}
        for root in _ROOTS:
            if root not in names:
                _repack(_find(root), directory)
    found = tuple(_measure(path) for path in sorted(directory.glob("*.whl")))
    bundle = Bundle(directory, metadata.version("drctl"), python, machine, found)
    fields = {"format": FORMAT, "version": bundle.version, "python": python, "machine": machine}
    rows = [{"name": wheel.name, "size": wheel.size, "sha256": wheel.sha256} for wheel in found]
    (directory / LIST).write_text(json.dumps({**fields, "wheels": rows}, indent=1) + "\n", "utf-8")
    return bundle


def read_list(path: Path, version: int, what: str, hint: str) -> dict[str, Any]:
    """What lies in a directory that was made before, by the list in it. Raises NotFound (with the hint),
    UnsupportedFormat, IntegrityError."""
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as exc:
        raise NotFound(what, str(path.parent), hint=hint) from exc
    except ValueError as exc:
        raise IntegrityError(f"{path}: not JSON: {exc}") from exc
    if data.get("format") != version:
        raise UnsupportedFormat(f"{path}: format {data.get('format')}, known is {version}")
    return data


def load_bundle(directory: Path) -> Bundle:
    """A bundle made before, every byte checked. Raises NotFound, UnsupportedFormat, IntegrityError."""
    data = read_list(directory / LIST, FORMAT, "bundle", "make one: drctl appliance bundle DIR")
    bundle = Bundle(
        directory, data["version"], data["python"], data["machine"], tuple(Wheel(**row) for row in data["wheels"])
    )
    for wheel in bundle.wheels:
        path = directory / wheel.name
        if not path.is_file() or _measure(path) != wheel:
            raise IntegrityError(f"{path} is not the file that {LIST} lists", hint="make the bundle anew")
    return bundle


def _own_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _measure(path: Path) -> Wheel:
    with path.open("rb") as file:
        return Wheel(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _copy(wheels: Path, directory: Path) -> tuple[str, str]:
    """Take the wheels of a directory; returns the Python and the processor that they are for."""
    python, machine = _own_python(), platform.machine()
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise NotFound("wheel", str(wheels), hint="fill it on a machine like the host: pip wheel -w DIR drctl pip")
    for file in files:
        (directory / file.name).write_bytes(file.read_bytes())
        parts = _WHEEL_NAME.fullmatch(file.name)
        if parts and (tag := re.fullmatch(r"cp3(\d+)", parts["python"])) and parts["abi"] != "abi3":
            python = f"3.{tag[1]}"
        if parts and (found := re.search(r"(x86_64|aarch64|ppc64le|s390x)$", parts["platform"])):
            machine = found[1]
    return python, machine


def _closure(roots: Iterable[str]) -> list[metadata.Distribution]:
    """The distributions that the roots need, themselves too; extras are left out."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(roots)
    while waiting:
        name = _normal(waiting.pop())
        if name in found:
            continue
        found[name] = _find(name)
        for text in found[name].requires or ():
            required = re.match(r"[A-Za-z0-9._-]+", text)
            # A requirement with a condition that does not hold here is one that is not installed here.
            condition = text.partition(";")[2]
            if required and "extra" not in condition and (not condition or _installed(required[0])):
                waiting.append(required[0])
    return [found[name] for name in sorted(found)]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _find(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError as exc:
        raise SetupFailed(
            f"{name} is not installed beside drctl here, so no bundle can be made",
            hint=f"{sys.executable} -m pip install {name}; or name wheels: --wheels DIR",
        ) from exc


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _repack(distribution: metadata.Distribution, directory: Path) -> Path:
    """A wheel of what is installed: scripts and compiled files are left out, the installer makes them anew."""
    name, version = re.sub(r"[-_.]+", "_", distribution.metadata["Name"]), distribution.version
    wheel_text = distribution.read_text("WHEEL")
    if wheel_text is None:
        raise SetupFailed(
            f"{name} {version} was not installed from a wheel", hint="install it with pip, or --wheels DIR"
        )
    tags = re.findall(r"^Tag: (\S+)$", wheel_text, re.MULTILINE)
    path = directory / f"{name}-{version}-{_tag(tags)}.whl"
    files = dict(_files(distribution, f"{name}-{version}.dist-info"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for inside, data in [*sorted(files.items()), (f"{name}-{version}.dist-info/RECORD", _record(files))]:
            info = zipfile.ZipInfo(inside, _DATE)
            info.external_attr, info.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return path


def _tag(tags: list[str]) -> str:
    """Several tags as one name has them: cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64."""
    parts = [tag.split("-") for tag in tags]
    return "-".join(".".join(sorted({part[index] for part in parts})) for index in range(3))


#: What pip notes about how it installed; not a part of the wheel.
_NOTES = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}


def _files(distribution: metadata.Distribution, info: str) -> Iterator[tuple[str, bytes]]:
    own = _normal(distribution.metadata["Name"]) == "drctl"
    for file in distribution.files or ():
        inside, place = file.as_posix(), Path(str(file.locate()))
        if inside.startswith("..") or "__pycache__" in inside or not place.is_file():
            continue
        if file.parent.name.endswith(".dist-info") or ".dist-info/" in inside:
            if file.name not in _NOTES:
                yield f"{info}/{inside.partition('.dist-info/')[2]}", place.read_bytes()
        elif not own:
            yield inside, place.read_bytes()
    if own:  # a checkout may be installed by reference: its files are where the package is
        package = Path(__file__).parents[2]
        for place in package.rglob("*"):
            if place.is_file() and "__pycache__" not in place.parts:
                yield f"drctl/{place.relative_to(package).as_posix()}", place.read_bytes()


def _record(files: Mapping[str, bytes]) -> bytes:
    lines = []
    for name, data in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join(lines).encode() + b""
