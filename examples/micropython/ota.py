"""Keeps an ESP32 with MicroPython up to date from ota-server.

Copy this file to the board, beside main.py. There, once the network is up:

    import ota

    ota.confirm()  # this firmware works: the boot loader does not go back to the one before
    ota.check()  # installs what is newer and restarts

To publish: build MicroPython with your code frozen in, and copy the application image to the
firmware folder of the server as <project>-<version>.bin. That is micropython.bin from the build
folder; firmware.bin has the boot loader in it and is refused. The board needs a partition table
with two app partitions (the variant "OTA").

With https:// the connection is encrypted, but `requests` does not check the certificate.
"""

import hashlib

import machine
import network
import requests
from esp32 import Partition

URL = "http://192.168.1.5:8000/sensor/latest.bin"  # the address of the server, your project
VERSION = "1.0.0"  # what this firmware is: the same as in the name of its file
TOKEN = ""  # when the server wants one

BLOCK = 4096  # bytes: what a flash page is erased in


def check(url=URL, version=VERSION):
    """Installs a newer firmware and restarts; returns when there is none."""
    if install(url, version):
        print("restarting into the new firmware")
        machine.reset()


def confirm():
    """Keeps this firmware. Without it the boot loader goes back to the last one at a restart."""
    Partition.mark_app_valid_cancel_rollback()


def install(url=URL, version=VERSION):
    """True when a newer firmware starts next. Raises ValueError when it must not."""
    answer = requests.get(f"{url}?version={version}", headers=_headers(), timeout=30)
    try:
        if answer.status_code == 304:
            print("no update for", version)
            return False
        if answer.status_code != 200:
            raise ValueError(f"the server says {answer.status_code}")
        size = int(answer.headers.get("Content-Length") or 0)
        expected = answer.headers.get("x-SHA256")
        target = Partition(Partition.RUNNING).get_next_update()
        if not 0 < size <= target.info()[3]:
            raise ValueError(f"{size} bytes do not fit")
        digest = _write(target, answer.raw, size)
    finally:
        answer.close()
    if digest != (expected or _fetch_digest(url)):
        raise ValueError("the download is damaged")
    target.set_boot()  # the boot loader checks the image once more
    return True


def _headers():
    mac = network.WLAN(network.STA_IF).config("mac")
    headers = {"x-ESP32-STA-MAC": ":".join(f"{byte:02X}" for byte in mac)}
    if TOKEN:
        headers["Authorization"] = "Bearer " + TOKEN
    return headers


def _fetch_digest(url):
    """The SHA-256 from the file beside the image, for a server or proxy that sends no x-SHA256."""
    answer = requests.get(url + ".sha256", headers=_headers(), timeout=30)
    try:
        return answer.text.split()[0] if answer.status_code == 200 else ""
    finally:
        answer.close()


def _write(target, stream, size):
    """Writes the image block by block; never more than one block is in memory."""
    digest = hashlib.sha256()
    buffer = bytearray(BLOCK)
    for number in range((size + BLOCK - 1) // BLOCK):
        count = min(BLOCK, size - number * BLOCK)
        _fill(buffer, stream, count)
        if number == 0:
            _check_chip(buffer)
        digest.update(memoryview(buffer)[:count])
        for index in range(count, BLOCK):
            buffer[index] = 0xFF
        target.writeblocks(number, buffer)
    return "".join(f"{byte:02x}" for byte in digest.digest())


def _fill(buffer, stream, count):
    """Reads exactly that many bytes into the buffer."""
    at = 0
    while at < count:
        data = stream.read(count - at)
        if not data:
            raise ValueError("the connection broke")
        buffer[at : at + len(data)] = data
        at += len(data)


def _check_chip(first):
    """Raises ValueError unless the image is for the chip that the running one is for."""
    running = bytearray(16)
    Partition(Partition.RUNNING).readblocks(0, running, 0)
    if first[0] != 0xE9 or first[12:14] != running[12:14]:
        raise ValueError("an image for another chip")
