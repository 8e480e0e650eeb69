"""The examples of docs/drills.md, run as they stand there: by a shell as cron's, by systemd's rules, as a CI's job.

The program is a process of its own, and speaks to appliances behind real control sockets. Only places are replaced:
/etc/drctl, /opt/drctl/bin and /var/lib/drills are directories of the test."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest

from drctl.appliance.control import ControlServer
from tests.cli.appliance import FakeAppliance, checkpoint, machine
from tests.cli.conftest import CONFIG, WEB

PAGE = (Path(__file__).parents[2] / "docs/drills.md").read_text("utf-8")
PLAN = """\
plan = "shop"
groups = ["shop"]
[[stage]]
name = "all"
all_of = ["shop"]
[[stage.check]]
kind = "command"
run = ["/bin/sh", "-c", "test ! -e broken"]
interval = "100ms"
retries = 0
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@dataclass
class Place:
    """Where the examples are run: `sh` gives a line to a shell, with the program in its path."""

    root: Path
    beta: FakeAppliance

    @property
    def config(self) -> Path:
        return self.root / "etc"

    @property
    def kept(self) -> Path:
        return self.root / "drills"

    def here(self, text: str) -> str:
        for theirs, ours in (
            ("/etc/drctl", self.config),
            ("/opt/drctl/bin", self.root / "bin"),
            ("/var/lib/drills", self.kept),
        ):
            text = text.replace(theirs, str(ours))
        return text

    def sh(self, line: str, path: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": path or f"{self.root}/bin:/usr/bin:/bin", "HOME": str(self.root)}
        return subprocess.run(
            ["/bin/sh", "-c", line],
            env=environment,
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def break_it(self) -> None:
        (self.config / "plans/broken").touch()


def serve(appliance: FakeAppliance, path: Path) -> ControlServer:
    methods = [
        name.removeprefix("_").replace("_", ".", 1) for name in dir(appliance) if re.fullmatch("_[a-z]+_[a-z]+", name)
    ]

    def handler(method: str):
        return lambda params, progress: appliance.call(method, params, on_progress=progress)

    server = ControlServer(path, {method: handler(method) for method in methods})
    server.start()
    return server


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    for name in ("etc/groups", "etc/plans", "bin", "drills"):
        (tmp_path / name).mkdir(parents=True)
    alpha, beta = FakeAppliance("a1", "alpha"), FakeAppliance("b1", "beta")
    spec = {
        "name": "shop",
        "source": "alpha",
        "recovery": "beta",
        "machines": ["db", "front"],
        "checkpoint_interval": 5.0,
    }
    for each in (alpha, beta):
        each.groups["shop"] = spec
    alpha.machines, alpha.phases["shop"] = [machine("db"), machine("front")], "live"
    beta.checkpoints = [checkpoint(12, 4.0)]
    (tmp_path / "etc/groups/shop.toml").write_text(WEB.replace('"web"', '"shop"'))
    (tmp_path / "etc/plans/shop.toml").write_text(PLAN)
    (tmp_path / "etc/drctl.toml").write_text(CONFIG.replace("/nowhere", str(tmp_path)))
    program = tmp_path / "bin/drctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m drctl.cli "$@"\n')
    program.chmod(0o755)
    servers = [serve(alpha, tmp_path / "a1.sock"), serve(beta, tmp_path / "b1.sock")]
    yield Place(tmp_path, beta)
    for server in servers:
        server.stop()


def cron_line(place: Place) -> tuple[str, str]:
    """(the command, PATH) as cron takes them from the table."""
    (table,) = blocks("crontab")
    path, _, job = place.here(table).splitlines()
    fields = job.split(None, 5)
    assert all(re.fullmatch(r"[\d*]+", field) for field in fields[:5])
    assert "%" not in fields[5], "cron takes it for the end of the line"
    return fields[5], path.removeprefix("PATH=")


def test_the_cron_line_says_nothing_when_all_is_well(place: Place) -> None:
    command, path = cron_line(place)
    done = place.sh(command, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert ET.parse(place.kept / "shop.xml").getroot().get("failures") == "0"
    assert place.beta.called("test.start")
    assert place.beta.tests == []


def test_the_cron_line_sends_what_went_wrong(place: Place) -> None:
    place.break_it()
    command, path = cron_line(place)
    done = place.sh(command, path)
    assert done.returncode != 0
    assert "failed: stage:all/check:command: exited with 1" in done.stdout


def units() -> list[ConfigParser]:
    found = []
    for text in blocks("ini"):
        parser = ConfigParser(interpolation=None)
        parser.optionxform = str
        parser.read_string(text)
        found.append(parser)
    return found


def test_the_service_drills_and_reports(place: Place) -> None:
    service = units()[0]["Service"]
    for key in ("ExecStart", "ExecStartPost"):
        words = shlex.split(place.here(service[key]).replace("%i", "shop"))
        assert words[0].startswith(str(place.root)), "systemd wants a whole path"
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    assert "passed" in (place.kept / "shop.html").read_text()
    assert (place.kept / "shop.xml").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_units(place: Place) -> None:
    directory = place.root / "units"
    directory.mkdir()
    names = ["drctl-drill@.service", "drctl-drill@.timer"]
    for name, text in zip(names, blocks("ini"), strict=True):
        (directory / name).write_text(place.here(text))
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        *(str(directory / name.replace("@", "@shop")) for name in names),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = [line for line in done.stderr.splitlines() if "drctl-drill" in line]
    assert told == [], done.stderr
    calendar = units()[1]["Timer"]["OnCalendar"]
    assert subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, check=False).returncode == 0


def job(name: str) -> list[str]:
    """The lines of one list of the CI's job."""
    (text,) = blocks("yaml")
    part = re.search(rf"^  {name}:\n((?:    - .*\n)+)", text, re.MULTILINE)
    return [line.removeprefix("    - ") for line in part[1].splitlines()]


@pytest.mark.parametrize("well", [True, False])
def test_the_job_of_a_ci(place: Place, well: bool) -> None:
    if not well:
        place.break_it()
    done = place.sh("set -e\n" + "\n".join(job("script")), cwd=place.config)
    assert (done.returncode == 0) is well, done.stderr
    after = place.sh("\n".join(job("after_script")), cwd=place.config)
    assert after.returncode == 0, after.stderr
    (text,) = blocks("yaml")
    for name in ("validate.xml", "drill.xml"):
        assert name in text.partition("junit:")[2]
        failures = ET.parse(place.config / name).getroot().get("failures")
        assert failures == ("1" if name == "drill.xml" and not well else "0")
    for name in ("drill.html", "drill.md"):
        assert name in text.partition("paths:")[2]
        assert ("passed" if well else "failed") in (place.config / name).read_text().lower()


def test_the_plugin_that_looks_whether_it_was_done(place: Place) -> None:
    (block,) = blocks("nagios")
    line = re.search(r"command_line\s+(.*)", block)[1].replace("$ARG1$", "shop")
    before = place.sh(place.here(line))
    assert (before.returncode, "no good drill here" in before.stdout) == (2, True)
    assert place.sh(cron_line(place)[0]).returncode == 0
    after = place.sh(place.here(line))
    assert (after.returncode, "DRCTL DRILL OK" in after.stdout) == (0, True)
