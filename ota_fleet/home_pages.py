"""The overview: every project, which of its devices are up to date, and which need a look."""

from __future__ import annotations

from dataclasses import dataclass

from ota_fleet.html import Sheet, bars, card, page
from ota_fleet.pages import HOME, Call, Page
from ota_fleet.registry import Registry
from ota_fleet.stock import Stock


@dataclass(frozen=True, slots=True)
class HomePages:
    """The page, and what it looks at."""

    registry: Registry
    stock: Stock

    def table(self) -> tuple[Page, ...]:
        """Its row."""
        return (Page(HOME, "viewer", self.show, link="Overview"),)

    def show(self, _call: Call) -> Sheet:
        """GET the overview."""
        return page("Overview", *(card(each, bars([], each)) for each in self.stock.projects()))
