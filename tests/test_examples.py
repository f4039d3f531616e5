"""The examples lead somewhere: what a user pastes asks for what the server has."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ota_server import Request, answer
from tests.conftest import put, running, site_of
from tests.data.make_images import (
    esp32_image,
    esp8266_image,
    gzip_image,
    littlefs_image,
    mongoose_zip,
    tasmota32_image,
    tasmota_image,
)
from tests.fleet.test_publish import shop

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVER = re.compile(r"http://(?:[^/@\s]+@)?192\.168\.1\.5:8000(/[^\s\"'`?<>]*)")


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    """A folder with the projects that the examples name."""
    folder = tmp_path / "firmware"
    put(folder / "firmware-1.1.0.bin", esp8266_image("firmware", "1.1.0"))
    put(folder / "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0"))
    put(folder / "lamp-1.1.0.zip", mongoose_zip("lamp", "1.1.0"))
    put(folder / "tasmota-14.2.0.bin.gz", gzip_image(tasmota_image("14.2.0")))
    put(folder / "tasmota32-14.2.0.bin", tasmota32_image("14.2.0"))
    return folder


def texts() -> list[Path]:
    """The examples, without the images."""
    return sorted(
        path
        for path in EXAMPLES.rglob("*")
        if path.is_file() and path.suffix not in {".bin", ".pyc"}
    )


def test_every_url_in_the_examples_is_answered(firmware: Path) -> None:
    site, asked = site_of(firmware), set()
    for path in texts():
        for url in SERVER.findall(path.read_text()):
            asked.add(url)
            version = {"lamp": ("x-mgos-fw-version", "esp32 1.0.0 1")}.get(url[1:], ("", ""))
            request = Request("GET", url, "version=1.0.0", dict([version]), "127.0.0.1")
            reply = answer(site, request)
            if not isinstance(reply.body, bytes):
                reply.body.file.close()
            assert (path.name, url, reply.status) == (path.name, url, 200)
    assert {"/sensor/latest.bin", "/sensor/manifest.json", "/lamp", "/tasmota.bin.gz"} <= asked


def program(name: str) -> str:
    """A program of the test extra, or one that the system has."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"the program {name} is not installed")
    return found


def test_shellcheck_has_nothing_to_say_about_the_script() -> None:
    shellcheck = program("shellcheck")
    subprocess.run([shellcheck, "--severity=style", str(EXAMPLES / "curl.sh")], check=True)


@pytest.mark.parametrize("token", ["", "T0ken"])
def test_the_script_downloads_and_checks(firmware: Path, tmp_path: Path, token: str) -> None:
    program("curl")
    file, image = "sensor-1.1.0.bin", esp32_image("sensor", "1.1.0")
    with running(site_of(firmware, token=token)) as server:
        environment = {
            "PATH": "/usr/bin:/bin",
            "SERVER": f"http://127.0.0.1:{server.server_address[1]}",
            "PROJECT": "sensor",
            "TOKEN": token,
        }
        for here in (0, 100, None):  # bytes of an earlier try; None: the whole file
            if here is not None:
                (tmp_path / file).write_bytes(image[:here])
            done = subprocess.run(
                ["sh", str(EXAMPLES / "curl.sh")],
                cwd=tmp_path,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            assert f"{file}: OK" in done.stdout
            assert '"latest":"1.1.0"' in done.stdout.replace(" ", "")
            assert (tmp_path / file).read_bytes() == image


# -- What publishes --------------------------------------------------------------------------------

WORKFLOW = EXAMPLES / "github-actions" / "publish.yml"
SETTINGS = EXAMPLES / "platformio" / "platformio.ini"

# What PlatformIO does around the script, in SCons itself, after docs.platformio.org/en/latest/
# scripting/custom_targets.html and platformio/builder/tools/piotarget.py, pioproject.py.
CONSTRUCTION = """
import json, os

env = Environment(ENV=os.environ, tools=[], BUILD_DIR=".pio/build/esp32", PROGNAME="firmware")
options = json.load(open("options.json"))

def AddCustomTarget(env, name, dependencies, actions, title=None, description=None):
    AlwaysBuild(env.Alias(name, dependencies, actions))

env.AddMethod(AddCustomTarget)
env.AddMethod(lambda env, option: options[option], "GetProjectOption")
env.Command("$BUILD_DIR/${PROGNAME}.bin", "main.bin", Copy("$TARGET", "$SOURCE"))
env.SConscript("publish.py", exports="env")
"""


def options_of(settings: Path, environment: str) -> dict[str, str]:
    """The options of an environment in platformio.ini, with ${section.option} put in."""
    sections = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("  ;",))
    sections.read(settings)

    def put_in(found: re.Match[str]) -> str:
        return sections[found[1]][found[2]]

    both = {**sections["env"], **sections[f"env:{environment}"]}
    return {name: re.sub(r"\$\{(\w+)\.(\w+)\}", put_in, text) for name, text in both.items()}


@dataclass(frozen=True, slots=True)
class Project:
    """A folder with the example of PlatformIO, whose compiler copies main.bin."""

    folder: Path

    def build(self, to: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the target."""
        options = {**options_of(SETTINGS, "esp32"), "custom_ota_to": to}
        (self.folder / "options.json").write_text(json.dumps(options))
        return subprocess.run(
            [sys.executable, "-m", "SCons", "publish"],
            cwd=self.folder,
            env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The example with a sketch and, from an earlier build, a file system."""
    pytest.importorskip("SCons")
    folder = tmp_path / "sketch"
    put(folder / "SConstruct", CONSTRUCTION.encode())
    put(folder / "publish.py", (EXAMPLES / "platformio" / "publish.py").read_bytes())
    put(folder / "main.bin", esp32_image("sensor-esp32", "1.0.0"))
    put(folder / ".pio/build/esp32/littlefs.bin", littlefs_image())
    return Project(folder)


def test_platformio_publishes_into_a_folder(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    done = project.build(str(folder))
    assert (done.returncode, done.stdout.count("is published at")) == (0, 2)
    names = ["sensor-esp32-1.0.0.bin", "sensor-esp32-1.0.0.littlefs.bin"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / names[0]).read_bytes() == (project.folder / "main.bin").read_bytes()


def test_platformio_says_why_it_did_not_publish(project: Project, tmp_path: Path) -> None:
    done = project.build(str(tmp_path / "nowhere"))
    assert (done.returncode, "No such file or directory" in done.stdout) == (2, True)
    assert "Traceback" not in done.stdout + done.stderr


def test_platformio_publishes_at_a_server(project: Project, shelf: Path) -> None:
    with shop(shelf) as made:
        made.ask("PUT", "/projects/sensor-esp32", {})
        token = made.token()
        for _ in range(2):
            done = project.build(made.url, OTA_UPLOAD_TOKEN=token)
            assert (done.returncode, done.stdout.count("is published at")) == (0, 2)
        names = {each["name"] for each in made.releases("sensor-esp32")}
        assert names == {"sensor-esp32-1.0.0.bin", "sensor-esp32-1.0.0.littlefs.bin"}
        done = project.build(made.url)
        assert (done.returncode, "1.0.0.bin is not published at" in done.stdout) == (2, True)
        assert re.search(r": 401 .*token", done.stdout)
        done = project.build("http://127.0.0.1:1", OTA_UPLOAD_TOKEN=token)
        assert (done.returncode, "Connection refused" in done.stdout) == (2, True)


def steps() -> dict[str, dict[str, Any]]:
    """The steps of the workflow that have a name."""
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    jobs = yaml.load(WORKFLOW)["jobs"]
    return {step["name"]: step for step in jobs["publish"]["steps"] if "name" in step}


def test_the_workflow_is_one() -> None:
    check = program("check-jsonschema")
    command = [check, "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    subprocess.run(command, check=True)


def test_shellcheck_has_nothing_to_say_about_the_workflow() -> None:
    shellcheck = program("shellcheck")
    for step in steps().values():
        command = [shellcheck, "--shell=bash", "--severity=style", "-"]
        subprocess.run(command, input=step["run"], text=True, check=True)


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a step as GitHub does: docs.github.com, workflow syntax, jobs.<id>.steps[*].shell."""
    (folder / "step").write_text(script)
    return subprocess.run(
        ["bash", "-e", "step"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("tag", "status"), [("v1.0.0", 0), ("v1.0.1", 1)])
def test_the_workflow_takes_only_the_tag_of_what_is_built(
    tag: str, status: int, tmp_path: Path
) -> None:
    shutil.copy(SETTINGS, tmp_path)
    step = steps()["The tag is the version that is built"]["run"]
    assert bash(step, tmp_path, GITHUB_REF_NAME=tag).returncode == status


def test_the_workflow_publishes(tmp_path: Path, shelf: Path) -> None:
    program("curl")
    step = steps()["Publish"]
    put(tmp_path / step["env"]["FILE"], esp32_image("sensor-esp32", "1.0.0"))
    with shop(shelf) as made:
        made.ask("PUT", "/projects/sensor-esp32", {})
        given = {**step["env"], "GITHUB_REF_NAME": "v1.0.0", "OTA_URL": made.url}
        token = made.token(project="sensor-esp32")
        for _ in range(2):
            done = bash(step["run"], tmp_path, **{**given, "OTA_UPLOAD_TOKEN": token})
            assert (done.returncode, token in done.stdout + done.stderr) == (0, False)
        (release,) = made.releases("sensor-esp32")
        done = bash(step["run"], tmp_path, **{**given, "OTA_UPLOAD_TOKEN": "other"})
        assert (done.returncode, '"status": 401' in done.stdout) == (22, True)
    assert (release["version"], release["name"]) == ("1.0.0", "sensor-esp32-1.0.0.bin")
