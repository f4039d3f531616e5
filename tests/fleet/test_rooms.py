"""The rooms beside the core keep the house's numbers."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house import ROOT, Function, code_lines

SQL_ROOMS = {  # docs/decisions/0007
    "assignments.py", "files.py", "grants.py", "history.py", "hooks.py", "ledger.py",
    "projects.py", "registry.py", "rollouts.py", "schema.py", "searches.py", "stock.py",
    "summons.py", "tables.py",
}  # fmt: skip
ROOMS = sorted((ROOT / "ota_fleet").glob("*.py"))


def functions(path: Path) -> list[Function]:
    """Every function of a room."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, Function)]


def sizes(path: Path) -> list[int]:
    """Code lines of every function, its head not included."""
    lines = code_lines(path.read_text())
    return [
        sum(line in lines for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1))
        for node in functions(path)
    ]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_a_room_has_at_most_400_lines(path: Path) -> None:
    assert len(code_lines(path.read_text())) <= 400


def test_every_sql_statement_is_in_the_registry() -> None:
    sql = re.compile(r"\b(SELECT|INSERT INTO|DELETE FROM|UPDATE \w+ SET|CREATE)\b")
    speaking = {path.name for path in ROOMS if sql.search(path.read_text())}
    assert speaking == SQL_ROOMS


def test_functions_are_short() -> None:
    lengths = sorted(length for path in ROOMS for length in sizes(path))
    assert lengths[-1] <= 40
    assert statistics.median(lengths) <= 8
    assert lengths[int(len(lengths) * 0.9)] <= 25


def test_public_names_have_docstrings() -> None:
    bare = [
        node.name
        for path in ROOMS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert bare == []


EXTRAS = {"mqtt.py": {"paho"}}  # declared in pyproject.toml


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.name)
def test_a_room_imports_only_the_standard_library_and_the_house(path: Path) -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
        )
    }
    known = sys.stdlib_module_names | {"ota_server", "ota_fleet"}
    assert imported - known == EXTRAS.get(path.name, set())


def test_what_is_an_extra_is_imported_where_it_is_needed_only() -> None:
    code = "import sys, ota_fleet, ota_fleet.mqtt; sys.exit('paho' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_core_runs_without_the_rooms() -> None:
    code = "import sys, ota_server; sys.exit('ota_fleet' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
