"""The pages of rollouts: which there are, one to begin, and each with what its devices came to.

GET  -> Rollouts, Grants -> stages as bars, what the open one waits for, who failed
POST -> RolloutOperations, as the API has them -> See
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from ota_fleet.api import read_number
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    badge,
    button,
    card,
    choice,
    count,
    facts,
    field,
    form,
    join,
    note,
    page,
    pager,
    table,
    tag,
    url,
    when,
)
from ota_fleet.outcomes import (
    DEVICES,
    ROLLOUTS,
    attempts_table,
    outcome_badge,
    rollout_row,
    standing,
    state_badge,
    whole,
)
from ota_fleet.pages import Call, Page, See, act_of, asked, may
from ota_fleet.plan_forms import (
    PRESETS,
    USUAL,
    plan_facts,
    plan_fields,
    plan_given,
    stage_terms,
    stage_words,
)
from ota_fleet.release_pages import release_path
from ota_fleet.rollout import (
    CONTROLS,
    HALTED,
    RUNNING,
    Counts,
    Plan,
    Results,
    Rollout,
    missing,
    places,
)
from ota_fleet.rollout_operations import RolloutOperations
from ota_fleet.rollouts import Rollouts
from ota_fleet.rows import MAX_INTEGER, MAX_LONG
from ota_fleet.stock import Stock
from ota_server import Refused, Release

NEW = f"{ROLLOUTS}/new"
ROWS = 50  # of a list of rollouts
LATEST = 20  # attempts that are shown
FAILED = 50  # devices that are shown, which failed
MAX_CHOICE = 500  # releases that can be chosen, the newest of each project
OF_EACH = 10  # of those, in a project
DONE = {
    "pause": "is halted: nobody else gets it.",
    "resume": "goes on.",
    "advance": "is at its next stage.",
    "finish": "is finished: everybody gets it.",
    "abort": "is aborted: nobody else gets it.",
}


@dataclass(frozen=True, slots=True)
class RolloutPages:
    """The pages, and what they work on."""

    operations: RolloutOperations

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(ROLLOUTS, "viewer", self.show_rollouts, link="Rollouts"),
            Page(NEW, "publisher", self.show_new, self.create),
            Page(f"{ROLLOUTS}/{{rollout}}", "viewer", self.show_rollout, self.control),
        )

    @property
    def _rollouts(self) -> Rollouts:
        return self.operations.rollouts

    @property
    def _stock(self) -> Stock:
        return self.operations.stock

    # -- All rollouts

    def show_rollouts(self, call: Call) -> Sheet:
        """GET rollouts: without those that are only watched, unless somebody asks for them."""
        project, every = call.asked("project"), bool(call.asked("watched"))
        before = read_number(call.asked("before")) if call.asked("before") else MAX_INTEGER
        found = self._rollouts.listed(project, before, ROWS + 1, watched=every)
        rows = [self._row(*each) for each in self._rollouts.with_results(found[:ROWS])]
        heads = "Release", "State", "Stage", "Devices", "Began"
        here = {"project": project, "watched": call.asked("watched")}
        last = found[ROWS - 1].id if len(found) > ROWS else 0
        pages = pager(url(ROLLOUTS, **here) if call.asked("before") else "",
                      url(ROLLOUTS, **here, before=last) if last else "")  # fmt: skip
        empty = "There is no rollout: new releases go to everybody at once, and are watched."
        live = tag("div", table(heads, rows, "Rollouts", empty), id="rollouts", class_="live",
                   data_live=10)  # fmt: skip
        new = a("Begin a rollout", url(NEW, project=project), class_="button main")
        return page(
            f"Rollouts of {project}" if project else "Rollouts",
            tag("p", new) if may(call.actor, "publisher") else None,
            card("", live, pages),
            tag("p", _others(project, every=every)),
        )

    def _row(self, rollout: Rollout, results: Results) -> tuple[object, ...]:
        who = f" by {rollout.who}" if rollout.who else ", by itself"
        began = join(when(rollout.created, self.operations.now()), who)
        return (*rollout_row(rollout, results), began)

    # -- A new one

    def show_new(self, call: Call) -> Sheet:
        """GET rollouts/new; ?project and ?version say of what."""
        asked = f"{call.asked('project')} {call.asked('version')}"
        names = [*islice(self._choice(call.asked("project")), MAX_CHOICE)]
        wanted = next((each for each in names if each.startswith(asked)), "")
        chosen = call.given("release", wanted)
        offered = [*names, *({chosen} - {*names, ""})]
        body = form(
            NEW, call.actor.csrf,
            choice("Release", "release", offered, chosen),
            plan_fields(call, Plan(PRESETS[USUAL][1]), self.operations.assignments.groups()),
            submit="Begin the rollout", class_="plan",
        )  # fmt: skip
        words = (
            "Devices that are pinned to the version get it at once. What a device has it keeps, "
            "also when the rollout halts."
        )
        return page("Begin a rollout", card("", tag("p", words), body))

    def _choice(self, first: str) -> Iterator[str]:
        """Releases of which there can be a rollout, those of the project `first` before others."""
        projects = sorted(self._stock.projects(), key=lambda name: (name != first, name))
        for project in projects:
            versions = dict.fromkeys(each.version.text for each in self._releases(project))
            yield from (f"{project} {each}" for each in islice(versions, OF_EACH))

    def _releases(self, project: str) -> Iterator[Release]:
        try:
            found = self._stock.releases(project)
        except Refused:
            return
        yield from (each for each in found if self._stock.why_withdrawn(each) is None)

    def create(self, call: Call) -> See:
        """POST rollouts/new."""
        project, _, version = call.given("release").partition(" ")
        if not version:
            raise Refused(422, "choose the release that is to go out")
        body = {"version": version, **asdict(plan_given(call))}
        begun = self.operations.begin(asked(call, {"project": project}, body))
        where = url(ROLLOUTS, str(begun["id"]))
        return See(where, f"The rollout of {project} {version} begins.")

    # -- One rollout

    def show_rollout(self, call: Call) -> Sheet:
        """GET a rollout. Refused: 404."""
        rollout, results = self._rollouts.get(read_number(call.names["rollout"]))
        now, number = int(self.operations.now()), rollout.id
        attempts = self.operations.grants.attempts(rollout=number, limit=LATEST)
        table_ = attempts_table(attempts, self.operations.grants.live(), now)
        return page(
            f"{rollout.project} {rollout.version}",
            tag("div", self._state(rollout, now), id="state", data_live=5),
            _controls(call, rollout) if may(call.actor, "publisher") else None,
            card("Stages", self._stages(rollout, results, now), id="stages", data_live=5),
            tag("div", self._failed(number, whole(results)), id="failed", data_live=5),
            card("Latest attempts", table_, id="attempts", data_live=5),
        )  # fmt: skip

    def _state(self, rollout: Rollout, now: int) -> Html:
        release = a("the release", release_path(rollout.project, rollout.version))
        who = f" by {rollout.who}" if rollout.who else ", by itself, as nobody made a plan"
        latest = self._rollouts.current(rollout.project, rollout.version)
        later = latest[0].id if latest and latest[0].id > rollout.id else 0
        reason = f"{rollout.state.capitalize()}: {rollout.reason}" if rollout.reason else ""
        return join(
            tag("p", state_badge(rollout), " began ", when(rollout.created, now), who, ". See ",
                release, "."),
            note(reason, kind="bad" if rollout.state in {"halted", "aborted"} else "")
            if reason else None,
            note("A later rollout of this version counts: ", a(later, url(ROLLOUTS, str(later))),
                 kind="warn") if later else None,
        )  # fmt: skip

    def _stages(self, rollout: Rollout, results: Results, now: int) -> Html:
        items = [
            self._stage(rollout, results, number, now) for number in range(len(rollout.plan.stages))
        ]
        others = [*plan_facts(rollout.plan)]
        return join(tag("ol", items, class_="stages"), facts(others) if others else None)

    def _stage(self, rollout: Rollout, results: Results, number: int, now: int) -> Html:
        stage, counts = rollout.plan.stages[number], results.get(number, Counts())
        later = number > rollout.stage and not counts.devices
        is_open = (rollout.state, rollout.stage) == (RUNNING, number)
        return tag(
            "li",
            tag("h3", f"{number + 1}. {stage_words(stage)} ", _place(rollout, number)),
            None if later else standing(counts, f"Stage {number + 1}"),
            tag("p", tag("small", stage_terms(stage, places(rollout, number, results)))),
            self._waits(rollout, results, now) if is_open else None,
            class_="later" if later else None,
        )

    def _waits(self, rollout: Rollout, results: Results, now: int) -> Html:
        """What the open stage waits for, and whether that will come."""
        last = rollout.stage + 1 == len(rollout.plan.stages)
        what = "it is finished" if last else f"stage {rollout.stage + 2} opens"
        left = missing(rollout, results, now) or "the next device has to ask"
        few = self.operations.too_few(rollout, results)
        return join(tag("p", tag("b", "Before ", what, ":"), f" {left}."),
                    note(f"{few}.", kind="warn") if few else None)  # fmt: skip

    def _failed(self, number: int, counts: Counts) -> Html | None:
        """The card of devices that failed; None: there are none."""
        if not counts.failed:
            return None
        rows = [
            (a(device, url(DEVICES, device)), stage + 1, outcome_badge(outcome))
            for device, stage, outcome in self._rollouts.failed(number, FAILED)
        ]
        more = counts.failed - len(rows)
        rest = tag("p", f"And {count(more, 'device')} more.") if more > 0 else None
        inner = table(("Device", "Stage", "Outcome"), rows, "Devices that failed")
        return card("Failed", inner, rest)

    def control(self, call: Call) -> See:
        """POST a rollout. Refused: 404, 409, 422."""
        said, number = act_of(DONE, call), call.names["rollout"]
        body = {"do": call.given("do"), "reason": call.given("reason").strip()}
        if body["do"] == "abort" and not body["reason"]:
            raise Refused(422, "say why it is aborted: whoever looks at a device reads it")
        name = self._rollouts.name_of(read_number(number)).partition(" of ")[2]
        self.operations.control(asked(call, {"rollout": number}, body))
        return See(url(ROLLOUTS, number), f"The rollout of {name} {said}")


# -- Parts -----------------------------------------------------------------------------------------


def _others(project: str, *, every: bool) -> Html:
    """Where the rollouts are that the list does not have."""
    if every:
        return a("Without those that are only watched", url(ROLLOUTS, project=project))
    return a("All, with those that are only watched", url(ROLLOUTS, project=project, watched=1))


def _place(rollout: Rollout, number: int) -> Html | None:
    """Where a stage stands."""
    if number == rollout.stage and rollout.state != "finished":
        return badge("open" if rollout.state == RUNNING else rollout.state,
                     "good" if rollout.state == RUNNING else "warn")  # fmt: skip
    if number <= rollout.stage:
        return badge("over")
    return None


def _controls(call: Call, rollout: Rollout) -> Html | None:
    """What somebody may do with it now; nothing, once it is over."""
    here, csrf = url(ROLLOUTS, str(rollout.id)), call.actor.csrf
    can = {do for do, (states, _) in CONTROLS.items() if rollout.state in states}
    if not can:
        return None
    if rollout.state == RUNNING and rollout.stage + 1 < len(rollout.plan.stages):
        can.add("advance")
    ways = (("resume", "Go on", "main"), ("advance", "Open the next stage", ""),
            ("finish", "Finish: it is good", ""))  # fmt: skip
    halt = button("Halt", "danger big", name="do", value="pause")
    others = [button(text, kind, name="do", value=do) for do, text, kind in ways if do in can]
    still = "When it goes on, the failures so far are no longer counted."
    why = field("Why", "reason", call.given("reason"), maxlength=MAX_LONG, required=True)
    return card(
        "",
        form(here, csrf, halt if "pause" in can else None, others),
        tag("p", still) if rollout.state == HALTED else None,
        form(here, csrf, why, button("Abort", "danger", name="do", value="abort")),
        id="controls", data_live=5,
    )  # fmt: skip
