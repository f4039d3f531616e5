"""Plans of rollouts in forms: what can be chosen, what can be filled in, and in words. Pure.

Plan -> plan_fields() -> a person -> the fields of a form -> plan_given() -> Plan

What was filled in and cannot be is shown again as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from ota_fleet.html import (
    Html,
    check,
    choice,
    count,
    details,
    facts,
    field,
    hidden,
    join,
    suggestions,
    table,
    tag,
)
from ota_fleet.pages import Call
from ota_fleet.rollout import MAX_DEVICES, MAX_STAGES, WATCHED, Plan, Stage, read_plan
from ota_server import shown

K = TypeVar("K")

OWN = "own"
_FIRST = Stage(count=1, proven=1, threshold=0, minimum=1)
_LAST = Stage(proven=10, wait=7 * 86_400)
PRESETS: Mapping[str, tuple[str, tuple[Stage, ...]]] = {
    "careful": ("One device, then 10 %, then all", (
        _FIRST,
        Stage(percent=10, proven=3, wait=3_600),
        _LAST,
    )),
    "few": ("One device, then 10 devices, then all", (
        _FIRST,
        Stage(count=10, proven=5, wait=3_600, threshold=20),
        _LAST,
    )),
    "halves": ("10 %, then half, then all", (
        Stage(percent=10, proven=5, wait=3_600),
        Stage(percent=50, proven=20, wait=86_400),
        _LAST,
    )),
    "watched": ("At once, watched", WATCHED.stages),
}  # fmt: skip
USUAL = "careful"
ROWS, MORE = 5, 1  # of stages to fill in at least; that are empty at least
HINT = (
    "A stage is a share of the devices, or the first that ask, or both; a line without any is all. "
    "It is over when so many have proven the release and it was open for so long. The rollout "
    "halts when more of its devices failed than that, as soon as so many are known."
)
COLUMNS = {  # the fields of a stage, and what they are called
    "percent": "Percent",
    "count": "Devices at most",
    "group": "Group",
    "proven": "Proven",
    "wait": "Open for",
    "threshold": "Failures, %",
    "minimum": "Of at least",
}
_USUAL: Mapping[str, Any] = asdict(Stage())  # of a cell that is empty
_UNITS = {"s": 1, "min": 60, "h": 3_600, "d": 86_400}
_SPAN = re.compile(r"([0-9]{1,9}) ?(s|min|h|d)")


# -- Words -----------------------------------------------------------------------------------------


def seconds_of(text: str, name: str) -> int:
    """A time such as "30 min", in seconds; "" and "0": none. ValueError: it is no time."""
    if text in {"", "0"}:
        return 0
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{name}: {shown(text)} is no time such as 90 s, 30 min, 2 h or 7 d")
    return int(match[1]) * _UNITS[match[2]]


def span_text(seconds: int) -> str:
    """Seconds as seconds_of() reads them; "": none."""
    unit = next(each for each in ("d", "h", "min", "s") if seconds % _UNITS[each] == 0)
    return f"{seconds // _UNITS[unit]} {unit}" if seconds else ""


def stage_words(stage: Stage) -> str:
    """Who a stage is for."""
    whose = f" of the group {stage.group}" * bool(stage.group)
    share = f"{stage.percent} % of the devices" if stage.percent < 100 else "All devices"
    if not stage.count:
        return share + whose
    if stage.percent < 100:
        return f"{share}{whose}, {stage.count:,} at most"
    first = "device" if stage.count == 1 else count(stage.count, "device")
    return f"The first {first}{whose}"


def stage_terms(stage: Stage, places: int = MAX_DEVICES) -> str:
    """What must be seen of it, and what ends the rollout; see rollout.places()."""
    places = min(places, stage.count or MAX_DEVICES)
    needs, minimum = max(1, min(stage.proven, places)), min(stage.minimum, places)
    proven = f"{count(needs, 'device')} {'has' if needs == 1 else 'have'} proven it"
    wait = f" and it was open for {span_text(stage.wait)}" * bool(stage.wait)
    least = f", of {minimum} or more," if 1 < minimum < places else ", of all," * (minimum > 1)
    share = f"more than {stage.threshold} %{least} fail" if stage.threshold else "one fails"
    share = "it fails" if places == 1 and stage.threshold < 100 else share
    return f"Over when {proven}{wait}; halts when {share}."


def plan_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a plan says beside its stages."""
    if plan.label or plan.group:
        only = [f"the group {plan.group}"] * bool(plan.group)
        yield "Only for", " and ".join(only + [f"the label {plan.label}"] * bool(plan.label))
    if plan.below:
        yield "Only for devices below", plan.below
    if plan.pace:
        yield "Pace", f"{count(plan.pace, 'device')} in {span_text(plan.period)}"
    if plan.at_once:
        yield "Downloads at once", f"{plan.at_once:,}"
    if plan.patience:
        yield "Silent after", span_text(plan.patience)
    if plan.urgent:
        yield "Urgent", "behind the first stage, none waits"


def plan_words(plan: Plan) -> str:
    """A plan in one sentence."""
    stages = ", then ".join(
        words if not number else words[0].lower() + words[1:]
        for number, words in enumerate(map(stage_words, plan.stages))
    )
    return "; ".join([stages, *(f"{name.lower()} {value}" for name, value in plan_facts(plan))])


# -- What is filled in -----------------------------------------------------------------------------


def plan_fields(
    call: Call, plan: Plan, groups: Sequence[str], more: Sequence[tuple[str, str]] = ()
) -> Html:
    """The fields of a plan as they were filled in, else of `plan`; `more` may be chosen as well."""
    chosen = call.given("stages", more[0][0] if more and plan == WATCHED else _name_of(plan))
    presets = [(name, text) for name, (text, _) in PRESETS.items()]
    shown_rows = [*map(_cells, plan.stages)]
    rows = _given_rows(call) or shown_rows
    return join(
        choice("Stages", "stages", [*more, *presets, (OWN, "As filled in below")], chosen,
               hint="Each opens when the one before it has proven the release."),
        details("What each of them sets", facts(map(_set, PRESETS.values())), class_="wide"),
        details("Stages of its own", tag("p", HINT, class_="hint"), _table(rows),
                hidden(untouched=call.given("untouched", json.dumps(shown_rows))),
                open=chosen == OWN, class_="wide"),
        _others(call, plan),
        suggestions("groups", groups),
    )  # fmt: skip


def _set(preset: tuple[str, Sequence[Stage]]) -> tuple[str, Html]:
    """What can be chosen, and what it stands for."""
    text, stages = preset
    items = (tag("li", f"{stage_words(each)}. {stage_terms(each)}") for each in stages)
    return text, tag("ol", *items)


def _name_of(plan: Plan) -> str:
    return next((name for name, (_, stages) in PRESETS.items() if stages == plan.stages), OWN)


def _cells(stage: Stage) -> list[str]:
    """A stage as it is filled in, in the order of COLUMNS."""
    values = {**asdict(stage), "count": stage.count or "", "wait": span_text(stage.wait)}
    return [str(values[name]) for name in COLUMNS]


def _given_rows(call: Call) -> list[list[str]]:
    """The rows that were filled in, without empty ones."""
    columns = [call.all_given(f"stage_{name}") for name in COLUMNS]
    rows = ([cell.strip() for cell in row] for row in zip(*columns, strict=False))
    return [row for row in rows if any(row)]


def _table(rows: Sequence[Sequence[str]]) -> Html:
    lines = [*rows, *[[""] * len(COLUMNS)] * max(MORE, ROWS - len(rows))]
    cells = [
        [number, *(_cell(name, label, text, number)
                   for (name, label), text in zip(COLUMNS.items(), row, strict=True))]
        for number, row in enumerate(lines[:MAX_STAGES], 1)
    ]  # fmt: skip
    return table(["Stage", *COLUMNS.values()], cells, "Stages")


def _cell(name: str, label: str, text: str, number: int) -> Html:
    words = {"list": "groups", "maxlength": 64} if name == "group" else {"inputmode": "numeric"}
    words = {"placeholder": "2 h", "maxlength": 16} if name == "wait" else words
    return tag("input", type="text", name=f"stage_{name}", value=text, size=6, autocomplete="off",
               aria_label=f"{label}, stage {number}", **words)  # fmt: skip


def _others(call: Call, plan: Plan) -> Html:
    """What a plan says beside its stages; to open, unless something is said."""
    usual, own = _texts(Plan()), _texts(plan)
    now = {name: call.given(name, own[name]) for name in own}
    urgent = plan.urgent if "stages" not in call.form else bool(call.given("urgent"))
    text = partial(field, spellcheck="false", maxlength=64)
    number = partial(field, inputmode="numeric", maxlength=8)
    fields = (
        number("Devices in a period", "pace", now["pace"], hint="Empty: any number."),
        text("The period", "period", now["period"]),
        number("Downloads at once", "at_once", now["at_once"], hint="Empty: any number."),
        text("Silent after", "patience", now["patience"],
             hint="Empty: four of a device's own intervals."),
        text("Only devices below", "below", now["below"], hint="A version."),
        text("Only the group", "group", now["group"], list="groups"),
        field("Only the label", "label", now["label"], maxlength=255),
        check("Urgent: behind the first stage, none waits", "urgent", checked=urgent),
    )  # fmt: skip
    return details("Pace, and for whom", tag("div", fields, class_="fields"),
                   open=urgent or now != usual, class_="wide")  # fmt: skip


def _texts(plan: Plan) -> dict[str, str]:
    """What is not of a stage, as it is filled in."""
    return {
        "pace": str(plan.pace or ""),
        "period": span_text(plan.period),
        "at_once": str(plan.at_once or ""),
        "patience": span_text(plan.patience),
        "below": plan.below,
        "group": plan.group,
        "label": plan.label,
    }


def plan_given(call: Call) -> Plan:
    """The plan that was filled in. ValueError: a sentence says what is wrong with it."""
    text = {name: call.given(name).strip() for name in _texts(Plan())}
    period = text["period"] or _texts(Plan())["period"]
    return read_plan({
        **_read({
            "stages": lambda: _stages(call),
            "pace": lambda: _number(text["pace"], "devices in a period"),
            "period": lambda: seconds_of(period, "the period"),
            "at_once": lambda: _number(text["at_once"], "downloads at once"),
            "patience": lambda: seconds_of(text["patience"], "silent after"),
        }),
        "below": text["below"],
        "group": text["group"],
        "label": text["label"],
        "urgent": bool(call.given("urgent")),
    })  # fmt: skip


def _read(readers: Mapping[K, Callable[[], object]]) -> dict[K, object]:
    """What each of them reads. ValueError: all that is wrong, in one sentence."""
    found, wrong = dict[K, object](), []
    for key, read in readers.items():
        try:
            found[key] = read()
        except ValueError as err:
            wrong.append(str(err))
    if wrong:
        raise ValueError("; ".join(wrong))
    return found


def check_untouched(call: Call) -> None:
    """ValueError: stages are filled in, and would be lost, as others are chosen."""
    rows = _given_rows(call)
    if rows and json.dumps(rows) != call.given("untouched"):
        raise ValueError("stages are filled in, but others are chosen: choose 'As filled in below'")


def _stages(call: Call) -> list[object]:
    name, rows = call.given("stages"), _given_rows(call)
    if name in PRESETS:
        check_untouched(call)
        return [*map(asdict, PRESETS[name][1])]
    if name != OWN or not rows:
        raise ValueError("choose the stages, or fill in at least one")
    stages = _read({number: partial(_stage, number, row) for number, row in enumerate(rows, 1)})
    return [*stages.values()]


def _stage(number: int, row: Sequence[str]) -> dict[str, object]:
    return _read({
        name: partial(_cell_given, name, text, f"stage {number}, {COLUMNS[name]}")
        for name, text in zip(COLUMNS, row, strict=True)
    })  # fmt: skip


def _cell_given(name: str, text: str, where: str) -> object:
    if name == "group":
        return text
    return seconds_of(text, where) if name == "wait" else _number(text, where, _USUAL[name])


def _number(text: str, name: str, usual: int = 0) -> int:
    if not text:
        return usual
    if re.fullmatch("[0-9]{1,9}", text) is None:
        raise ValueError(f"{name}: {shown(text)} is no number")
    return int(text)
