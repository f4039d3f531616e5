"""What `--mqtt` says: where the broker is, which topics there are; and what devices say on theirs.

    mqtts://user:password@host:8883/prefix?name=value&... --> read_url() --> Broker
    template, device --> topic_for() --> where the device is told something
    template, topic  --> words_in()  --> whose message it is --> read_state() --> Heard

Pure. A template is a topic in which {device}, {mac}, {project} and {group} stand for what is the
device's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ota_fleet.rows import clean, is_mac, normal_id, parsed
from ota_server import Version, shown

PORTS = {"mqtt": 1883, "mqtts": 8883}
# Where a number stands as port; an @ behind it says that it is the beginning of a password.
_PORT = re.compile(r"\w+://(?:[^/?#]*@)?(?:[^/?#@:]+|\[[^]]*\]):(\d{1,9})(?:[/?][^@]*)?")
OPTIONS = ("ca", "command", "state", "discovery")  # of the URL
TEMPLATES = ("command", "state")
PLACES = ("device", "mac", "project", "group")  # of a template
INSTEAD = "in a topic write {mac} in the place of + or #"
NONE = "-"  # the level of a topic for who has no project, or no group
MAX_STATE = 4_096  # bytes of what a device says
VERSIONS = ("version", "app_version", "fw_version", "firmware")  # what devices call it
IDS = ("device", "mac", "id")
# States in which a device still runs what it is about to replace: that it does says nothing.
BUSY = frozenset((
    "ota", "ota_start", "ota_started", "ota_progress", "downloading", "updating", "installing",
    "flashing", "rebooting", "restarting",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Broker:
    """Where messages go, and on which topics."""

    host: str
    port: int = 1883
    secure: bool = False  # TLS
    ca: str = ""  # file of who signed the broker's certificate; "": whom the system trusts
    user: str = ""
    password: str = field(default="", repr=False)
    prefix: str = "ota"  # of our own topics
    command: str = "/switch/cmd/root"  # template: where a device is told to ask; "": nowhere
    state: str = "/switch/state/root"  # template: where it says what it runs; "": nowhere
    discovery: str = "homeassistant"  # where Home Assistant looks for entities; "": nowhere


def read_url(text: str) -> Broker:
    """The settings. ValueError: a sentence says what is wrong, without the password."""
    if (number := _PORT.fullmatch(text)) and not 0 < int(number[1]) <= 65535:
        raise ValueError(f"--mqtt: {number[1]} is no port, 65535 is the last one")
    if "#" in text and "@" not in text.partition("#")[2]:
        raise ValueError(f"--mqtt: # ends a URL: {INSTEAD}")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # whose words may be a part of the password
        port = 0
    if port == 0 or not parts.hostname or "#" in text:
        raise ValueError(
            "--mqtt is to be such as mqtts://user:password@broker:8883/ota, where / ? # @ : in the"
            " password are written %2F %3F %23 %40 %3A"
        )
    if parts.scheme not in PORTS:
        raise ValueError("--mqtt is to begin with mqtt:// or mqtts://")
    given = {"user": _decoded(parts.username or ""), "password": _decoded(parts.password or "")}
    if given["password"] and not given["user"]:
        raise ValueError("--mqtt: there is a password, but no user")
    if prefix := _decoded(parts.path).strip("/"):
        given["prefix"] = prefix
    given |= _options(parts.query)
    if "ca" in given and parts.scheme == "mqtt":
        raise ValueError("--mqtt: ca= goes with mqtts://")
    for name in ("prefix", "command", "state", "discovery"):
        _check_topic(name, given.get(name, ""))
    return Broker(parts.hostname, port or PORTS[parts.scheme], parts.scheme == "mqtts", **given)


def _decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("--mqtt: what is written with % is to be UTF-8") from None


def _options(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in filter(None, query.split("&")):
        name, _, value = each.partition("=")
        if name not in OPTIONS:
            raise ValueError(f"--mqtt: {shown(name)} is none of {', '.join(OPTIONS)}")
        if name in found:
            raise ValueError(f"--mqtt: {name}= stands there twice")
        found[name] = _decoded(value)
    return found


# -- Topics ----------------------------------------------------------------------------------------


def _check_topic(name: str, topic: str) -> None:
    """ValueError: nothing can be published there."""
    pieces = _pieces(topic)
    for place in pieces[1::2]:
        if name not in TEMPLATES or place not in PLACES:
            known = "{" + "}, {".join(PLACES) + "}" if name in TEMPLATES else "nothing"
            raise ValueError(f"--mqtt: {name}= has {{{place}}}, but {known} has a meaning there")
    if re.search(r"[+#{}\0-\x1f]", "".join(pieces[::2])):
        cure = f": {INSTEAD}" if name in TEMPLATES and re.search("[+#]", topic) else ""
        raise ValueError(f"--mqtt: {name}= {shown(topic)} is no topic to publish on{cure}")


def _pieces(template: str) -> list[str]:
    """Text and names of places in turn, text first."""
    return re.split("{([^{}]*)}", template)


def topic_for(template: str, device: str, project: str, group: str) -> str:
    """The topic of a device."""
    mac = device.replace(":", "").lower() if is_mac(device) else device
    words = {"device": device, "mac": mac, "project": project or NONE, "group": group or NONE}
    pieces = _pieces(template)
    pieces[1::2] = (_level(words[place]) for place in pieces[1::2])
    return "".join(pieces)


def _level(text: str) -> str:
    """Text as one level of a topic: who chooses his id shall not choose another one's topic."""
    return re.sub(r"[%/+#\0-\x1f\x7f]", lambda found: f"%{ord(found[0]):02X}", text)


def filter_of(template: str) -> str:
    """What to subscribe to for the topics of all devices."""
    levels = template.split("/")
    return "/".join("+" if "{" in level else level for level in levels)


def words_in(template: str, topic: str) -> Mapping[str, str] | None:
    """What stands in the places of a topic; None: it is not of this template."""
    pieces = _pieces(template)
    named: set[str] = set()
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            pieces[at] = re.escape(piece)
        else:
            pieces[at] = f"(?P={piece})" if piece in named else f"(?P<{piece}>[^/]+)"
            named.add(piece)
    match = re.fullmatch("".join(pieces), topic)
    return {name: unquote(text) for name, text in match.groupdict().items()} if match else None


# -- What devices say ------------------------------------------------------------------------------


class Nameless(ValueError):
    """Nobody knows whose message it is."""


class Heard(NamedTuple):
    """What a device says of itself."""

    device: str  # as normal_id() has it
    project: str  # "": it does not say
    version: Version | str  # that it runs
    is_busy: bool  # with replacing that


def read_state(words: Mapping[str, str], payload: bytes) -> Heard:
    """What a message on a topic with these words says. ValueError: why it says nothing.

    Nameless, which is one: the topic has no word for the device, and the message none either.
    """
    if len(payload) > MAX_STATE:
        raise ValueError(f"it has {len(payload)} bytes, not at most {MAX_STATE}")
    try:
        said = json.loads(payload.decode())
    except RecursionError as err:
        raise ValueError("it is nested too deep") from err
    fields = said.items() if isinstance(said, dict) else ()
    texts = {name: value.strip() for name, value in fields if isinstance(value, str)}
    version = _first(texts, VERSIONS)
    device = normal_id(words.get("device") or words.get("mac") or _first(texts, IDS))
    if not device:
        raise Nameless('no device is named: put {mac} into state=, or "mac" into the message')
    if not version:
        raise ValueError("it says no version")
    project = words.get("project", "") if words.get("project") != NONE else ""
    return Heard(
        device,
        clean(project or texts.get("project", "")),
        parsed(version) or clean(version),
        texts.get("state", "").lower() in BUSY,
    )


def _first(texts: Mapping[str, str], names: tuple[str, ...]) -> str:
    return next((texts[name] for name in names if texts.get(name)), "")
