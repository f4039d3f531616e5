"""Pages about people: signing in, the first administrator, accounts, tokens, one's own account."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ota_fleet.accounts import DEVICE, MAX_NAME, MIN_PASSWORD, ROLES, Accounts
from ota_fleet.api import NOBODY, read_number
from ota_fleet.html import (
    SECURE,
    Html,
    Sheet,
    a,
    badge,
    button,
    card,
    check,
    choice,
    copied,
    details,
    field,
    form,
    hidden,
    join,
    note,
    page,
    table,
    tag,
    url,
    when,
)
from ota_fleet.pages import SIGN_IN, Call, Page, See, own_path
from ota_fleet.rows import Account, Token
from ota_server import UNCACHED, Refused, Reply, base_url, text_reply

SET_UP, ACCOUNTS, TOKENS, ACCOUNT = (
    f"/admin/{name}" for name in ("setup", "accounts", "tokens", "account")
)
MAY = {
    "viewer": "sees everything",
    "publisher": "also changes devices, projects and releases",
    "admin": "also manages accounts and tokens",
    DEVICE: "reads images, and the FUOTA files of its device",
}
_PASSWORD = {"type": "password", "required": True}
_NEW = {**_PASSWORD, "autocomplete": "new-password", "minlength": MIN_PASSWORD}
_EMAIL = {"type": "email", "required": True, "maxlength": 254, "autocomplete": "username"}
_LENGTH = f"At least {MIN_PASSWORD} characters; a sentence is good."


@dataclass(frozen=True, slots=True)
class PeoplePages:
    """The pages, and what they work on."""

    accounts: Accounts
    now: Callable[[], float] = time.time

    def table(self) -> tuple[Page, ...]:
        """Their rows."""
        return (
            Page(SIGN_IN, "", self.show_sign_in, self.sign_in),
            Page("/admin/sign-out", "viewer", None, self.sign_out, "viewer"),
            Page(SET_UP, "", self.show_set_up, self.set_up),
            Page(ACCOUNTS, "admin", self.show_accounts, self.change_accounts, "admin", "Accounts"),
            Page(TOKENS, "admin", self.show_tokens, self.change_tokens, "admin", "Tokens"),
            Page(ACCOUNT, "viewer", self.show_own, self.change_own, "viewer"),
        )

    # -- Signing in

    def show_sign_in(self, call: Call) -> Sheet | Reply | See:
        """GET sign-in."""
        there = own_path(call.given("next") or call.asked("next"))
        if self.accounts.setup_secret:
            return See(SET_UP)
        if call.actor is not NOBODY and call.request.method != "POST":
            return See(there)
        if call.request.headers.get("sec-fetch-site") == "cross-site" and not call.form:
            # A browser that follows a link of another server keeps the cookie back. It has it on
            # the way from here, where it may be signed in.
            return text_reply(
                200, f"Go on to {there}", ("Refresh", f"0; url={there}"), *SECURE, UNCACHED
            )
        fields = (
            field("E-mail address", "email", call.given("email"), autofocus=True, **_EMAIL),
            field("Password", "password", autocomplete="current-password", **_PASSWORD),
            hidden(next=there),
        )  # fmt: skip
        body = form(SIGN_IN, call.actor.csrf, *fields, submit="Sign in")
        return page("Sign in", card("", body, class_="card narrow"))

    def sign_in(self, call: Call) -> See:
        """POST sign-in."""
        email, password = call.given("email"), call.given("password")
        _, cookie = self.accounts.sign_in(call.request, email, password)
        return See(own_path(call.given("next")), headers=(("Set-Cookie", cookie),))

    def sign_out(self, call: Call) -> See:
        """POST sign-out."""
        cookie = self.accounts.sign_out(call.request)
        return See(SIGN_IN, "You are signed out.", (("Set-Cookie", cookie),))

    def show_set_up(self, call: Call) -> Sheet | See:
        """GET setup; the script takes the secret from behind the # of the URL."""
        if not self.accounts.setup_secret:
            return See(SIGN_IN)
        fields = (
            field("Secret", "secret", call.given("secret"), required=True, autocomplete="off",
                  spellcheck="false", data_fragment=True,
                  hint="Stands behind the # of the link in the server's log."),
            field("E-mail address", "email", call.given("email"), **_EMAIL),
            field("Password", "password", hint=_LENGTH, **_NEW),
        )  # fmt: skip
        words = tag("p", "Nobody has an account yet. Whoever can read the log makes the first one.")
        body = form(SET_UP, call.actor.csrf, *fields, submit="Make the first account")
        return page("Welcome", card("", words, body, class_="card narrow"))

    def set_up(self, call: Call) -> See:
        """POST setup; the new administrator is signed in."""
        email, password = call.given("email"), call.given("password")
        self.accounts.set_up(call.given("secret"), email, password)
        return self.sign_in(call)._replace(said="Welcome. This is your fleet.")

    # -- Accounts

    def show_accounts(self, call: Call) -> Sheet:
        """GET accounts."""
        rows = [self._account(call, each) for each in self.accounts.accounts()]
        fields = (
            field("E-mail address", "email", call.given("email"), **_EMAIL),
            field("Password", "password", hint=_LENGTH, **_NEW),
            _roles(call.given("role", "viewer"), ROLES),
        )
        new = form(
            ACCOUNTS, call.actor.csrf, *fields, button("Add", "main", name="do", value="open")
        )
        heads = "E-mail address", "Role", "Since", ""
        return page(
            "Accounts",
            card("", table(heads, rows, "Accounts")),
            card("Add an account", new),
        )

    def _account(self, call: Call, account: Account) -> tuple[Html, ...]:
        own = account.id == call.actor.account
        which = hidden(id=account.id)
        csrf = call.actor.csrf
        role = form(ACCOUNTS, csrf, which, _roles(account.role, ROLES),
                    button("Set role", name="do", value="role"))  # fmt: skip
        password = form(
            ACCOUNTS, csrf, which, _whose(account.email),
            field("New password", "password", hint="Ends the sessions of this account.", **_NEW),
            button("Set password", name="do", value="password"),
        )  # fmt: skip
        close = form(ACCOUNTS, csrf, which, check("Yes, take it away", "sure", required=True),
                     button("Take away", "danger", name="do", value="close"))  # fmt: skip
        changes = details("Change", role, None if own else password, close)
        you = badge("you", "good") if own else None
        return (
            join(account.email, " ", you),
            badge(account.role),
            when(account.created, self.now()),
            changes,
        )

    def change_accounts(self, call: Call) -> See:
        """POST accounts."""
        who, do = call.actor.name, call.given("do")
        if do == "open":
            email = call.given("email")
            self.accounts.open_account(email, call.given("password"), call.given("role"), who=who)
            return See(ACCOUNTS, f"Now {email.strip().lower()} may sign in.")
        account = read_number(call.given("id"))
        if do == "role":
            self.accounts.change_account(account, role=call.given("role"), who=who)
            return See(ACCOUNTS, "The role is set.")
        if do == "password":
            if account == call.actor.account:
                raise Refused(422, f"your own is changed on {ACCOUNT}, with the present one")
            self.accounts.change_account(account, call.given("password"), who=who)
            return See(ACCOUNTS, "The password is set, the sessions are over.")
        if do != "close":
            raise Refused(422, "the form does not say what to do")
        _be_sure(call)
        self.accounts.close_account(account, who=who)
        return See(ACCOUNTS, "The account is taken away.")

    # -- Tokens

    def show_tokens(self, call: Call) -> Sheet:
        """GET tokens."""
        return self._tokens(call, None)

    def _tokens(self, call: Call, fresh: Html | None) -> Sheet:
        rows = [self._token(call, each) for each in self.accounts.tokens()]
        projects = [("", "all projects"), *((each, each) for each in call.site.catalog.projects())]
        fields = (
            field("Name", "name", call.given("name"), required=True, maxlength=MAX_NAME,
                  hint="What it is for: the CI of the lamp."),
            _roles(call.given("role", "publisher"), (*ROLES, DEVICE)),
            choice("Project", "project", projects, call.given("project")),
            field("Device", "device", call.given("device"), maxlength=255,
                  hint="Its MAC address, if the token is for this one only."),
        )  # fmt: skip
        words = "For programs and devices: CI, scripts, a sketch. Each is shown once."
        heads = "Id", "Name", "Role", "Project", "Device", "Since", ""
        return page(
            "Tokens",
            tag("p", "Who is to be told of what happens: ", a("webhooks", "/admin/webhooks")),
            fresh,
            card("", table(heads, rows, "Tokens", "There is no token yet.")),
            card("Make a token", tag("p", words),
                 form(TOKENS, call.actor.csrf, *fields,
                      button("Make", "main", name="do", value="mint"))),
        )  # fmt: skip

    def _token(self, call: Call, token: Token) -> tuple[object, ...]:
        inner = form(
            TOKENS, call.actor.csrf, hidden(id=token.id),
            check("Yes, it opens nothing any more", "sure", required=True),
            button("Revoke", "danger", name="do", value="revoke"),
        )  # fmt: skip
        device = a(token.device, url("/admin/devices", token.device)) if token.device else ""
        since = when(token.created, self.now())
        where = token.project or "all"
        return (
            token.id,
            token.name,
            badge(token.role),
            where,
            device,
            since,
            details("Revoke", inner),
        )

    def change_tokens(self, call: Call) -> See | Sheet:
        """POST tokens. What is shown once cannot be told by the next page, so it is told here."""
        if call.given("do") == "mint":
            words = (call.given(each) for each in ("name", "role", "project", "device"))
            number, text = self.accounts.mint(*words, who=call.actor.name)
            line = f"curl -H 'Authorization: Bearer {text}' {base_url(call.request)}/api/v1/devices"
            api = call.given("role") in ROLES  # which devices have no use for
            fresh = card(
                f"Token {number}",
                note("Copy it now: nobody can tell it again.", kind="warn"),
                copied(text, "the token"),
                details("Try it", copied(line, "the command")) if api else None,
                role="status",
            )
            return self._tokens(call._replace(form={}), fresh)
        token = read_number(call.given("id"))
        _be_sure(call)
        self.accounts.revoke(token, who=call.actor.name)
        return See(TOKENS, f"Token {token} opens nothing any more.")

    # -- One's own account

    def show_own(self, call: Call) -> Sheet:
        """GET account."""
        role = call.actor.role
        words = tag(
            "p", "You are ", tag("b", call.actor.name), ", ", badge(role), f" who {MAY[role]}."
        )
        fields = (
            field("Present password", "old", autocomplete="current-password", **_PASSWORD),
            field("New password", "password", hint=_LENGTH, **_NEW),
        )
        change = form(
            ACCOUNT, call.actor.csrf, _whose(call.actor.name), *fields,
            button("Change it", "main", name="do", value="password"),
        )  # fmt: skip
        return page(
            "Your account",
            card("", words),
            card("Password", tag("p", "A new one ends all your other sessions."), change),
            card("Sessions", *self._sessions(call)),
        )

    def _sessions(self, call: Call) -> tuple[Html | None, ...]:
        now = self.now()
        found = self.accounts.sessions(call.request)
        rows = [
            (when(each.created, now), when(each.expires, now),
             badge("this browser", "good") if is_this else "")
            for each, is_this in found
        ]  # fmt: skip
        end = button("End the others", name="do", value="end")
        return (
            table(("Signed in", "Ends", "Which"), rows, "Your sessions"),
            form(ACCOUNT, call.actor.csrf, end) if len(found) > 1 else None,
        )

    def change_own(self, call: Call) -> See:
        """POST account. A session alone, of a browser left open, does not change a password."""
        if call.given("do") == "end":
            self.accounts.sign_out_others(call.request)
            return See(ACCOUNT, "The other sessions are over.")
        name, password = call.actor.name, call.given("password")
        try:
            self.accounts.sign_in(call.request, name, call.given("old"))
        except Refused as refused:
            if refused.status != 401:
                raise
            raise Refused(403, "the present password is wrong") from refused
        self.accounts.change_account(call.actor.account, password, who=name)
        _, cookie = self.accounts.sign_in(call.request, name, password)
        return See(ACCOUNT, "The password is changed.", (("Set-Cookie", cookie),))


def _roles(role: str, roles: tuple[str, ...]) -> Html:
    return choice("Role", "role", [(each, f"{each}: {MAY[each]}") for each in roles], role)


def _whose(email: str) -> Html:
    """What tells a browser that keeps passwords, of whom this one is."""
    return tag("input", type="text", name="email", value=email, autocomplete="username",
               hidden=True, readonly=True, aria_label="E-mail address")  # fmt: skip


def _be_sure(call: Call) -> None:
    """Refused: 422, the box was not ticked."""
    if not call.given("sure"):
        raise Refused(422, "tick the box to say that you are sure")
