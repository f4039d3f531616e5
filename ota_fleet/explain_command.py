"""The operator's `ota_server.py explain URL --device MAC`: why a device gets a release, or not.

It asks the API of a server, `GET /api/v1/explain`, and prints a line for each rule.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlencode

from ota_fleet.client import (
    NO_API,
    Remote,
    Sent,
    Unreachable,
    add_options,
    exchange,
    read_remote,
    sentence,
    trouble,
)
from ota_fleet.rollout_schemas import EXPLANATION
from ota_server import Parser, Refused, printable

DESCRIPTION = """Says rule by rule why a device gets a release or not, as a server started with
--state would decide now. Nothing is given to the device.
Ends with 0: it would get the release; 1: it would not; 2: wrong usage, or the server cannot be
asked."""
TOKEN, OWN_TOKEN = "OTA_UPLOAD_TOKEN", "OTA_TOKEN"  # where it is: as for publish, or alone
ASKED = ("device", "version", "project", "running")


class Options(NamedTuple):
    """What the operator wants."""

    remote: Remote
    query: Mapping[str, str]


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """What the arguments say. SystemExit: --help, or they are wrong and stderr has said why."""
    parser = Parser(prog="ota_server.py explain", description=DESCRIPTION, allow_abbrev=False)
    option = parser.add_argument
    option("url", metavar="URL", help="of the server: https://ota.example")
    option("--device", metavar="MAC", required=True, help="its MAC address, or other id")
    option("--version", default="", help="of the release (default: what it gets, or the newest)")
    option("--project", default="", help="default: that of the device, if the server knows it")
    option("--running", metavar="VERSION", default="", help="default: what the device said last")
    add_options(parser, f"of a viewer; better in {TOKEN}: arguments stand in the list of processes")
    given = parser.parse_args(argv)
    try:
        token = environ.get(TOKEN) or environ.get(OWN_TOKEN)
        remote = read_remote(given.url, given, TOKEN, token)
    except ValueError as err:
        parser.error(str(err))
    return Options(remote, {each: value for each in ASKED if (value := getattr(given, each))})


def ask(options: Options) -> dict[str, Any]:
    """What the server answers. Refused, Unreachable: nothing of use, and why."""
    query = urlencode(options.query, errors="surrogatepass")
    fields = options.remote.fields("explain")
    sent = Sent("GET", f"/api/v1/explain?{query}", fields, io.BytesIO(), 0)
    try:
        answer = exchange(options.remote, sent)
    except (OSError, HTTPException) as err:
        raise Unreachable(trouble(err)) from err
    if answer.status != 200:
        said = sentence(answer, options.remote.to.path)
        raise Refused(answer.status, said.replace(" ?project, and ?", " --project, and --"))
    if any(each not in answer.data for each in EXPLANATION["required"]):
        raise Refused(answer.status, f"what answers is no ota-server: {NO_API}")
    return answer.data


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a person reads of an explanation."""
    runs = f"runs {found['running']}" if found["running"] else "does not say what it runs"
    known = "" if found["known"] else " (not known)"
    yield f"{found['project']} {found['version']} ({found['name']})"
    yield f"{found['device']}{known}, {runs}"
    yield ""
    yield from _table((_mark(each), each["rule"], _words(each)) for each in found["verdicts"])
    if others := [each for each in found["releases"] if each["name"] != found["name"]]:
        yield from ("", "Other releases:")
        yield from _table((_mark(each), each["version"], _words(each)) for each in others)
    if rollout := found.get("rollout"):
        yield from ("", _of_rollout(rollout))
    if found["attempts"]:
        yield from ("", "Its last attempts:")
        yield from _table(
            (_clock(each["granted"]), each["version"], each["outcome"] or "nobody knows yet")
            for each in found["attempts"]
        )
    answer = "It would get" if found["gets"] else "It would not get"
    yield from ("", f"{answer} {found['version']}: {_words(found)}")


def _mark(found: Mapping[str, Any]) -> str:
    return "ok" if found.get("gets", not found["code"]) else "no"


def _words(found: Mapping[str, Any]) -> str:
    text = str(found.get("sentence") or found.get("reason"))
    return f"{found['code']}: {text}" if found["code"] else text


def _of_rollout(rollout: Mapping[str, Any]) -> str:
    stage, stages = rollout["stage"], rollout["stages"]
    counts = stages[stage - 1]["counts"]
    amounts = ", ".join(f"{counts[each]} {each}" for each in counts)
    more = "; ".join(filter(None, (rollout["reason"], rollout["missing"])))
    where = f"Rollout {rollout['id']} is {rollout['state']}, stage {stage} of {len(stages)}"
    return f"{where}: {amounts}{'; ' if more else ''}{more}"


def _table(rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """A line each, the columns below each other."""
    found = list(rows)
    first, second = (max(len(row[at]) for row in found) for at in (0, 1))
    for one, two, three in found:
        yield f"  {one:{first}}  {two:{second}}  {three}"


def _clock(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Explains what `argv` asks; gives back the status that --help explains."""
    try:
        options = read_options(argv, environ)
    except SystemExit as err:  # argparse has said why, or has helped
        return int(err.code or 0)
    try:
        found = ask(options)
    except (Refused, Unreachable) as why:
        where = f"{options.remote.to.authority}: " if isinstance(why, Unreachable) else ""
        text = f"ota-server: {where}{why}".replace(
            options.remote.token, "***"
        )  # whoever repeated it
        sys.stderr.write(text + "\n")
        return 2
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines(found)))
    return 0 if found["gets"] else 1
