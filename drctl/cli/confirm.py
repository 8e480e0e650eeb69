"""Who may be asked, and what has to be said, before something is changed."""

from __future__ import annotations

from collections.abc import Sequence

from drctl.cli.render import Screen
from drctl.errors import Interrupted, Refused


def propose(screen: Screen, steps: Sequence[str], *, dry_run: bool, yes: bool, question: str = "") -> bool:
    """Say what is about to happen and find out whether to do it; False after a dry run.

    With an empty `question` nothing is asked: the act harms nothing. Raises Refused or Interrupted."""
    for step in steps:
        screen.say(f"{'would' if dry_run else 'will'} {step}")
    if dry_run:
        screen.say("dry run: nothing was changed")
        return False
    if question:
        confirm(screen, question, yes=yes)
    return True


def confirm(screen: Screen, question: str, *, yes: bool) -> None:
    """Go on only with `--yes` or a typed `y`. What is about to happen has been printed before.

    Raises Refused when nobody can be asked, Interrupted when the answer is no."""
    if yes:
        return
    if not screen.interactive:
        raise Refused("nobody can be asked: stdin is not a terminal", hint="add --yes")
    if screen.ask(f"{question} [y/N]").lower() not in ("y", "yes"):
        raise Interrupted("answered no; nothing was done")


def confirm_name(screen: Screen, name: str, *, typed: str, what: str = "group") -> None:
    """Go on only when the name of the group, or of `what`, is typed: at a prompt, or before as `--confirm NAME`.

    Raises Refused or Interrupted."""
    if typed:
        if typed != name:
            raise Refused(f"--confirm {typed!r} is not the {what}'s name {name!r}; nothing was done")
        return
    if not screen.interactive:
        raise Refused(
            "nobody can be asked: stdin is not a terminal", hint=f"add --confirm {name}; --yes alone is not enough here"
        )
    if screen.ask(f"type the {what}'s name ({name}) to go on:") != name:
        raise Interrupted("another name was typed; nothing was done")
