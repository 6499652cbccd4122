"""Docstrings as the site shows them.

Roles such as :func:`kernelmeta.ops.sib` become links. The comment beside a field of a tuple, or above a name of a
module, is its docstring.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth):`~?([\w.]+)`")
# What has an entry of its own: a name of a public module.
PUBLIC = re.compile(r"kernelmeta\.(?:ops|nn|data|func|training)\.[A-Za-z]\w*$|kernelmeta\.(?:Ragged|Classifier)$")


class Docstrings(griffe.Extension):
    """Completes and rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object once it is loaded."""
        if obj.docstring is None and obj.is_attribute and (comment := _comment(obj)):
            obj.docstring = griffe.Docstring(comment, lineno=obj.lineno, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _comment(attribute: griffe.Object) -> str:
    if not isinstance(attribute.filepath, Path) or attribute.lineno is None or attribute.endlineno is None:
        return ""
    lines = attribute.filepath.read_text(encoding="utf-8").splitlines()
    beside = re.search(r"\s# (.*)$", lines[attribute.endlineno - 1])
    if beside:
        return beside[1]
    above = []
    for line in reversed(lines[: attribute.lineno - 1]):
        if not line.startswith("# "):
            break
        above.append(line.removeprefix("# "))
    return " ".join(reversed(above))


def _link(match: re.Match[str]) -> str:
    name = match[1]
    return f"[`{name}`][{name}]" if PUBLIC.match(name) else f"`{name}`"
