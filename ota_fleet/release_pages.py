"""Pages about releases: what each image is, who needs it, what is done about it.

    GET  -> Stock, image.described() -> Sheet, or the image itself
    POST -> Operations, as the API has them -> See

Operations do what the API does, so both mean the same and the audit says it in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ota_fleet import lines
from ota_fleet.accounts import allow
from ota_fleet.api import is_text
from ota_fleet.assignment_operations import AssignmentOperations
from ota_fleet.html import (
    Html,
    Sheet,
    a,
    area,
    badge,
    button,
    card,
    cards,
    check,
    code,
    copied,
    count,
    details,
    facts,
    field,
    form,
    join,
    note,
    page,
    suggestions,
    table,
    tag,
    url,
    when,
)
from ota_fleet.image import described
from ota_fleet.operations import Operations
from ota_fleet.outcomes import ROLLOUTS, short_standing, state_badge, whole
from ota_fleet.pages import Call, Page, See, act_of, asked, may, typed
from ota_fleet.policy import channel_of
from ota_fleet.projects import needing, offered
from ota_fleet.rollout import PAUSED, RUNNING
from ota_fleet.rollouts import Rollouts
from ota_fleet.rows import MAX_LONG, Project, Stocked
from ota_fleet.stock import Stock
from ota_fleet.upload_pages import inside
from ota_server import UNVERSIONED, Refused, Release, Reply, Version, base_url, image_reply, shown

PROJECTS = "/admin/projects"
PROJECT = PROJECTS + "/{project}"
RELEASE = PROJECT + "/releases/{version}"
MAX_NEEDS = 10  # devices in a list of who needs a release


@dataclass(frozen=True, slots=True)
class ReleasePages:
    """The pages, and what they work on."""

    operations: Operations
    assignments: AssignmentOperations
    rollouts: Rollouts

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(RELEASE, "viewer", self.show_release, self.change_release),
            Page(RELEASE + "/{name}", "viewer", self.download),
        )

    @property
    def _stock(self) -> Stock:
        return self.operations.stock

    def show_release(self, call: Call) -> Sheet:
        """GET a version."""
        project, version, images = self._version(call)
        newest, _ = offered(self._stock, project)
        state = badges(images, newest, self.assignments.assignments.channel(images[0].release))
        back = tag("p", a(project, url(PROJECTS, project)), " ", state)
        now, here = self.operations.now(), release_path(project, str(version))
        changes = may(call.actor, "publisher")
        return page(
            f"{project} {called(version)}",
            back,
            *(note("Withdrawn: ", each, kind="bad") for each in _reasons(images)),
            cards(_image(call, project, each, now) for each in images),
            self._notes(call, images, here),
            self._way(call, project, images[0].release),
            self._needs(call, project, version),
            self._ends(call, images, here) if changes else None,
        )  # fmt: skip

    def _version(self, call: Call) -> tuple[str, Version, list[Stocked]]:
        """Project, version and its images. Refused: 404."""
        project = project_of(self._stock, call).name
        try:
            version = Version.parse(call.names["version"])
        except ValueError as err:
            raise Refused(404, str(err)) from err
        found = self._stock.of_version(project, version)
        return project, version, sorted(found, key=Stocked.place)

    def _notes(self, call: Call, images: Sequence[Stocked], here: str) -> Html | None:
        texts = [*dict.fromkeys(each.release.notes for each in images if each.release.notes)]
        if not may(call.actor, "publisher") or not any(each.who for each in images):
            return card("Notes", *(tag("pre", text) for text in texts)) if texts else None
        text = call.given("notes", texts[0] if texts else "")
        editor = form(
            here, call.actor.csrf,
            area("What is new", "notes", text, maxlength=MAX_LONG,
                 hint="ESPHome and Home Assistant show the first 255 characters."),
            button("Save the notes", name="do", value="notes"),
        )  # fmt: skip
        return card("Notes", editor)

    def _way(self, call: Call, project: str, release: Release) -> Html:
        """How it goes out: its rollout, its channel."""
        known, version = self.assignments.assignments, release.version.text
        rollout = tag("div", self._rollout(call, project, version), id="rollout", data_live=10)
        channel, usual = known.channel(release), channel_of(release.version, "")
        if not may(call.actor, "publisher"):
            return card("How it goes out", rollout, tag("p", f"On the channel {channel}."))
        given = "" if channel == usual else channel
        body = form(
            release_path(project, version), call.actor.csrf,
            field("Channel", "channel", call.given("channel", given), list="channels",
                  maxlength=64, spellcheck="false", placeholder=usual,
                  hint=f"Empty: {usual}, as its number says."),
            button("Save", name="do", value="channel"),
            suggestions("channels", known.channels()),
        )  # fmt: skip
        return card("How it goes out", rollout, body)

    def _rollout(self, call: Call, project: str, version: str) -> Html:
        """Its rollout, and a way to begin one, where that can be."""
        current = self.rollouts.current(project, version)
        found = self.rollouts.with_results([current[0]]) if current else []
        shown_ = [
            tag("div", a("Its rollout", url(ROLLOUTS, str(rollout.id))), " ", state_badge(rollout),
                short_standing(whole(results), version))
            for rollout, results in found
        ]  # fmt: skip
        busy = any(each.state in {RUNNING, PAUSED} and not each.is_watched for each, _ in found)
        begin = url(f"{ROLLOUTS}/new", project=project, version=version)
        return join(
            shown_ or tag("p", "Nobody was given it yet."),
            tag("p", a("Begin a rollout", begin, class_="button"))
            if may(call.actor, "publisher") and not busy else None,
        )  # fmt: skip

    def _needs(self, call: Call, project: str, version: Version) -> Html:
        found = needing(self._stock, self.operations.ledger, project, version)
        if not found:
            return card("Who needs it", tag("p", "No device runs it or is pinned to it.",
                                            class_="empty"))  # fmt: skip
        found.sort(key=lambda each: not each.pinned)
        rows = [
            (a(each.device, url("/admin/devices", each.device)),
             join(badge("runs it") if each.runs else None, " ",
                  badge("is pinned to it", "warn") if each.pinned else None))
            for each in found[:MAX_NEEDS]
        ]  # fmt: skip
        pinned = sum(each.pinned for each in found)
        words = f"{count(len(found), 'device')} that run it or are pinned to it"
        words += f", {pinned:,} of them pinned." if pinned else "."
        rest = url("/admin/devices", project=project, version=str(version))
        more = tag("p", a("All that run it", rest)) if len(found) > MAX_NEEDS else None
        return card("Who needs it", tag("p", words),
                    table(("Device", "Why"), rows, "Devices that need it"), more)  # fmt: skip

    def _ends(self, call: Call, images: Sequence[Stocked], here: str) -> Html:
        csrf = call.actor.csrf
        if all(each.withdrawn is not None for each in images):
            again = form(here, csrf, button("Restore", "main", name="do", value="restore"))
            first = card("Restore", tag("p", "Devices may get it again."), again)
        else:
            words = "No device gets it any more. Who runs it keeps it, and gets the next one."
            first = card("Withdraw", tag("p", words), form(
                here, csrf,
                field("Why", "reason", call.given("reason"), maxlength=MAX_LONG),
                button("Withdraw", "danger", name="do", value="withdraw"),
            ))  # fmt: skip
        if not may(call.actor, "admin") or not any(each.who for each in images):
            return cards(first)
        sure = check("Yes, nobody can bring it back", "sure", required=True)
        last = form(here, csrf, sure, button("Delete", "danger", name="do", value="delete"))
        return cards(first, card("Delete", tag("p", "Deletes its files from the disk."), last))

    def change_release(self, call: Call) -> See:
        """POST a version."""
        project, version, _ = self._version(call)
        names = {"project": project, "version": str(version)}
        what = f"{project} {called(version)}"
        do = call.given("do")
        if do == "delete":
            allow(call.actor, "admin")
            if not call.given("sure"):
                raise Refused(422, "tick the box to say that you are sure")
            self.operations.delete_release(asked(call, names))
            return See(url(PROJECTS, project), f"{what} is deleted.")
        if do == "channel":
            channel = call.given("channel").strip()
            self.assignments.put_channel(asked(call, names, {"channel": channel}))
            return See(release_path(project, str(version)), "The channel is saved.")
        changes: Mapping[str, tuple[dict[str, object], str]] = {
            "notes": ({"notes": typed(call.given("notes"))}, "The notes are saved."),
            "withdraw": ({"withdrawn": True, "reason": call.given("reason")},
                         f"{what} is withdrawn."),
            "restore": ({"withdrawn": False}, f"{what} is offered again."),
        }  # fmt: skip
        body, said = act_of(changes, call)
        self.operations.change_release(asked(call, names, body))
        return See(release_path(project, str(version)), said)

    def download(self, call: Call) -> Reply:
        """GET an image, also one that no device gets."""
        _, version, images = self._version(call)
        for each in images:
            if each.release.name == call.names["name"] and not each.flaw:
                image = self._stock.open(each.release)
                reply = None
                try:
                    reply = image_reply(call.request, each.release, image, "no-store")
                finally:
                    if reply is None or reply.body is not image:
                        image.file.close()
                return reply
        raise Refused(404, f"{version} has no file {shown(call.names['name'])}")


# -- Parts -----------------------------------------------------------------------------------------


def copied_lines(each: lines.Lines) -> Html:
    """Lines under their title, with a button that copies them."""
    return join(tag("h3", each.title), copied(each.text, each.title))


def _image(call: Call, project: str, stocked: Stocked, now: float) -> Html:
    """What is known of one image."""
    release = stocked.release
    source = f"uploaded by {stocked.who}" if stocked.who else "in the firmware folder"
    rows: list[tuple[object, object]] = [
        ("Since", join(when(stocked.uploaded, now), ", ", source)),
        ("File", code(release.name)),
    ]
    if stocked.flaw:
        known = facts([*rows, ("SHA-256", code(release.facts.sha256))])
        return card(what_of(stocked), note(f"{release.name} {stocked.flaw}", kind="bad"), known)
    try:
        about = described(release.path, release.name)
    except FileNotFoundError:
        return card(what_of(stocked), note(f"{release.name} is gone from the disk", kind="bad"))
    there = url(release_path(project, str(release.version)), release.name)
    get = a("Download", there, class_="button", download=True) if is_text(release.name) else None
    found = lines.of_image(base_url(call.request), project, release.name)
    commands = details("On the command line", *map(copied_lines, found))
    return card(what_of(stocked), facts([*rows, *inside(about)]), tag("p", get), commands)


def badges(images: Sequence[Stocked], newest: str, channel: str = "") -> Html:
    """What is special about a version; `newest` is the one that devices get."""
    version = images[0].release.version
    withdrawn = sum(each.withdrawn is not None for each in images)
    early = version.prerelease and version != UNVERSIONED
    partly = "withdrawn" if withdrawn == len(images) else "partly withdrawn"
    found = (
        badge("newest", "good") if str(version) == newest else None,
        badge("pre-release") if early else None,
        badge(channel) if channel not in {"", channel_of(version, "")} else None,
        badge(partly, "bad") if withdrawn else None,
        badge("damaged", "bad") if any(each.flaw for each in images) else None,
    )
    return join(*filter(None, found), between=" ")


def _reasons(images: Sequence[Stocked]) -> list[str]:
    reasons = (each.withdrawn for each in images if each.withdrawn is not None)
    return [*dict.fromkeys(each or "nobody said why" for each in reasons)]


def what_of(stocked: Stocked) -> str:
    """What an image is for: esp8266, esp32 littlefs..."""
    release = stocked.release
    words = (
        release.facts.chip,
        release.kind * (release.kind != "sketch"),
        "gzip" * (release.facts.packed),
    )
    return " ".join(filter(None, words)) or "any chip"


def called(version: Version) -> str:
    """A version for people."""
    return "without a version" if version == UNVERSIONED else str(version)


def release_path(project: str, version: str) -> str:
    """The page of a release."""
    return url(PROJECTS, project, "releases", version)


def project_of(stock: Stock, call: Call) -> Project:
    """The project of the path, by name or alias. Refused: 404."""
    found = stock.project(call.names["project"])
    if found is None:
        raise Refused(404, f"there is no project {shown(call.names['project'])}")
    return found
