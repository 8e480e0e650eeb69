"""What a machine asks of its host that another host may not have: machine type, processor, secrets, emulators. Pure.

What has a near equivalent is mapped, and told by name; what has none is told by `unmet`."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from drctl.hypervisor.domain_xml import parse
from drctl.hypervisor.guest_state import SecretRef, secrets, tpm

#: Aliases that QEMU gives the newest machine type of a family.
_ALIASES = {"pc-q35": "q35", "pc-i440fx": "pc"}
_VERSIONED = re.compile(r"(?P<family>[a-z][a-z0-9-]*?)-(?P<version>[a-z]*[0-9][a-z0-9.]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The recovery host. `secrets`: type and usage by UUID. `fits` asks libvirt whether the host can give a processor:
    (architecture, machine type, domain type, `<cpu>`) → None where it can't tell. `networks` None: not known; `bridge`
    tells whether there is one of that name."""

    capabilities: str
    secrets: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    fits: Callable[[str, str, str, str], bool | None] = lambda *_: None
    tpm_emulator: bool = True
    networks: frozenset[str] | None = None
    bridge: Callable[[str], bool] = lambda _: True


def adapt(root: ET.Element, host: HostFacts, named: Iterable[SecretRef], notes: list[str]) -> None:
    """Map what this host has otherwise. `named`: the machine's secrets as its source named them."""
    _map_machine(root, ET.fromstring(host.capabilities), notes)
    _map_processor(root, host, notes)
    _map_secrets(root, host, named, notes)


# -- machine type -----------------------------------------------------------------------------------------------------


def _map_machine(root: ET.Element, capabilities: ET.Element, notes: list[str]) -> None:
    kind = root.find("os/type")
    machine = "" if kind is None else kind.get("machine", "")
    if kind is None or not machine:
        return
    offered = _offered(root, capabilities)
    if not offered or machine in offered:
        return
    if near := nearest(machine, offered):
        kind.set("machine", near)
        notes.append(
            f"machine type: {machine} becomes {near}, this host's QEMU does not have it; the guest may find other "
            "revisions of its devices (Windows may ask to be activated)"
        )


def nearest(machine: str, offered: Iterable[str]) -> str:
    """The type of the same family that is closest below, else the oldest above; "" when the family is not here."""
    wanted = _VERSIONED.fullmatch(machine)
    if wanted is None:
        return ""
    names = list(offered)
    split = [found for name in names if (found := _VERSIONED.fullmatch(name))]
    kin = sorted((_version(one["version"]), one.string) for one in split if one["family"] == wanted["family"])
    mine = _version(wanted["version"])
    below = [name for version, name in kin if version <= mine]
    if below or kin:
        return below[-1] if below else kin[0][1]
    alias = _ALIASES.get(wanted["family"], wanted["family"])
    return alias if alias in names else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _guest(root: ET.Element, capabilities: ET.Element) -> ET.Element | None:
    kind = root.find("os/type")
    arch = "" if kind is None else kind.get("arch", "")
    return next((each for each in capabilities.iterfind("guest/arch") if not arch or each.get("name") == arch), None)


def _offered(root: ET.Element, capabilities: ET.Element) -> list[str]:
    guest = _guest(root, capabilities)
    if guest is None:
        return []
    own = guest.find(f"domain[@type='{root.get('type', '')}']") if re.fullmatch(r"\w+", root.get("type", "")) else None
    places = [place for place in (guest, own) if place is not None]
    return [each.text for place in places for each in place.iterfind("machine") if each.text]


# -- processor --------------------------------------------------------------------------------------------------------


def _map_processor(root: ET.Element, host: HostFacts, notes: list[str]) -> None:
    processor, kind = root.find("cpu"), root.find("os/type")
    if processor is None or kind is None:
        return
    mode, model = processor.get("mode", "custom"), (processor.findtext("model") or "").strip()
    domain = root.get("type", "")
    if mode in ("host-passthrough", "host-model") and domain == "kvm":
        notes.append(f"cpu: {mode}, so the guest sees this host's processor, not the one it knew")
    if mode != "custom" or not model or processor.get("check") == "none":
        return
    text = ET.tostring(processor, encoding="unicode")
    if host.fits(kind.get("arch", ""), kind.get("machine", ""), domain, text) is not False:
        return
    own = "host-model" if domain == "kvm" else "maximum"
    for child in list(processor):
        if child.tag not in ("topology", "numa"):
            processor.remove(child)
    processor.attrib.clear()
    processor.set("mode", own)
    notes.append(f"cpu: this host can't give {model} as it is defined; the guest gets {own}, and may lack features")


# -- secrets ----------------------------------------------------------------------------------------------------------


def _map_secrets(root: ET.Element, host: HostFacts, named: Iterable[SecretRef], notes: list[str]) -> None:
    """A secret of the same type and usage is the same secret, whatever its UUID."""
    usages = {usage: uuid for uuid, usage in host.secrets.items() if usage[1]}
    known = {one.uuid: (one.kind, one.usage) for one in named if one.uuid and one.usage}
    for element in root.iter():
        name = {"secret": "uuid", "encryption": "secret"}.get(element.tag)
        uuid = element.get(name, "") if name else ""
        if not name or not uuid or uuid in host.secrets or uuid not in known:
            continue
        if (own := usages.get(known[uuid])) is not None:
            element.set(name, own)
            notes.append(f"secret: {uuid} becomes {own}, which is {' '.join(known[uuid])} here")


def _unmet_secrets(root: ET.Element, host: HostFacts, named: Sequence[SecretRef]) -> list[str]:
    known = {one.uuid: f" ({one.kind} {one.usage})" for one in named if one.usage}
    usages = set(host.secrets.values())
    found = []
    for one in secrets(root):
        if one.uuid and one.uuid not in host.secrets:
            found.append(f"secret {one.uuid}{known.get(one.uuid, '')} of its {one.needed_by}: libvirt has none here")
        elif not one.uuid and one.usage and (one.kind, one.usage) not in usages:
            found.append(f"secret {one.kind} {one.usage} of its {one.needed_by}: libvirt has none here")
    return found


# -- what can't be mapped ---------------------------------------------------------------------------------------------


def unmet_here(definition: str, host: HostFacts, named: Iterable[SecretRef] = ()) -> tuple[str, ...]:
    """What the machine needs and this host lacks; empty when it can run. The definition is one that was adapted."""
    root = parse(definition)
    found = [*unmet(definition, host.capabilities), *_unmet_secrets(root, host, list(named))]
    found += _unmet_networks(root, host)
    facts = tpm(root)
    if facts is not None and facts.backend == "emulator" and not host.tpm_emulator:
        found.append("tpm: no swtpm is installed here")
    if root.find("launchSecurity") is not None:
        found.append("launchSecurity: its memory is sealed by its host's processor, which is another here")
    return tuple(found)


def _unmet_networks(root: ET.Element, host: HostFacts) -> list[str]:
    found = []
    for source in root.iterfind("devices/interface/source"):
        network, bridge = source.get("network", ""), source.get("bridge", "")
        if network and host.networks is not None and network not in host.networks:
            found.append(f"network {network}: this host has none of that name; map it (networks of its group)")
        elif bridge and not network and not host.bridge(bridge):
            found.append(f"bridge {bridge}: this host has none of that name; map it (networks of its group)")
    return found


def unmet(definition: str, capabilities: str) -> tuple[str, ...]:
    """What libvirt's capabilities lack of the machine: architecture, accelerator, machine type.

    Of the processor only libvirt can say the last word, at start."""
    root, host = parse(definition), ET.fromstring(capabilities)
    guest = _guest(root, host)
    kind = root.find("os/type")
    if guest is None:
        return (f"architecture {'' if kind is None else kind.get('arch', '')}: no emulator for it here",)
    machine = "" if kind is None else kind.get("machine", "")
    return tuple(filter(None, (_unmet_accelerator(root, guest), _unmet_machine(machine, root, host))))


def _unmet_accelerator(root: ET.Element, guest: ET.Element) -> str:
    wanted = root.get("type", "")
    if wanted in {each.get("type") for each in guest.iterfind("domain")}:
        return ""
    return f"domain type {wanted}: not available here"


def _unmet_machine(machine: str, root: ET.Element, host: ET.Element) -> str:
    if not machine or machine in _offered(root, host):
        return ""
    return f"machine type {machine}: this host's QEMU does not have it"
