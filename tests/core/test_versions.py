"""Versions: SemVer 2.0.0, held against the PyPI package semver."""

from __future__ import annotations

import itertools

import pytest
import semver
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ota_server import MAX_VERSION, Version

NUMBERS = st.one_of(st.integers(0, 2), st.integers(0, 10**25)).map(str)
WORDS = st.from_regex(r"[0-9]{0,2}[A-Za-z-][0-9A-Za-z-]{0,3}", fullmatch=True)
PRERELEASES = st.lists(st.one_of(NUMBERS, WORDS), max_size=4).map(".".join)
BUILDS = st.lists(st.text("0189azAZ-", min_size=1, max_size=3), max_size=3).map(".".join)


@st.composite
def versions(draw: st.DrawFn) -> str:
    """A semantic version by construction; small numbers, so that two are often near."""
    numbers = ".".join(draw(NUMBERS) for _ in range(3))
    prerelease, build = draw(PRERELEASES), draw(BUILDS)
    text = f"{numbers}{'-' * bool(prerelease)}{prerelease}{'+' * bool(build)}{build}"
    assume(len(text) <= MAX_VERSION)
    return text


@st.composite
def misspelled(draw: st.DrawFn) -> str:
    """A semantic version in which some characters were changed, added or taken away."""
    text = draw(versions())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        kept = draw(st.integers(at, min(at + 2, len(text))))
        text = text[:at] + draw(st.text("0019.-+aZ_ ~x", max_size=2)) + text[kept:]
    return text


def accepted(text: str) -> bool:
    try:
        Version.parse(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        pytest.param("1.2.3", "1.2.3", id="three numbers"),
        pytest.param("0.0.0", "0.0.0", id="zeros"),
        pytest.param("v1.2.3", "1.2.3", id="v"),
        pytest.param("V1.2.3", "1.2.3", id="V"),
        pytest.param("1.2", "1.2.0", id="two numbers"),
        pytest.param("v0.1", "0.1.0", id="v and two numbers"),
        pytest.param("1.0", "1.0.0", id="the version of the captured ESP8266 request"),
        pytest.param("1.2.3-rc.1", "1.2.3-rc.1", id="pre-release"),
        pytest.param("1.2-rc.1", "1.2.0-rc.1", id="pre-release of two numbers"),
        pytest.param("1.2.3-0", "1.2.3-0", id="pre-release zero"),
        pytest.param("1.2.3-01a", "1.2.3-01a", id="word that begins with a zero"),
        pytest.param("1.2.3--", "1.2.3--", id="pre-release of one hyphen"),
        pytest.param("1.2.3+build.007", "1.2.3+build.007", id="build with leading zeros"),
        pytest.param("1.2+7", "1.2.0+7", id="build of two numbers"),
        pytest.param("1.2.3-a.b+c.d", "1.2.3-a.b+c.d", id="pre-release and build"),
        pytest.param("1.2.3+a-b", "1.2.3+a-b", id="hyphen in the build is no pre-release"),
        pytest.param(f"1.2.{'9' * 124}", f"1.2.{'9' * 124}", id="128 characters"),
    ],
)
def test_version_is_read_and_written_in_normal_form(text: str, normal: str) -> None:
    assert str(Version.parse(text)) == normal


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("1", id="one number"),
        pytest.param("v1", id="v and one number"),
        pytest.param("1.2.3.4", id="four numbers"),
        pytest.param("01.2.3", id="zero before major"),
        pytest.param("1.02.3", id="zero before minor"),
        pytest.param("1.2.03", id="zero before patch"),
        pytest.param("1.02", id="zero before minor of two"),
        pytest.param("1.2.3-01", id="zero before a numeric identifier"),
        pytest.param("+1.2.3", id="plus sign"),
        pytest.param("-1.2.3", id="minus sign"),
        pytest.param("1.-2.3", id="minus sign inside"),
        pytest.param(" 1.2.3", id="blank before"),
        pytest.param("1.2.3 ", id="blank behind"),
        pytest.param("1.2.3\n", id="line feed behind"),
        pytest.param("1. 2.3", id="blank inside"),
        pytest.param("1_0.2.3", id="underscore"),
        pytest.param("1.2.3-", id="empty pre-release"),
        pytest.param("1.2.3+", id="empty build"),
        pytest.param("1.2.3-a..b", id="empty identifier"),
        pytest.param("1.2.3-a.", id="empty last identifier"),
        pytest.param("1.2.3-.a", id="empty first identifier"),
        pytest.param("1.2.3+a..b", id="empty identifier in the build"),
        pytest.param("1.2.3+a+b", id="two builds"),
        pytest.param("1.2.", id="dot at the end"),
        pytest.param(".1.2", id="dot at the start"),
        pytest.param("1..2", id="two dots"),
        pytest.param("1,2,3", id="commas"),
        pytest.param("vv1.2.3", id="two v"),
        pytest.param("v.1.2.3", id="v and a dot"),
        pytest.param("1.2.3-ä", id="umlaut"),
        pytest.param("1.2.\N{ARABIC-INDIC DIGIT THREE}", id="arabic digit"),
        pytest.param("\N{FULLWIDTH DIGIT ONE}.2.3", id="wide digit"),
        pytest.param("1.2.\N{SUPERSCRIPT TWO}", id="superscript digit"),
        pytest.param("1.2.3-\N{DEVANAGARI DIGIT ONE}", id="devanagari digit in the pre-release"),
        pytest.param("1e3.0.0", id="exponent"),
        pytest.param("0x1.0.0", id="hexadecimal"),
        pytest.param("nan", id="nan"),
        pytest.param("14.1.0(tasmota)", id="Tasmota"),
        pytest.param(f"1.2.{'9' * 125}", id="129 characters"),
        pytest.param(f"1.{'9' * 125}", id="129 characters in normal form"),
        pytest.param("9" * 100_000, id="far too long"),
    ],
)
def test_what_is_no_version_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no version such as 1\.2\.3$") as caught:
        Version.parse(text)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        pytest.param("1.9.0", "1.10.0", id="numbers, not text"),
        pytest.param("1.9", "1.10", id="nor decimals"),
        pytest.param("2.0.0", "10.0.0", id="major"),
        pytest.param("1.0.9", "1.0.10", id="patch"),
        pytest.param("1.0.0-alpha", "1.0.0", id="pre-release comes before the release"),
        pytest.param("0.9.9", "1.0.0-alpha", id="and behind the one before"),
        pytest.param("1.0.0-2", "1.0.0-11", id="numeric identifiers are numbers"),
        pytest.param("1.0.0-999", "1.0.0-a", id="numbers before words"),
        pytest.param("1.0.0-A", "1.0.0-a", id="ASCII order"),
        pytest.param("1.0.0-a", "1.0.0-a.0", id="more identifiers come later"),
    ],
)
def test_lower_version_is_before_higher(lower: str, higher: str) -> None:
    assert Version.parse(lower) < Version.parse(higher)
    assert not Version.parse(lower) >= Version.parse(higher)


def test_order_of_the_standards_own_example() -> None:
    prereleases = ["alpha", "alpha.1", "alpha.beta", "beta", "beta.2", "beta.11", "rc.1"]
    texts = [*(f"1.0.0-{each}" for each in prereleases), "1.0.0", "2.0.0", "2.1.0", "2.1.1"]
    read = [Version.parse(text) for text in texts]  # SemVer 11
    assert all(a < b for a, b in itertools.combinations(read, 2))
    assert [str(version) for version in sorted(set(read))] == texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("1.2.3", False, id="release"),
        pytest.param("1.2.3+rc-1", False, id="build with a hyphen"),
        pytest.param("1.2.3-rc", True, id="pre-release"),
        pytest.param("1.2-0", True, id="pre-release zero of two numbers"),
    ],
)
def test_prerelease_is_known_as_one(text: str, expected: bool) -> None:
    assert Version.parse(text).prerelease is expected


@settings(deadline=None)
@given(versions())
def test_whatever_semver_writes_is_accepted_and_kept(text: str) -> None:
    assert str(Version.parse(text)) == text == str(semver.Version.parse(text))
    assert Version.parse(f"v{text}") == Version.parse(text)


@settings(deadline=None, max_examples=300)
@given(misspelled())
def test_acceptance_of_three_numbers_is_that_of_semver(text: str) -> None:
    assume(len(text) <= MAX_VERSION)
    start = text.partition("-")[0].partition("+")[0]
    assume(start.count(".") != 1)  # 1.2 is ours alone
    assert accepted(text) == semver.Version.is_valid(text)


@settings(deadline=None, max_examples=300)
@given(versions(), versions())
def test_order_is_that_of_semver(one: str, other: str) -> None:
    a, b = Version.parse(one), Version.parse(other)
    expected = semver.Version.parse(one).compare(other)
    assert (a > b) - (a < b) == expected
    assert (a == b) == (expected == 0)


@settings(deadline=None)
@given(PRERELEASES, PRERELEASES)
def test_order_of_prereleases_is_that_of_semver(one: str, other: str) -> None:
    assume(one and other)
    a, b = (Version.parse(f"1.0.0-{each}") for each in (one, other))
    expected = semver.Version.parse(f"1.0.0-{one}").compare(f"1.0.0-{other}")
    assert (a > b) - (a < b) == expected


@settings(deadline=None)
@given(st.lists(versions().map(Version.parse), min_size=3, max_size=3))
def test_order_is_total(three: list[Version]) -> None:
    a, b, c = sorted(three)
    assert a <= b <= c
    assert a <= c
    assert (a < b) + (a == b) + (a > b) == 1


@settings(deadline=None)
@given(versions(), BUILDS, BUILDS)
def test_build_metadata_does_not_count(text: str, one: str, other: str) -> None:
    assume(one and other and len(text) < 90)
    plain = text.partition("+")[0]
    a, b = Version.parse(f"{plain}+{one}"), Version.parse(f"{plain}+{other}")
    assert a == b == Version.parse(plain)
    assert hash(a) == hash(b)
    assert not a < b
    assert not a > b


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=140))
def test_any_text_is_a_version_or_a_value_error(text: str) -> None:
    if accepted(text):
        assert text.isascii()
