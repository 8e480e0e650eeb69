"""What another host has otherwise: mapped by name, or told."""

import xml.etree.ElementTree as ET

import pytest

from drctl.hypervisor.guest_state import SecretRef
from drctl.hypervisor.recovery_fit import HostFacts, adapt, nearest, unmet_here

CAPABILITIES = """<capabilities><guest><os_type>hvm</os_type><arch name='x86_64'>
  <machine>pc-q35-7.2</machine><machine canonical='pc-q35-7.2'>q35</machine><machine>pc-q35-6.1</machine>
  <machine>pc-i440fx-7.2</machine><domain type='qemu'/><domain type='kvm'/></arch></guest></capabilities>"""
SECRET, OWN = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"


def domain(machine="pc-q35-7.2", cpu="", devices="", kind="kvm"):
    return ET.fromstring(
        f"<domain type='{kind}'><name>x</name><os><type arch='x86_64' machine='{machine}'>hvm</type></os>{cpu}"
        f"<devices>{devices}</devices></domain>"
    )


def adapted(root, host=None, named=()):
    notes = []
    adapt(root, host or HostFacts(CAPABILITIES), named, notes)
    return notes


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("pc-q35-9.2", "pc-q35-7.2"),
        ("pc-q35-6.2", "pc-q35-6.1"),
        ("pc-q35-2.4", "pc-q35-6.1"),
        ("pc-q35-rhel9.2.0", "pc-q35-7.2"),
        ("pc-i440fx-rhel7.6.0", "pc-i440fx-7.2"),
        ("pc-i440fx-noble", ""),
        ("virt-7.2", ""),
        ("isapc", ""),
    ],
)
def test_the_nearest_machine_type_of_the_family(machine, expected):
    assert nearest(machine, ["pc-q35-7.2", "q35", "pc-q35-6.1", "pc-i440fx-7.2"]) == expected


def test_an_alias_stands_for_its_family():
    assert nearest("pc-q35-9.2", ["q35", "pc"]) == "q35"
    assert nearest("pc-i440fx-9.2", ["q35", "pc"]) == "pc"


def test_a_machine_type_is_mapped_and_told():
    root = domain("pc-q35-9.2")
    assert adapted(root)[0].startswith("machine type: pc-q35-9.2 becomes pc-q35-7.2")
    assert root.find("os/type").get("machine") == "pc-q35-7.2"
    assert unmet_here(ET.tostring(root, encoding="unicode"), HostFacts(CAPABILITIES)) == ()
    for known in ("pc-q35-7.2", "q35"):
        assert adapted(domain(known)) == []


def test_a_machine_type_without_kin_is_unmet():
    root = domain("microvm")
    assert adapted(root) == []
    found = unmet_here(ET.tostring(root, encoding="unicode"), HostFacts(CAPABILITIES))
    assert found == ("machine type microvm: this host's QEMU does not have it",)


CPU = "<cpu mode='custom' match='exact' check='partial'><model>Icelake</model><topology cores='2'/><feature/></cpu>"


@pytest.mark.parametrize(("kind", "mode"), [("kvm", "host-model"), ("qemu", "maximum")])
def test_a_processor_that_this_host_lacks_becomes_its_own(kind, mode):
    asked = []

    def fits(*question):
        asked.append(question)
        return False

    root = domain(cpu=CPU, kind=kind)
    notes = adapted(root, HostFacts(CAPABILITIES, fits=fits))
    assert asked[0][:3] == ("x86_64", "pc-q35-7.2", kind)
    assert "Icelake" in asked[0][3]
    assert notes == [
        f"cpu: this host can't give Icelake as it is defined; the guest gets {mode}, and may lack features"
    ]
    processor = root.find("cpu")
    assert processor.attrib == {"mode": mode}
    assert [child.tag for child in processor] == ["topology"]


@pytest.mark.parametrize("answer", [True, None])
def test_a_processor_that_fits_or_of_which_nothing_is_known_stays(answer):
    root = domain(cpu=CPU)
    before = ET.tostring(root)
    assert adapted(root, HostFacts(CAPABILITIES, fits=lambda *_: answer)) == []
    assert ET.tostring(root) == before


def test_the_host_s_own_processor_is_told():
    root = domain(cpu="<cpu mode='host-passthrough'/>")
    assert adapted(root) == ["cpu: host-passthrough, so the guest sees this host's processor, not the one it knew"]
    assert adapted(domain(cpu="<cpu mode='maximum'/>", kind="qemu")) == []


TPM = f"<tpm><backend type='emulator'><encryption secret='{SECRET}'/></backend></tpm>"


def test_a_secret_of_the_same_usage_takes_its_place():
    root, named = domain(devices=TPM), [SecretRef("tpm", SECRET, "vtpm", "web")]
    host = HostFacts(CAPABILITIES, {OWN: ("vtpm", "web")})
    assert adapted(root, host, named) == [f"secret: {SECRET} becomes {OWN}, which is vtpm web here"]
    assert root.find("devices/tpm/backend/encryption").get("secret") == OWN
    assert unmet_here(ET.tostring(root, encoding="unicode"), host) == ()


def test_a_secret_that_is_not_here_is_unmet():
    root, named = domain(devices=TPM), [SecretRef("tpm", SECRET, "vtpm", "web")]
    host = HostFacts(CAPABILITIES, {OWN: ("vtpm", "other")})
    assert adapted(root, host, named) == []
    found = unmet_here(ET.tostring(root, encoding="unicode"), host, named)
    assert found == (f"secret {SECRET} (vtpm web) of its tpm: libvirt has none here",)


def test_what_has_no_equivalent_is_unmet():
    text = ET.tostring(domain(devices="<tpm><backend type='emulator'/></tpm>"), encoding="unicode")
    assert unmet_here(text, HostFacts(CAPABILITIES, tpm_emulator=False)) == ("tpm: no swtpm is installed here",)
    sealed = text.replace("</domain>", "<launchSecurity type='sev'/></domain>")
    assert "launchSecurity" in unmet_here(sealed, HostFacts(CAPABILITIES))[0]


def test_networks_that_are_not_here_are_unmet():
    interfaces = "<interface type='network'><source network='{}'/></interface>"
    interfaces += "<interface type='bridge'><source bridge='{}'/></interface>"
    text = ET.tostring(domain(devices=interfaces.format("prod", "br0")), encoding="unicode")
    host = HostFacts(CAPABILITIES, networks=frozenset({"prod"}), bridge=lambda name: name == "br0")
    assert unmet_here(text, host) == ()
    text = ET.tostring(domain(devices=interfaces.format("lan", "br9")), encoding="unicode")
    assert [each.partition(":")[0] for each in unmet_here(text, host)] == ["network lan", "bridge br9"]
    assert len(unmet_here(text, HostFacts(CAPABILITIES))) == 0
