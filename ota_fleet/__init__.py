"""The rooms beside the core: what remembers the fleet, and what asks a server from outside.

They import ota_server, never the reverse, but for two doors there: `--state` and the commands.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

from ota_fleet import doctor, explain_command, monitor, mqtt, pages, publish, schema
from ota_fleet.accounts import Accounts, Opening
from ota_fleet.activity_pages import ActivityPages
from ota_fleet.admission_pages import AdmissionPages
from ota_fleet.api import BELOW, Api, refusal_by_path
from ota_fleet.assignment_operations import AssignmentOperations
from ota_fleet.assignments import Approval, Assignments
from ota_fleet.broker import Broker
from ota_fleet.device_pages import DevicePages
from ota_fleet.device_updates import DeviceUpdates
from ota_fleet.files import Store
from ota_fleet.grants import Grants
from ota_fleet.group_pages import GroupPages
from ota_fleet.history import History
from ota_fleet.home_pages import HomePages
from ota_fleet.hook_operations import HookOperations
from ota_fleet.hook_pages import HookPages
from ota_fleet.hooks import Hooks
from ota_fleet.ledger import Ledger
from ota_fleet.monitor import Monitor, Sources
from ota_fleet.openapi import Operation
from ota_fleet.operations import Operations
from ota_fleet.outlook import awaited, getting
from ota_fleet.pages import Page, Pages
from ota_fleet.people_pages import PeoplePages
from ota_fleet.project_pages import ProjectPages
from ota_fleet.project_policy_pages import ProjectPolicyPages
from ota_fleet.projects import has_release
from ota_fleet.registry import MAX_PAGE, Registry, Search, Sighting, normal_id
from ota_fleet.release_pages import ReleasePages
from ota_fleet.rollout_operations import RolloutOperations
from ota_fleet.rollout_pages import RolloutPages
from ota_fleet.rollouts import Notify, Rollouts, nobody
from ota_fleet.rows import is_example
from ota_fleet.rules import (
    above_floors,
    approved,
    fit_for,
    fits_partition,
    in_rollout,
    in_window,
    not_again,
    not_held,
    not_looping,
    not_whitelisted,
    towards_target,
    withdrawn,
)
from ota_fleet.searches import all_of
from ota_fleet.stock import Stock
from ota_fleet.summons import Summons
from ota_fleet.trigger_operations import TriggerOperations
from ota_fleet.two_step import PATHS, Credentials, TwoStep, pair_of
from ota_fleet.upload import Uploads
from ota_fleet.upload_pages import UploadPages
from ota_server import (
    Access,
    Config,
    Event,
    Refused,
    Release,
    Request,
    Rule,
    Site,
    fit_unasked,
    only_newer,
    own_url,
    same_image,
)

COMMANDS: dict[str, Callable[[Sequence[str], Mapping[str, str]], int]] = {
    "check": doctor.main,
    "publish": publish.main,
    "explain": explain_command.main,
    "--backup": schema.backup,
}

log = logging.getLogger("ota.fleet")


class Known(NamedTuple):
    """What is remembered of devices and of what people decided about them."""

    registry: Registry
    assignments: Assignments
    rollouts: Rollouts
    grants: Grants
    now: Callable[[], float]  # UTC seconds

    @classmethod
    def of(
        cls,
        registry: Registry,
        notify: Notify = nobody,
        now: Callable[[], float] = time.time,
        *,
        proxied: bool = False,
    ) -> Self:
        """All of it; see Rollouts and Grants."""
        assignments = Assignments(registry)
        rollouts = Rollouts(registry, assignments, notify=notify, now=now)
        grants = Grants(registry, assignments, rollouts, notify=notify, now=now, proxied=proxied)
        return cls(registry, assignments, rollouts, grants, now)


class Acts(NamedTuple):
    """What people and programs can do, on the pages and by the API."""

    operations: Operations
    rollouts: RolloutOperations
    assignments: AssignmentOperations
    hooks: HookOperations
    triggers: TriggerOperations

    @classmethod
    def of(cls, operations: Operations, known: Known, hooks: Hooks, summons: Summons) -> Self:
        """All of it."""
        ledger, stock, now = operations.ledger, operations.stock, known.now
        members = functools.partial(due_for, known)
        return cls(
            operations,
            RolloutOperations(ledger, stock, known.rollouts, known.grants, known.assignments, now),
            AssignmentOperations(ledger, stock, known.assignments, now),
            HookOperations(hooks, ledger),
            TriggerOperations(summons, ledger, stock.resolve, members),
        )

    def table(self) -> tuple[Operation, ...]:
        """What the API can do."""
        return tuple(operation for each in self for operation in each.table())


def extend(site: Site, now: Callable[[], float] = time.time) -> Site:
    """The site with a memory. OSError, ValueError: the folder of the fleet is not to be used."""
    config = site.config
    pair, broker = pair_of(config), mqtt.prepare(config)
    registry = opened_registry(config)
    store = Store(os.path.join(config.state, "files"), registry, time.time())
    stock = Stock(site.catalog, registry, store)
    hooks = Hooks(registry, stock, stock.resolve, now=now)
    known = Known.of(registry, hooks.notify, now, proxied=bool(config.accel))
    history = History(registry)
    ledger = Ledger(registry)
    accounts = Accounts(ledger, secure=bool(config.cert))
    remembering = functools.partial(remember, known, history, stock.resolve, now=now)
    site = replace(
        with_stock(site, stock, known),
        listeners=(*site.listeners, remembering),
        closers=(*site.closers, accounts.close, stock.close, registry.close, store.close),
    )
    begin(accounts, site)
    guard = Credentials(accounts, registry.admitted, pair)
    uploads = Uploads(stock, ledger, config)
    operations = Operations(accounts, registry, ledger, stock, uploads, config.state)
    summons = Summons(registry, broker.command if broker else "")
    acts = Acts.of(operations, known, hooks, summons)
    api = Api(acts.table(), accounts, stock.resolve, uploads.max_body)
    site = replace(
        site,
        guards=(*opened(site, accounts), api.guard, guard),
        routes=(*TwoStep(ledger, store, guard.actor, config.max_image).routes(), *site.routes),
    )
    sheets = Pages(all_pages(acts, known, history), accounts, drop="/admin/upload")
    sources = Sources(registry, history, hooks, known.grants.tally, known.rollouts.states)
    hooks.start(known.grants.sweep)
    watch = Monitor(accounts, stock.resolve, sources)
    site = with_monitor(with_pages(with_api(site, api), sheets), watch, hooks)
    return with_mqtt(site, broker, known, ledger, summons) if broker else site


def due_for(known: Known, site: Site, number: int) -> Iterator[str]:
    """The devices that would get the release of a rollout now. Refused: 404, there is none."""
    rollout, _ = known.rollouts.get(number)
    devices = all_of(known.registry.devices, Search(rollout.project), MAX_PAGE)
    return getting(site, devices, rollout.version)


def all_pages(acts: Acts, known: Known, history: History) -> tuple[Page, ...]:
    """What the web administration shows."""
    operations, ledger, stock = acts.operations, acts.operations.ledger, acts.operations.stock
    return (
        *HomePages(history, stock, known.registry, known.rollouts, known.grants).table(),
        *DevicePages(ledger, stock, history, DeviceUpdates(*acts[:3])).table(),
        *GroupPages(acts.assignments).table(),
        *ProjectPages(operations, history, known.assignments).table(),
        *ProjectPolicyPages(acts.assignments).table(),
        *ReleasePages(operations, acts.assignments, known.rollouts).table(),
        *RolloutPages(acts.rollouts).table(),
        *UploadPages(operations).table(),
        *AdmissionPages(ledger, stock).table(),
        *ActivityPages(ledger, history).table(),
        *PeoplePages(operations.accounts).table(),
        *HookPages(acts.hooks).table(),
    )


def opened_registry(config: Config) -> Registry:
    """The registry in the folder of the fleet. OSError, ValueError: that is not to be used."""
    os.makedirs(config.state, mode=0o700, exist_ok=True)
    try:
        path = os.path.join(config.state, "fleet.db")
        return Registry(path, max_devices=config.max_devices)
    except RuntimeError as err:
        raise ValueError(str(err)) from err


def with_monitor(site: Site, watch: Monitor, hooks: Hooks) -> Site:
    """The site that counts what it does, and tells what happens."""
    return replace(
        site,
        routes=(*watch.routes(), *site.routes),
        listeners=(hooks.note, *site.listeners, watch.note),
        carriers=(*site.carriers, watch.carry),
        pulses=(*site.pulses, watch.pulse),
        closers=(hooks.close, *site.closers),
    )


def with_mqtt(site: Site, broker: Broker, known: Known, ledger: Ledger, summons: Summons) -> Site:
    """The site that talks to a broker: triggers, what devices say there, Home Assistant."""
    assert isinstance(site.catalog, Stock)
    seams = mqtt.Seams(
        known.grants.hear_version, site.catalog.resolve, functools.partial(awaited, site),
        functools.partial(approve, known, ledger), known.grants.live, site.catalog.newest,
    )  # fmt: skip
    talk = mqtt.start(broker, site.config, known.registry, summons, seams)
    listeners, closers = (*site.listeners, talk.listen), (talk.close, *site.closers)
    return replace(site, listeners=listeners, closers=closers)


def approve(known: Known, ledger: Ledger, device: str, project: str, version: str) -> None:
    """Somebody pressed Install in Home Assistant."""
    who, at = "Home Assistant", int(known.now())
    with ledger.recording(who, "approve", at) as (_, what):
        if known.assignments.approve(Approval(device, project, version, at, who)):
            what.append(f"{device} {project} {version}")


def with_pages(site: Site, people: Pages) -> Site:
    """The site with the web administration."""
    return replace(
        site,
        guards=(*site.guards, people.guard),
        routes=(*people.routes(), *site.routes),
        refusal=functools.partial(people.refusal, site.refusal),
    )


def with_api(site: Site, api: Api) -> Site:
    """The site with the paths of the API, where every refusal is a problem of RFC 9457."""
    return replace(
        site,
        routes=(*api.routes(), *site.routes),
        refusal=functools.partial(refusal_by_path, site.refusal),
    )


def opened(site: Site, accounts: Accounts) -> Iterator[Callable[[Request], None]]:
    """The guards of the core, of which that of images lets in who has a token of the fleet."""
    own = PATHS, BELOW, pages.BELOW, monitor.PATHS
    for guard in site.guards:
        if isinstance(guard, Access):
            access = replace(guard, catalog=site.catalog)  # reads a path as the endpoints do
            yield functools.partial(elsewhere, own, Opening(accounts, site.catalog, access))
        else:
            yield guard


def elsewhere(
    own: Sequence[re.Pattern[str]], guard: Callable[[Request], None], request: Request
) -> None:
    """A guard, for all but the paths that have credentials of their own."""
    if not any(paths.fullmatch(request.path) for paths in own):
        guard(request)


def begin(accounts: Accounts, site: Site) -> None:
    """Makes the first account, or says in the log who may. ValueError: the settings are wrong."""
    secret, config = accounts.setup_secret, site.config
    if secret and config.admin_email:
        try:
            accounts.set_up(secret, config.admin_email, config.admin_password)
        except ValueError as err:
            for close in site.closers:
                close()
            raise ValueError(f"ADMIN_EMAIL, ADMIN_PASSWORD: {err}") from err
        except Refused:  # another server with the same state was faster
            log.info("ADMIN_EMAIL is not used: there is an account")
    elif secret:
        path = f"admin/setup#{secret}"
        log.warning("there is no account yet: make the first one at %s%s", _own_url(config), path)
    elif config.admin_email:
        log.info("ADMIN_EMAIL is not used: there is an account")


def _own_url(config: Config) -> str:
    """Where people find the server, as far as it knows before it listens."""
    if config.inherited or config.host.startswith("unix:"):
        return "/"
    return own_url(config, (config.host, config.port))


def with_stock(site: Site, stock: Stock, known: Known) -> Site:
    """The site with uploaded releases beside the folder's, and the rules that know of devices."""
    policy, now = known.assignments.policy, known.now
    others: dict[Rule, Rule] = {
        only_newer: towards_target(policy),
        same_image: not_again(policy, known.grants.learned),
        fit_unasked: fit_for(policy, known.assignments.channel),
    }
    waiting = (
        approved(policy, known.assignments.is_approved),
        in_window(policy, now),
        in_rollout(known.assignments.own_pin, known.rollouts),
    )
    admit = functools.partial(is_admitted, stock, known.registry, site.config.admit)
    return replace(
        site,
        catalog=stock,
        rules=(
            *(others.get(rule, rule) for rule in site.rules),
            withdrawn(stock.why_withdrawn),
            fits_partition(stock.partition_size),
            not_whitelisted(admit),
            not_held(policy),
            above_floors(policy, functools.partial(has_release, stock)),
            not_looping(known.grants.is_looping),
            *waiting,
        ),
        unasked=(*(others.get(rule, rule) for rule in site.unasked), *waiting),
        grant=known.grants.grant,
        carriers=(*site.carriers, known.grants.carry),
    )


def is_admitted(
    stock: Stock, registry: Registry, usual: str, project: str, device: str | None
) -> bool:
    """Whether a device may have images of a project; `usual` is --admit."""
    if stock.is_open(project, usual):
        return True
    # S3's contract: nothing for who does not say who it is
    return device is not None and normal_id(device) in registry.admitted(project)


def remember(
    known: Known,
    history: History,
    resolve: Callable[[str], str],
    event: Event,
    now: Callable[[], float] = time.time,
) -> None:
    """The listener that notes who was here, when, and what was decided; but not of the doctor.

    `resolve` gives the name of a project that was asked for by an alias.
    """
    (report, outcome), at = event, int(now())
    if report.device and is_example(report.device):
        return
    if (project := resolve(report.project)) != report.project:
        report = report._replace(project=project)
        event = Event(report, outcome)
    history.note(event, at)
    if report.device is None:
        return
    known.grants.hear(event, at)
    offered = outcome.version.text if isinstance(outcome, Release) else ""
    sighting = Sighting(
        report.device, report.project, report.chip, report.version, report.sketch_md5,
        report.sketch_sha256, report.free_space, report.sdk, report.address, at,
        downloaded=offered != "", offered=offered,
    )  # fmt: skip
    known.registry.seen(sighting)
