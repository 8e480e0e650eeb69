"""The control socket: a caller who hangs up is no bug of the method that it called."""

import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from drctl.appliance.control import ControlServer, Progress


def test_a_caller_who_hangs_up_ends_the_method_without_a_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left, ended = threading.Event(), threading.Event()

    def slow(_params: dict[str, Any], progress: Progress) -> None:
        left.wait(10)
        try:
            for turn in range(1000):
                progress({"turn": turn, "filler": "x" * 4096})
        finally:
            ended.set()

    server = ControlServer(tmp_path / "c", {"slow": slow})
    server.start()
    with caplog.at_level(logging.DEBUG):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(tmp_path / "c"))
            caller.sendall(json.dumps({"method": "slow", "id": 1}).encode() + b"\n")
        left.set()
        assert ended.wait(10)
    server.stop()
    assert not [record for record in caplog.records if record.exc_info]
