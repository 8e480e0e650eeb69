"""Plans as files: what is read, and what every mistake is told as."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import ConfigInvalid
from drctl.model.move import Settlement
from drctl.plan.plan import CheckKind, Mac, Mode, OnFailure, Plan, When, Where, find_cycle
from drctl.plan.read import decode_plan, load_plan, parse_plan, read_plan
from drctl.toml.table import parse_toml

FULL = """\
plan = "shop"
description = "the web shop"
groups = ["shop", "mail"]
time_limit = "30m"
rto_target = "15m"
on_failure = "rollback"
rollback_after = "4h"

[[script]]
when = "before"
run = ["/usr/local/bin/announce", "begin; rm -rf /"]
[[manual]]
when = "after"
text = "call the ward"
skippable = true
modes = ["switchover", "failover"]

[[stage]]
name = "front"
after = ["database"]
all_of = ["mail"]
time_limit = "5m"
[[stage.check]]
kind = "http"
url = "https://shop.example.org/health"
test_url = "http://192.0.2.7:8080/health"
status = 204
text = "ok"

[[stage]]
name = "database"
on_failure = "stop"
[[stage.vm]]
name = "db 'ä' / 1"
group = "shop"
memory = "2 GiB"
vcpus = 2
mac = "new"
networks = {lan = "lan-b"}
test_networks = {lan = "island"}
re_ip = "cloud-init"
[[stage.vm.address]]
ip = ["10.9.0.11/24", "fd00::11/64"]
gateway = ["10.9.0.1"]
dns = ["10.9.0.2"]
search = ["shop.example.org"]
interface = "ens3"
[[stage.vm.test_address]]
card = 2
ip = ["192.0.2.11/24"]
[[stage.vm.check]]
kind = "tcp"
host = "10.0.0.5"
port = 5432
retries = 3
interval = "500ms"
timeout = "1s"
[[stage.vm.check]]
kind = "console"
text = "login:"
on_failure = "continue"
[[stage.vm.script]]
when = "after"
where = "guest"
run = ["/bin/true"]
[[stage.vm]]
name = "spare"
group = "shop"
boot = false
"""
SMALL = """\
plan = "one"
groups = ["web"]
[[stage]]
name = "all"
[[stage.vm]]
name = "web"
"""


def failure(text: str, stem: str = "") -> ConfigInvalid:
    with pytest.raises(ConfigInvalid) as caught:
        parse_plan(text, "p.toml", stem)
    return caught.value


def test_everything_that_a_plan_can_say() -> None:
    plan = parse_plan(FULL)
    assert (plan.name, plan.groups, plan.time_limit, plan.rto_target) == ("shop", ("shop", "mail"), 1800.0, 900.0)
    assert (plan.settlement, plan.settle_after) == (Settlement.ROLLBACK, 4 * 3600.0)
    assert [stage.name for stage in plan.stages] == ["database", "front"], "in an order that can be run"
    database, front = plan.stages
    assert (front.after, front.all_of, front.time_limit) == (("database",), ("mail",), 300.0)
    db, spare = database.vms
    assert (db.name, db.memory, db.vcpus, db.mac) == ("db 'ä' / 1", 2 * 2**30, 2, Mac.NEW)
    assert (db.networks, db.test_networks) == ((("lan", "lan-b"),), (("lan", "island"),))
    assert not spare.boot
    (real,), (test,) = db.addresses, db.test_addresses
    assert (db.re_ip, real.card, real.of_family(4)) == ("cloud-init", 1, (("10.9.0.11/24",), "10.9.0.1"))
    assert (real.of_family(6), test.card, test.ip) == ((("fd00::11/64",), ""), 2, ("192.0.2.11/24",))
    assert (spare.re_ip, spare.addresses) == (None, ())
    tcp, console = db.checks
    assert (tcp.kind, tcp.host, tcp.port, tcp.retries, tcp.interval, tcp.timeout) == (
        CheckKind.TCP, "10.0.0.5", 5432, 3, 0.5, 1.0,
    )  # fmt: skip
    assert (console.on_failure, tcp.on_failure) == (OnFailure.CONTINUE, OnFailure.STOP), "the nearest one holds"
    assert (db.scripts[0].where, db.scripts[0].when) == (Where.GUEST, When.AFTER)
    assert plan.scripts[0].run == ("/usr/local/bin/announce", "begin; rm -rf /")
    assert (plan.scripts[0].name, plan.scripts[0].on_failure) == ("announce", OnFailure.ROLLBACK)
    assert plan.manuals[0].modes == (Mode.SWITCHOVER, Mode.FAILOVER)
    assert front.checks[0].status == 204


def test_defaults_are_safe() -> None:
    plan = parse_plan(SMALL)
    assert plan.settlement is None
    (vm,) = plan.stages[0].vms
    assert (vm.group, vm.boot, vm.mac, vm.on_failure, vm.time_limit) == ("web", True, Mac.KEEP, OnFailure.STOP, 300.0)


VM = SMALL + "[[stage.vm.check]]\n"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (SMALL.replace('groups = ["web"]', "groups = []"), "p.toml:2: groups: names no group", "drctl group list"),
        (SMALL.replace("groups", "gruops"), "p.toml: key 'groups' is missing", ""),
        (SMALL + "memroy = '2 GiB'", "p.toml:7: stage[0].vm[0].memroy: unknown key", "did you mean 'memory'?"),
        (SMALL + "memory = '2 GB'", "p.toml:7: stage[0].vm[0].memory: '2 GB' is not a size", ""),
        (SMALL + "memory = '2 KiB'", "p.toml:7: stage[0].vm[0].memory: 2.0 KiB is too small", "at least 16.0 MiB"),
        (SMALL + "vcpus = true", "p.toml:7: stage[0].vm[0].vcpus: is true or false, must be an integer", ""),
        (SMALL + "vcpus = 0", "p.toml:7: stage[0].vm[0].vcpus: 0 is below 1", ""),
        (SMALL + "group = 'wep'", "p.toml:7: stage[0].vm[0].group: 'wep' is not in groups", "did you mean 'web'?"),
        (SMALL + "networks = 'lan'", "p.toml:7: stage[0].vm[0].networks: is a string, must be a table", ""),
        (SMALL + "on_failure = 'rolback'", "'rolback' is not one of stop, continue, rollback", "mean 'rollback'?"),
        (SMALL + "time_limit = '2d'", "p.toml:7: stage[0].vm[0].time_limit: 2d is out of range", "at most 1d"),
        (SMALL.replace('"web"\n', '"web\\u001b[2J"\n', 2), "names no machine", "drctl vm list"),
        (SMALL.replace('name = "all"', 'name = "all"\nafter = ["db"]'), "p.toml:5: stage[0].after: there is no stage 'db'", "known: all"),
        (SMALL.replace('name = "all"', 'name = "all"\nafter = ["all"]'), "stages wait for each other: all -> all", "after"),
        (SMALL + "[[stage]]\nname = 'all'\nall_of = ['web']", "p.toml:8: stage[1].name: stage 'all' is there already, in line 4", ""),
        (SMALL + "[[stage.vm]]\nname = 'web'", "p.toml:8: stage[0].vm[1].name: 'web' is in stage 'all' already", "boots once"),
        (SMALL + "[[stage]]\nname = 'empty'", "p.toml:7: stage[1]: stage 'empty' does nothing", "[[stage.vm]]"),
        ("plan = 'one'\ngroups = ['web']", "p.toml: the plan has no [[stage]]", "[[stage]]"),
        (SMALL + "[[stage.script]]\nwhen = 'before'\nrun = 'rm -rf /'", "p.toml:9: stage[0].script[0].run: is a string, must be an array", "no shell"),
        (SMALL + "[[stage.script]]\nwhen = 'before'\nrun = []", "stage[0].script[0].run: names no program", ""),
        (SMALL + "[[stage.script]]\nrun = ['a']", "stage[0].script[0]: when is missing", ""),
        (SMALL + "[[stage.script]]\nwhen = 'after'\nwhere = 'guest'\nrun = ['a']", "stage[0].script[0]: vm is missing", ""),
        (SMALL + "[[stage.vm.script]]\nwhen = 'before'\nwhere = 'guest'\nrun = ['a']", "a guest that is not up yet", "after"),
        (SMALL + "[[stage.script]]\nwhen = 'after'\nrun = ['a\\u0000']".replace("'", '"'), "zero byte", ""),
        (SMALL + "[[stage.manual]]\nwhen = 'after'\ntext = 'x'\nmodes = []", "names no mode", ""),
        (VM + "kind = 'ping'", "stage[0].vm[0].check[0].kind: 'ping' is not one of tcp, http, command, guest-agent, console", ""),
        (VM + "kind = 'tcp'\nhost = 'x'\nport = 99999", "p.toml:10: stage[0].vm[0].check[0].port: 99999 is no port", "65535"),
        (VM + "kind = 'tcp'\nhost = 'x'\nport = 1\nurl = 'http://x'", "check[0].url: unknown key", "known here"),
        (VM + "kind = 'http'\nurl = 'ftp://x'", "'ftp://x' is no http or https URL", "https://"),
        (VM + "kind = 'http'\nurl = 'http://u:p@x/'", "holds a password", "command"),
        (VM + "kind = 'http'\nurl = 'http://x:99999/'", "is no URL", ""),
        (VM + "kind = 'console'\ntext = ' '", "is empty, so it would be found at once", ""),
        (SMALL + "[[stage.check]]\nkind = 'console'\ntext = 'x'", "'console' is not one of tcp, http, command", ""),
        (SMALL + "boot = false\n" + "[[stage.vm.check]]\nkind = 'guest-agent'", "web is left off, but has checks", ""),
        ("commit_after = '1h'\nrollback_after = '1h'\n" + SMALL, "p.toml:2: rollback_after: excludes commit_after", ""),
    ],
)  # fmt: skip
def test_mistakes(text: str, message: str, hint: str) -> None:
    error = failure(text)
    assert message in error.message
    assert hint in error.hint
    assert error.fields["line"] or "missing" in error.message or "no [[stage]]" in error.message


def test_a_plan_is_called_as_its_file(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(SMALL)
    with pytest.raises(ConfigInvalid, match=r"two.toml:1: plan: is 'one', but the file is two.toml"):
        load_plan(tmp_path / "two.toml")
    (tmp_path / "one.toml").write_text(SMALL)
    assert load_plan(tmp_path / "one.toml").name == "one"
    assert "can't be read" in read_plan(tmp_path / "none.toml").errors[0].message


def test_all_mistakes_are_told_at_once_in_order_of_line() -> None:
    text = (
        FULL.replace("vcpus = 2", "vcpus = -2").replace("port = 5432", "port = 0").replace("status = 204", "status = 1")
    )
    found = decode_plan(parse_toml(text, "p.toml"))
    assert found.plan is None
    assert [error.fields["line"] for error in found.errors] == [27, 37, 54]
    assert failure(text).hint.endswith("2 more: drctl plan validate")


def test_a_cycle_is_named_by_its_path() -> None:
    text = "plan = 'p'\ngroups = ['g']\n" + "".join(
        f"[[stage]]\nname = '{name}'\nafter = ['{after}']\nall_of = []\n[[stage.vm]]\nname = '{name}'\n"
        for name, after in (("a", "b"), ("b", "c"), ("c", "b"))
    )
    assert failure(text).message == "p.toml:11: stage[1].after: stages wait for each other: b -> c -> b"


def test_a_long_chain_is_no_problem() -> None:
    stages = [(f"s{number}", (f"s{number + 1}",)) for number in range(20_000)]
    assert find_cycle(stages) == []
    assert len(find_cycle([*stages, ("s20000", ("s0",))])) == 20_002


def _random_graph(data: list[tuple[int, int]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(str(node), tuple(str(b) for a, b in data if a == node)) for node in range(6)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=10))
def test_a_cycle_is_found_when_there_is_one(edges: list[tuple[int, int]]) -> None:
    graph = _random_graph(edges)
    found = find_cycle(graph)
    remaining = dict(graph)
    while free := [name for name, waits in remaining.items() if not set(waits) & set(remaining)]:
        for name in free:
            del remaining[name]
    assert bool(found) is bool(remaining)
    if found:
        assert found[0] == found[-1]
        assert all(after in dict(graph)[name] for name, after in pairwise(found))


_scalars = st.one_of(st.text(max_size=8), st.integers(-5, 5), st.booleans(), st.floats(allow_nan=False, width=16))
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4
)  # fmt: skip


def _set(tree: dict, path: list[object], value: object) -> None:
    for part in path[:-1]:
        tree = tree[part]  # type: ignore[index]
    tree[path[-1]] = value  # type: ignore[index]


def _paths(tree: object, path: tuple = ()) -> list[tuple]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    return [each for key, value in inner for each in [(*path, key), *_paths(value, (*path, key))]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_a_plan_or_an_error_of_ours(data: st.DataObject) -> None:
    import tomllib

    import tomlkit

    tree = tomllib.loads(FULL)
    _set(tree, list(data.draw(st.sampled_from(_paths(tree)))), data.draw(_values))
    found = decode_plan(parse_toml(tomlkit.dumps(tree), "plan.toml"))
    assert isinstance(found.plan, Plan) is not bool(found.errors)
    assert all(error.message.startswith("plan.toml") for error in found.errors)


def test_a_thousand_machines_are_read_in_a_second() -> None:
    text = "plan = 'big'\ngroups = ['g']\n" + "".join(
        f"[[stage]]\nname = 's{stage}'\n"
        + "".join(
            f"[[stage.vm]]\nname = 'vm-{stage}-{vm}'\n[[stage.vm.check]]\nkind = 'tcp'\nhost = 'h'\nport = 22\n"
            for vm in range(100)
        )
        for stage in range(10)
    )
    before = time.process_time()
    assert len(parse_plan(text).vms) == 1000
    assert time.process_time() - before < 2


ADDRESS = "re_ip = '{way}'\n[[stage.vm.address]]\n{keys}\n"


@pytest.mark.parametrize(
    ("way", "keys", "message"),
    [
        ("guest-agent", "ip = ['10.9.0.11']", "address[0].ip: '10.9.0.11' is no address with its prefix"),
        ("guest-agent", "ip = ['10.9.0.300/24']", "is no address with its prefix"),
        ("guest-agent", "ip = ['10.9.0.1/24; reboot']", "is no address with its prefix"),
        ("guest-agent", "ip = []", "names no address"),
        ("guest-agent", "ip = ['10.9.0.11/24']\ngateway = ['fd00::1']", "has a gateway of IPv6, and no address"),
        ("guest-agent", "ip = ['10.9.0.11/24']\ngateway = ['10.9.0.1', '10.9.0.2']", "two gateways of one kind"),
        ("guest-agent", "ip = ['10.9.0.11/24']\ndns = ['ns.example.org']", "is no address, e.g. 10.9.0.1"),
        ("guest-agent", "ip = ['10.9.0.11/24']\nsearch = ['$(id)']", "is no domain"),
        ("cloud-init", "ip = ['10.9.0.11/24']\ninterface = 'a b'", "interface: 'a b' is not allowed"),
        ("guest-agent", "ip = ['10.9.0.11/24']\ncard = 0", "card: 0 is below 1"),
        ("guest-agent", "ip = ['10.9.0.11/24']\ncard = 999", "is above 256"),
        ("guest-agent", "ip = ['1.2.3.4/8']\n[[stage.vm.address]]\nip = ['1.2.3.5/8']", "card 1 is there twice"),
        ("guest-agent", "ip = ['1.2.3.4/8']\ngatewy = ['1.2.3.1']", "gatewy: unknown key"),
        ("dhcp", "ip = ['10.9.0.11/24']", "must be one IPv4 address without a prefix"),
        ("dhcp", "ip = ['fd00::11']", "must be one IPv4 address"),
        ("dhcp", "ip = ['10.9.0.11']\ndns = ['10.9.0.1']", "has more than an address"),
        ("pigeon", "ip = ['10.9.0.11/24']", "re_ip: 'pigeon' is not one of guest-agent, cloud-init, dhcp"),
    ],
)
def test_mistakes_in_addresses(way: str, keys: str, message: str) -> None:
    assert message in failure(SMALL + ADDRESS.format(way=way, keys=keys)).message


def test_a_way_without_an_address_and_an_address_without_a_way() -> None:
    assert "no address is given" in failure(SMALL + "re_ip = 'dhcp'").message
    assert "re_ip is missing" in failure(SMALL + "[[stage.vm.address]]\nip = ['10.9.0.11/24']").message
    assert (
        "is left off" in failure(SMALL + "boot = false\n" + ADDRESS.format(way="dhcp", keys="ip = ['1.2.3.4']")).message
    )


def test_a_hundred_thousand_addresses_take_no_time() -> None:
    """The largest file that is read at all."""
    import time

    rows = "".join(f"'10.{n >> 16}.{n >> 8 & 255}.{n & 255}/8'," for n in range(100_000))
    before = time.process_time()
    failure(SMALL + ADDRESS.format(way="dhcp", keys=f"ip = [{rows}]"))
    assert time.process_time() - before < 20
