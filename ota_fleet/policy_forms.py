"""Policies in forms: what is said of a device, a group or a project, and in words. Pure.

    Policy -> policy_fields() -> a person -> the fields of a form -> changed() -> what is different

A form sends what it showed as well: what others said meanwhile stays, unless it is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ota_fleet.html import Html, choice, field, hidden, join, note, suggestions
from ota_fleet.pages import Call
from ota_fleet.plan_forms import plan_words
from ota_fleet.policy import MAX_WINDOW, Policy
from ota_fleet.rollout import plan_of

ELSEWHERE = "as it is said elsewhere"
_ANSWERS = {
    "hold": ("Hold", "yes: it gets nothing", "no"),
    "approval": ("Approval", "yes: only what somebody approved", "no: not needed"),
}


def policy_fields(
    call: Call, values: Mapping[str, str], channels: Sequence[str], groups: Sequence[str] = ()
) -> Html:
    """Fields for these names and values, as they were filled in; pin is none of them."""
    makers = {"channel": _channel, "group": _group, "window": _window}
    parts = [
        makers[name](call.given(name, value)) if name in makers
        else _answer(name, call.given(name, value))
        for name, value in values.items()
        if name in makers or name in _ANSWERS
    ]  # fmt: skip
    offers = [suggestions("channels", channels)]
    offers += [suggestions("groups", groups)] * ("group" in values)
    return join(parts, was(call, values), offers)


def was(call: Call, values: Mapping[str, str]) -> Html:
    """What the form shows, for changed()."""
    return hidden(
        **{f"was_{name}": call.given(f"was_{name}", value) for name, value in values.items()}
    )


def changed(call: Call, values: Mapping[str, str]) -> dict[str, str]:
    """What a form says anew; `values` are those of now, for who does not say what it showed."""
    return {
        name: text
        for name, value in values.items()
        if (text := call.given(name, value).strip()) != call.given(f"was_{name}", value)
    }


def _channel(value: str) -> Html:
    return field("Channel", "channel", value, list="channels", maxlength=64, spellcheck="false",
                 hint="Everybody has stable; beta also has pre-releases.")  # fmt: skip


def _group(value: str) -> Html:
    return field("Group", "group", value, list="groups", maxlength=64, spellcheck="false")


def _window(value: str) -> Html:
    return field("Maintenance window", "window", value, maxlength=MAX_WINDOW, spellcheck="false",
                 placeholder="Mon-Fri 22:00-05:00 Europe/Berlin",
                 hint="Images are given then only; or: always. Without a zone, as in 22:00-05:00, "
                      "it is UTC.")  # fmt: skip


def _answer(name: str, value: str) -> Html:
    label, yes, no = _ANSWERS[name]
    return choice(label, name, [("", ELSEWHERE), ("yes", yes), ("no", no)], value)


def absent_note(project: str, versions: Sequence[str]) -> Html | None:
    """That a project has no release of what somebody named; None: it has."""
    if not versions:
        return None
    words = f"{project} has no release {' and no '.join(versions)}, which is named here"
    return note(f"{words}: nobody can get it before it is published.", kind="warn")


def policy_facts(policy: Policy) -> Iterator[tuple[str, object]]:
    """What a policy says."""
    if policy.channel:
        yield "Channel", policy.channel
    if policy.pin:
        yield "Pinned to", policy.pin
    if policy.hold:
        yield "Held", policy.hold
    if policy.window:
        yield "Maintenance window", policy.window
    if policy.approval:
        yield "Approval needed", policy.approval
    if policy.floors:
        yield "Not jumped over", ", ".join(policy.floors)
    if policy.plan:
        yield "New releases", plan_words(plan_of(policy.plan))
