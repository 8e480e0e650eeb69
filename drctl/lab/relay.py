"""Passes tokens around rings of guests. Sans-IO: takes the guests' lines, returns what to send to whom.

A ring is the guests of one site whose domains are named alike (`web-1`, `web-2`; or `web-1-test`, `web-2-test`): a copy
booted from a checkpoint must not hear of the original's future."""

from __future__ import annotations

from dataclasses import dataclass, field

#: A ring in which nothing was acknowledged for this long is started again: a token was lost with a guest.
STALL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A guest's channel: the site and the domain's name."""

    site: str
    domain: str


@dataclass
class _Member:
    guest: str
    ring: tuple[str, str]
    token: str = ""


@dataclass
class Relay:
    """The rings of all channels. Times are monotonic seconds."""

    _members: dict[Place, _Member] = field(default_factory=dict)
    _moved: dict[tuple[str, str], float] = field(default_factory=dict)

    def join(self, place: Place, guest: str) -> None:
        suffix = place.domain.replace(guest, "", 1)
        ring = (place.site, suffix)
        known = self._members.get(place)
        if known is None or known.guest != guest:
            self._members[place] = _Member(guest, ring)

    def leave(self, place: Place) -> None:
        self._members.pop(place, None)

    def token(self, place: Place, chain: str, number: str, digest: str, now: float) -> list[tuple[Place, str]]:
        """A guest's record was acknowledged: tell the next in its ring. Alone, it may go on by itself."""
        member = self._members.get(place)
        if member is None:
            return []
        member.token = f"token {member.guest} {chain} {number} {digest}"
        self._moved[member.ring] = now
        following = self._next(place, member.ring)
        return [(following, member.token if following != place else "token - 0 0")]

    def tick(self, now: float) -> list[tuple[Place, str]]:
        """Starts stalled rings: each guest's newest token again, and a push for the first."""
        sends: list[tuple[Place, str]] = []
        for ring in {member.ring for member in self._members.values()}:
            if now - self._moved.get(ring, 0.0) < STALL_SECONDS:
                continue
            self._moved[ring] = now
            places = self._places(ring)
            for place in places:
                member, following = self._members[place], self._next(place, ring)
                if member.token and following != place:
                    sends.append((following, member.token))
            sends.append((places[0], "token - 0 0"))
        return sends

    def _places(self, ring: tuple[str, str]) -> list[Place]:
        return sorted(place for place, member in self._members.items() if member.ring == ring)

    def _next(self, place: Place, ring: tuple[str, str]) -> Place:
        places = self._places(ring)
        return places[(places.index(place) + 1) % len(places)]
