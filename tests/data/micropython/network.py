"""A board's network: only its address is asked for."""

STA_IF = 0


class WLAN:
    """The station."""

    def __init__(self, interface: int) -> None:
        assert interface == STA_IF

    def config(self, name: str) -> bytes:
        """The MAC."""
        assert name == "mac"
        return b"\x24\x6f\x28\xaa\xbb\xcc"
