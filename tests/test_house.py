"""The house keeps what design.md and style promise; each promise is one test."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import shutil
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import ota_server
from tests.data.make_images import write_examples

ROOT = Path(__file__).parent.parent
CORE = ROOT / "ota_server.py"
SOURCE = CORE.read_text()
TREE = ast.parse(SOURCE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tracked(*suffixes: str) -> list[Path]:
    """The files of the project with these endings, without what tools leave behind."""
    skipped = {".git", ".venv", "build", "dist"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.suffix in suffixes
        and not any(part in skipped or part.endswith("_cache") for part in path.parts)
    ]


def code_lines(source: str) -> set[int]:
    """The lines that hold code: neither blank, nor only a comment, nor a docstring."""
    idle = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in idle and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node):
            text = node.body[0]
            lines.difference_update(range(text.lineno, (text.end_lineno or 0) + 1))
    return lines


def functions() -> Iterator[Function]:
    """Every function of the core."""
    for node in ast.walk(TREE):
        if isinstance(node, Function):
            yield node


def sizes() -> list[int]:
    """Code lines of every function of the core, its head included."""
    lines = code_lines(SOURCE)
    return [
        sum(line in lines for line in range(node.lineno, (node.end_lineno or 0) + 1))
        for node in functions()
    ]


def test_the_core_imports_nothing_but_the_standard_library() -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(TREE)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    assert imported - {"ota_fleet"} <= sys.stdlib_module_names


def test_the_fleet_is_imported_through_its_door_only() -> None:
    doors = {
        function.name
        for function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and node.module == "ota_fleet"
    }
    assert doors == {"build_site", "by_fleet"}
    assert SOURCE.count("from ota_fleet") == 2


def test_the_script_copied_alone_runs_isolated(tmp_path: Path) -> None:
    shutil.copy(CORE, tmp_path)
    command = [sys.executable, "-I", str(tmp_path / CORE.name), "--version"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout == f"ota-server {ota_server.__version__}\n"


def test_the_core_has_at_most_2390_lines_of_code() -> None:
    assert len(code_lines(SOURCE)) <= 2390


def test_functions_are_short() -> None:
    lengths = sorted(sizes())
    assert lengths[-1] <= 40
    assert statistics.median(lengths) <= 9  # 8 and the def line
    assert lengths[int(len(lengths) * 0.9)] <= 26


def test_public_names_have_docstrings() -> None:
    public = [
        node
        for node in ast.walk(TREE)
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
    ]
    nested = {child for node in functions() for child in ast.walk(node) if child is not node}
    bare = [node.name for node in public if node not in nested and not ast.get_docstring(node)]
    assert len(bare) <= 0.05 * len(public), bare


def test_a_section_uses_only_what_stands_above_it() -> None:
    starts = [i for i, line in enumerate(SOURCE.splitlines(), 1) if line.startswith("# -- ")]
    assert len(starts) == 14

    def section(line: int) -> int:
        return sum(start <= line for start in starts)

    defined: dict[str, int] = {}
    for node in TREE.body:
        if isinstance(node, Function | ast.ClassDef):
            defined[node.name] = section(node.lineno)
        elif isinstance(node, ast.Assign):
            for name in (target for target in node.targets if isinstance(target, ast.Name)):
                defined[name.id] = section(node.lineno)
    notes: set[ast.AST] = set()
    for each in ast.walk(TREE):
        if isinstance(each, ast.arg | ast.AnnAssign) and each.annotation:
            notes.update(ast.walk(each.annotation))
        if isinstance(each, Function) and each.returns:
            notes.update(ast.walk(each.returns))
    wrong = [
        f"{node.id} in line {node.lineno}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name)
        and node not in notes
        and defined.get(node.id, 0) > section(node.lineno)
    ]
    assert wrong == []


def test_the_sections_are_numbered_in_order() -> None:
    numbers = [int(number) for number in re.findall(r"^# -- (\d+)\. ", SOURCE, re.MULTILINE)]
    assert all(after == before + 1 for before, after in pairwise(numbers))


def test_everything_is_caught_only_where_a_thread_or_a_request_ends() -> None:
    catchers = {
        node.name
        for node in functions()
        for inner in ast.walk(node)
        if isinstance(inner, ast.ExceptHandler)
        and (inner.type is None or (isinstance(inner.type, ast.Name) and "Exc" in inner.type.id))
    }
    assert catchers == {"answer", "_advance", "_watch"}


def test_the_environment_is_read_in_one_place() -> None:
    assert SOURCE.count("os.environ") == 1
    assert "argv is None else argv, os.environ" in SOURCE


def test_no_module_global_is_changed() -> None:
    assert not [node for node in ast.walk(TREE) if isinstance(node, ast.Global)]


def long_options() -> set[str]:
    """What --help names."""
    done = subprocess.run(
        [sys.executable, str(CORE), "--help"], check=True, capture_output=True, text=True
    )
    return set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", done.stdout, re.MULTILINE))


def test_the_readme_has_a_row_for_every_option_and_no_other() -> None:
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = re.findall("`(--[a-z-]+)`", " ".join(rows))
    assert sorted(named) == sorted(long_options())


MORE = {
    "sign_key",
    "us_username",
    "us_password",
    "admin_email",
    "admin_password",
}  # passwords stand in the environment only
SYSTEMD = {"notify_socket", "inherited", "watchdog", "journal"}  # settings that systemd makes


def test_every_option_is_a_setting() -> None:
    settings = {field.name for field in dataclasses.fields(ota_server.Config)}
    options = {option.removeprefix("--").replace("-", "_") for option in long_options()}
    s0 = {"firmware_dir", "url_firmware", "no_certs", "no_token"}  # become other settings
    assert options - {"help", "version", "sign_key_file"} - s0 == settings - MORE - SYSTEMD


def test_every_route_stands_in_the_protocols() -> None:
    text = (ROOT / "docs" / "protocols.md").read_text()
    table = text.partition("## Routes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `/.*?\| (\w+) \|", table, re.MULTILINE)
    assert rows == [route.endpoint.__name__ for route in ota_server.ROUTES]


def test_the_sample_images_are_what_the_tool_makes(tmp_path: Path) -> None:
    made = {path.name: path.read_bytes() for path in write_examples(tmp_path)}
    kept = {path.name: path.read_bytes() for path in (ROOT / "examples/firmware").glob("*.bin")}
    assert kept == made


def test_there_is_more_test_than_code() -> None:
    tests = sum(len(code_lines(path.read_text())) for path in (ROOT / "tests").rglob("*.py"))
    assert tests >= 1.3 * len(code_lines(SOURCE))


def test_no_test_sleeps() -> None:
    sleeping = [
        path.name
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"\bsleep\(\d|\.sleep\(", path.read_text())
    ]
    assert [name for name in sleeping if name != Path(__file__).name] == []


@pytest.mark.parametrize("word", ["pypi" + ".org", "python" + "hosted", "deb." + "debian.org"])
def test_no_file_names_a_package_host(word: str) -> None:
    suffixes = (".py", ".md", ".toml", ".sh", ".service", "")
    assert [path.name for path in tracked(*suffixes) if word in path.read_text("latin-1")] == []
