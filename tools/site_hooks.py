"""Hooks of the documentation's site (mkdocs.yml): pages that lie outside of docs/, formulas, the commands' help.

Pages link to each other as they do in the repository (``../benchmarks/results/x.md``), so that the links hold in both.
"""

from __future__ import annotations

import argparse
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
# Files outside of docs/ -> their pages.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}


def outside() -> dict[str, str]:
    """Path in the repository -> path in the site, of what is shown though it is not in docs/."""
    found = {path.relative_to(ROOT).as_posix(): f"results/{path.name}" for path in (ROOT / RESULTS).glob("*.md")}
    found |= {path.relative_to(ROOT).as_posix(): f"results/{path.name}" for path in (ROOT / RESULTS).glob("*.png")}
    return {**PAGES, **found}


def report_title(name: str) -> str:
    """amd-epyc-2026-11-21-grid-float32-train.md -> AMD EPYC, 2026-11-21: grid float32 train."""
    machine, date, rest = re.fullmatch(r"(.*)-(\d{4}-\d\d-\d\d)-?(.*)\.md", name).groups()  # type: ignore[union-attr]
    title = f"{machine.replace('-', ' ').upper()}, {date}"
    return f"{title}: {rest.replace('-', ' ')}" if rest else title


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every results page is in the navigation, the newest first."""
    names = sorted(path.name for path in (ROOT / RESULTS).glob("*.md"))
    names.sort(key=lambda name: re.findall(r"\d{4}-\d\d-\d\d", name), reverse=True)
    for section in config.nav or []:
        if "Results" in section:
            section["Results"] += [{report_title(name): f"results/{name}"} for name in names]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in outside().items():
        content = (ROOT / source).read_bytes()
        files.append(File.generated(config, target, content=content if source.endswith(".png") else content.decode()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    pages = outside()
    source = {target: source for source, target in pages.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        shown = pages.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if there == "README.md":
            shown = "index.md"
        if shown is None or not (ROOT / there).exists():
            return match[0]  # left to the check of links
        return f"]({posixpath.relpath(shown, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    markdown = re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", link, markdown)
    if "\n# " not in f"\n{markdown}":  # a report has no title of its own
        name = page.file.src_uri.rpartition("/")
        title = report_title(name[2]) if name[0] == "results" else page.title
        page.meta["hide"] = ["toc"]  # its tables are wide
        markdown = f"# {title}\n\n{markdown}"
    markdown = re.sub(r"^> In the repository\b.*\n(> .*\n)*\n?", "", markdown, flags=re.MULTILINE)
    example = r"^\[examples/([\w.]+)\]\(\.\./examples/\1\)$"  # a link in the repository, the text on the site
    markdown = re.sub(example, lambda m: _example(m[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- help: ([\w-]+) -->$", lambda m: _help(m[1]), markdown, flags=re.MULTILINE)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which needs no script."""
    pattern = r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>'

    def formula(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")

    return re.sub(pattern, formula, content, flags=re.DOTALL)


def _example(name: str) -> str:
    """An example as it stands in the repository."""
    return f"```python\n{(ROOT / 'examples' / name).read_text(encoding='utf-8')}```"


def _help(command: str) -> str:
    """The options of a command, as its own parser tells them."""
    from kernelmeta.cli import parser

    (commands,) = (action.choices for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    parser: Any = commands[command]
    rows = ["| | |", "|---|---|"]
    for part in parser._action_groups:
        actions = [a for a in part._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions and all(a.option_strings for a in actions):
            rows.append(f"| **{part.title}** | |")
        for action in actions:
            shown = f"{', '.join(action.option_strings)} {action.metavar or ''}".strip() or action.dest
            text = (action.help or "").replace("|", "\\|")
            rows.append(f"| `{shown}` | {text} |")
    return f"{parser.description}\n\n    kernelmeta {parser.example}\n\n" + "\n".join(rows)
