"""The target `publish` for platformio.ini: brings what was built to the server.

`custom_ota_to` is the URL of a server with --state, which wants a token in OTA_UPLOAD_TOKEN, or a
folder that a server reads. There a file gets its name last, so that no half one is ever seen. A
server's own certificate is trusted if SSL_CERT_FILE names it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

Import("env")  # noqa: F821 - SCons puts it and env there


def upload(file, server, project, version):
    """Sends the file; the same one again does no harm."""
    image = file.read_bytes()
    fields = {
        "Authorization": "Bearer " + os.environ.get("OTA_UPLOAD_TOKEN", "").strip(),
        "Content-Type": "application/octet-stream",
        "x-MD5": hashlib.md5(image).hexdigest(),  # noqa: S324 - for damage on the way
    }
    url = f"{server.rstrip('/')}/api/v1/projects/{quote(project)}/releases/{quote(version)}"
    request = Request(url, image, fields, method="PUT")  # noqa: S310 - the URL is the user's
    try:
        urlopen(request, timeout=60).close()  # noqa: S310
    except HTTPError as err:
        said = err.read().decode("utf-8", "replace")
        if err.headers.get_content_type() == "application/problem+json":
            said = json.loads(said)["detail"]
        raise OSError(f"{err.code} {said}") from err


def copy(file, folder, name):
    """Copies the file."""
    shutil.copy(file, Path(folder, f".{name}"))
    Path(folder, f".{name}").rename(Path(folder, name))


def publish(target, source, env):
    """Publishes firmware.bin, and the file system if there is one; 1: it cannot."""
    options = (f"custom_ota_{name}" for name in ("to", "project", "version"))
    to, project, version = map(env.GetProjectOption, options)
    built = Path(env.subst("$BUILD_DIR"))
    for file, ending in (("firmware.bin", ".bin"), ("littlefs.bin", ".littlefs.bin")):
        if not (built / file).exists():
            continue
        name = f"{project}-{version}{ending}"
        try:
            if to.startswith(("http://", "https://")):
                upload(built / file, to, project, version)
            else:
                copy(built / file, to, name)
        except OSError as err:  # of which URLError is one
            print(f"{name} is not published at {to}: {err}")
            return 1
        print(f"{name} is published at {to}")
    return 0


env.AddCustomTarget("publish", "$BUILD_DIR/${PROGNAME}.bin", publish, "Publish")  # noqa: F821
