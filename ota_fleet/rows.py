"""The rows of the registry, and what makes any text fit to stand in one."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from operator import itemgetter
from typing import Any, NamedTuple, Self

from ota_server import ESP32_CHIPS, UNVERSIONED, Refused, Release, Version, shown

MAX_TEXT = 255  # characters of what a device says of itself; of names too
MAX_LONG = 4_096  # characters of notes, of an entry of the audit, of what the two-step table holds
MAX_PARSED = 20_000  # versions that are kept, some 10 MB: twice as many as devices, usually
MAX_INTEGER = (1 << 63) - 1  # BIGINT


class Sighting(NamedTuple):
    """One check-in. None or "": the device did not say."""

    device: str  # MAC or any other id; "": there is nobody to remember
    project: str
    chip: str | None
    version: Version | str | None
    sketch_md5: str | None
    sketch_sha256: str | None
    free_space: int | None  # bytes
    sdk: str | None
    address: str
    at: int  # UTC seconds
    downloaded: bool  # it was given an image
    offered: str = ""  # the version of that

    def row(self) -> tuple[str | int | None, ...]:
        """As device has it; whatever a device says, the database takes it."""
        space = None if self.free_space is None else min(self.free_space, MAX_INTEGER)
        return (
            normal_id(self.device), clean(self.project), clean(self.chip or ""),
            clean(self.version or ""), clean(self.sketch_sha256 or self.sketch_md5 or ""), space,
            clean(self.sdk or ""), clean(self.address), self.at, self.at, int(self.downloaded),
            clean(self.offered), int(self.offered != ""),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """What is known of a device. "": it never said."""

    id: str  # a MAC in upper case with colons, or what the protocol gives
    project: str
    chip: str
    version: str
    image: str  # digest of what runs: SHA-256 if it knows that, or MD5
    free_space: int | None  # bytes
    sdk: str
    address: str
    first_seen: int  # UTC seconds
    last_seen: int
    downloads: int
    notes: str
    labels: tuple[str, ...]
    pin: str  # the one version it is to run; "": none
    admitted: bool  # to its project
    offered: str = ""  # the version that it was given last; "": an objection came since
    offers: int = 0  # how often, in a row
    channel: str = ""  # "": as its group or its project has it
    group: str = ""  # "": in none
    interval: int = 0  # seconds between its check-ins, about; 0: it asked only once

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Reads a row, in which the labels are JSON."""
        labels, pin, admitted, *rest = row[-8:]
        values: list[Any] = [*row[:-8], tuple(json.loads(labels)), pin, bool(admitted), *rest]
        return cls(*values)


class Search(NamedTuple):
    """Which devices a list has, "" for any, and in which order."""

    project: str = ""
    text: str = ""  # anywhere in what is known of them; a MAC address in any of its forms
    chip: str = ""
    version: str = ""
    label: str = ""
    sort: str = "id"  # or project, version, last_seen; with "-" in front: downwards
    state: str = ""  # as in the registry's STATES
    since: int = 0  # last seen, UTC seconds
    until: int = MAX_INTEGER  # UTC seconds; from then on it is too late
    group: str = ""

    def place(self, device: Device) -> tuple[str | int, ...]:
        """Where a device stands in the list: what comes behind it is the next page."""
        by = self.sort.removeprefix("-")
        return (device.id,) if by == "id" else (getattr(device, by), device.id)

    def values(self) -> tuple[str | int, ...]:
        """All but project, state and order, as the registry's statement takes them."""
        label = "\n" + json.dumps(clean(self.label), ensure_ascii=False) if self.label else ""
        text = escaped(normal_id(self.text))
        chip, version, group = clean(self.chip), clean(self.version), clean(self.group)
        words = chip, chip, version, version, group, group, label, label, f"%{text}%", f"%{text}%"
        return self.since, self.until, *words


def by_version(
    rows: Iterable[tuple[str, str]], after: Sequence[Any], *, down: bool
) -> Iterator[str]:
    """Ids, of rows of version and id, in the order of SemVer, from behind the pair `after`."""
    groups: dict[str, list[str]] = {}
    for version, device in rows:
        groups.setdefault(version, []).append(device)
    here = version_place(after[0]) if after else None
    for place in sorted(map(version_place, groups), reverse=down):
        if here and (place > here if down else place < here):
            continue
        for device in sorted(groups[place[-1]], reverse=down):
            if place != here or (device < after[1] if down else device > after[1]):
                yield device


def version_place(text: str) -> tuple[Any, ...]:
    """What orders versions; what is none stands before those that are."""
    version = parsed(text)
    return (1, version.precedence, text) if version else (0, (), text)


@functools.lru_cache(MAX_PARSED)
def parsed(text: str) -> Version | None:
    """The version that a device says; None: it is none. Lists ask for the same ones each time."""
    try:
        return Version.parse(text)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class App:
    """A line of the two-step protocol's table."""

    device_id: str  # as it was given: no MAC is rewritten
    app_ver: str  # the version to update from
    update_file_path: str


@dataclass(frozen=True, slots=True)
class Account:
    """A person who may sign in."""

    id: int
    email: str  # in lower case
    role: str
    password: str = field(repr=False)  # hashed, as accounts.py does it
    created: int  # UTC seconds


@dataclass(frozen=True, slots=True)
class Session:
    """A browser in which somebody signed in."""

    digest: str  # of what the browser has
    account: int
    created: int  # UTC seconds
    expires: int  # UTC seconds; from then on it opens nothing


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token, which is not the token."""

    id: int
    name: str
    role: str
    project: str  # "": of all
    digest: str
    device: str  # the only one that it is for; "": it is for none
    created: int  # UTC seconds


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the audit."""

    number: int  # 1, 2, 3... without a gap
    at: int  # UTC seconds
    who: str
    action: str
    what: str
    digest: str = ""  # see follows()

    def follows(self, previous: str) -> str:
        """The digest that this entry has behind one with the digest `previous`, first behind "".

        It is the SHA-256, in lower-case hex, of that and of the JSON of the other fields: an entry
        that was changed, moved or taken out breaks the chain. Whoever writes the file can make
        a whole new chain, but the log has the digests too.
        """
        row = [self.number, self.at, self.who, self.action, self.what]
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
        return sha256(f"{previous}{text}".encode()).hexdigest()


MAX_ALIASES = 32
MAX_PARTITION = 1 << 30  # bytes
ADMIT = ("", "open", "whitelist")
CHIPS = ("esp8266", *ESP32_CHIPS.values())
Rows = Sequence[Sequence[Any]]

# What a URL with such a name would mean is something else.
_NAME = re.compile(
    r"(?!(?i:latest(?:-minimal|-safeboot)?|api|admin|devices|files|update|versions|healthz|readyz"
    r"|metrics|.*\.(?:bin|gz|zip|json|ico|md5|sha256))\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
)
_NORMAL = re.compile(r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}")
_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}[:.-]?){5}[0-9A-Fa-f]{2}")


def clean(text: object, most: int = MAX_TEXT) -> str:
    """Text that any database takes: cut, without NUL and halves of surrogate pairs."""
    text = str(text)[:most]
    if text.isascii() and "\0" not in text:  # as nearly all is
        return text
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def escaped(text: str) -> str:
    """Text that stands for itself in LIKE ... ESCAPE '!'."""
    return re.sub("([!%_])", r"!\1", text)


def is_mac(text: str) -> bool:
    """Whether it is a MAC address, however it is written."""
    return _MAC.fullmatch(text.strip()) is not None


def normal_id(text: str) -> str:
    """A MAC address in upper case with colons, however it was written; anything else as it is."""
    if _NORMAL.fullmatch(text):  # as devices do, and a check asks several times
        return text
    text = clean(text.strip())
    if not _MAC.fullmatch(text):
        return text
    digits = re.sub("[:.-]", "", text).upper()
    return ":".join(digits[i : i + 2] for i in range(0, 12, 2))


def is_example(device: str) -> bool:
    """Whether it is a MAC address for documentation, RFC 7042 2.1.2: the doctor's, nobody's."""
    return normal_id(device).startswith("00:00:5E:00:53:")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Bytes that were uploaded under a path; digests are lower-case hex."""

    path: str
    sha256: str
    md5: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """An image that was uploaded; digests are lower-case hex."""

    project: str
    version: str  # in its normal form
    kind: str  # as in ota_server.Release
    chip: str  # as in ota_server.Facts
    packed: bool
    name: str  # of the file, for devices and people
    sha256: str
    md5: str
    size: int  # bytes
    notes: str
    uploaded: int  # UTC seconds
    who: str

    @property
    def slot(self) -> tuple[str, str, bool]:
        """What only one image of a version has."""
        return self.kind, self.chip, self.packed


@dataclass(frozen=True, slots=True)
class Project:
    """What devices ask for by its name."""

    name: str
    chips: tuple[str, ...] = ()  # that its images may be for; none: those of its earlier images
    aliases: tuple[str, ...] = ()  # what devices or images call it as well; sorted
    created: int = 0  # UTC seconds
    made: bool = True  # False: it is there because of files in the folder only
    partition_size: int = 0  # bytes that its devices have for a sketch; 0: nobody knows
    admit: str = ""  # "open" | "whitelist"; "": as --admit says


@dataclass(frozen=True, slots=True)
class Draft:
    """An image that somebody looks at, to publish it."""

    id: int
    sha256: str
    name: str  # of the file, as it came
    who: str
    at: int  # UTC seconds


class Stocked(NamedTuple):
    """A release, and what is known beside it."""

    release: Release  # without a path while there is a flaw
    source: str  # "upload" | "folder"
    uploaded: int  # UTC seconds; of the folder: when the file was last written
    who: str  # "": it lies in the folder
    withdrawn: str | None  # the reason, which may be ""; None: it is not
    flaw: str = ""  # why no device gets it, completes "name.bin ..."; "": it is whole

    @property
    def cursor(self) -> str:
        """Where it stands among the entries of its project."""
        return f"{self.release.version}/{self.release.facts.sha256}/{self.release.name}"

    def place(self) -> tuple[str, str]:
        """What orders entries of one version."""
        return self.release.name, self.release.facts.sha256

    def is_behind(self, cursor: str) -> bool:
        """Whether it comes later in a list, newest first. Refused: 422, that is no cursor."""
        text, _, rest = cursor.partition("/")
        digest, _, name = rest.partition("/")
        try:
            version = Version.parse(text)
        except ValueError as err:
            raise Refused(422, f"{shown(cursor)} is no cursor that came from here") from err
        own = self.release.version
        return own < version or (own == version and self.place() > (name, digest))

    def as_json(self) -> dict[str, object]:
        """What the API says of it."""
        release, facts = self.release, self.release.facts
        return {
            "project": release.project,
            "version": str(release.version),
            "kind": release.kind,
            "chip": facts.chip,
            "packed": facts.packed,
            "name": release.name,
            "size": release.size,
            "md5": facts.md5,
            "sha256": facts.sha256,
            "notes": release.notes,
            "source": self.source,
            "uploaded": self.uploaded,
            "who": self.who,
            "withdrawn": self.withdrawn,
            "flaw": self.flaw,
        }


class Tables(NamedTuple):
    """What the registry holds of all this, at one moment."""

    projects: Mapping[str, Project] = {}
    aliases: Mapping[str, str] = {}
    releases: Mapping[str, Sequence[StoredRelease]] = {}  # by project, newest first
    withdrawn: Mapping[tuple[str, str], str] = {}  # reasons by project and SHA-256


def tables_of(projects: Rows, aliases: Rows, releases: Rows, withdrawn: Rows) -> Tables:
    """The same from the rows that _ALL finds."""
    owners: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for alias, project in aliases:
        owners[alias] = project
        names.setdefault(project, []).append(alias)
    found: dict[str, list[StoredRelease]] = {}
    for row in releases:
        stored = replace(StoredRelease(*row), packed=bool(row[4]))
        found.setdefault(stored.project, []).append(stored)
    for each in found.values():
        each.sort(key=lambda row: (Version.parse(row.version), row.uploaded), reverse=True)
    made = {
        name: Project(
            name,
            tuple(json.loads(chips)),
            tuple(names.get(name, ())),
            created,
            partition_size=size,
            admit=admit,
        )
        for name, chips, created, size, admit in projects
    }
    reasons = {(project, digest): reason for project, digest, reason in withdrawn}
    return Tables(made, owners, found, reasons)


def outdated(
    rows: Sequence[StoredRelease], keep: int, withdrawn: Mapping[tuple[str, str], str]
) -> Iterator[StoredRelease]:
    """Those of a project, newest first, that are behind the newest `keep` versions of their kind.

    Versions of a chip and pre-releases count for themselves, too, and withdrawn ones do not.
    """
    groups: dict[tuple[object, ...], set[Version]] = {}
    for row in rows:
        version = Version.parse(row.version)
        counted = groups.setdefault((row.kind, row.chip, version.prerelease), set())
        if version not in counted and len(counted) == keep:
            yield row
        elif (row.project, row.sha256) not in withdrawn:
            counted.add(version)


Rank = tuple[object, ...]


class Pile(NamedTuple):
    """A project's uploaded releases, as far as they are checked."""

    whole: Sequence[tuple[Rank, Release]] = ()
    flawed: Sequence[str] = ()  # sentences
    waiting: bool = False  # for a check


def rank(release: Release, age: int) -> Rank:
    """What orders releases, as DirectoryCatalog does; `age` is ns since 1970."""
    return release.version.precedence, not release.name.endswith(".gz"), age


def _same(release: Release) -> tuple[object, ...]:
    """What only one release of a project has: the newer file wins."""
    name = release.name * (release.version == UNVERSIONED)
    return release.version, release.kind, release.facts.chip, release.facts.packed, name


def merged(folder: Sequence[Release], pile: Pile) -> tuple[Release, ...]:
    """Both, newest first."""
    ranked = [(rank(each, each.identity[3]), each) for each in folder]
    found: dict[tuple[object, ...], Release] = {}
    for _, release in sorted((*ranked, *pile.whole), key=itemgetter(0), reverse=True):
        found.setdefault(_same(release), release)
    return tuple(found.values())


def check_name(name: str) -> None:
    """Refused: 422, no project can have this name."""
    if _NAME.fullmatch(name) is None:
        rule = "1 to 64 of A-Z a-z 0-9 . _ -, a letter or digit first, no word that URLs need"
        raise Refused(422, f"{shown(name)} is no name for a project: {rule}")


def check_project(project: Project) -> None:
    """Refused: 422, no project can be like this."""
    for name in (project.name, *project.aliases):
        check_name(name)
    if len(project.aliases) > MAX_ALIASES:
        raise Refused(422, f"a project has at most {MAX_ALIASES} aliases")
    if unknown := [chip for chip in project.chips if chip not in CHIPS]:
        raise Refused(422, f"no chip is called {shown(unknown[0])}, but {', '.join(CHIPS)}")
    if not 0 <= project.partition_size <= MAX_PARTITION:
        raise Refused(422, f"a partition has 1 to {MAX_PARTITION} bytes, 0 if nobody knows")
    if project.admit not in ADMIT:
        raise Refused(422, f"{shown(project.admit)} is neither open nor whitelist")
