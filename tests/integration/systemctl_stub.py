#!/usr/bin/python3 -I
"""Stands for systemctl on a host that is only namespaces: one service, started as its unit says, but unhardened."""

import os
import pathlib
import pwd
import re
import signal
import subprocess
import sys
import time

STATE = pathlib.Path("/run/stub")
UNIT = pathlib.Path("/etc/systemd/system/drctl-appliance.service")
WANTS = pathlib.Path("/etc/systemd/system/multi-user.target.wants/drctl-appliance.service")


def main_pid() -> int:
    try:
        pid = int((STATE / "pid").read_text())
        return 0 if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX" else pid
    except (OSError, ValueError):
        return 0


def stop() -> None:
    if pid := main_pid():
        os.kill(pid, signal.SIGTERM)
        while main_pid():
            time.sleep(0.02)


def start() -> None:
    unit = UNIT.read_text()
    found = {
        key: re.search(f"^{key}=(.*)$", unit, re.M)[1]
        for key in ("ExecStart", "User", "RuntimeDirectory", "RuntimeDirectoryMode")
    }
    user = pwd.getpwnam(found["User"])
    run = pathlib.Path("/run") / found["RuntimeDirectory"]
    run.mkdir(exist_ok=True)
    os.chown(run, user.pw_uid, user.pw_gid)
    run.chmod(int(found["RuntimeDirectoryMode"], 8))
    argv = [
        "setpriv",
        "--reuid",
        user.pw_name,
        "--regid",
        str(user.pw_gid),
        "--init-groups",
        *found["ExecStart"].split(),
    ]
    with open("/run/stub/log", "ab") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    (STATE / "pid").write_text(str(process.pid))


if os.geteuid() == 0:
    STATE.mkdir(exist_ok=True)
words = [word for word in sys.argv[1:] if not word.startswith("--")]
match words:
    case ["is-active", "drctl-appliance"]:
        print("active" if main_pid() else "inactive")
        sys.exit(0 if main_pid() else 3)
    case ["is-active", _]:
        sys.exit(3)
    case ["is-enabled", _]:
        sys.exit(0 if WANTS.is_symlink() else 1)
    case ["enable", _]:
        WANTS.parent.mkdir(parents=True, exist_ok=True)
        WANTS.symlink_to(UNIT)
    case ["disable", _]:
        stop()
        WANTS.unlink(missing_ok=True)
    case ["restart", "drctl-appliance"]:
        stop()
        start()
    case ["show", *_]:
        print(main_pid())
    case [] if "--version" in sys.argv:
        print("systemd 252 (stub)")
