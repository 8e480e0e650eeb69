"""Exit codes and errors' names, as `drctl explain` and the manual tell them. Made from errors.py."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from drctl import errors
from drctl.errors import DrctlError


@dataclass(frozen=True, slots=True)
class Code:
    """One error, or one code that is no error of ours (`slug` is its name all the same)."""

    code: int
    slug: str
    meaning: str
    advice: str


_OTHERS = (
    Code(0, "done", "Done.", "Nothing."),
    Code(2, "usage", "The command line is wrong; nothing was done.", "See --help of the command."),
    Code(
        3,
        "partly",
        "Done in part, or done with warnings: an appliance did not answer, a machine failed.",
        "Read what was said on stderr; what was not done is named there.",
    ),
    Code(130, "interrupted-by-signal", "Ended by Ctrl-C.", "What was begun at an appliance goes on: drctl status."),
    Code(141, "broken-pipe", "The reader of the output went away.", "Nothing, if it was `head`."),
    Code(143, "terminated", "Ended by SIGTERM.", "What was begun at an appliance goes on: drctl status."),
)

#: What an operator does about each error; its own hint, when it has one, is more exact.
_ADVICE = {
    "unexpected": "A bug in drctl. The traceback is in ~/.local/state/drctl/errors.log, or on stderr with --debug.",
    "config-invalid": "Open the file at the line that is named; the message says what would be right.",
    "not-found": "Check the name; the message lists those that are known. Does the header name your configuration?",
    "wrong-phase": "See drctl status GROUP for the phase; the message says which one the action needs.",
    "already-exists": "It is there already. A machine belongs to one group: drctl vm list shows which.",
    "locked": "Another operator works on the group; the message says who and until when. Wait, or see drctl status.",
    "refused": "A guard protects your data. Read what it asks for; give it only when you know that it is true.",
    "source-alive": "Look at the source: drctl status GROUP. While it lives, move without loss: drctl switchover.",
    "retention-locked": "Wait for the date that is named. A lock can be lengthened, never shortened.",
    "host-unreachable": "Is the hypervisor up, and does the login work? drctl doctor looks closer.",
    "hypervisor-refused": "The hypervisor said no; its own words are in the message.",
    "appliance-unreachable": "Is the service running on that host? systemctl status drctl there; drctl doctor here.",
    "host-key-rejected": "Compare the fingerprint with the host's own (ssh-keygen -lf there), then mend known_hosts.",
    "login-refused": "Try ssh with the same user and key; put the public key into authorized_keys there.",
    "privilege-missing": "Log in as root, or let the user run sudo without a password there.",
    "host-unfit": "Install what is named on that host, then give the command again; nothing was changed there.",
    "protocol-violation": "A peer does not speak the protocol: compare the versions with drctl doctor.",
    "integrity": "Data does not match its checksum; it was not served. Recover another checkpoint; look at the disk.",
    "unsupported-format": "A file or peer is of another version of drctl. Use the one that wrote it, or a newer one.",
    "out-of-space": "Free space, or raise the limit that is named. Replication does not lose checkpoints by it.",
    "behind-objective": "Look for the cause in drctl status GROUP: backlog, link, phase.",
    "clock-skew": "Mend time synchronisation (chrony, systemd-timesyncd) on the host that is named.",
    "certificate-rejected": "The peer is not on the site's list, or its certificate is expired or foreign.",
    "step-failed": "A step did not succeed; what was done before is in the message; the command can be given again.",
    "interrupted": "You stopped it. Nothing, or what the message says, was done.",
    "precondition-failed": "Something is not as it has to be; nothing was done. The message names it.",
    "clean-up-failed": "Look for what is left: drctl test list; remove it: drctl test stop ID.",
    "setup-failed": "This machine lacks a package, a version or a permission; the message names it.",
}


def error_classes(root: type[DrctlError] = DrctlError) -> list[type[DrctlError]]:
    """The whole tree, the root first."""
    own = [cls for cls in root.__subclasses__() if cls.__module__ == errors.__name__]
    return [root, *(found for cls in own for found in error_classes(cls))]


def all_codes() -> list[Code]:
    """Every code with its meaning, in order of code."""
    ours = [Code(cls.exit_code, cls.slug, _meaning(cls), _ADVICE[cls.slug]) for cls in error_classes()]
    return sorted([*_OTHERS, *ours], key=lambda code: code.code)


def _meaning(cls: type[DrctlError]) -> str:
    if cls is DrctlError:
        return "Something that was not foreseen: a bug."
    return (inspect.getdoc(cls) or cls.slug).split("\n\n")[0].replace("\n", " ")
