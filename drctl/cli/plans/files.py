"""`plans/NAME.toml` beside the configuration: where they are, and which one a name on the command line means."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from drctl.cli.config import Config
from drctl.errors import ConfigInvalid, NotFound
from drctl.plan.plan import Plan
from drctl.plan.read import load_plan

#: A run does not wait for a git that hangs, e.g. on a network's file system.
_GIT_SECONDS = 3.0


def plan_directory(config: Config) -> Path:
    """Where the plans are. Raises ConfigInvalid when there is no configuration."""
    if config.directory is None:
        hint = "name a configuration with --config DIR, or a plan's file: ./NAME.toml"
        raise ConfigInvalid("plans/", 0, "", f"there are no plans: {config.origin}", hint=hint)
    return config.directory / "plans"


def plan_paths(config: Config) -> list[Path]:
    """Every plan's file, by name. Raises ConfigInvalid."""
    return sorted(plan_directory(config).glob("*.toml"))


def plan_path(config: Config, name: str) -> Path:
    """The file of a plan: `name` is that of a plan, or a path that ends in `.toml`. Raises NotFound, ConfigInvalid."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.exists():
            raise NotFound("plan", name, hint="there is no such file")
        return path
    path = plan_directory(config) / f"{name}.toml"
    if "/" in name or not path.exists():
        known = [each.stem for each in plan_paths(config)]
        raise NotFound("plan", name, known=known, hint="" if known else f"there is no file in {path.parent}")
    return path


def plan_commit(path: Path) -> str:
    """The git commit that a plan's file was last changed in; `+changes` behind it when the file is not as it was then.

    Empty where there is no git, or the file is not in it."""
    try:
        last = _git(path, "log", "-1", "--format=%H")
        return f"{last}+changes" if last and _git(path, "status", "--porcelain") else last
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(path: Path, *arguments: str) -> str:
    """What git says of the file. Raises OSError, SubprocessError."""
    command = ["git", "-C", str(path.parent), *arguments, "--", path.name]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=_GIT_SECONDS, env=environment
    )
    return done.stdout.decode("utf-8", "replace").strip()


def find_plan(config: Config, name: str) -> Plan:
    """The plan of that name or file. Raises NotFound, ConfigInvalid."""
    return load_plan(plan_path(config, name))
