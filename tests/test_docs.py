"""What the documentation says: its Python code runs, and every public name is described."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from runs import make_bank

import kernelmeta as km
import kernelmeta.training
from kernelmeta.cli import parser

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT).as_posix()}-{i}")
    for path in FILES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bank = make_bank()
    # As extract names the classes of a folder.
    names = ("test/otter", "test/marten", "test/badger", "test/unknown", *bank.class_names[4:])
    km.data.FeatureBank(bank.features, bank.labels, bank.class_split, names).save("photos.safetensors")
    # Together with the imports that an earlier block of the file may have made.
    exec(compile(f"import torch\nimport kernelmeta as km\n{block}", "documentation", "exec"), {})


TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*FILES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("examples/*")))
}
COMMANDS = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
LINES = [
    pytest.param(line.replace("\\\n", " "), id=f"{name}-{' '.join(line.split()[1:3])}-{i}")
    for name, text in TEXTS.items()
    for i, line in enumerate(
        re.findall(r"^(?:    )?(?:torchrun .*-m )?(kernelmeta [a-z](?:.*\\\n)*.*)", text, re.MULTILINE)
    )
    if not name.startswith("examples/")
]


@pytest.mark.parametrize("line", LINES)
def test_every_line_for_a_terminal_is_a_command(line: str) -> None:
    words = shlex.split(line.split(" > ")[0], comments=True)
    assert parser().parse_args(words[1:]).command == words[1]


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_sentence_calls_a_command_an_option_or_an_extra_is_one(name: str) -> None:
    text = TEXTS[name]
    for line in re.findall(r"`(?:torchrun [^`]*-m\s+)?kernelmeta\s+([a-z][^`]*)`", text):
        command, *words = line.split()
        options = {option for action in COMMANDS[command]._actions for option in action.option_strings}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line
    extras = re.search(r"(?ms)^\[project.optional-dependencies\]$(.*?)^\[", (ROOT / "pyproject.toml").read_text())
    assert extras is not None
    known = set(re.findall(r"(?m)^(\w+) = \[", extras[1]))
    for asked in re.findall(r"'(?:kernelmeta|\.)\[([a-z,]+)\]'", text):
        assert set(asked.split(",")) <= known, asked
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?:^ +|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text):
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


MODULES = (km, km.ops, km.nn, km.func, km.graceful, km.linear, km.data, km.reference, kernelmeta.training)
NAMES = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module in MODULES
    for name in module.__all__
    if not isinstance(getattr(module, name), (ModuleType, str))
]


def own_docstring(thing: Any) -> str:
    """Its docstring, unless it is another's, or made up by NamedTuple or dataclass."""
    text = inspect.getdoc(thing) or ""
    inherited = {inspect.getdoc(base) for base in getattr(thing, "__mro__", ())[1:]}
    return "" if text in inherited or text.startswith(f"{getattr(thing, '__name__', None)}(") else text


def described(thing: Any, text: str) -> list[str]:
    """The parameters, or fields, that the docstring does not name. (A field may have a comment beside it, or a
    docstring below.)"""
    if inspect.isclass(thing) and issubclass(thing, tuple):
        names = list(thing.__annotations__)
        text += "\n".join(re.findall(r'^    (\w+): .*(?:# .*|\n    """)', inspect.getsource(thing), re.MULTILINE))
    else:
        names = [name for name in inspect.signature(thing).parameters if name not in ("self", "args", "kwargs")]
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("thing", NAMES)
def test_every_public_name_is_described(thing: Any) -> None:
    if typing.get_origin(thing) is not None:  # an alias of a type: the comment above it describes it
        return
    text = own_docstring(thing)
    assert text, "no docstring"
    if thing.__module__.startswith("kernelmeta.reference") and inspect.isfunction(thing):
        assert "kernelmeta.ops" in text or thing.__name__ in km.ops.__all__  # which documents it
        return
    # "as in": the rest is that of another op. "fields": one attribute a setting, told by the command's help.
    if ", ...:" not in text and thing is not kernelmeta.training.TrainConfig:
        assert described(thing, text) == []
    if not inspect.isclass(thing) or thing.__init__ is object.__init__ or issubclass(thing, tuple):
        return
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", member)
        if not name.startswith("_") and name != "extra_repr" and (callable(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(thing, name)), f"{thing.__name__}.{name} has no docstring"


@pytest.mark.parametrize("module", [km.ops, km.nn])
def test_what_can_be_wrong_is_said(module: ModuleType) -> None:
    silent = [
        name
        for name in module.__all__
        if callable(thing := getattr(module, name))
        and "raise " in inspect.getsource(thing)
        and "Raises:" not in (inspect.getdoc(thing) or "")
    ]
    assert not silent


def test_every_public_module_has_a_page() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    for module in MODULES[1:]:
        assert re.search(rf"^::: {re.escape(module.__name__)}$", pages, re.MULTILINE), module.__name__
    for name in km.__all__:
        if callable(getattr(km, name)):
            assert re.search(rf"^::: [\w.]+\.{name}$", pages, re.MULTILINE), name


def anchors(path: Path) -> list[set[str]]:
    """Of the headings of a page, as GitHub calls them, and as the site does."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    bare = [re.sub(r"[^\w\s-]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)$", text, re.M)]
    return [{re.sub(r"\s", "-", title) for title in bare}, {re.sub(r"[-\s]+", "-", title) for title in bare}]


@pytest.mark.parametrize("page", [*FILES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"], ids=str)
def test_links_to_headings_hold_on_github_and_on_the_site(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)\s#:]*\.md|)#([^)\s]+)\)", text):
        other = (page.parent / target).resolve() if target else page
        if "reference" not in other.parts:  # whose headings the site makes of docstrings
            assert all(anchor in names for names in anchors(other)), f"{target}#{anchor}"


def test_pages_that_the_site_fills_say_so_in_the_repository() -> None:
    for page in FILES:
        text = page.read_text(encoding="utf-8")
        if page.parent.name == "reference":
            note = re.search(
                r"^> In the repository this page is an outline: .*\n> \[(.*)/\]\(\.\./\.\./\1\)\.$", text, re.M
            )
            assert note and (ROOT / note[1]).is_dir(), page
    examples = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\[examples/([\w.]+)\]\(\.\./examples/\1\)$", examples, re.M)
    assert sorted(linked) == sorted(
        {path.name for path in (ROOT / "examples").glob("*.py")} - {"demo.py"}
    )  # (make demo)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("[nowhere](nowhere.md)", "nowhere.md"),
        ("[no such heading](learners.md#no-such-heading)", "no-such-heading"),
        ("[no such name][kernelmeta.ops.nothing]", "kernelmeta.ops.nothing"),
    ],
)
def test_a_broken_link_fails_the_site(broken: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (make docs installs it)")
    for name in ("docs", "tools", "benchmarks", "examples", "kernelmeta"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "_native", "*.json", "*.npz")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs/index.md").open("a") as page:
        page.write(f"\n{broken}\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(rf"WARNING.*{re.escape(said)}", done.stderr), done.stderr
