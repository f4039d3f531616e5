"""Whether an update worked: what a device's next check-in says of what it was given. Pure.

    granted --> the bytes leave --> the device restarts --> it asks again, and says what it runs

    PROVEN    it runs the new image, by its digest, or by the version if it tells no digest
    RETURNED  it runs the old one, though all bytes had left
    BROKEN    it runs the old one, and the bytes had not all left
    SILENT    it did not come back in time, or could not tell

Nothing is a success that was only a download: who runs the same version as before, and tells no
digest, proves nothing. What was decided is decided anew when the device says
something else: who was silent may come back, who was proven may roll back.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from ota_fleet.rows import parsed
from ota_server import Objection, Release, Report, Version

OPEN, PROVEN, RETURNED, BROKEN, SILENT = "", "proven", "returned", "broken", "silent"
OUTCOMES = (PROVEN, RETURNED, BROKEN, SILENT)
FAILURES = (RETURNED, BROKEN, SILENT)
MAX_FULL = 3  # downloads of one image that do not make a device run it
PATIENCE = 4  # of its own intervals, after which a device is silent
LEAST_PATIENCE = 3_600  # seconds: to write an image, to restart, to find the network
USUAL_PATIENCE = 86_400  # seconds for who asked only once so far
MOST_PATIENCE = 14 * 86_400  # seconds


class Said(NamedTuple):
    """What a device says that it runs. "": it does not say."""

    version: str  # in its normal form
    md5: str
    sha256: str

    @classmethod
    def by(cls, report: Report) -> Self:
        """What a report says."""
        version = str(report.version) if report.version else ""
        if lane_of(report.kind) != "sketch":  # the digests are of the sketch
            return cls(version, "", "")
        return cls(version, report.sketch_md5 or "", report.sketch_sha256 or "")

    @property
    def digest(self) -> str:
        """The better of the two."""
        return self.sha256 or self.md5


@dataclass(frozen=True, slots=True)
class Attempt:
    """A device's way from one image to another; its row is the grant."""

    id: int
    device: str
    lane: str  # see lane_of()
    project: str
    version: str  # that it was given, in its normal form
    sha256: str  # of that file
    size: int  # bytes
    digests: tuple[str, ...]  # any of which the device may call that image
    rollout: int  # 0: none
    before: str  # the version that it ran; "": it did not say
    before_digest: str  # of what it ran; "": it did not say
    granted: int  # UTC seconds
    deadline: int  # UTC seconds; from then on it is silent
    sent: int = 0  # bytes from the beginning on, without a gap
    busy: int = 0  # UTC seconds, until when it may be downloading
    ended: int = 0  # UTC seconds, when the outcome was known; 0: it is not
    outcome: str = OPEN

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Reads a row, in which the digests are JSON."""
        values: list[Any] = [*row]
        values[7] = _digests(row[7])
        return cls(*values)

    @property
    def is_full(self) -> bool:
        """Whether all bytes have left."""
        return self.sent >= self.size


@functools.lru_cache(maxsize=256)  # a fleet is given the same few images again and again
def _digests(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text))


def lane_of(kind: str) -> str:
    """What can be under way beside each other: a sketch and a filesystem."""
    return "sketch" if kind in {"sketch", "zip"} else "filesystem"


def digests_of(release: Release) -> tuple[str, ...]:
    """What a device may call an image that it runs; see ota_server.Facts.running."""
    return tuple(sorted(each for each in release.facts.running if each))


def outcome_of(attempt: Attempt, said: Said, learned: frozenset[str] = frozenset()) -> str:
    """What a later check-in makes of an attempt; OPEN: it tells nothing.

    `learned` are digests by which other devices have called the same image. A digest says more than
    a version: a sketch's version is what somebody has typed.
    """
    called = {said.md5, said.sha256} - {""}
    names = {*attempt.digests, *learned}
    back = RETURNED if attempt.is_full else BROKEN
    if called & names:  # which is no news of who had the same image before
        return back if attempt.before_digest in names and not attempt.is_full else PROVEN
    if attempt.before_digest in called:
        return back
    is_other = bool(called and attempt.before_digest)  # than the one before, if not the new one
    if not said.version:
        return back if is_other else OPEN
    if not _means(said.version, attempt.version):
        return OPEN if _went_on(attempt, said.version) else back
    if not _means(said.version, attempt.before):  # else somebody says so, or flashed it by hand
        return PROVEN if attempt.is_full else OPEN
    return PROVEN if is_other and attempt.is_full else OPEN


def _means(said: str, version: str) -> bool:
    """Whether a device that says one version runs the other; only both together tell builds."""
    if "+" in said and "+" in version:
        return said == version
    return said.partition("+")[0] == version.partition("+")[0]


def _went_on(attempt: Attempt, said: str) -> bool:
    """Whether it had proven the image, and somebody gave it a newer one by another way."""
    version = parsed(said)  # by MQTT, or to the FUOTA server, a device may say any text
    newer = version is not None and version > Version.parse(attempt.version)
    return newer and attempt.outcome == PROVEN


def is_news(attempt: Attempt, outcome: str) -> bool:
    """Whether a check-in changes what is known of an attempt."""
    if outcome in {OPEN, attempt.outcome}:
        return False
    return outcome in {PROVEN, RETURNED} or attempt.outcome in {OPEN, SILENT, PROVEN}


def can_teach(attempt: Attempt, said: Said) -> bool:
    """Whether a proof by version shows what devices call the image: signed ones, for example."""
    return bool(
        said.digest
        and attempt.is_full
        and _means(said.version, attempt.version)
        and not _means(said.version, attempt.before)
        and said.digest not in {*attempt.digests, attempt.before_digest}
    )


def patience_of(interval: int) -> int:
    """Seconds that a device has to come back, which asks every `interval` seconds; 0: not known."""
    if not interval:
        return USUAL_PATIENCE
    return max(LEAST_PATIENCE, min(PATIENCE * interval, MOST_PATIENCE))


def looping(release: Release) -> Objection:
    """Why a device does not get an image again."""
    reason = f"{release.version} was given {MAX_FULL} times in full and the device does not run it"
    # Final: it may well run it and say an old version, and an older image would take it back.
    return Objection("loop", f"{reason}: look at it, then let it try again", final=True)
