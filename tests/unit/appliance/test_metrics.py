"""The metrics: every sample documented, nothing unknown told as 0, the file whole; the alert rules fire on what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from drctl.appliance.metrics import HELP, render
from drctl.appliance.metrics_file import MetricsFile
from drctl.appliance.metrics_service import MetricsService
from drctl.errors import IntegrityError

RULES = Path(__file__).parents[3] / "contrib" / "prometheus" / "drctl.rules.yml"
NOW = 1_800_000_000.0
INFO = {
    "site": "alpha",
    "host": 'a"1\\',
    "version": "0.1.0",
    "certificate": {"not_before": 0.0, "not_after": NOW + 1e6},
    "space": {"store": {"path": "/s", "total": 1000, "free": 300}, "run": {"path": "/r", "total": None, "free": None}},
    "findings": [{"severity": "warning"}, {"severity": "error"}, {"severity": "warning"}],
}
SOURCE = {
    "group": "web",
    "phase": "live",
    "generation": 2,
    "interval": 5.0,
    "link": {"state": "connected", "offset_ms": -250.0},
    "backlog_bytes": 4096,
    "ring": {"size": 2**24, "used": 0},
    "spill": {"size": 2**30, "used": 8192, "state": "failed", "error": "no room"},
    "dirty_map": {"size": 2**33, "used": 4096},
    "sync": {"done_bytes": 1, "total_bytes": 2},
    "strays": ["web-1"],
    "boot": {"state": "waiting"},
}
RECOVERY = {
    "group": "db",
    "mode": "journal",
    "generation": 1,
    "interval": 5.0,
    "wall_ns": int(NOW * 1e9),
    "checkpoints": {"count": 3, "newest": {"number": 3, "time": NOW - 4.5}, "oldest": {"number": 1, "time": NOW - 90}},
    "journal": {"bytes": 10, "limit": 100},
    "history": {"seconds": 85.5, "target": 3600.0, "forecast": {"falls_short": True}},
    "recoveries": [{"kind": "test", "state": "running"}, {"kind": "test", "state": "running"}],
}


def samples(text):
    """Each sample's value by its name and labels as they stand."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_what_is_known_is_told():
    found = samples(render(INFO, [SOURCE], [RECOVERY], NOW))
    assert found['drctl_recovery_point_timestamp_seconds{group="db"}'] == NOW - 4.5
    assert found['drctl_recovery_point_age_seconds{group="db"}'] == 4.5
    assert found['drctl_group_phase{group="web",phase="live"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("drctl_group_phase{")) == 1
    assert found['drctl_group_strays{group="web"}'] == 1
    assert found['drctl_spill_bytes{group="web"}'] == 8192
    assert found['drctl_spill_failed{group="web"}'] == 1
    assert found['drctl_dirty_map_limit_bytes{group="web"}'] == 2**33
    assert found['drctl_group_boot_unfinished{group="web"}'] == 1
    assert found['drctl_clock_offset_seconds{group="web"}'] == -0.25
    assert found['drctl_findings{severity="warning"}'] == 2
    assert found['drctl_recoveries{group="db",kind="test",state="running"}'] == 2
    assert found["drctl_written_timestamp_seconds"] == NOW
    assert found['drctl_appliance_info{site="alpha",host="a\\"1\\\\",version="0.1.0"}'] == 1
    assert {name.partition("{")[0] for name in found} == set(HELP)


@pytest.mark.parametrize("mode", ["empty", "failed-over"])
def test_what_is_not_known_has_no_sample(mode):
    points = {"count": 0, "newest": None, "oldest": None} if mode == "empty" else RECOVERY["checkpoints"]
    status = RECOVERY | {"mode": "initial" if mode == "empty" else mode, "checkpoints": points}
    text = render({"site": "a", "host": "b", "version": "1"}, [{"group": "web"}], [status], NOW)
    assert "recovery_point" not in text
    assert "backlog" not in text
    assert "certificate" not in text
    assert ('drctl_group_failed_over{group="db"} 1.0' in text) is (mode == "failed-over")


class Role:
    def __init__(self, *groups):
        self.groups = groups

    def names(self):
        return self.groups

    def status(self, name):
        if name == "broken":
            raise IntegrityError("damaged")
        return RECOVERY | {"group": name}


def test_one_group_that_can_not_be_told_does_not_hide_the_others(tmp_path):
    path = tmp_path / "drctl.prom"
    service = MetricsService(lambda: INFO, Role(), Role("broken", "db"), str(path))
    assert 'drctl_checkpoints{group="db"} 3.0' in service.text()
    service.start()
    service.stop()
    MetricsFile(path, service.text).write()
    assert 'group="db"' in path.read_text()
    assert "broken" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.iterdir()] == ["drctl.prom"]


def test_a_place_that_can_not_be_written_is_nobody_elses_trouble(tmp_path, caplog):
    file = MetricsFile(tmp_path / "absent" / "drctl.prom", lambda: "x\n")
    file.write()
    file.write()
    assert len(caplog.records) == 1


def test_the_rules_ask_for_metrics_that_there_are():
    asked = set(re.findall(r"\bdrctl_\w+", " ".join(re.findall(r"expr: (.*)", RULES.read_text()))))
    assert asked
    assert asked <= set(HELP)


CASES = """\
rule_files: [drctl.rules.yml]
evaluation_interval: 30s
tests:
  - interval: 30s
    input_series:
      - {series: 'drctl_group_info{group="web",role="recovery",instance="b"}', values: '1x200'}
      - {series: 'drctl_group_info{group="new",role="recovery",instance="b"}', values: '1x200'}
      - {series: 'drctl_group_info{group="gone",role="recovery",instance="b"}', values: '1x200'}
      - {series: 'drctl_group_failed_over{group="web",instance="b"}', values: '0x200'}
      - {series: 'drctl_group_failed_over{group="gone",instance="b"}', values: '1x200'}
      - {series: 'drctl_recovery_point_timestamp_seconds{group="web",instance="b"}', values: '0x200'}
      - {series: 'drctl_group_strays{group="gone",instance="a"}', values: '0 0 2x100'}
      - {series: 'drctl_written_timestamp_seconds{instance="b"}', values: '0x200'}
    alert_rule_test:
      - {eval_time: 30s, alertname: DrctlRecoveryPointOld, exp_alerts: []}
      - eval_time: 10m
        alertname: DrctlRecoveryPointOld
        exp_alerts:
          - exp_labels: {severity: critical, group: web, instance: b}
            exp_annotations:
              summary: "web: the newest restorable checkpoint is 10m 0s old"
              description: "drctl status web names the cause: backlog, link, phase."
      - eval_time: 20m
        alertname: DrctlRecoveryPointUnknown
        exp_alerts:
          - exp_labels: {severity: critical, group: new, role: recovery, instance: b}
            exp_annotations:
              summary: "new: nothing can be recovered"
              description: "No checkpoint is restorable at b: the first sync is not done, or the store can't be read."
      - eval_time: 10m
        alertname: DrctlTwoOfOne
        exp_alerts:
          - exp_labels: {severity: critical, group: gone, instance: a}
            exp_annotations:
              summary: "gone: 2 guests run at the superseded source a"
              description: "The group reigns at the other site; what these guests write is lost. Power them off."
      - eval_time: 10m
        alertname: DrctlMetricsStale
        exp_alerts:
          - exp_labels: {severity: critical, instance: b}
            exp_annotations:
              summary: "the drctl appliance of b does not write its metrics any more"
              description: "systemctl status drctl there."
"""


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    return found


def test_promtool_takes_metrics_and_rules(promtool, tmp_path):
    text = render(INFO, [SOURCE], [RECOVERY], NOW)
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_alerts_fire_on_what_they_say(promtool, tmp_path):
    shutil.copy(RULES, tmp_path)
    (tmp_path / "cases.yml").write_text(CASES)
    done = subprocess.run(
        [promtool, "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
