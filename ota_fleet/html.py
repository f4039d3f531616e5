"""The house of every page: what makes HTML of values, and the frame around it. Pure.

    values -> e(), tag(), table(), form(), chart() ... -> Html -> page() -> Sheet
    Sheet, Frame -> framed() -> Reply with all that a browser must be told

Only Html goes into a page as it is; everything else is escaped on its way, so no page can forget
it. No text of a user ends in a style or a script: the policy below forbids both.
"""

from __future__ import annotations

import hashlib
import html
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from ota_server import UNCACHED, Reply, __version__, body_reply

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
SECURE = (
    ("Content-Security-Policy", CONTENT_SECURITY_POLICY),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),  # with none, forms would have no Origin
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
KEEP = 300  # seconds that what asks once more stays in the browser
COLOURS = 6  # that parts of a bar or a chart have, in admin.css
_VOID = frozenset(("br", "hr", "img", "input", "link", "meta"))
# What no text of a page has: control characters, halves of surrogate pairs, turned directions.
_UNFIT = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def _static() -> dict[str, tuple[str, bytes]]:
    """The files beside this one, by URL: each other content has another one."""
    found = {}
    kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
    for path in sorted(Path(__file__).with_name("static").iterdir()):
        if path.suffix in kinds:
            data = path.read_bytes()
            name = f"{path.stem}-{hashlib.sha256(data).hexdigest()[:16]}{path.suffix}"
            found[f"/admin/static/{name}"] = kinds[path.suffix], data
    return found


STATIC: Mapping[str, tuple[str, bytes]] = _static()


# -- 1. Text and tags ------------------------------------------------------------------------------


class Html(str):
    """Text that is HTML already, made by a function of this module."""

    __slots__ = ()


def e(value: object) -> Html:
    """Any value as text of a page, or of an attribute between quotes; Html stays as it is."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_UNFIT.sub("\ufffd", str(value))))


def join(*parts: object, between: str = "") -> Html:
    """Several values; None is nothing, and what is in lists stands in their order."""
    return Html(e(between).join(_flat(parts)))


def _flat(parts: Iterable[object]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            yield e(part)
        elif isinstance(part, Iterable):
            yield from _flat(part)
        elif part is not None:
            yield e(part)


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. An attribute that is True has no value, one that is False or None is left out.

    A `_` in an attribute's name is a `-`; one at its end makes it no word of Python: `class_`.
    """
    words = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID and not children:
        return Html(f"<{name}{words}>")
    return Html(f"<{name}{words}>{join(*children)}</{name}>")


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    # str() of Html is plain text again: a quote in it would end the attribute.
    return f" {name}" if value is True else f' {name}="{e(str.__str__(str(value)))}"'


def url(path: str, *names: str, **query: object) -> str:
    """A path of this server with names behind it, and a query; what is empty is left out."""
    parts = (quote(name, safe="", errors="surrogateescape") for name in names)
    words = urlencode({key.rstrip("_"): value for key, value in query.items() if value})
    return "/".join((path, *parts)) + ("?" + words) * bool(words)


def a(text: object, href: str, **attributes: object) -> Html:
    """A link to a page of this server: url() makes `href`."""
    assert href.startswith(("/", "?", "#")), "no link leads away"
    return tag("a", text, href=href, **attributes)


# -- 2. Words --------------------------------------------------------------------------------------


def ago(seconds: float) -> str:
    """How long something is past, for a person: 3 min ago."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def when(at: float, now: float) -> Html:
    """A moment, in UTC seconds, as time that has passed until `now`, or is left."""
    text = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
    words = ago(abs(now - at))
    if at > now:
        words = f"in {words.removesuffix(' ago')}" if words.endswith(" ago") else "soon"
    return tag("time", words, datetime=text.replace(" ", "T") + "Z", title=f"{text} UTC")


def size_of(size: int) -> str:
    """Bytes for a person."""
    if size < 10_000:
        return f"{size} bytes"
    return f"{size / 1000:,.0f} KB" if size < 10_000_000 else f"{size / 1_000_000:,.1f} MB"


def count(number: int, noun: str) -> str:
    """So many of them: 1 device, 2 devices."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def badge(text: object, kind: str = "") -> Html:
    """A word that stands out; `kind` good, warn, bad, or "" for none of it."""
    return tag("span", text, class_=f"badge {kind}".strip())


def code(text: object) -> Html:
    """What a machine reads."""
    return tag("code", text)


def copied(text: str, what: str = "") -> Html:
    """Lines to copy, with a button that does it, which the script shows; `what` is their name."""
    button = tag("button", "Copy", type="button", class_="copy", aria_label=f"Copy {what}".strip(),
                 hidden=True)  # fmt: skip
    return tag("div", tag("pre", code(text), tabindex="0"), button, class_="copied")


# -- 3. Parts of pages -----------------------------------------------------------------------------


def card(title: object, *body: object, **attributes: object) -> Html:
    """A part of a page under its own heading; "": without one."""
    heading = tag("h2", title) if title else None
    return tag("section", heading, *body, **{"class_": "card", **attributes})


def cards(*parts: object) -> Html:
    """Cards beside each other, where there is room."""
    return tag("div", *parts, class_="cards")


def facts(rows: Iterable[tuple[object, object]]) -> Html:
    """Names and their values."""
    return tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in rows], class_="facts")


def figures(rows: Iterable[tuple[object, object]]) -> Html:
    """Names and their numbers, large."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows]
    return tag("dl", pairs, class_="figures")


def note(*body: object, kind: str = "", **attributes: object) -> Html:
    """A sentence that stands out; `kind` as of badge()."""
    quoted = join(*body).startswith((e("'"), e('"'))) or None  # a name keeps its small letter
    return tag("p", *body, class_=f"note {kind}".strip(), data_quoted=quoted, **attributes)


def details(summary: object, *body: object, **attributes: object) -> Html:
    """What is shown when somebody asks for it."""
    return tag("details", tag("summary", summary), *body, **attributes)


class Head(NamedTuple):
    """The head of a column."""

    label: str
    href: str = ""  # that sorts by it
    sorted: str = ""  # "ascending" | "descending"


def table(
    heads: Sequence[str | Head], rows: Iterable[Sequence[object]], caption: str, empty: object = ""
) -> Html:
    """A table, whose rows are cards on a phone; `empty` stands in the place of one without rows.

    The caption is read by who does not see the page.
    """
    columns = [head if isinstance(head, Head) else Head(head) for head in heads]
    lines = [
        tag("tr", [tag("td", cell, data_label=head.label)
                   for head, cell in zip(columns, row, strict=True)])
        for row in rows
    ]  # fmt: skip
    if not lines:
        return tag("p", empty or "Nothing yet.", class_="empty")
    top = tag("tr", map(_head, columns))
    caption_ = tag("caption", caption, class_="unseen")
    inner = tag("table", caption_, tag("thead", top), tag("tbody", lines))
    return tag("div", inner, class_="table")


def _head(head: Head) -> Html:
    label = a(head.label, head.href) if head.href else head.label
    if not head.label:
        label = tag("span", "Actions", class_="unseen")
    return tag("th", label, scope="col", aria_sort=head.sorted or None)


def pager(first: str, following: str, shown: str = "") -> Html:
    """Links to the first and to the next page, "" where there is none."""
    links = [
        a(text, href) for text, href in (("First page", first), ("Next page", following)) if href
    ]
    return tag("nav", links, tag("span", shown), class_="pager", aria_label="Pages")


# -- 4. Forms --------------------------------------------------------------------------------------


def field(
    label: object, name: str, value: object = "", *, hint: object = "", **attributes: object
) -> Html:
    """An input with its label; `type` is text, where it is not said."""
    control = tag("input", **{"type": "text", "name": name, "value": value, **attributes})
    return _labelled(label, control, hint)


def area(
    label: object, name: str, value: object = "", *, hint: object = "", **attributes: object
) -> Html:
    """A field of several lines."""
    # The first line end behind the tag is not part of the text.
    return _labelled(label, tag("textarea", "\n", value, name=name, **attributes), hint)


def choice(
    label: object, name: str, options: Iterable[tuple[str, object] | str], value: str = "",
    *, hint: object = "", **attributes: object,
) -> Html:  # fmt: skip
    """One of several: a value, and what it is called."""
    pairs = [(each, each) if isinstance(each, str) else each for each in options]
    inner = [tag("option", text, value=key, selected=key == value) for key, text in pairs]
    return _labelled(label, tag("select", inner, name=name, **attributes), hint)


def suggestions(name: str, words: Iterable[str]) -> Html:
    """What fields offer that have this name as `list`; anything else may be typed, too."""
    return tag("datalist", [tag("option", value=each) for each in words], id=name)


def check(
    label: object, name: str, value: str = "1", *, checked: bool = False, **attributes: object
) -> Html:
    """A box to tick."""
    box = tag("input", type="checkbox", name=name, value=value, checked=checked, **attributes)
    return tag("label", box, " ", tag("span", label), class_="check")


def _labelled(label: object, control: Html, hint: object) -> Html:
    small = tag("small", hint) if hint else None
    return tag("label", tag("span", label), control, small, class_="field")


def hidden(**values: object) -> Html:
    """What a form sends and nobody sees."""
    return join(tag("input", type="hidden", name=name.rstrip("_"), value=value)
                for name, value in values.items())  # fmt: skip


def button(text: object, kind: str = "", **attributes: object) -> Html:
    """What sends a form; `kind` main, plain or danger. With `name` and `value` it says which."""
    return tag("button", text, **{"type": "submit", "class_": kind or None, **attributes})


def form(action: str, csrf: str, *body: object, submit: object = "", **attributes: object) -> Html:
    """A form that changes something; `submit` is the text of its button, "": it is in the body."""
    assert action.startswith("/"), "no form is sent away"
    secret = hidden(csrf=csrf) if csrf else None
    last = button(submit, "main") if submit else None
    inside = {"method": "post", "action": action, "accept_charset": "utf-8", **attributes}
    return tag("form", secret, *body, last, **inside)


def asking(action: str, *body: object, submit: object = "Show", **attributes: object) -> Html:
    """A form that changes nothing: what is chosen stands in the URL."""
    last = button(submit) if submit else None
    return tag(
        "form", *body, last, **{"method": "get", "action": action, "role": "search", **attributes}
    )


# -- 5. Pictures -----------------------------------------------------------------------------------

Share = tuple[str, float]  # what it is called, how much


def bars(parts: Sequence[Share], label: str) -> Html:
    """One bar of the shares of a whole, and their names below it."""
    items = [_key(number, name, f"{amount:g}") for number, (name, amount) in enumerate(parts)]
    return join(bar(parts, label), tag("ul", items, class_="keys"))


def bar(parts: Sequence[Share], label: str) -> Html:
    """The same without the names, which who does not see it is told."""
    whole = sum(amount for _, amount in parts) or 1
    starts = (0.0, *accumulate(100 * amount / whole for _, amount in parts))
    rects = [
        tag("rect", tag("title", f"{name}: {amount:g}"), x=f"{start:.2f}", y=0,
            width=f"{100 * amount / whole:.2f}", height=1, class_=_colour(number))
        for number, ((name, amount), start) in enumerate(zip(parts, starts, strict=False))
    ]  # fmt: skip
    words = ", ".join(f"{name} {amount:g}" for name, amount in parts)
    return tag("svg", tag("title", f"{label}: {words}"), rects, viewBox="0 0 100 1",
               preserveAspectRatio="none", role="img", class_="bars")  # fmt: skip


def _key(number: int, name: object, amount: object = "") -> Html:
    dot = tag("svg", tag("rect", width=10, height=10, class_=_colour(number)), viewBox="0 0 10 10",
              aria_hidden="true")  # fmt: skip
    return tag("li", dot, " ", name, " ", tag("b", amount) if amount else None)


def _colour(number: int) -> str:
    return f"c{min(number, COLOURS - 1)}"


class Series(NamedTuple):
    """What a chart shows of one name."""

    name: str
    amounts: Sequence[float]  # one for each moment


def chart(
    label: str, moments: Sequence[str], series: Sequence[Series], *, stacked: bool = False
) -> Html:
    """Amounts over time, as lines or on top of each other; the same as a table, to open."""
    if not moments:
        return tag("p", "Nothing yet.", class_="empty")
    tops = [sum(column) if stacked else max(column)
            for column in zip(*(each.amounts for each in series), strict=True)]  # fmt: skip
    top = _round_up(max(tops, default=0))
    shapes = _stacked(series, top) if stacked else [
        _line(each.amounts, top, number) for number, each in enumerate(series)
    ]  # fmt: skip
    axes = [_level(height, top) for height in (0.0, 0.5, 1.0)]
    ends = [tag("text", text, x=x, y=158, class_=anchor) for text, x, anchor in
            ((moments[0], 40, "start"), (moments[-1], 600, "end"))]  # fmt: skip
    picture = tag("svg", tag("title", label), axes, shapes, ends, viewBox="0 0 600 162",
                  role="img", class_="chart")  # fmt: skip
    keys = tag("ul", [_key(number, each.name) for number, each in enumerate(series)], class_="keys")
    rows = [(moment, *(f"{each.amounts[at]:g}" for each in series))
            for at, moment in enumerate(moments)]  # fmt: skip
    numbers = table(["Time", *(each.name for each in series)], reversed(rows), label)
    return join(picture, keys, details("Numbers", numbers, class_="numbers"))


def _round_up(amount: float) -> float:
    """The next number that ends an axis well."""
    size = 10.0 ** max(0, len(str(int(amount))) - 1)
    return next(size * step for step in (2, 4, 6, 8, 10) if size * step >= amount)


def _level(height: float, top: float) -> Html:
    y = 140 - 130 * height
    line = tag("line", x1=40, x2=600, y1=y, y2=y, class_="grid")
    return join(line, tag("text", f"{top * height:g}", x=34, y=y + 4, class_="end"))


def _points(amounts: Sequence[float], top: float) -> list[str]:
    if len(amounts) == 1:  # one moment is as wide as the chart
        amounts = [*amounts, *amounts]
    step = 560 / (len(amounts) - 1)
    return [f"{40 + at * step:.1f},{140 - 130 * each / top:.1f}" for at, each in enumerate(amounts)]


def _line(amounts: Sequence[float], top: float, number: int) -> Html:
    return tag("path", d="M" + "L".join(_points(amounts, top)), class_=f"line {_colour(number)}")


def _stacked(series: Sequence[Series], top: float) -> list[Html]:
    lower = [0.0] * len(series[0].amounts)
    shapes = []
    for number, each in enumerate(series):
        upper = [low + amount for low, amount in zip(lower, each.amounts, strict=True)]
        ring = _points(upper, top) + _points(lower, top)[::-1]
        title = tag("title", each.name)
        shapes.append(tag("path", title, d=f"M{'L'.join(ring)}Z", class_=_colour(number)))
        lower = upper
    return shapes


# -- 6. The frame ----------------------------------------------------------------------------------


class Sheet(NamedTuple):
    """A page, without what is around all of them."""

    title: str
    body: Html
    keep: int = 0  # seconds that the browser may show it again: Back to what answered a POST


class Frame(NamedTuple):
    """What is around a page."""

    path: str  # of the page
    name: str = ""  # who is signed in; "": nobody
    role: str = ""
    csrf: str = ""
    links: Sequence[tuple[str, str]] = ()  # path and text of the pages that he may see
    said: str = ""  # what was just done
    alert: str = ""  # why it was not
    drop: str = ""  # where a file goes that is dropped on any page; "": nowhere


def page(title: str, *body: object) -> Sheet:
    """A page of its parts, below a heading with its title."""
    return Sheet(title, join(*body))


def framed(sheet: Sheet, frame: Frame, status: int = 200, *headers: tuple[str, str]) -> Reply:
    """The page as it is sent."""
    css, script = sorted(STATIC, key=lambda path: path.endswith(".js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", f"{sheet.title} · OTA server"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="/favicon.ico"),
        tag("link", rel="stylesheet", href=css),
        tag("script", src=script, defer=True),
    )
    skip = a("Skip to content", "#main", class_="skip")
    messages = [_message(frame.said, "status", "good"), _message(frame.alert, "alert", "bad")]
    main = tag("main", tag("h1", sheet.title), messages, sheet.body, id="main", tabindex="-1")
    foot = tag("footer", f"ota-server {__version__}")
    body = tag("body", skip, _banner(frame), main, foot, data_csrf=frame.csrf or None,
               data_drop=frame.drop or None)  # fmt: skip
    text = f"<!doctype html>{tag('html', head, body, lang='en')}"
    kept = ("Cache-Control", f"private, max-age={sheet.keep}") if sheet.keep else UNCACHED
    return body_reply(status, "text/html; charset=utf-8", text.encode(), *SECURE, kept, *headers)


def _message(text: str, role: str, kind: str) -> Html | None:
    return note(text, kind=kind, role=role) if text else None


def _banner(frame: Frame) -> Html:
    brand = a("OTA server", "/admin", class_="brand")
    if not frame.name:
        return tag("header", brand, class_="top")
    items = [tag("li", a(text, path, aria_current=_current(path, frame.path)))
             for path, text in frame.links]  # fmt: skip
    nav = tag("nav", tag("ul", items), aria_label="Main")
    who = a(frame.name, "/admin/account", title=f"Your account: {frame.role}", class_="who")
    leave = form("/admin/sign-out", frame.csrf, button("Sign out", "plain"))
    return tag("header", brand, nav, tag("div", who, leave, class_="self"), class_="top")


def _current(path: str, here: str) -> str | None:
    if path == here:
        return "page"
    return "true" if path != "/admin" and here.startswith(path + "/") else None
