"""A board that notes that it was restarted."""

import esp32  # type: ignore[import-not-found]  # the file beside this one, on a board


def reset() -> None:
    """Restarts the board, which here goes on."""
    esp32.EVENTS.append("reset")
