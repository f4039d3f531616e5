"""What Home Assistant is told: an update entity for each device, by MQTT discovery. Pure.

    device -> node_of() -> the topics of its entity: config, state, install
    device -> config_of(), state_of() -> what is retained there

It drops a state of which one key is null or unknown, and keeps of the one before what a new one
leaves out (homeassistant/components/mqtt/update.py, MQTT_JSON_UPDATE_SCHEMA): texts are empty here,
versions that nobody knows are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ota_fleet.broker import Broker
from ota_fleet.html import url
from ota_fleet.rows import Device, clean, is_mac
from ota_server import Release, __version__

ONLINE, OFFLINE = b"online", b"offline"
INSTALL = b"INSTALL"
MAX_SUMMARY = 255  # characters
Progress = tuple[int, int]  # bytes that have left, and all


def node_of(broker: Broker, device: str) -> str:
    """What a device is called in topics, which take letters, digits, _ and - here."""
    node = device.replace(":", "").lower() if is_mac(device) else device
    if re.search("[^a-zA-Z0-9_-]", node):  # another one's may differ only in what is no letter
        digest = hashlib.sha256(device.encode()).hexdigest()
        node = f"{re.sub('[^a-zA-Z0-9_-]', '_', node[:32])}_{digest[:8]}"
    return f"{_word(broker)}_{node}"


def _word(broker: Broker) -> str:
    """The prefix, where no slash can stand."""
    return re.sub("[^a-zA-Z0-9_-]", "_", broker.prefix)


def status_topic(broker: Broker) -> str:
    """Where it is said whether this server is there."""
    return f"{broker.prefix}/server/status"


def config_topic(broker: Broker, node: str) -> str:
    """Where Home Assistant finds the entity."""
    return f"{broker.discovery}/update/{node}/firmware/config"


def state_topic(broker: Broker, node: str) -> str:
    """Where the state of the entity is."""
    return f"{broker.prefix}/device/{node}/update"


def install_topic(broker: Broker, node: str) -> str:
    """Where Home Assistant says that somebody pressed Install."""
    return f"{broker.prefix}/device/{node}/install"


def config_of(broker: Broker, device: Device, server: str) -> bytes:
    """The entity and its device; `server` is the URL that this server has, without a slash."""
    node = node_of(broker, device.id)
    return _json({
        "name": None,  # as the device is called
        "unique_id": f"{node}_firmware",
        "device_class": "firmware",
        "entity_category": "config",
        "state_topic": state_topic(broker, node),
        "command_topic": install_topic(broker, node),
        "payload_install": INSTALL.decode(),
        "availability_topic": status_topic(broker),
        "qos": 1,
        "device": _device(node, device, server),
        "origin": {"name": "ota-server", "sw_version": __version__},
    })  # fmt: skip


def _device(node: str, device: Device, server: str) -> dict[str, Any]:
    mac = is_mac(device.id)
    found: dict[str, Any] = {
        "identifiers": [node],
        "name": f"{device.project or 'device'} {node[-6:]}" if mac else device.id,
        "configuration_url": server + url("/admin/devices", device.id),
    }
    if mac:  # what others know of the same device stands on one page with this
        found["connections"] = [["mac", device.id.lower()]]
    known = {"model": device.chip, "sw_version": device.version}
    return found | {name: text for name, text in known.items() if text}


def state_of(
    device: Device, release: Release | None, progress: Progress | None, server: str
) -> bytes:
    """What the device runs, and what it could run: `release`, if it is not what it runs."""
    latest = str(release.version) if release else device.version
    found: dict[str, Any] = {
        "title": device.project,
        "release_summary": clean(release.notes, MAX_SUMMARY) if release else "",
        "in_progress": progress is not None,
        "update_percentage": None,
    }
    if progress:
        sent, size = progress
        found["update_percentage"] = min(100, 100 * sent // max(size, 1))
    if release:
        path = url("/admin/projects", release.project, "releases", latest)
        found["release_url"] = server + path
    versions = {"installed_version": device.version, "latest_version": latest}
    return _json(found | {name: text for name, text in versions.items() if text})


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
