"""The target `publish` for platformio.ini: copies what was built to the server's folder.

It copies under another name first and then renames, so that the server never sees half a file.
"""

import shutil
from pathlib import Path

Import("env")  # noqa: F821 - SCons puts it and env there


def publish(target, source, env):
    """Copies firmware.bin, and the file system if there is one."""
    folder = Path(env.GetProjectOption("custom_ota_folder"))
    name = "{}-{}".format(*map(env.GetProjectOption, ("custom_ota_project", "custom_ota_version")))
    built = Path(env.subst("$BUILD_DIR"))
    for file, ending in (("firmware.bin", ".bin"), ("littlefs.bin", ".littlefs.bin")):
        if (built / file).exists():
            shutil.copy(built / file, folder / f".{name}{ending}")
            (folder / f".{name}{ending}").rename(folder / (name + ending))
            print(f"published {folder / (name + ending)}")


env.AddCustomTarget("publish", "$BUILD_DIR/${PROGNAME}.bin", publish, "Publish")  # noqa: F821
