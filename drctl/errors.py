"""Every error that drctl raises on purpose, and the exit code of each. Knows nothing else.

    DrctlError
    ├── ConfigInvalid            10   a TOML file, named by file, line and key
    ├── NotFound                 11   no such host, machine, group, checkpoint
    ├── WrongPhase               12   the group is not in a phase that allows the action
    │   └── AlreadyExists        12
    ├── Locked                   13   another drctl holds it
    ├── Refused                  14   a guard said no (generation, confirmation, unsafe version)
    │   ├── SourceAlive          15   a failover would make a second copy of machines that run
    │   └── RetentionLocked      16   a retention lock keeps history from being shortened or deleted
    ├── HostUnreachable          20
    ├── HypervisorRefused        21
    ├── ApplianceUnreachable     22
    ├── HostKeyRejected          23   SSH: the host's key is unknown, another one, or revoked
    ├── LoginRefused             24   SSH: the host refused every key that was offered
    ├── PrivilegeMissing         25   SSH: the login may not become root there
    ├── HostUnfit                26   the host lacks what an appliance needs (Python, libvirt, QEMU, systemd)
    ├── ProtocolViolation        30   a peer broke the link or NBD protocol
    ├── IntegrityError           31   checksum, signature or format mismatch
    │   └── UnsupportedFormat    31
    ├── OutOfSpace               32
    ├── BehindObjective          33
    ├── ClockSkew                34
    ├── CertificateRejected      35
    ├── StepFailed               40
    ├── Interrupted              41
    ├── PreconditionFailed       42
    ├── SetupFailed              43   the machine lacks something drctl needs
    └── CleanUpFailed            44   what a run made could not all be removed or undone

Codes are unique per class, never reused; an unknown code must be read as failure.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DrctlError(Exception):
    """Root of the tree: a message made of typed fields, a hint of what to do, an exit code."""

    exit_code: ClassVar[int] = 1
    slug: ClassVar[str] = "unexpected"

    def __init__(self, message: str, *, hint: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def as_dict(self) -> dict[str, Any]:
        """The error as the JSON object that `--output json` prints on stderr."""
        return {
            "error": self.slug,
            "exit_code": self.exit_code,
            "message": self.message,
            "hint": self.hint,
            **{key: str(value) for key, value in self.fields.items()},
        }


class ConfigInvalid(DrctlError):
    """A configuration, group or plan file is wrong; names file, line and key."""

    exit_code = 10
    slug = "config-invalid"

    def __init__(self, file: str, line: int, key: str, problem: str, *, hint: str = "") -> None:
        place = f"{file}:{line}" if line else file
        subject = f"{place}: {key}: {problem}" if key else f"{place}: {problem}"
        super().__init__(subject, hint=hint, file=file, line=line, key=key, problem=problem)


class NotFound(DrctlError):
    """The named object does not exist."""

    exit_code = 11
    slug = "not-found"

    def __init__(
        self, kind: str, name: str, *, known: list[str] | None = None, hint: str = "", message: str = ""
    ) -> None:
        if not hint and known:
            hint = _suggest(name, known)
        super().__init__(message or f"no {kind} named {name!r}", hint=hint, kind=kind, name=name)


def _suggest(name: str, known: list[str]) -> str:
    import difflib  # 5 ms that only a wrong name costs

    near = difflib.get_close_matches(name, known, 1)
    others = f"known: {', '.join(known[:12])}" + (", …" if len(known) > 12 else "")
    return f"did you mean {near[0]}? {others}" if near else others


class WrongPhase(DrctlError):
    """The group is not in a phase that allows the action."""

    exit_code = 12
    slug = "wrong-phase"


class AlreadyExists(WrongPhase):
    """The object exists already, or the machine is protected already."""

    slug = "already-exists"


class Locked(DrctlError):
    """Another run holds the lease."""

    exit_code = 13
    slug = "locked"


class Refused(DrctlError):
    """A guard refused: superseded generation, missing confirmation, an unsafe version."""

    exit_code = 14
    slug = "refused"


class SourceAlive(Refused):
    """The group's source is alive: a failover would make a second copy of machines that run."""

    exit_code = 15
    slug = "source-alive"


class RetentionLocked(Refused):
    """A retention lock keeps the group's history from being shortened or deleted; names the date until when."""

    exit_code = 16
    slug = "retention-locked"


class HostUnreachable(DrctlError):
    """A hypervisor host can't be reached or refused the login."""

    exit_code = 20
    slug = "host-unreachable"


class HypervisorRefused(DrctlError):
    """The hypervisor refused an operation."""

    exit_code = 21
    slug = "hypervisor-refused"


class ApplianceUnreachable(DrctlError):
    """An appliance can't be reached, or speaks another version."""

    exit_code = 22
    slug = "appliance-unreachable"


class HostKeyRejected(DrctlError):
    """A host's SSH key is unknown, revoked, or not the one that known_hosts has for it."""

    exit_code = 23
    slug = "host-key-rejected"


class LoginRefused(DrctlError):
    """A host refused the SSH login: no key that was offered is accepted there."""

    exit_code = 24
    slug = "login-refused"


class PrivilegeMissing(DrctlError):
    """The SSH login may not do there what is needed: it is not root, and sudo wants a password or refuses."""

    exit_code = 25
    slug = "privilege-missing"


class HostUnfit(DrctlError):
    """A host lacks what an appliance needs: Python, libvirt, QEMU, systemd of a version; nothing was changed there."""

    exit_code = 26
    slug = "host-unfit"


class ProtocolViolation(DrctlError):
    """The peer broke the link or NBD protocol; the connection must end."""

    exit_code = 30
    slug = "protocol-violation"


class IntegrityError(DrctlError):
    """A checksum, signature or format does not match; names file and offset."""

    exit_code = 31
    slug = "integrity"


class UnsupportedFormat(IntegrityError):
    """A file or peer is of a version that this drctl does not know."""

    slug = "unsupported-format"


class OutOfSpace(DrctlError):
    """A journal, scratch or file system limit is reached."""

    exit_code = 32
    slug = "out-of-space"


class BehindObjective(DrctlError):
    """An objective is missed: RPO, history, drill age."""

    exit_code = 33
    slug = "behind-objective"


class ClockSkew(DrctlError):
    """Two machines' clocks differ by more than the limit."""

    exit_code = 34
    slug = "clock-skew"


class CertificateRejected(DrctlError):
    """A peer's certificate is foreign, expired, or not on the site's list."""

    exit_code = 35
    slug = "certificate-rejected"


class StepFailed(DrctlError):
    """A step of an operation failed; what was done is in the message."""

    exit_code = 40
    slug = "step-failed"


class Interrupted(DrctlError):
    """The operator stopped it."""

    exit_code = 41
    slug = "interrupted"


class PreconditionFailed(DrctlError):
    """A precondition is not met; nothing was done."""

    exit_code = 42
    slug = "precondition-failed"


class SetupFailed(DrctlError):
    """This machine lacks something: a package, a version, a permission."""

    exit_code = 43
    slug = "setup-failed"


class CleanUpFailed(DrctlError):
    """What a run made could not all be removed or undone; what is left is in the message."""

    exit_code = 44
    slug = "clean-up-failed"
