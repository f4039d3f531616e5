"""The rooms beside the core: what remembers the fleet, and what asks a server from outside.

They import ota_server, never the reverse, but for two doors there: `--state` and the commands.
"""

from __future__ import annotations

from ota_server import Site


def extend(site: Site) -> Site:
    """The site with a memory. ValueError: the folder of the fleet is not to be used."""
    return site
