"""Commands, answers, and a monitor that misbehaves."""

import json
import socket
import threading

import pytest

from drctl.errors import HostUnreachable, HypervisorRefused
from drctl.hypervisor.qmp import QmpSocket, command, qmp_class, unpack

GREETING = {"QMP": {"version": {}, "capabilities": []}}


class Server:
    """Answers each command with the next of `answers`; a bytes one is sent as it is."""

    def __init__(self, path, answers, greeting=GREETING):
        self.received = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._answers = [greeting, *answers]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        client, _ = self._listener.accept()
        with client, client.makefile("rb") as lines:
            for number, answer in enumerate(self._answers):
                if number and not (line := lines.readline()):
                    break
                if number:
                    self.received.append(json.loads(line))
                    if isinstance(answer, dict):
                        answer = answer | {"id": self.received[-1]["id"]}
                client.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\r\n")

    def join(self):
        self._thread.join(5)
        self._listener.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*answers, **options):
        servers.append(Server(tmp_path / "qmp", answers, **options))
        return str(tmp_path / "qmp"), servers[-1]

    yield start
    for server in servers:
        server.join()


def test_a_command_spells_its_arguments_as_qemu_does():
    built = command("blockdev-add", node_name="n", auto_dismiss=False)
    assert built == {"execute": "blockdev-add", "arguments": {"node-name": "n", "auto-dismiss": False}}
    assert command("query-status") == {"execute": "query-status"}


def test_a_refusal_keeps_qemus_words_and_class():
    with pytest.raises(HypervisorRefused, match="QEMU refused block-job-cancel: Block job 'x' not found") as refusal:
        unpack(command("block-job-cancel"), {"error": {"class": "DeviceNotActive", "desc": "Block job 'x' not found"}})
    assert qmp_class(refusal.value) == "DeviceNotActive"


def test_an_answer_is_found_behind_events(serve):
    event = json.dumps({"event": "BLOCK_JOB_READY"}).encode() + b"\r\n"
    path, server = serve({"return": {}}, event + event + b'{"return": {"status": "running"}, "id": 2}\r\n')
    with QmpSocket(path) as monitor:
        assert monitor(command("query-status")) == {"status": "running"}
        assert len(monitor.events) == 2
    server.join()
    assert [each["execute"] for each in server.received] == ["qmp_capabilities", "query-status"]


def test_answers_to_a_client_before_us_are_not_taken_for_ours(serve):
    """A monitor under load serves the next client with what the one before did not wait for (seen with 7.2)."""
    stale = b'{"return": {"left": "over"}, "id": 7}\r\n{"return": {}}\r\n'
    path, _ = serve(
        {"return": {}}, stale + b'{"return": [], "id": 2}\r\n', greeting=stale + json.dumps(GREETING).encode() + b"\r\n"
    )
    with QmpSocket(path) as monitor:
        assert monitor(command("query-block")) == []


def test_an_error_without_an_id_is_the_answer(serve):
    path, _ = serve({"return": {}}, b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n')
    with QmpSocket(path) as monitor, pytest.raises(HypervisorRefused, match="JSON parse error"):
        monitor(command("query-block"))


@pytest.mark.parametrize(
    "answer", [b"", b'{"return": ', b"[1]\n", b"HTTP/1.1 200 OK\r\n"], ids=["closed", "torn", "list", "foreign"]
)
def test_a_monitor_that_breaks_is_unreachable(serve, answer):
    path, _ = serve({"return": {}}, answer)
    with QmpSocket(path) as monitor, pytest.raises(HostUnreachable):
        monitor(command("query-status"))


def test_what_does_not_speak_qmp_is_unreachable(serve):
    path, _ = serve(greeting=b"SSH-2.0-OpenSSH\r\n")
    with pytest.raises(HostUnreachable, match="does not speak QMP"):
        QmpSocket(path)


def test_no_monitor_is_unreachable(tmp_path):
    with pytest.raises(HostUnreachable, match="no QEMU monitor"):
        QmpSocket(str(tmp_path / "nothing"))


def test_a_monitor_that_does_not_answer_is_unreachable_in_time(serve):
    path, _ = serve({"return": {}}, b"\r"[:0] + b" ")
    with QmpSocket(path, timeout_seconds=0.2) as monitor, pytest.raises(HostUnreachable):
        monitor(command("query-status"))
