"""What the pages say can be done can be done: commands are parsed, settings are known, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitfreeze.cli import parse_arguments
from vitfreeze.config import Config, load_config, settings

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("docs", "launch", "ds_configs", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))])
# A command stands on an indented or fenced line of its own, or between backticks; a table hides its bars.
COMMANDS = re.compile(r"^(?: {4,}|\$ )(vitfreeze (?:\\\n|[^\n])+)|`(vitfreeze [^`\n]+)`", flags=re.MULTILINE)
LINKS = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
STAND_INS = {"RECIPE": "paper", "NAME": "paper", "N": "2", "H": "3", "GBPS": "12", "...": ""}


def commands_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?\n(.*?)^```", lambda match: re.sub(r"^", "    ", match[1], flags=re.MULTILINE),
                  page.read_text(), flags=re.MULTILINE | re.DOTALL)  # fmt: skip
    found = [first or second for first, second in COMMANDS.findall(text)]
    return [command.replace("\\\n", " ").replace("\\|", "|") for command in found]


CASES = [pytest.param(command, id=f"{page.name}: {command[:70]}") for page in PAGES for command in commands_of(page)]


def words_of(command: str) -> list[str]:
    """Return the words of a command without what a page leaves open: choices, options in brackets, comments."""
    command = re.sub(r"\[[a-zA-Z-][^\]]*\]", "", command.split(" #")[0].split(" > ")[0].split(" && ")[0])
    words = shlex.split(command)[1:]
    words = [word.split("|")[0] for word in words]
    return [word for word in (STAND_INS.get(word, word) for word in words) if word]


def test_pages_hold_commands() -> None:
    assert len(CASES) > 30


@pytest.mark.parametrize("command", CASES)
def test_command_is_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(command)
    if len(words) <= 1 + (words[0] == "bench"):
        words.append("--help")  # the name of a command, in a sentence
    parsed, status = None, 0
    try:
        parsed = parse_arguments(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 0, f"{command}\n{capsys.readouterr().err}"
    overrides = [word for word in getattr(parsed, "overrides", None) or [] if "=" in word]
    recipe = getattr(parsed, "recipe", None)
    if recipe and not recipe.endswith((".yaml", ".yml")):
        given = [word for word in overrides if not re.search(r"=[A-Z_]+$|=\.\.\.$|^section\.key=", word)]
        load_config(recipe, given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for link in LINKS.findall(page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """MkDocs checks every link and anchor, and that every page has its place; the reference names every setting."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'vitfreeze[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "site" / "reference" / "settings" / "index.html").read_text()
    assert [key for key, _, _ in settings(Config()) if f"<code>{key}</code>" not in shown] == []
    assert "FreezingEngine" in (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert "https://fonts" not in shown


def test_figures_are_small() -> None:
    assert [path.name for path in (ROOT / "docs").rglob("*.png") if path.stat().st_size > 300e3] == []


def test_pages_quote_the_measured_costs_of_stages() -> None:
    runs = json.loads((ROOT / "benchmarks/results/stages_vit_base_cpu.json").read_text())["runs"]
    page = (ROOT / "docs/measured.md").read_text()
    for run, words in zip(runs, ("plain", "frozen", "small images first", "both"), strict=True):
        ratio = run["measured"] / run["planned"]
        assert f"| {words} | {run['planned']:.3f} | {run['measured']:.3f} | {ratio:.3f} |" in page
    assert f"| {runs[-1]['planned']:.3f} | {runs[-1]['measured']:.3f} | |" in (ROOT / "README.md").read_text()
