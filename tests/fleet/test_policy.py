"""Policies: what is said nearest to a device counts; and when a maintenance window is open."""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ota_fleet.policy import (
    ANSWERS,
    DAYS,
    MAX_FLOORS,
    MAX_SPANS,
    MAX_WINDOW,
    NOTHING,
    Policy,
    channel_of,
    check_word,
    checked,
    is_open,
    merged,
    next_floor,
    opens_at,
    read_window,
)
from ota_server import Version

BERLIN = "Europe/Berlin"
MINUTE, HOUR, DAY = 60, 3_600, 86_400


def at(text: str) -> int:
    """UTC seconds of a time such as 2026-03-29 02:30+01:00, in UTC if it names no offset."""
    moment = datetime.fromisoformat(text)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


# -- What holds ------------------------------------------------------------------------------------

DEVICE = Policy(pin="1.0.0", hold="no")
GROUP = Policy(channel="beta", hold="yes", window="Sun 00:00-24:00")
PROJECT = Policy(channel="stable", floors=("7.2.0",), plan="{}", since=9, approval="yes")


@pytest.mark.parametrize(
    ("policies", "found"),
    [
        pytest.param((), NOTHING, id="nothing"),
        pytest.param((NOTHING, NOTHING), NOTHING, id="nothing-twice"),
        pytest.param((NOTHING, GROUP), GROUP, id="one"),
        pytest.param(
            (DEVICE, GROUP, PROJECT),
            Policy("beta", "1.0.0", "no", "Sun 00:00-24:00", "yes", ("7.2.0",), "{}", 9),
            id="nearest-first",
        ),
        pytest.param(
            (Policy(window="always"), GROUP),
            Policy(channel="beta", hold="yes", window="always"),
            id="always-ends-a-window",
        ),
        pytest.param(
            (Policy(again="2.0.0"), NOTHING, Policy(again="1.0.0", approval="no")),
            Policy(again="2.0.0", approval="no"),
            id="between-them-nothing",
        ),
    ],
)
def test_what_is_said_nearest_to_the_device_counts(
    policies: tuple[Policy, ...], found: Policy
) -> None:
    assert merged(policies) == found


POLICIES = st.builds(
    Policy, channel=st.sampled_from(["", "beta", "stable"]), pin=st.sampled_from(["", "1.0.0"]),
    hold=st.sampled_from(ANSWERS), window=st.sampled_from(["", "always", "Mon 01:00-02:00"]),
    approval=st.sampled_from(ANSWERS), floors=st.sampled_from([(), ("1.0.0",)]),
    plan=st.sampled_from(["", "{}"]), since=st.integers(0, 2), again=st.sampled_from(["", "1.0.0"]),
)  # fmt: skip


@given(st.lists(POLICIES | st.just(NOTHING), max_size=4))
def test_each_field_is_that_of_the_first_who_says_it(policies: list[Policy]) -> None:
    found = merged(policies)
    for field in fields(Policy):
        said = (getattr(each, field.name) for each in policies)
        assert getattr(found, field.name) == next(filter(None, said), field.default)


def test_policy_is_kept_in_normal_form() -> None:
    policy = Policy("beta", "v1.2", "yes", "Mon 1:00-2:00", "no", ("2.0", "1.10.0", "2.0.0"))
    assert checked(policy) == Policy(
        "beta", "1.2.0", "yes", "Mon 1:00-2:00", "no", ("1.10.0", "2.0.0")
    )
    assert checked(Policy(window="always", again="v2.0.0")) == Policy(
        window="always", again="2.0.0"
    )
    assert checked(NOTHING) == NOTHING


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (Policy(hold="maybe"), "hold is yes, no, or nothing"),
        (Policy(approval="YES"), "approval is yes, no, or nothing"),
        (
            Policy(channel="-x"),
            "'-x' is no name for a channel: 1 to 64 of A-Z a-z 0-9 . _ -",
        ),
        (Policy(pin="one"), "'one' is no version such as 1.2.3"),
        (Policy(again="1"), "'1' is no version such as 1.2.3"),
        (Policy(floors=("1.0.0", "x")), "'x' is no version such as 1.2.3"),
        (
            Policy(floors=tuple(f"{number}.0.0" for number in range(MAX_FLOORS + 1))),
            "a project has at most 32 floors",
        ),
        (
            Policy(window="Always"),
            "'Always' is no span such as Mon-Fri 22:00-05:00 Europe/Berlin",
        ),
    ],
)
def test_policy_that_cannot_be_is_refused_with_a_sentence(policy: Policy, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        checked(policy)


@pytest.mark.parametrize("name", ["a", "0", "Lab_2.east-wing", "x" * 64])
def test_group_can_be_called_so(name: str) -> None:
    check_word(name, "group")


@pytest.mark.parametrize("name", ["", " ", ".x", "_x", "a b", "a/b", "x" * 65, "süd", "a\n"])
def test_group_cannot_be_called_so(name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a group: 1 to 64 of "):
        check_word(name, "group")


@pytest.mark.parametrize(
    ("version", "given", "channel"),
    [
        ("1.0.0", "", "stable"),
        ("1.0.0-rc.1", "", "beta"),
        ("1.0.0+build", "", "stable"),
        ("1.0.0", "beta", "beta"),
        ("1.0.0-rc.1", "stable", "stable"),
        ("1.0.0-rc.1", "nightly", "nightly"),
    ],
)
def test_channel_is_the_given_one_or_what_the_number_says(
    version: str, given: str, channel: str
) -> None:
    assert channel_of(Version.parse(version), given) == channel


@pytest.mark.parametrize(
    ("running", "floor"),
    [
        pytest.param("", None, id="who-says-no-version-goes-anywhere"),
        pytest.param("1.0.0", "7.2.0", id="below-all"),
        pytest.param("7.2.0-rc.1", "7.2.0", id="pre-release-of-a-floor-is-below-it"),
        pytest.param("7.2.0", "10.0.0", id="on-a-floor"),
        pytest.param("9.9.9", "10.0.0", id="between-floors"),
        pytest.param("10.0.0", None, id="on-the-last"),
        pytest.param("11.0.0", None, id="above-all"),
    ],
)
def test_next_floor_is_the_lowest_above_the_running_version(
    running: str, floor: str | None
) -> None:
    found = next_floor(("10.0.0", "7.2.0"), Version.parse(running) if running else None)
    assert (str(found) if found else None) == floor


def test_without_floors_a_device_goes_anywhere() -> None:
    assert next_floor((), Version.parse("1.0.0")) is None


# -- When a window is open -------------------------------------------------------------------------

# On 2026-03-29, Berlin goes from 02:00 to 03:00; on 2026-10-25 from 03:00 to 02:00. Both: Sundays.
OPEN: list[Any] = [
    pytest.param("", "2026-11-30 12:00", True, id="nothing-said"),
    pytest.param("always", "2026-11-30 12:00", True, id="always"),
    pytest.param("10:00-12:00", "2026-11-30 09:59", False, id="before"),
    pytest.param("10:00-12:00", "2026-11-30 10:00", True, id="first-minute"),
    pytest.param("10:00-12:00", "2026-11-30 11:59:59", True, id="last-second"),
    pytest.param("10:00-12:00", "2026-11-30 12:00", False, id="after"),
    pytest.param("9:00-9:01", "2026-11-30 09:00", True, id="short-hour"),
    pytest.param("Mon 10:00-12:00", "2026-11-30 11:00", True, id="its-day"),
    pytest.param("Tue 10:00-12:00", "2026-11-30 11:00", False, id="other-day"),
    pytest.param("MON,wed 10:00-12:00", "2026-12-02 11:00", True, id="list-of-days-in-any-case"),
    pytest.param("Mon-Wed,Fri 10:00-12:00", "2026-12-03 11:00", False, id="not-in-the-list"),
    pytest.param("Mon-Wed,Fri 10:00-12:00", "2026-12-04 11:00", True, id="behind-the-comma"),
    pytest.param("Fri-Mon 10:00-12:00", "2026-11-30 11:00", True, id="days-wrap"),
    pytest.param("Fri-Mon 10:00-12:00", "2026-12-01 11:00", False, id="days-wrap-and-end"),
    pytest.param("Sun 00:00-24:00", "2026-11-29 23:59", True, id="whole-day"),
    pytest.param("Sun 00:00-24:00", "2026-11-30 00:00", False, id="whole-day-ends"),
    pytest.param("Sun 22:00-05:00", "2026-11-30 04:59", True, id="over-midnight"),
    pytest.param("Sun 22:00-05:00", "2026-11-30 05:00", False, id="over-midnight-ends"),
    pytest.param("Sun 22:00-05:00", "2026-11-29 04:00", False, id="not-the-night-before"),
    pytest.param("Sun 22:00-05:00", "2026-11-29 22:00", True, id="evening"),
    pytest.param("Sun 08:00-08:00", "2026-11-30 07:59", True, id="a-day-round"),
    pytest.param("Sun 08:00-08:00", "2026-11-30 08:00", False, id="a-day-round-ends"),
    pytest.param("Mon 1:00-2:00; Mon 3:00-4:00;", "2026-11-30 03:30", True, id="second-span"),
    pytest.param("Mon 1:00-2:00;Mon 3:00-4:00", "2026-11-30 02:30", False, id="between-spans"),
    pytest.param(f"22:00-05:00 {BERLIN}", "2026-11-30 03:59", True, id="zone-winter"),
    pytest.param(f"22:00-05:00 {BERLIN}", "2026-11-30 04:00", False, id="zone-winter-ends"),
    pytest.param(f"22:00-05:00 {BERLIN}", "2026-07-01 02:59", True, id="zone-summer"),
    pytest.param(f"22:00-05:00 {BERLIN}", "2026-07-01 03:00", False, id="zone-summer-ends"),
    pytest.param("Mon 00:00-01:00 Asia/Tokyo", "2026-11-29 15:30", True, id="day-of-the-zone"),
    pytest.param("10:00-12:00 UTC", "2026-11-30 11:00", True, id="utc"),
    pytest.param(f"02:00-03:00 {BERLIN}", "2026-03-29 00:59", False, id="no-such-hour-before"),
    pytest.param(f"02:00-03:00 {BERLIN}", "2026-03-29 01:00", False, id="no-such-hour"),
    pytest.param(f"02:30-04:00 {BERLIN}", "2026-03-29 01:00", True, id="clock-jumps-into-it"),
    pytest.param(f"02:00-03:00 {BERLIN}", "2026-10-25 00:30", True, id="hour-that-comes-twice"),
    pytest.param(f"02:00-03:00 {BERLIN}", "2026-10-25 01:30", True, id="its-second-time"),
    pytest.param(f"02:00-03:00 {BERLIN}", "2026-10-25 02:00", False, id="it-ends-but-once"),
    pytest.param(f"01:00-02:30 {BERLIN}", "2026-10-25 00:45", False, id="closed-in-between"),
    pytest.param(f"01:00-02:30 {BERLIN}", "2026-10-25 01:15", True, id="clock-jumps-back-into-it"),
]


@pytest.mark.parametrize(("window", "moment", "found"), OPEN)
def test_window_is_open_by_the_clock_of_its_zone(window: str, moment: str, found: bool) -> None:
    assert is_open(window, at(moment)) is found


@pytest.mark.parametrize(
    ("window", "moment", "opens"),
    [
        pytest.param("10:00-12:00", "2026-11-30 09:59:59", "2026-11-30 10:00", id="soon"),
        pytest.param("10:00-12:00", "2026-11-30 12:00", "2026-12-01 10:00", id="tomorrow"),
        pytest.param("10:00-10:01", "2026-11-30 10:01", "2026-12-01 10:00", id="just-closed"),
        pytest.param("Mon 10:00-12:00", "2026-11-30 12:00", "2026-12-07 10:00", id="in-a-week"),
        pytest.param(
            "Wed 1:00-2:00; Tue 3:00-4:00", "2026-11-30 12:00", "2026-12-01 03:00", id="first-span"
        ),
        pytest.param(
            f"22:00-05:00 {BERLIN}", "2026-07-01 12:00", "2026-07-01 22:00+02:00", id="zone"
        ),
        pytest.param(
            f"02:30-04:00 {BERLIN}", "2026-03-29 00:00", "2026-03-29 03:00+02:00", id="by-the-jump"
        ),
        pytest.param(
            f"01:00-02:30 {BERLIN}", "2026-10-25 00:40", "2026-10-25 02:00+01:00", id="by-jump-back"
        ),
        pytest.param(
            f"02:17-02:20 {BERLIN}", "2026-10-25 00:30", "2026-10-25 02:17+01:00", id="second-time"
        ),
        pytest.param(
            f"Sun 02:00-03:00 {BERLIN}", "2026-03-22 02:00", "2026-04-05 02:00+02:00",
            id="a-week-without",
        ),
    ],
)  # fmt: skip
def test_closed_window_says_when_it_opens(window: str, moment: str, opens: str) -> None:
    assert not is_open(window, at(moment))
    assert opens_at(window, at(moment)) == at(opens)


TIMES = st.builds("{:02}:{:02}".format, st.integers(0, 23), st.integers(0, 59))
SPANS = st.builds(
    "{} {}-{} {}".format,
    st.sampled_from([*DAYS, "Mon-Fri", "Sat-Sun", "Fri-Mon", "Sun,Wed"]),
    TIMES,
    TIMES | st.just("24:00"),
    st.sampled_from(
        [
            BERLIN,
            "UTC",
            "America/St_Johns",
            "Australia/Lord_Howe",
            "America/Santiago",
            "Asia/Beirut",
        ]
    ),
)
# About the days in 2026 on which one of those zones sets its clocks; and any other
CHANGES = [
    at(f"2026-{day} 00:00") for day in ("03-08", "03-29", "04-05", "09-06", "10-04", "10-25")
]
MOMENTS = st.builds(
    int.__add__,
    st.sampled_from(CHANGES) | st.integers(at("2025-01-01"), at("2027-01-01")),
    st.integers(-2 * DAY, 2 * DAY),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=2).map("; ".join), MOMENTS)
@example(f"Sun 02:30-03:30 {BERLIN}", at("2026-03-28 12:00"))
@example(f"Sun 00:15-02:45 {BERLIN}", at("2026-10-25 00:50"))
@example("Sat 23:30-00:30 America/Santiago", at("2026-09-05 12:00"))
def test_it_opens_with_the_first_minute_that_is_open(window: str, now: int) -> None:
    if is_open(window, now):
        return
    first = now - now % MINUTE + MINUTE
    found = next(each for each in range(first, now + 15 * DAY, MINUTE) if is_open(window, each))
    assert opens_at(window, now) == found


# -- Texts that are no window ----------------------------------------------------------------------

SPAN = "is no span such as Mon-Fri 22:00-05:00 Europe/Berlin"


@pytest.mark.parametrize(
    ("window", "sentence"),
    [
        (" ", "a maintenance window has 1 to 16 spans, with ; between them"),
        (";;", "a maintenance window has 1 to 16 spans, with ; between them"),
        (
            "1:00-2:00;" * (MAX_SPANS + 1),
            "a maintenance window has 1 to 16 spans, with ; between them",
        ),
        ("1:00-2:00 " + "x" * MAX_WINDOW, "a maintenance window has at most 255 characters"),
        ("always; 1:00-2:00", f"'always' {SPAN}"),
        ("at night", f"'at night' {SPAN}"),
        ("Mon  1:00-2:00", f"'Mon  1:00-2:00' {SPAN}"),
        ("1:00 - 2:00", f"'1:00 - 2:00' {SPAN}"),
        ("1:00-2:00 Europe/Berlin UTC", f"'1:00-2:00 Europe/Berlin UTC' {SPAN}"),
        ("1-2", f"'1-2' {SPAN}"),
        ("100-200", f"'100-200' {SPAN}"),
        ("0100-0200", "'0100' is no time such as 22:00"),
        (":100-2:00", "':100' is no time such as 22:00"),
        ("1:000-2:00", "'1:000' is no time such as 22:00"),
        ("1:0:0-2:00", "'1:0:0' is no time such as 22:00"),
        ("25:00-2:00", "'25:00' is no time of a day"),
        ("1:00-24:01", "'24:01' is no time of a day"),
        ("1:60-2:00", "'1:60' is no time of a day"),
        (
            "Mon 24:00-2:00",
            "a span does not begin at 24:00, but at 00:00 of the next day",
        ),
        ("Monday 1:00-2:00", "'Monday' is no day: they are Mon, Tue, Wed, Thu, Fri, Sat, Sun"),
        ("Mo 1:00-2:00", "'Mo' is no day: they are Mon, Tue, Wed, Thu, Fri, Sat, Sun"),
        ("Mon- 1:00-2:00", "'Mon-' is no day: they are Mon, Tue, Wed, Thu, Fri, Sat, Sun"),
        ("Mon,,Tue 1:00-2:00", "'' is no day: they are Mon, Tue, Wed, Thu, Fri, Sat, Sun"),
        ("Mon-Tue-Wed 1:00-2:00", "'Mon-Tue-Wed' is no day: they are Mon, .*"),
        ("1:00-2:00 Europe/Bonn", "this machine knows no time zone 'Europe/Bonn'"),
        ("1:00-2:00 Europe", "this machine knows no time zone 'Europe'"),
        ("1:00-2:00 ../UTC", "this machine knows no time zone '../UTC'"),
        ("1:00-2:00 /etc/passwd", "this machine knows no time zone '/etc/passwd'"),
        ("1:00-2:00 \ud800", "this machine knows no time zone .*"),
        ("1:00-2:00 a\0b", "this machine knows no time zone .*"),
    ],
)
def test_text_that_is_no_window_is_refused_with_a_sentence(window: str, sentence: str) -> None:
    pattern = sentence if sentence.endswith(".*") else re.escape(sentence)
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        read_window(window)


@given(st.text(st.sampled_from("Mon-Fri,; 0123456789:/UTC"), max_size=40))
def test_any_text_is_a_window_or_a_sentence(text: str) -> None:
    try:
        spans = read_window(text)
    except ValueError:
        return
    assert all(0 <= span.start < 24 * 60 >= span.end > -1 and span.days for span in spans)
    assert is_open(text, 0) in {True, False}


@pytest.fixture
def no_zones(tmp_path: Path) -> Iterator[None]:
    """A machine where no time zones are installed."""
    zoneinfo.reset_tzpath([str(tmp_path)])
    zoneinfo.ZoneInfo.clear_cache()
    yield
    zoneinfo.reset_tzpath()


@pytest.mark.usefixtures("no_zones")
def test_utc_needs_no_time_zones_to_be_installed() -> None:
    assert is_open("10:00-11:59 UTC", at("2026-11-30 11:00"))
    assert is_open("10:00-11:58", at("2026-11-30 11:00"))
    if find_spec("tzdata") is None:  # which is in the place of the system's
        with pytest.raises(ValueError, match="this machine knows no time zone 'Africa/Lome'"):
            read_window("10:00-11:57 Africa/Lome")
