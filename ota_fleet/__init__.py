"""The rooms beside the core: what remembers the fleet, and what asks a server from outside.

They import ota_server, never the reverse, but for two doors there: `--state` and the commands.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ota_fleet import doctor, publish, schema
from ota_fleet.accounts import Accounts
from ota_fleet.api import BELOW, Api, refusal_by_path
from ota_fleet.files import Store
from ota_fleet.ledger import Ledger
from ota_fleet.operations import Operations
from ota_fleet.registry import Registry, Sighting, normal_id
from ota_fleet.rules import not_whitelisted
from ota_fleet.two_step import PATHS, TwoStep, by_credentials
from ota_server import Access, Event, Release, Request, Site

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "check": doctor.main,
    "publish": publish.main,
    "--backup": schema.backup,
}


def extend(site: Site) -> Site:
    """The site with a memory. OSError, ValueError: the folder of the fleet is not to be used."""
    config = site.config
    os.makedirs(config.state, mode=0o700, exist_ok=True)
    try:
        path = os.path.join(config.state, "fleet.db")
        registry = Registry(path, max_devices=config.max_devices)
    except RuntimeError as err:
        raise ValueError(str(err)) from err
    site = replace(
        site,
        listeners=(*site.listeners, functools.partial(remember, registry)),
        closers=(*site.closers, registry.close),
    )
    if config.admit == "WHITELIST":
        rule = not_whitelisted(lambda name, mac: normal_id(mac) in registry.admitted(name))
        site = replace(site, rules=(*site.rules, rule))
    speaks_s4 = bool(config.us_username and config.us_password)
    own = (BELOW, PATHS) if speaks_s4 else (BELOW,)
    guards = [
        functools.partial(elsewhere, own, each) if isinstance(each, Access) else each
        for each in site.guards
    ]
    ledger = Ledger(registry)
    accounts = Accounts(ledger, secure=bool(config.cert))
    if config.admin_email and config.admin_password and accounts.setup_secret:
        accounts.open_account(config.admin_email, config.admin_password, "admin", who="start")
    operations = Operations(accounts, registry, ledger, config.state)
    api = Api(operations.table(), accounts, config.max_image)
    site = replace(
        site,
        guards=(*guards, api.guard),
        routes=(*api.routes(), *site.routes),
        refusal=functools.partial(refusal_by_path, site.refusal),
    )
    if not speaks_s4:
        return site
    store = Store(os.path.join(config.state, "files"), registry)
    routes = TwoStep(registry, store, config.max_image).routes()
    guard = by_credentials(config.us_username, config.us_password)
    return replace(site, guards=(*site.guards, guard), routes=(*routes, *site.routes))


def elsewhere(
    own: Sequence[re.Pattern[str]], guard: Callable[[Request], None], request: Request
) -> None:
    """A guard, for all but the paths that have credentials of their own."""
    if not any(paths.fullmatch(request.path) for paths in own):
        guard(request)


def remember(registry: Registry, event: Event) -> None:
    """The listener that notes who was here, and when."""
    report, outcome = event
    if report.device is None:
        return
    registry.seen(
        Sighting(
            device=report.device,
            project=report.project,
            chip=report.chip,
            version=report.version,
            sketch_md5=report.sketch_md5,
            sketch_sha256=report.sketch_sha256,
            free_space=report.free_space,
            sdk=report.sdk,
            address=report.address,
            at=int(time.time()),
            downloaded=isinstance(outcome, Release),
        )
    )
