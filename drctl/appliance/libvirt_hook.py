"""Libvirt's `qemu` hook: refuses to start a guest whose group is superseded at this host. Only its text is here.

libvirtd calls it from HOOK_PATH (a directory since libvirt 6.5) with the domain's name, the operation and its stage,
and the domain's XML on stdin; a failure of `prepare begin` or `start begin` ends the start, with our stderr in its
message. It may call nothing of libvirt (that deadlocks), and must never be in another guest's way: whatever goes
wrong, it exits with 0 unless a file of `home/guard` names the guest. Session daemons call it too, as their own user
(measured with 9.0): one who may not look into the appliance's home passes."""

from __future__ import annotations

import shlex
from pathlib import Path

HOOK_PATH = Path("/etc/libvirt/hooks/qemu.d/drctl")
MODE = 0o755

_SCRIPT = """\
#!/bin/sh
# drctl: refuses to start a guest whose group reigns at another site by now. Written by the installer; do not edit.
# Called by libvirt: NAME OPERATION STAGE EXTRA, the domain's XML on stdin.
guard=@GUARD@
case "$2/$3" in prepare/begin | start/begin) ;; *) exit 0 ;; esac
[ -d "$guard" ] || exit 0
uuid=$(sed -n '/<uuid>/{s:.*<uuid>\\([0-9A-Fa-f-]*\\)</uuid>.*:\\1:p;q;}' 2>/dev/null | tr 'A-F' 'a-f' 2>/dev/null)
for key in "$uuid" "$1"; do
    case "$key" in '' | */* | .*) continue ;; esac
    if [ -f "$guard/$key" ]; then
        head -n 1 "$guard/$key" >&2 2>/dev/null
        exit 1
    fi
done
exit 0
"""


def script(home: Path) -> str:
    """The hook for the appliance whose home this is."""
    return _SCRIPT.replace("@GUARD@", shlex.quote(str(home / "guard")))
