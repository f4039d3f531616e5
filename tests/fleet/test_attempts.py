"""What a check-in makes of an attempt: tables over what a device says, and what always holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ota_fleet.attempts import (
    BROKEN,
    FAILURES,
    LEAST_PATIENCE,
    MOST_PATIENCE,
    OPEN,
    OUTCOMES,
    PROVEN,
    RETURNED,
    SILENT,
    USUAL_PATIENCE,
    Attempt,
    Said,
    can_teach,
    digests_of,
    is_news,
    lane_of,
    looping,
    outcome_of,
    patience_of,
)
from ota_fleet.registry import Registry
from ota_server import Facts, Release, Report, Version, inspect, read_report
from tests.data.make_images import esp32_image, esp32_signed, esp8266_image, gzip_image
from tests.devices import Esp32, Esp8266
from tests.fleet.test_registry import SIGHTING

OLD, NEW, OTHER = "1.0.0", "2.0.0", "1.5.0"
NEWS, LEARNED, BEFORE, FOREIGN = "a" * 32, "b" * 32, "c" * 32, "d" * 32  # digests
SIZE = 1_000
HOUR, DAY = 3_600, 86_400
ATTEMPT = Attempt(
    id=1, device="5C:CF:7F:12:34:56", lane="sketch", project="firmware", version=NEW,
    sha256="f" * 64, size=SIZE, digests=(NEWS, "e" * 32), rollout=0, before=OLD,
    before_digest=BEFORE, granted=10, deadline=20, sent=SIZE,
)  # fmt: skip
AGAIN = replace(ATTEMPT, before=NEW)  # the same version, built anew
SAME = replace(AGAIN, before_digest=NEWS)  # the very image once more
UNTOLD = replace(ATTEMPT, before_digest="")  # no digest was told with the grant
HALF = SIZE // 2


def said(version: str = "", digest: str = "") -> Said:
    """What a device says."""
    return Said(version, digest, "")


# -- What a check-in makes of an attempt -----------------------------------------------------------

BACK = RETURNED, BROKEN  # by whether all bytes had left
PROOF = PROVEN, PROVEN
CLAIM = PROVEN, OPEN  # a version is what somebody types: no proof until all bytes have left
NOTHING = OPEN, OPEN

TABLE = [  # attempt, digest, version, what comes of it when all bytes have left, when some have
    *((ATTEMPT, NEWS, version, PROOF) for version in (NEW, OLD, OTHER, "")),
    *((ATTEMPT, LEARNED, version, PROOF) for version in (NEW, OLD, OTHER, "")),
    *((ATTEMPT, BEFORE, version, BACK) for version in (NEW, OLD, OTHER, "")),
    (ATTEMPT, FOREIGN, NEW, CLAIM),  # signed on the way, for example
    (ATTEMPT, FOREIGN, OLD, BACK),
    (ATTEMPT, FOREIGN, OTHER, BACK),
    (ATTEMPT, FOREIGN, "", BACK),
    (ATTEMPT, "", NEW, CLAIM),
    (ATTEMPT, "", OLD, BACK),
    (ATTEMPT, "", OTHER, BACK),
    (ATTEMPT, "", "", NOTHING),
    (AGAIN, NEWS, NEW, PROOF),
    (AGAIN, BEFORE, NEW, BACK),
    (AGAIN, FOREIGN, NEW, CLAIM),  # another image, which calls itself as this one
    (AGAIN, "", NEW, NOTHING),  # a download, and no more
    (AGAIN, "", OLD, BACK),
    (SAME, NEWS, NEW, (PROVEN, BROKEN)),
    (SAME, FOREIGN, NEW, CLAIM),
    (UNTOLD, NEWS, "", PROOF),
    (UNTOLD, FOREIGN, "", NOTHING),
    (UNTOLD, FOREIGN, NEW, CLAIM),
    (UNTOLD, FOREIGN, OLD, BACK),
    (replace(UNTOLD, before=NEW), FOREIGN, NEW, NOTHING),
    (replace(UNTOLD, before=""), "", NEW, CLAIM),
    (replace(UNTOLD, before=""), "", OLD, BACK),
]


@pytest.mark.parametrize(("attempt", "digest", "version", "outcomes"), TABLE)
def test_outcome_is_what_the_device_says_it_runs(
    attempt: Attempt, digest: str, version: str, outcomes: tuple[str, str]
) -> None:
    learned = frozenset((LEARNED,))
    words = said(version, digest)
    assert outcome_of(attempt, words, learned) == outcomes[0]
    for sent in (0, HALF, SIZE - 1):
        assert outcome_of(replace(attempt, sent=sent), words, learned) == outcomes[1]


def test_better_digest_of_a_device_that_tells_two_is_enough() -> None:
    assert outcome_of(ATTEMPT, Said(OLD, FOREIGN, NEWS)) == PROVEN
    assert outcome_of(ATTEMPT, Said(NEW, FOREIGN, BEFORE)) == RETURNED
    assert (Said("", "md5", "sha256").digest, Said("", "md5", "").digest) == ("sha256", "md5")


@pytest.mark.parametrize(
    ("given", "before", "says", "outcome"),
    [
        pytest.param("2.0.0+5", "1.0.0", "2.0.0+5", PROVEN, id="same-build"),
        pytest.param("2.0.0+5", "1.0.0", "2.0.0", PROVEN, id="device-tells-no-build"),
        pytest.param("2.0.0", "1.0.0", "2.0.0+5", PROVEN, id="file-tells-no-build"),
        pytest.param("2.0.0+5", "1.0.0", "2.0.0+4", RETURNED, id="other-build"),
        pytest.param("2.0.0+5", "2.0.0+4", "2.0.0+5", PROVEN, id="from-build-to-build"),
        pytest.param("2.0.0+5", "2.0.0+4", "2.0.0+4", RETURNED, id="stays-at-its-build"),
        pytest.param("2.0.0+5", "2.0.0", "2.0.0", OPEN, id="cannot-tell-builds-apart"),
        pytest.param("2.0.0-rc.1", "1.0.0", "2.0.0", RETURNED, id="no-pre-release"),
    ],
)
def test_build_metadata_counts_where_both_have_it(
    given: str, before: str, says: str, outcome: str
) -> None:
    attempt = replace(ATTEMPT, version=given, before=before, before_digest="")
    assert outcome_of(attempt, said(says)) == outcome


@pytest.mark.parametrize(
    ("digest", "version", "outcome"),
    [
        pytest.param(FOREIGN, "2.1.0-dev", OPEN, id="newer-by-hand"),
        pytest.param("", "10.0.0", OPEN, id="newer-by-hand-without-digest"),
        pytest.param(FOREIGN, "0.9.0", RETURNED, id="factory-image"),
        pytest.param(BEFORE, "1.0.0", RETURNED, id="rolled-back"),
        pytest.param(BEFORE, "2.1.0", RETURNED, id="rolled-back-whatever-it-says"),
        pytest.param("", "1.0.0", RETURNED, id="rolled-back-without-digest"),
        pytest.param(NEWS, "2.0.0", PROVEN, id="still-runs-it"),
    ],
)
def test_who_was_proven_may_roll_back_or_go_on(digest: str, version: str, outcome: str) -> None:
    assert outcome_of(replace(ATTEMPT, outcome=PROVEN), said(version, digest)) == outcome


VERSIONS = st.sampled_from(["", OLD, NEW, OTHER, "2.0.0+1", "2.0.0+2"])
DIGESTS = st.sampled_from(["", NEWS, LEARNED, BEFORE, FOREIGN])
SAID = st.builds(Said, VERSIONS, DIGESTS, DIGESTS)
ATTEMPTS = st.builds(
    replace,
    st.just(ATTEMPT),
    version=VERSIONS.filter(bool),
    digests=st.lists(DIGESTS.filter(bool), max_size=2).map(tuple),
    before=VERSIONS,
    before_digest=DIGESTS,
    sent=st.integers(0, SIZE),
    outcome=st.sampled_from([OPEN, *OUTCOMES]),
)
KNOWN = st.frozensets(DIGESTS.filter(bool), max_size=2)


@given(ATTEMPTS, SAID, KNOWN)
def test_success_is_never_a_download_alone(
    attempt: Attempt, words: Said, learned: frozenset[str]
) -> None:
    names = {*attempt.digests, *learned}
    called = {words.md5, words.sha256} - {""}
    if outcome_of(attempt, words, learned) == PROVEN and not called & names:
        assert attempt.before_digest not in called
        assert words.version.partition("+")[0] == attempt.version.partition("+")[0]
        assert words.version != attempt.before or (called and attempt.before_digest)


@given(ATTEMPTS, KNOWN)
def test_who_says_what_it_said_before_has_proven_nothing(
    attempt: Attempt, learned: frozenset[str]
) -> None:
    before = said(attempt.before, attempt.before_digest)
    if attempt.before_digest not in {*attempt.digests, *learned}:
        assert outcome_of(attempt, before, learned) != PROVEN


@given(ATTEMPTS, SAID, KNOWN)
def test_returned_is_only_who_got_all_bytes(
    attempt: Attempt, words: Said, learned: frozenset[str]
) -> None:
    outcome = outcome_of(attempt, words, learned)
    assert outcome != (BROKEN if attempt.is_full else RETURNED)
    assert outcome != SILENT  # only time decides that


# -- What is news ----------------------------------------------------------------------------------

STANDINGS = (OPEN, *OUTCOMES)
NO_NEWS = {  # from what was known to what is said
    *((known, OPEN) for known in STANDINGS),
    *((known, known) for known in STANDINGS),
    (RETURNED, BROKEN),  # all bytes have left once
}


@pytest.mark.parametrize(("known", "said"), list(product(STANDINGS, (OPEN, PROVEN, *BACK))))
def test_check_in_is_news_if_it_changes_what_is_known(known: str, said: str) -> None:
    assert is_news(replace(ATTEMPT, outcome=known), said) is ((known, said) not in NO_NEWS)


def test_silent_device_that_comes_back_and_then_rolls_back_is_news_twice() -> None:
    silent = replace(ATTEMPT, outcome=SILENT)
    assert is_news(silent, outcome_of(silent, said(NEW)))
    proven = replace(ATTEMPT, outcome=PROVEN)
    assert is_news(proven, outcome_of(proven, said(OLD)))


def test_failures_are_all_outcomes_but_the_proof() -> None:
    assert {*FAILURES} == {*OUTCOMES} - {PROVEN}


# -- What a device teaches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "digest", "version", "teaches"),
    [
        pytest.param(ATTEMPT, FOREIGN, NEW, True, id="signed"),
        pytest.param(UNTOLD, FOREIGN, NEW, True, id="no-digest-before"),
        pytest.param(replace(ATTEMPT, version="2.0.0+5"), FOREIGN, NEW, True, id="build"),
        pytest.param(ATTEMPT, NEWS, NEW, False, id="known"),
        pytest.param(ATTEMPT, BEFORE, NEW, False, id="lies"),
        pytest.param(ATTEMPT, "", NEW, False, id="no-digest"),
        pytest.param(ATTEMPT, FOREIGN, OLD, False, id="old-version"),
        pytest.param(ATTEMPT, FOREIGN, "", False, id="no-version"),
        pytest.param(AGAIN, FOREIGN, NEW, False, id="same-version-again"),
        pytest.param(replace(ATTEMPT, sent=HALF), FOREIGN, NEW, False, id="flashed-by-hand"),
    ],
)
def test_only_a_full_proof_by_version_teaches_a_digest(
    attempt: Attempt, digest: str, version: str, teaches: bool
) -> None:
    assert can_teach(attempt, said(version, digest)) is teaches


@given(ATTEMPTS, SAID)
def test_who_teaches_has_proven(attempt: Attempt, words: Said) -> None:
    if can_teach(attempt, words) and attempt.before_digest not in {words.md5, words.sha256}:
        assert outcome_of(attempt, words) == PROVEN


# -- Real images -----------------------------------------------------------------------------------


def release_with(facts: Facts) -> Release:
    """A release of which this is known."""
    return Release("firmware", Version.parse(NEW), "sketch", "", "", (0, 0, SIZE, 0, 0), facts)


def attempt_for(image: bytes) -> Attempt:
    """An attempt to run an image."""
    facts = inspect(io.BytesIO(image))  # type: ignore[arg-type]  # it only reads
    return replace(ATTEMPT, digests=digests_of(release_with(facts)))


@pytest.mark.parametrize("mode", range(4), ids=["qio", "qout", "dio", "dout"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("built", [0, 2], ids=["built-for-qio", "built-for-dio"])
def test_esp8266_proves_an_image_in_each_of_its_flash_modes(
    mode: int, packed: bool, built: int
) -> None:
    image = esp8266_image("firmware", NEW, flash_mode=built)
    attempt = attempt_for(gzip_image(image) if packed else image)
    runs = Esp8266(host="", port=0, path="", image=image, flash_mode=mode)
    assert runs.image[2] == mode
    assert outcome_of(attempt, said("0.0.1", runs.sketch_md5)) == PROVEN
    rebuilt = esp8266_image("firmware", NEW, seed=1)
    other = Esp8266(host="", port=0, path="", image=rebuilt, flash_mode=mode)
    assert outcome_of(attempt, said(OLD, other.sketch_md5)) == RETURNED


@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize("signed", ["", "secure-boot-v1", "secure-boot-v2", "arduino"])
def test_esp32_proves_an_image_by_its_appended_digest(upper: bool, signed: str) -> None:
    image = esp32_image("firmware", NEW)
    appended = image[-32:].hex()
    attempt = attempt_for(esp32_signed(image, signed) if signed else image)
    fields = {"x-esp32-version": "0.0.1", "x-esp32-sta-mac": ATTEMPT.device}
    fields["x-esp32-sketch-sha256"] = appended.upper() if upper else appended
    assert outcome_of(attempt, Said.by(read_report("firmware", fields, ""))) == PROVEN


def test_esp32_that_tells_no_appended_digest_proves_it_by_its_md5() -> None:
    device = Esp32(host="", port=0, path="", image=esp32_image("firmware", NEW))
    assert outcome_of(attempt_for(device.image), said("0.0.1", device.sketch_md5)) == PROVEN


# -- What is said, what is kept --------------------------------------------------------------------


def test_what_a_report_says_is_in_normal_form() -> None:
    report = Report("firmware", "", Version.parse("v1.2"), sketch_md5="a", sketch_sha256="b")
    assert Said.by(report) == Said("1.2.0", "a", "b")
    assert Said.by(Report("firmware", "")) == Said("", "", "")


@pytest.mark.parametrize("kind", ["filesystem", "littlefs", "spiffs", "fatfs"])
def test_digest_of_the_sketch_says_nothing_of_a_filesystem(kind: str) -> None:
    report = Report("firmware", "", Version.parse(OLD), kind=kind, sketch_md5=BEFORE)
    assert lane_of(kind) == "filesystem"
    assert Said.by(report) == Said(OLD, "", "")
    attempt = replace(ATTEMPT, lane="filesystem", digests=(), before_digest="")
    assert outcome_of(attempt, Said.by(report._replace(version=Version.parse(NEW)))) == PROVEN


@pytest.mark.parametrize(("kind", "lane"), [("sketch", "sketch"), ("zip", "sketch")])
def test_sketch_and_zip_are_one_lane(kind: str, lane: str) -> None:
    assert lane_of(kind) == lane


def test_attempt_is_read_from_its_row() -> None:
    digests = f'["{NEWS}", "{"e" * 32}"]'
    row: Sequence[object] = (
        1, ATTEMPT.device, "sketch", "firmware", NEW, "f" * 64, SIZE, digests, 0, OLD, BEFORE,
        10, 20, SIZE, 0, 0, "",
    )  # fmt: skip
    assert Attempt.of(row) == ATTEMPT


@pytest.mark.parametrize(("sent", "full"), [(0, False), (SIZE - 1, False), (SIZE, True)])
def test_download_is_full_with_its_last_byte(sent: int, full: bool) -> None:
    assert replace(ATTEMPT, sent=sent).is_full is full


def test_digests_are_those_that_devices_may_say() -> None:
    release = Release(
        "p", Version.parse(NEW), "sketch", "", "", (0,) * 5, Facts(running=frozenset("ab"))
    )
    assert digests_of(release) == ("a", "b")
    assert digests_of(replace(release, facts=Facts())) == ()


def test_loop_has_its_sentence() -> None:
    assert str(looping(release_with(Facts()))) == (
        "loop: 2.0.0 was given 3 times in full and the device does not run it: look at it, "
        "then let it try again"
    )


# -- Time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "patience"),
    [
        pytest.param(0, USUAL_PATIENCE, id="asked-once"),
        pytest.param(60, LEAST_PATIENCE, id="every-minute"),
        pytest.param(900, HOUR, id="quarter-of-an-hour"),
        pytest.param(HOUR, 4 * HOUR, id="hourly"),
        pytest.param(DAY, 4 * DAY, id="daily"),
        pytest.param(7 * DAY, MOST_PATIENCE, id="weekly"),
    ],
)
def test_patience_is_four_intervals_within_bounds(interval: int, patience: int) -> None:
    assert patience_of(interval) == patience


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_who_asks_more_seldom_has_no_less_time(one: int, other: int) -> None:
    fewer, more = sorted((max(one, 1), max(other, 1)))
    assert LEAST_PATIENCE <= patience_of(fewer) <= patience_of(more) <= MOST_PATIENCE


RETRY = 60  # seconds; who asks again so soon says nothing of how often it asks


def interval_of(before: int, gap: int) -> int:
    """How often a device asks, in seconds, once it was away for `gap` seconds; as SQL divides."""
    if gap < RETRY:
        return before
    return before + int((min(gap, 4 * before) - before) / 8) if before else gap


JITTER = st.lists(st.integers(HOUR * 9 // 10, HOUR * 11 // 10), max_size=50)


@given(JITTER, st.integers(0, 10**9), JITTER)
def test_hourly_device_stays_near_an_hour_whatever_single_absence_comes(
    before: list[int], absence: int, after: list[int]
) -> None:
    interval = HOUR
    for gap in (*before, absence, *after):
        interval = interval_of(interval, gap)
        assert HOUR * 3 // 4 <= interval <= HOUR * 8 // 5


@given(st.integers(RETRY, 30 * DAY), st.integers(RETRY, 30 * DAY))
def test_changed_rhythm_is_learned(before: int, gap: int) -> None:
    interval = before
    for _ in range(120):
        after = interval_of(interval, gap)
        assert min(interval, gap) <= after <= max(interval, gap)
        interval = after
    assert abs(interval - gap) <= max(8, gap // 10)


@given(st.integers(0, 10**9), st.integers(0, RETRY - 1))
def test_retry_says_nothing_of_the_rhythm(before: int, gap: int) -> None:
    assert interval_of(before, gap) == before


def test_restart_after_an_image_is_no_rhythm(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "fleet.db")
    try:
        for at, offered in ((0, "2.0.0"), (90, ""), (90 + HOUR, "")):
            registry.seen(SIGHTING._replace(at=SIGHTING.at + at, offered=offered))
        registry.flush()
        device = registry.device(SIGHTING.device)
    finally:
        registry.close()
    assert device is not None
    assert device.interval == HOUR


def test_registry_reckons_as_it_is_written_here(tmp_path: Path) -> None:
    befores = (0, 60, 61, 67, 900, HOUR, DAY)
    gaps = (0, 59, 60, 61, 100, HOUR - 1, HOUR + 1, 4 * HOUR, 5 * HOUR, DAY, 30 * DAY)
    cases = {f"5C:CF:7F:00:{a:02X}:{b:02X}": (befores[a], gaps[b])
             for a, b in product(range(len(befores)), range(len(gaps)))}  # fmt: skip
    registry = Registry(tmp_path / "fleet.db")
    try:
        for device, (before, gap) in cases.items():
            times = dict.fromkeys((SIGHTING.at, SIGHTING.at + before, SIGHTING.at + before + gap))
            for at in times:
                registry.seen(SIGHTING._replace(device=device, at=at))
        registry.flush()
        found = {device: registry.device(device) for device in cases}
    finally:
        registry.close()
    for device, (before, gap) in cases.items():
        row = found[device]
        assert row is not None
        assert row.interval == interval_of(before, gap), (before, gap)
