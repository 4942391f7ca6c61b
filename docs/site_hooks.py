"""What the site has beside the pages of this folder: pages that live elsewhere, and the reference.

MkDocs calls `on_files` and `on_page_markdown`. Pages of the checkout keep their place, because they are read there too;
here they get an address, and their links are turned. The reference is made of settings and parsers at every build, so
it cannot differ.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from vitfreeze.cli import build_parser
from vitfreeze.config import SECTIONS, Config, describe_allowed, settings

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "launch/README.md": "launch.md",
    "ds_configs/README.md": "ds_configs.md",
    "CHANGELOG.md": "changelog.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SOURCES = {address: source for source, address in ELSEWHERE.items()}
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of this folder."""
    pages = {address: (ROOT / source).read_text() for address, source in SOURCES.items()}
    pages |= {"reference/settings.md": describe_settings(), "reference/commands.md": describe_commands()}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    return Files(file for file in files if file.src_uri != "site_hooks.py")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page with its links as they are from its address in the site."""
    address = page.file.src_uri
    folder = (ROOT / SOURCES.get(address, f"docs/{address}")).parent

    def turn(match: re.Match[str]) -> str:
        target = os.path.relpath(folder / match[2], ROOT)
        goal = ELSEWHERE.get(target) or target.removeprefix("docs/")
        return match[1] + os.path.relpath(goal, PurePosixPath(address).parent)

    return LINK.sub(turn, markdown)


def describe_settings() -> str:
    """Return the page of all settings, with defaults, ranges and explanations."""
    lines = ["# Settings", "", "Every setting of a recipe, as `vitfreeze config RECIPE` explains it.", ""]
    config = Config()
    for section in SECTIONS:
        lines += [f"## {section}", "", str(getattr(config, section).__doc__), ""]
        lines += ["| setting | default | allowed | |", "| --- | --- | --- | --- |"]
        for key, value, option_field in settings(config):
            if key.startswith(f"{section}."):
                rule = describe_allowed(option_field)
                change = " *May change when a run goes on.*" if option_field.metadata["may_change"] else ""
                cells = [f"`{key}`", f"`{_plain(value)}`", rule, option_field.metadata["help"] + change]
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or "''"


def describe_commands() -> str:
    """Return the page of all commands: what `--help` says."""
    from data_prep.__main__ import build_parser as build_data_parser

    os.environ["COLUMNS"] = "100"
    lines = ["# Commands", "", "What `--help` says of each command.", ""]
    for parser in (build_parser(), build_data_parser()):
        for command in _commands_of(parser):
            lines += [f"## {command.prog}", "", "```text", command.format_help().strip(), "```", ""]
    return "\n".join(lines)


def _commands_of(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [
        parser,
        *(found for action in inner for choice in action.choices.values() for found in _commands_of(choice)),
    ]
