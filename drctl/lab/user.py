"""The unprivileged user that everything of a lab runs as: a system user of its own when root makes the lab."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import sys
from pathlib import Path

from drctl.errors import SetupFailed, StepFailed
from drctl.lab.command import run

USER = "drctl-lab"
_HOME = Path("/var/lib/drctl-lab")
_CACHE = Path("/var/cache/drctl-lab")


def is_root() -> bool:
    return os.geteuid() == 0


def name() -> str:
    """The user the lab runs as."""
    return USER if is_root() else pwd.getpwuid(os.geteuid()).pw_name


def cache() -> Path:
    """Where downloads and the guest's template are kept between labs."""
    if pwd.getpwuid(os.geteuid()).pw_name == USER:
        return _CACHE
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drctl-lab"


def ensure() -> pwd.struct_passwd:
    """The lab user's entry; made, with home and cache, if it isn't there. Needs root."""
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        argv = ["useradd", "--system", "--user-group", "--home-dir", str(_HOME), "--shell", "/usr/sbin/nologin", USER]
        with contextlib.suppress(StepFailed):  # another lab may make it at the same time
            run(argv)
        try:
            entry = pwd.getpwnam(USER)
        except KeyError:
            raise SetupFailed(f"the user {USER} can't be made", hint=f"make it by hand: {' '.join(argv)}") from None
    for directory in (_HOME, _CACHE):
        give(directory, entry)
    return entry


def give(directory: Path, entry: pwd.struct_passwd) -> None:
    """Makes a directory and hands it to the lab user."""
    directory.mkdir(parents=True, exist_ok=True)
    os.chown(directory, entry.pw_uid, entry.pw_gid)


def remove() -> None:
    """Removes the lab user with home and cache. Needs root."""
    run(["rm", "-rf", "--one-file-system", str(_HOME), str(_CACHE)])
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return
    run(["userdel", USER])


def environment(entry: pwd.struct_passwd) -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "PATH": path, "LANG": "C.UTF-8"}


def check_python(entry: pwd.struct_passwd) -> None:
    """Raises SetupFailed when the lab user can't run this very drctl."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import drctl.lab.worker"],
            user=entry.pw_uid,
            group=entry.pw_gid,
            extra_groups=[],
            env=environment(entry),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        problem = done.stderr.strip()[-300:] if done.returncode else ""
    except OSError as exc:
        problem = str(exc)
    if problem:
        raise SetupFailed(
            f"user {USER} can't run {sys.executable}: {problem}",
            hint="put the virtual environment where others can read it: make setup VENV=/opt/drctl-venv",
        )
