"""All parts, one after the other, with the same options: `python -m bench`."""

from __future__ import annotations

import sys

from bench import checks, cost, downloads, fleet, open_loop, slow, tls

PARTS = (checks.main, downloads.main, slow.main, cost.main, open_loop.main, tls.main, fleet.main)


def main() -> int:
    """The exit status: 1 if a goal of some part is not met."""
    return max([part() for part in PARTS])


if __name__ == "__main__":
    sys.exit(main())
