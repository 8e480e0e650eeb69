"""Joins stdin and stdout to an appliance's control socket: the far end of control over SSH. Stands alone.

    python -m drctl.appliance.connect /run/drctl/control.sock

The socket is for root and the appliance's own user: whoever else logs in becomes root by `sudo -n` first. It imports
the standard library only, and starts in milliseconds. Exit codes are those of sysexits.h."""

from __future__ import annotations

import os
import socket
import sys
import threading

#: sysexits.h: no appliance listens there; the login may not speak to it.
EX_UNAVAILABLE = 69
EX_NOPERM = 77
_CHUNK = 65536
_STDIN, _STDOUT = 0, 1


def join(path: str) -> int:
    """Carry bytes both ways until the appliance hangs up. Returns the exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(path)
        except PermissionError:
            return _become_root(path)
        except OSError as exc:
            return _fail(f"no appliance answers at {path}: {exc.strerror or exc}", EX_UNAVAILABLE)
        threading.Thread(target=_forward, args=(sock,), daemon=True).start()
        try:
            while data := sock.recv(_CHUNK):
                _write(data)
        except OSError:
            return EX_UNAVAILABLE  # nobody reads any more
    return 0


def _forward(sock: socket.socket) -> None:
    try:
        while data := os.read(_STDIN, _CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the appliance hung up; the other direction ends the program


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(_STDOUT, view) :]


def _become_root(path: str) -> int:
    if os.geteuid() == 0:
        return _fail(f"{path} is not open even to root", EX_NOPERM)
    again = [sys.executable, "-I", "-m", "drctl.appliance.connect", path]
    try:
        os.execvp("sudo", ["sudo", "-n", "--", *again])
    except OSError:
        return _fail(f"{path} is not open to you, and there is no sudo", EX_NOPERM)


def _fail(message: str, code: int) -> int:
    os.write(2, f"{message}\n".encode())
    return code


if __name__ == "__main__":
    sys.exit(join(sys.argv[1]))
