"""Two app partitions: the `esp32` module of MicroPython, in memory. Source: esp32_partition.c."""

import hashlib

SIZE = 64 * 1024
RUNNING_IMAGE = bytearray(b"\xe9" + bytes(15))  # the header of what runs; bytes 12 and 13: the chip
NEXT = bytearray(b"\x55" * SIZE)
EVENTS: list[str] = []


class Partition:
    """The running one, or the one that is written next."""

    RUNNING = 1

    def __init__(self, which: int) -> None:
        self._which = which

    def get_next_update(self) -> "Partition":
        """The app partition that does not run."""
        return Partition(0)

    def info(self) -> tuple[int, int, int, int, str, bool]:
        """Type, subtype, address, size, label, encrypted."""
        return (0, 16, 0x10000, SIZE, "ota_1", False)

    def readblocks(self, number: int, buffer: bytearray, offset: int) -> None:
        """Fills the buffer from there."""
        at = number * 4096 + offset
        source = RUNNING_IMAGE if self._which else NEXT
        buffer[:] = source[at : at + len(buffer)]

    def writeblocks(self, number: int, buffer: bytearray) -> None:
        """Erases one block and writes it."""
        assert not self._which, "the running partition"
        assert len(buffer) == 4096, "not one block"
        NEXT[number * 4096 : number * 4096 + 4096] = buffer
        EVENTS.append(f"write {number}")

    def set_boot(self) -> None:
        """The boot loader starts this one next."""
        EVENTS.append("boot")

    @classmethod
    def mark_app_valid_cancel_rollback(cls) -> None:
        """What runs is kept."""
        EVENTS.append("valid")


def digest(size: int) -> str:
    """The SHA-256 of so many bytes of the written partition."""
    return "".join(f"{byte:02x}" for byte in hashlib.sha256(bytes(NEXT[:size])).digest())
