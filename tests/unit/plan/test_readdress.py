"""Addresses by the guest agent: the script really run by /bin/sh on what stands for a guest's programs, and the agent
answering as qemu-ga does."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from threading import Event

import pytest

from drctl.errors import HypervisorRefused
from drctl.model.address import CardAddress
from drctl.plan.re_ip_commands import NETPLAN_FILE, linux_script, windows_commands
from drctl.plan.readdress import readdress

MAC = "52:54:00:00:00:01"
CARD = CardAddress(1, ("10.9.0.11/24", "fd00::11/64"), ("10.9.0.1", "fd00::1"), ("10.9.0.2",), ("shop.example.org",))


class Guest:
    """A guest whose script does what `becomes` says, at once, unless it fails."""

    def __init__(self, system: str = "debian", becomes: tuple[str, ...] = ("10.9.0.11", "fd00::11")) -> None:
        self.system = system
        self.addresses = ["192.0.2.7", "fe80::1"]
        self.becomes = becomes
        self.code = 0
        self.silent = 0
        self.ran: list[dict] = []

    def __call__(self, sent: dict) -> object:
        if self.silent:
            self.silent -= 1
            raise HypervisorRefused("the guest's agent is not connected")
        match sent["execute"]:
            case "guest-get-osinfo":
                return {"id": self.system}
            case "guest-network-get-interfaces":
                rows = [{"ip-address": ip, "ip-address-type": "ipv4", "prefix": 24} for ip in self.addresses]
                card = {"name": "ens3", "hardware-address": MAC.upper(), "ip-addresses": rows}
                return [{"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1"}]}, {"name": "sit0"}, card]
            case "guest-exec":
                self.ran.append(sent["arguments"])
                if not self.code:
                    self.addresses = ["fe80::1", *self.becomes]
                return {"pid": 7}
            case "guest-exec-status":
                said = base64.b64encode(b"way: ip\n\x1b[31mno\n").decode()
                return {"exited": True, "exitcode": self.code, "out-data": said}
        return {}


def give(guest: Guest, *cards: CardAddress, macs=(MAC,), limit: float = 30.0):
    times = iter(range(100_000))
    return readdress(
        guest, macs, cards or (CARD,), time_limit=limit, cancelled=Event(), monotonic=lambda: float(next(times))
    )


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drctl.plan.readdress._LOOK", 0.0)
    monkeypatch.setattr("drctl.plan.guest._LOOK", 0.0)


def test_a_linux_guest_gets_its_addresses_and_has_them() -> None:
    guest = Guest()
    guest.silent = 3
    done = give(guest)
    assert (done.reason, done.seen) == ("", "ens3 10.9.0.11, fd00::11, fe80::1".replace(", fe80::1", ""))
    (ran,) = guest.ran
    assert (ran["path"], ran["arg"][0], "env" in ran) == ("/bin/sh", "-c", False)
    assert done.output == "$ /bin/sh\nway: ip\n\\x1b[31mno\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"code": 2}, "/bin/sh: exited with 2: \\x1b[31mno"),
        ({"becomes": ("10.9.0.11",)}, "ens3 has not got fd00::11"),
        ({"becomes": ("10.9.0.11", "fd00::11", "192.0.2.7")}, "ens3 has still got 192.0.2.7"),
        ({"silent": 10_000}, "its agent did not answer within 30 s: the guest's agent is not connected"),
    ],
)
def test_what_is_not_as_it_was_wanted_is_a_failure(change: dict, reason: str) -> None:
    guest = Guest()
    for key, value in change.items():
        setattr(guest, key, value)
    assert give(guest).reason == reason


def test_cards_are_known_by_their_mac_addresses() -> None:
    assert give(Guest(), CardAddress(2, ("10.9.0.1/24",))).reason == "it has no network card 2, but 1"
    other = give(Guest(), macs=("52:54:00:00:00:09",)).reason
    assert other == "its guest has no interface with the address 52:54:00:00:00:09 of card 1"


def test_an_answer_that_makes_no_sense_is_a_failure() -> None:
    def agent(sent: dict) -> object:
        return 7

    assert "makes no sense" in give(agent).reason


def test_windows_is_asked_by_netsh() -> None:
    guest = Guest("mswindows")
    done = give(guest)
    assert done.reason == ""
    words = [[one["path"], *one["arg"]] for one in guest.ran]
    assert words[0][2:] == ["ipv4", "set", "address", "name=ens3", "source=static", *words[0][7:]]
    assert words[0][7:] == ["address=10.9.0.11", "mask=255.255.255.0", "gateway=10.9.0.1"]
    assert words == [list(one) for one in windows_commands({"ens3": CARD})]


def test_windows_may_say_that_it_is_there_already_but_must_have_it() -> None:
    guest = Guest("mswindows", becomes=())
    guest.code = 1
    only_v6 = CardAddress(1, ("fd00::11/64",))
    assert "netsh interface ipv6 add address" in give(guest, only_v6).reason
    guest.addresses = ["fd00::11"]
    assert give(guest, only_v6).reason == ""
    assert "netsh interface ipv4 set address" in give(guest).reason


# -- the script itself --------------------------------------------------------------------------------------------------


def run_script(directory: Path, programs: dict[str, str], name: str = "ens3", card: CardAddress = CARD) -> list[str]:
    """Run it with these programs alone besides a shell's own; what they were called with."""
    bin_ = directory / "bin"
    bin_.mkdir()
    calls = directory / "calls"
    for program, body in {"cat": "/bin/cat > /dev/null", "ls": "exit 1", **programs}.items():
        (bin_ / program).write_text(f'#!/bin/sh\necho {program} "$@" >> {calls}\n{body}\n')
        (bin_ / program).chmod(0o755)
    script = linux_script({name: card}, {name: MAC}).replace(
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", ""
    )
    script = script.replace("/etc/resolv.conf", str(directory / "resolv.conf"))
    script = script.replace(NETPLAN_FILE, str(directory / "netplan.yaml"))
    subprocess.run(["/bin/sh", "-c", script], env={"PATH": str(bin_)}, check=True, timeout=10)
    return calls.read_text().splitlines()


def test_the_script_without_any_manager_uses_ip(tmp_path: Path) -> None:
    assert [one for one in run_script(tmp_path, {"ip": ""}) if one.startswith("ip ")] == [
        "ip link set dev ens3 up",
        "ip -4 addr flush dev ens3 scope global",
        "ip -4 addr add 10.9.0.11/24 dev ens3",
        "ip -4 route replace default via 10.9.0.1 dev ens3",
        "ip -6 addr flush dev ens3 scope global",
        "ip -6 addr add fd00::11/64 dev ens3 nodad",
        "ip -6 route replace default via fd00::1 dev ens3",
    ]
    assert (tmp_path / "resolv.conf").read_text() == "search shop.example.org\nnameserver 10.9.0.2\n"


def test_the_script_leaves_a_resolver_alone_that_somebody_keeps(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("nameserver 127.0.0.53\n")
    (tmp_path / "resolv.conf").symlink_to(tmp_path / "kept")
    run_script(tmp_path, {"ip": ""})
    assert (tmp_path / "kept").read_text() == "nameserver 127.0.0.53\n"


NMCLI = """\
case "$*" in
  *RUNNING*) echo running;;
  *GENERAL.STATE*) echo "100 (connected)";;
  *GENERAL.CONNECTION*) echo "Wired connection 1";;
esac"""


def test_the_script_asks_network_manager_where_it_has_the_card(tmp_path: Path) -> None:
    calls = run_script(tmp_path, {"nmcli": NMCLI, "ip": "exit 1", "netplan": "exit 1"})
    modify = next(one for one in calls if "modify" in one)
    assert modify == (
        "nmcli connection modify Wired connection 1 connection.autoconnect yes "
        "ipv4.addresses 10.9.0.11/24 ipv4.gateway 10.9.0.1 ipv4.dns 10.9.0.2 ipv4.dns-search shop.example.org "
        "ipv4.method manual ipv6.addresses fd00::11/64 ipv6.gateway fd00::1 ipv6.dns  "
        "ipv6.dns-search shop.example.org ipv6.method manual"
    )
    assert calls[-1] == "nmcli connection up Wired connection 1 ifname ens3"


def test_a_card_that_network_manager_leaves_alone_is_not_asked_of_it(tmp_path: Path) -> None:
    calls = run_script(tmp_path, {"nmcli": NMCLI.replace("100 (connected)", "10 (unmanaged)"), "ip": ""})
    assert not any("modify" in one for one in calls)
    assert "ip link set dev ens3 up" in calls


def test_the_script_writes_a_file_of_its_own_for_netplan(tmp_path: Path) -> None:
    calls = run_script(tmp_path, {"netplan": "", "ls": "", "cat": "exec /bin/cat", "ip": "exit 1"}, "ens3.7")
    assert [one for one in calls if one.startswith("netplan")] == [
        "netplan set ethernets.ens3\\.7=null",
        "netplan apply",
    ]
    told = json.loads((tmp_path / "netplan.yaml").read_text())["network"]["ethernets"]["ens3.7"]
    assert (told["match"], told["set-name"]) == ({"macaddress": MAC}, "ens3.7")
    assert told["routes"] == [{"to": "0.0.0.0/0", "via": "10.9.0.1"}, {"to": "::/0", "via": "fd00::1"}]
    assert (told["addresses"], told["nameservers"]["search"]) == (["10.9.0.11/24", "fd00::11/64"], ["shop.example.org"])
    assert (tmp_path / "netplan.yaml").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["a b", "$(touch owned)", "x';reboot;'", "-f", "Ethernet (2)"])
def test_an_interfaces_name_is_never_a_command(tmp_path: Path, name: str) -> None:
    calls = run_script(tmp_path, {"ip": ""}, name)
    assert f"ip link set dev {name} up" in calls
    assert not Path("owned").exists()
