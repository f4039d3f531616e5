"""install.sh, really run: into a DESTDIR, which needs neither root nor systemd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "install.sh"
PROGRAM = "opt/ota-server/ota_server.py"
UNIT = "etc/systemd/system/ota-server.service"
SOCKET = "etc/systemd/system/ota-server.socket"
SETTINGS = "etc/default/ota-server"
FIRMWARE = "srv/firmware"
PACKAGE = (*(ROOT / "ota_fleet").glob("*.py"), *(ROOT / "ota_fleet/static").iterdir())
FLEET = {f"opt/ota-server/{path.relative_to(ROOT)}" for path in PACKAGE}
INSTALLED = {PROGRAM, UNIT, SOCKET, SETTINGS} | FLEET


def install(
    destination: Path,
    *options: str,
    script: Path = SCRIPT,
    cwd: Path = ROOT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Return the finished run of install.sh below `destination`, whatever its exit status."""
    settings = {"DESTDIR": str(destination), "PYTHON": sys.executable, **environment}
    return run(["sh", str(script), *options], cwd=cwd, env=os.environ | settings)


def run(
    command: list[str], *, cwd: Path = ROOT, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Return a finished program with what it printed as text."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def program(name: str) -> str:
    """Return the path of a program, or skip the test and name it."""
    beside_python = Path(sys.executable).parent / name  # a virtual environment that is not active
    found = shutil.which(name) or shutil.which(str(beside_python))
    if found is None:
        pytest.skip(f"the program {name} is missing")
    return found


def files_below(folder: Path) -> set[str]:
    """Return every file below a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def mode(path: Path) -> int:
    """Return the permission bits of a file or folder, set-group-id included."""
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "busybox"])
def test_every_shell_can_parse_the_script(shell: str) -> None:
    """The shebang says sh: dash on Debian, bash or busybox elsewhere."""
    applet = ["sh"] if shell == "busybox" else []
    assert run([program(shell), *applet, "-n", str(SCRIPT)]).stderr == ""


def test_shellcheck_has_nothing_to_say() -> None:
    """Warnings, hints and style remarks count."""
    done = run([program("shellcheck"), "--shell=sh", "--severity=style", str(SCRIPT)])
    assert (done.returncode, done.stdout) == (0, "")


def test_script_can_be_started_by_its_name() -> None:
    """`./install.sh` needs the executable bit in the checkout."""
    assert os.access(SCRIPT, os.X_OK)


def test_installs_program_unit_settings_and_firmware_folder(tmp_path: Path) -> None:
    """Nothing else is left behind, no temporary name either."""
    done = install(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert files_below(tmp_path) == INSTALLED
    assert (tmp_path / SOCKET).read_bytes() == (ROOT / "ota-server.socket").read_bytes()
    assert (tmp_path / PROGRAM).read_bytes() == (ROOT / "ota_server.py").read_bytes()
    assert (tmp_path / FIRMWARE).is_dir()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PROGRAM, 0o644),
        (UNIT, 0o644),
        (SOCKET, 0o644),
        (SETTINGS, 0o640),
        (FIRMWARE, 0o2755),
        ("opt", 0o755),
    ],
)
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, path: str, expected: int) -> None:
    """A strict umask of the caller would hide the program from the service."""
    shell = f"umask 077; exec sh {SCRIPT}"
    environment = os.environ | {"DESTDIR": str(tmp_path / "root"), "PYTHON": sys.executable}
    assert run(["sh", "-c", shell], env=environment).returncode == 0
    assert mode(tmp_path / "root" / path) == expected


def test_second_install_keeps_edited_settings_and_firmware(tmp_path: Path) -> None:
    """An upgrade replaces program and unit only."""
    install(tmp_path)
    (tmp_path / SETTINGS).write_text("OTA_PORT=9000\n")
    (tmp_path / FIRMWARE / "sensor-1.0.0.bin").write_bytes(b"\xe9")
    (tmp_path / FIRMWARE).chmod(0o700)
    (tmp_path / PROGRAM).write_text("old")
    (tmp_path / UNIT).write_text("old")
    (tmp_path / SOCKET).write_text("old")
    assert install(tmp_path).returncode == 0
    assert (tmp_path / SETTINGS).read_text() == "OTA_PORT=9000\n"
    assert files_below(tmp_path) == INSTALLED | {f"{FIRMWARE}/sensor-1.0.0.bin"}
    assert mode(tmp_path / FIRMWARE) == 0o700
    assert (tmp_path / PROGRAM).read_bytes() == (ROOT / "ota_server.py").read_bytes()
    assert "ExecStart=" in (tmp_path / UNIT).read_text()
    assert "ListenStream=" in (tmp_path / SOCKET).read_text()


def test_upgrade_replaces_the_program_instead_of_writing_into_it(tmp_path: Path) -> None:
    """Whoever holds the old file open keeps it whole."""
    install(tmp_path)
    with (tmp_path / PROGRAM).open("rb") as old:
        install(tmp_path)
        assert os.fstat(old.fileno()).st_nlink == 0
        assert old.read() == (ROOT / "ota_server.py").read_bytes()


def test_works_from_another_folder(tmp_path: Path) -> None:
    """The sources are found beside the script, a relative DESTDIR below the caller."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    assert install(Path("root"), cwd=elsewhere).returncode == 0
    assert (elsewhere / "root" / PROGRAM).is_file()


def test_unit_runs_the_interpreter_that_was_named(tmp_path: Path) -> None:
    """PYTHON= is the way out on a system whose python3 is too old."""
    install(tmp_path)
    assert f"\nExecStart={sys.executable} -I /opt/" in (tmp_path / UNIT).read_text()


def test_uninstall_keeps_firmware_and_settings_and_says_so(tmp_path: Path) -> None:
    """Firmware may exist nowhere else."""
    install(tmp_path)
    (tmp_path / FIRMWARE / "sensor-1.0.0.bin").write_bytes(b"\xe9")
    done = install(tmp_path, "--uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert files_below(tmp_path) == {SETTINGS, f"{FIRMWARE}/sensor-1.0.0.bin"}
    assert not (tmp_path / PROGRAM).parent.exists()
    assert re.search(r"Kept: firmware in .*/srv/firmware and settings in .*", done.stdout)


def test_uninstall_leaves_foreign_files_beside_the_program(tmp_path: Path) -> None:
    """Only what was installed goes."""
    install(tmp_path)
    (tmp_path / PROGRAM).with_name("cert.pem").write_text("")
    assert install(tmp_path, "--uninstall").returncode == 0
    assert "opt/ota-server/cert.pem" in files_below(tmp_path)


@pytest.mark.parametrize("option", ["--uninstall", "--purge"])
def test_uninstall_of_nothing_succeeds(tmp_path: Path, option: str) -> None:
    """Running it twice is safe as well."""
    done = install(tmp_path, option)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Removed" not in done.stdout
    assert files_below(tmp_path) == set()


def test_purge_removes_firmware_settings_and_changes_and_names_them(tmp_path: Path) -> None:
    """What `systemctl edit` made is a setting, too."""
    install(tmp_path)
    for name in ("sensor-1.0.0.bin", "lamp/lamp-1.0.0.bin"):
        (tmp_path / FIRMWARE / name).parent.mkdir(exist_ok=True)
        (tmp_path / FIRMWARE / name).write_bytes(b"\xe9")
    for unit in (UNIT, SOCKET):
        (tmp_path / f"{unit}.d").mkdir()
        (tmp_path / f"{unit}.d" / "override.conf").write_text("")
    done = install(tmp_path, "--purge")
    assert (done.returncode, done.stderr) == (0, "")
    assert files_below(tmp_path) == set()
    assert not (tmp_path / FIRMWARE).exists()
    assert done.stdout.splitlines() == [
        "ota-server is removed.",
        f"Removed: 2 files of firmware in {tmp_path}/{FIRMWARE}",
        f"Removed: settings in {tmp_path}/{SETTINGS}",
        f"Removed: changes to the service in {tmp_path}/{UNIT}.d",
        f"Removed: changes to the socket in {tmp_path}/{SOCKET}.d",
    ]


def test_purge_keeps_firmware_that_lies_elsewhere(tmp_path: Path) -> None:
    """Only what the script has made goes; a link is removed, not what it leads to."""
    install(tmp_path)
    elsewhere = tmp_path / "home/pi/firmware"
    elsewhere.mkdir(parents=True)
    (elsewhere / "sensor-1.0.0.bin").write_bytes(b"\xe9")
    (tmp_path / FIRMWARE).rmdir()
    (tmp_path / FIRMWARE).symlink_to(elsewhere)
    (tmp_path / SETTINGS).write_text('OTA_DIR="/home/pi/firmware"\n')
    done = install(tmp_path, "--purge")
    assert files_below(tmp_path) == {"home/pi/firmware/sensor-1.0.0.bin"}
    assert not (tmp_path / FIRMWARE).is_symlink()
    assert done.stdout.splitlines()[-1] == "Kept: /home/pi/firmware, which OTA_DIR named."


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an ota_fleet/ that holds more than the server needs; its install.sh."""
    folder = tmp_path / "checkout"
    for name in ("__pycache__", "static"):
        (folder / "ota_fleet" / name).mkdir(parents=True)
    for name in ("install.sh", "ota_server.py", "ota-server.service", "ota-server.socket"):
        shutil.copy(ROOT / name, folder)
    others = "notes.txt", "__pycache__/doctor.pyc", "static/notes.txt"
    for name in ("__init__.py", "doctor.py", "static/admin.css", "static/admin.js", *others):
        (folder / "ota_fleet" / name).write_text("")
    return folder / "install.sh"


def fleet_below(folder: Path) -> set[str]:
    """What is installed of ota_fleet/."""
    return {Path(name).name for name in files_below(folder) if "ota_fleet" in name}


def test_fleet_is_installed_as_far_as_it_is_needed_and_renewed(
    tmp_path: Path, checkout: Path
) -> None:
    """What an upgrade no longer has must not stay importable."""
    root = tmp_path / "root"
    assert install(root, script=checkout).returncode == 0
    assert fleet_below(root) == {"__init__.py", "doctor.py", "admin.css", "admin.js"}
    assert mode(root / "opt/ota-server/ota_fleet/static/admin.css") == 0o644
    assert mode(root / "opt/ota-server/ota_fleet/doctor.py") == 0o644
    (checkout.parent / "ota_fleet/doctor.py").rename(checkout.parent / "ota_fleet/surgeon.py")
    (checkout.parent / "ota_fleet/static/admin.js").unlink()
    assert install(root, script=checkout).returncode == 0
    assert fleet_below(root) == {"__init__.py", "surgeon.py", "admin.css"}


def test_without_the_fleet_the_script_alone_is_installed(tmp_path: Path, checkout: Path) -> None:
    """One copied file is enough for the server."""
    shutil.rmtree(checkout.parent / "ota_fleet")
    done = install(tmp_path / "root", script=checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert files_below(tmp_path / "root") == {PROGRAM, UNIT, SOCKET, SETTINGS}


def test_uninstall_takes_the_fleet_and_what_python_made_of_it(
    tmp_path: Path, checkout: Path
) -> None:
    """Root who called a command has left compiled files there."""
    root = tmp_path / "root"
    install(root, script=checkout)
    compiled = root / "opt/ota-server/ota_fleet/__pycache__"
    compiled.mkdir()
    (compiled / "doctor.cpython-311.pyc").write_text("")
    assert install(root, "--uninstall", script=checkout).returncode == 0
    assert not (root / "opt/ota-server").exists()


@pytest.mark.parametrize(
    "options", [["--frobnicate"], ["firmware"], ["--uninstall", "now"]], ids=" ".join
)
def test_unknown_option_shows_usage_and_exits_2(tmp_path: Path, options: list[str]) -> None:
    """Nothing is installed by a typing error."""
    done = install(tmp_path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: sudo ./install.sh" in done.stderr
    assert files_below(tmp_path) == set()


def test_help_names_every_option_and_place(tmp_path: Path) -> None:
    """--help goes to standard output and changes nothing."""
    done = install(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    words = ("--uninstall", "--purge", "--help", "DESTDIR")
    for word in (*words, f"/{PROGRAM}", f"/{UNIT}", f"/{SOCKET}", f"/{SETTINGS}"):
        assert word in done.stdout
    assert files_below(tmp_path) == set()


def test_without_root_it_says_how_to_call_it() -> None:
    """The script comes on standard input: nobody may not read a private checkout."""
    command = ["sh", "-s"]
    if os.geteuid() == 0:
        command = [program("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", *command]
    environment = {key: value for key, value in os.environ.items() if key != "DESTDIR"}
    done = run(command, cwd=Path("/"), env=environment, stdin=SCRIPT.read_text())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "install.sh: must run as root; try: sudo ./install.sh\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 3.9.2; exit 1", r"needs Python 3\.11 or newer, but .*/python3 is 3\.9\.2;"),
        ("exit 1", r"but .*/python3 is not a Python;"),
        (None, r"no python3 at .*/python3; install Python 3\.11 or newer"),
    ],
    ids=["too old", "broken", "missing"],
)
def test_unusable_python_is_named(tmp_path: Path, body: str | None, reason: str) -> None:
    """The first line a person reads tells what is wrong and what to do."""
    python = tmp_path / "python3"
    if body is not None:
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
    done = install(tmp_path / "root", PYTHON=str(python))
    assert done.returncode == 1
    assert re.search(reason, done.stderr)
    assert "PYTHON=/path/to/python3" in done.stderr
    assert not (tmp_path / "root").exists()


def test_missing_source_stops_before_anything_is_changed(tmp_path: Path) -> None:
    """A lonely install.sh must not write an empty unit."""
    lonely = tmp_path / "lonely" / "install.sh"
    lonely.parent.mkdir()
    shutil.copy(SCRIPT, lonely)
    environment = os.environ | {"DESTDIR": str(tmp_path / "root"), "PYTHON": sys.executable}
    done = run(["sh", str(lonely)], env=environment)
    assert done.returncode == 1
    assert "ota_server.py is not beside install.sh" in done.stderr
    assert not (tmp_path / "root").exists()
