"""What people decided about who gets releases: of a project, of a group, of one device. Pure.

    policies of device, group, project --> merged() --> Policy: what is said nearest to the device

A maintenance window is text such as "Mon-Fri 22:00-05:00 Europe/Berlin; Sun 00:00-24:00 UTC".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta, tzinfo
from typing import NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ota_server import Version, shown

STABLE, BETA = "stable", "beta"
SCOPES = ("project", "group", "device")
ANSWERS = ("", "yes", "no")  # "": not said here
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MAX_FLOORS = 32
MAX_SPANS = 16
MAX_WINDOW = 255  # characters
SOON = 15  # days: a span of one day a week that a clock jumped over comes again by then
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a channel, a group
_SPAN = re.compile(
    r"(?:(?P<days>[A-Za-z,-]+) )?(?P<start>[0-9:]{4,5})-(?P<end>[0-9:]{4,5})(?: (?P<zone>\S+))?"
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What is said in one place. "" and (): nothing is said there."""

    channel: str = ""  # see channel_of()
    pin: str = ""  # the one version to run, also downwards; not of a project
    hold: str = ""  # "yes": nothing is given; one of ANSWERS
    window: str = ""  # when images are given; "always": at any time
    approval: str = ""  # "yes": only what somebody approved for the device; one of ANSWERS
    floors: tuple[str, ...] = ()  # versions that are not jumped over; of a project only
    plan: str = ""  # of the rollouts of new releases, plan_text(); of a project only
    since: int = 0  # UTC seconds: older releases do not go by that plan
    again: str = ""  # the version that is given once more; of a device only


NOTHING = Policy()


def merged(policies: Iterable[Policy]) -> Policy:
    """One policy of several, the nearest to the device first."""
    found = NOTHING
    for policy in policies:
        if policy is NOTHING:
            continue
        if found is NOTHING:
            found = policy
            continue
        missing = {
            each.name: getattr(policy, each.name)
            for each in fields(Policy)
            if not getattr(found, each.name)
        }
        found = replace(found, **missing)
    return found


def checked(policy: Policy) -> Policy:
    """The policy with its versions in normal form. ValueError: no policy can be like this."""
    for name in ("hold", "approval"):
        if getattr(policy, name) not in ANSWERS:
            raise ValueError(f"{name} is yes, no, or nothing")
    if policy.channel:
        check_word(policy.channel, "channel")
    if policy.window not in {"", "always"}:
        read_window(policy.window)
    if len(policy.floors) > MAX_FLOORS:
        raise ValueError(f"a project has at most {MAX_FLOORS} floors")
    floors = sorted({Version.parse(each) for each in policy.floors})
    return replace(
        policy,
        floors=tuple(map(str, floors)),
        pin=_normal(policy.pin),
        again=_normal(policy.again),
    )


def _normal(version: str) -> str:
    return str(Version.parse(version)) if version else ""


def check_word(text: str, what: str) -> None:
    """ValueError: no channel or group can be called so; `what` is which of them."""
    if _WORD.fullmatch(text) is None:
        raise ValueError(f"{shown(text)} is no name for a {what}: 1 to 64 of A-Z a-z 0-9 . _ -")


def channel_of(version: Version, given: str) -> str:
    """The channel of a release: what it was `given`, else beta for a pre-release."""
    return given or (BETA if version.prerelease else STABLE)


def next_floor(floors: Sequence[str], running: Version | None) -> Version | None:
    """The lowest version that a device may not jump over; None: it may go anywhere."""
    if running is None:
        return None
    found = (version for each in floors if (version := Version.parse(each)) > running)
    return min(found, default=None)


# -- Maintenance windows ---------------------------------------------------------------------------


class Span(NamedTuple):
    """A part of a week, in the time of its zone."""

    days: frozenset[int]  # on which it begins, 0: Monday
    start: int  # minutes of the day
    end: int  # minutes of the day; not above start: of the next one
    zone: tzinfo


@functools.lru_cache(maxsize=256)
def read_window(text: str) -> tuple[Span, ...]:
    """What a window says. ValueError: a sentence says what is wrong with it."""
    if len(text) > MAX_WINDOW:
        raise ValueError(f"a maintenance window has at most {MAX_WINDOW} characters")
    spans = tuple(_span(each.strip()) for each in text.split(";") if each.strip())
    if not 1 <= len(spans) <= MAX_SPANS:
        raise ValueError(f"a maintenance window has 1 to {MAX_SPANS} spans, with ; between them")
    return spans


def _span(text: str) -> Span:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is no span such as Mon-Fri 22:00-05:00 Europe/Berlin")
    start, end = _minutes(match["start"]), _minutes(match["end"])
    if start == 24 * 60:
        raise ValueError("a span does not begin at 24:00, but at 00:00 of the next day")
    return Span(_days(match["days"]), start, end, _zone(match["zone"] or "UTC"))


def _zone(name: str) -> tzinfo:
    """A time zone; UTC is one even where no others are installed."""
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as err:
        raise ValueError(f"this machine knows no time zone {shown(name)}") from err


def _days(text: str | None) -> frozenset[int]:
    """Those that a list such as Mon-Fri,Sun names; None: all."""
    found: set[int] = set()
    for part in (text or "Mon-Sun").split(","):
        first, dash, last = part.partition("-")
        try:
            begin, end = DAYS.index(first.title()), DAYS.index((last if dash else first).title())
        except ValueError as err:
            raise ValueError(f"{shown(part)} is no day: they are {', '.join(DAYS)}") from err
        found.update((begin + each) % 7 for each in range((end - begin) % 7 + 1))
    return frozenset(found)


def _minutes(text: str) -> int:
    hour, _, minute = text.partition(":")
    if not (hour.isdecimal() and minute.isdecimal() and len(minute) == 2):
        raise ValueError(f"{shown(text)} is no time such as 22:00")
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > 24 * 60:
        raise ValueError(f"{shown(text)} is no time of a day")
    return found


def is_open(window: str, now: int) -> bool:
    """Whether a maintenance window is open at a time, UTC seconds."""
    return window in {"", "always"} or any(_holds(each, now) for each in read_window(window))


def _holds(span: Span, now: int) -> bool:
    here = datetime.fromtimestamp(now, span.zone)
    minute = here.hour * 60 + here.minute
    if span.start < span.end:
        return here.weekday() in span.days and span.start <= minute < span.end
    yesterday = (here.weekday() - 1) % 7
    late = here.weekday() in span.days and minute >= span.start
    return late or (yesterday in span.days and minute < span.end)


def opens_at(window: str, now: int) -> int:
    """When a closed window opens next, UTC seconds, to the minute; `now`: not within SOON."""
    first = (
        next((at for at in _moments(span, now) if at > now and _holds(span, at)), None)
        for span in read_window(window)
    )
    return min((at for at in first if at is not None), default=now)


def _moments(span: Span, now: int) -> Iterator[int]:
    """When a span may open: at its start, which some days have twice; and when clocks are set."""
    today = datetime.fromtimestamp(now, span.zone)
    midnight = today.replace(hour=0, minute=0, second=0)
    for day in range(SOON):
        begin, end = midnight + timedelta(days=day), midnight + timedelta(days=day + 1)
        start = begin + timedelta(minutes=span.start)
        found = {int(start.replace(fold=fold).timestamp()) for fold in (0, 1)}
        if begin.utcoffset() != end.utcoffset():  # clocks are set at a full quarter of an hour
            found.update(range(int(begin.timestamp()), int(end.timestamp()), 900))
        yield from sorted(found)
