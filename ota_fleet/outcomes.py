"""What updates came to, as parts of pages: bars, badges and tables of attempts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ota_fleet.attempts import BROKEN, OPEN, PROVEN, RETURNED, SILENT, Attempt
from ota_fleet.html import Html, a, badge, bar, bars, join, size_of, table, tag, url, when
from ota_fleet.rollout import Counts, Results, Rollout

DEVICES, ROLLOUTS = "/admin/devices", "/admin/rollouts"
WORDS = {
    OPEN: ("open", "", "it has not come back yet"),
    PROVEN: ("proven", "good", "it runs the new image"),
    RETURNED: ("returned", "bad", "it runs the old image again"),
    BROKEN: ("broken off", "warn", "the bytes did not all leave"),
    SILENT: ("silent", "bad", "it did not come back in time"),
}
STATES = {"running": "good", "paused": "warn", "halted": "bad", "aborted": "bad", "finished": ""}
Live = Mapping[str, tuple[int, int]]  # by device: bytes that have left, and all


def outcome_badge(outcome: str) -> Html:
    """An outcome, short; why it is that is its title."""
    word, kind, why = WORDS[outcome]
    return tag("span", badge(word, kind), title=why)


def state_badge(rollout: Rollout) -> Html:
    """The state of a rollout."""
    if rollout.is_watched and rollout.state == "running":
        return badge("watched")
    return badge(rollout.state, STATES[rollout.state])


def whole(results: Results) -> Counts:
    """The devices of all stages."""
    return Counts(*map(sum, zip(*results.values(), strict=True))) if results else Counts()


def _shares(counts: Counts) -> list[tuple[str, float]]:
    """In the order of the colours of admin.css."""
    names = ("proven", "returned", "broken", "silent", "open")
    words = ("proven", "returned", "broken off", "silent", "open")
    return [(word, getattr(counts, name)) for word, name in zip(words, names, strict=True)]


def standing(counts: Counts, label: str) -> Html:
    """What devices came to, as a bar and its key."""
    return tag("div", bars(_shares(counts), label), class_="outcomes")


def short_standing(counts: Counts, label: str) -> Html:
    """The same for a row of a table: what there is none of is not said."""
    shares = _shares(counts)
    words = ", ".join(f"{amount:,.0f} {name}" for name, amount in shares if amount)
    return tag("div", bar(shares, label), tag("small", words or "no device yet"),
               class_="outcomes")  # fmt: skip


def rollout_row(rollout: Rollout, results: Results) -> tuple[object, ...]:
    """A rollout in a list: release, state, stage, devices."""
    name = f"{rollout.project} {rollout.version}"
    return (
        a(name, url(ROLLOUTS, str(rollout.id))),
        state_badge(rollout),
        f"{rollout.stage + 1} of {len(rollout.plan.stages)}",
        short_standing(whole(results), name),
    )


def attempts_table(
    attempts: Iterable[Attempt], live: Live, now: float, *, of_device: bool = False
) -> Html:
    """Attempts, the newest first; of one device, with the rollouts that they belong to."""
    rows = [
        (when(each.granted, now),
         _rollout(each) if of_device else a(each.device, url(DEVICES, each.device)),
         f"{each.before or 'not told'} → {each.version}",
         _sent(each, live),
         join(outcome_badge(each.outcome), _since(each, now), between=" "))
        for each in attempts
    ]  # fmt: skip
    heads = "When", "Rollout" if of_device else "Device", "From → to", "Sent", "Outcome"
    empty = "It was given nothing yet." if of_device else "Nobody was given it yet."
    return table(heads, rows, "Attempts", empty)


def _rollout(attempt: Attempt) -> Html | str:
    return a(f"{attempt.rollout}", url(ROLLOUTS, str(attempt.rollout))) if attempt.rollout else ""


def _sent(attempt: Attempt, live: Live) -> str:
    """How much of the image has left; what is under way says so itself."""
    sent, size = attempt.sent, attempt.size
    under_way = live.get(attempt.device, (0, 0))
    if not attempt.outcome and under_way[1] == size:
        sent = max(sent, under_way[0])
    if sent >= size:
        return f"all of {size_of(size)}"
    return f"{100 * sent // size} % of {size_of(size)}"


def _since(attempt: Attempt, now: float) -> Html | None:
    if attempt.outcome == OPEN:
        return join("silent ", when(attempt.deadline, now))
    return tag("small", when(attempt.ended, now)) if attempt.ended else None
