"""Learners in folders that can be shared: ``config.json``, ``model.safetensors`` and a model card.

The files are those of huggingface_hub's ``PyTorchModelHubMixin``, which can read and write them too. That package is
needed for what lies on the Hub, and not for folders.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from kernelmeta.data.files import read_json, write_json, write_text
from kernelmeta.data.tensor_files import read_tensors, write_tensors
from kernelmeta.data.words import one_line
from kernelmeta.phases import Phase

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
_CARD = """---
library_name: kernelmeta
tags: [few-shot-learning, meta-learning]
---

# {name}

A few-shot learner of [kernelmeta](https://pypi.org/project/kernelmeta/): from a few labelled rows of each class to
labels for others. To use it:

```py
import kernelmeta as km

head = km.nn.{name}.from_pretrained("THIS FOLDER")
logits = head(support, labels, query)  # [T, S, D], [T, S], [T, Q, D] -> [T, Q, N]
```
"""
Kind = TypeVar("Kind", bound="Pretrained")


class Pretrained(nn.Module):
    """A module that knows what it was made with, and can be saved to a folder and made of one."""

    _made_with: dict[str, Any]

    def __new__(cls: type[Kind], *given: Any, **named: Any) -> Kind:
        self: Kind = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *given, **named)
        except TypeError:  # __init__ will say what is wrong; a copy has none of it, and gets the attributes
            return self
        object.__setattr__(self, "_made_with", dict(list(bound.arguments.items())[1:]))
        return self

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any] | None = None,
        card: str | None = None,
    ) -> None:
        """Write it to a folder that `from_pretrained` reads, and that can be uploaded as it is.

        Args:
            folder: made if it is not there.
            settings: of its training, kept with it: what `kernelmeta.training.loading.load_learner` returned.
            card: a text about it, README.md; a few lines on how to load it if None.

        Raises:
            OSError: it cannot be written.
            TypeError: it was made with something that JSON does not take.
        """
        folder = Path(folder)
        config: dict[str, Any] = {"learner": type(self).__name__, **_plain(self._made_with)}
        if settings is not None:
            config["settings"] = dict(settings)
        write_tensors(folder / MODEL, self.state_dict(), {"format": "pt"})
        write_text(folder / CARD, _CARD.format(name=type(self).__name__) if card is None else card)
        write_json(folder / CONFIG, config)  # last: with it, the folder is complete

    @classmethod
    def from_pretrained(cls: type[Kind], where: str | os.PathLike[str], *, revision: str | None = None) -> Kind:
        """A learner from a folder, or from the Hub, in evaluation mode.

        Args:
            where: a folder that `save_pretrained` wrote, or else the name of a repository on the Hugging Face Hub
                (``pip install 'kernelmeta[hub]'``).
            revision: of that repository.

        Raises:
            ImportError: it is no folder, and huggingface_hub is not installed.
            OSError: it cannot be read, or fetched.
            ValueError: it holds no learner, one of another kind, or what does not fit.
        """
        folder = Path(where) if os.path.isdir(where) else _fetched(os.fspath(where), revision)
        config = read_json(folder / CONFIG)
        kind = _learners().get(config.get("learner"))
        if kind is None:
            raise ValueError(f"{folder / CONFIG}: expected a learner, got {config.get('learner')!r}")
        if not issubclass(kind, cls) and not issubclass(cls, kind):
            raise ValueError(f"{where}: holds a {kind.__name__}, not a {cls.__name__}")
        made = cls if issubclass(cls, kind) else kind
        names = list(inspect.signature(kind.__init__).parameters)[1:]
        arguments = {name: config[name] for name in names if name in config}
        try:
            if "phases" in arguments:
                arguments["phases"] = [Phase(**phase) for phase in arguments["phases"]]
            learner: Any = made(**arguments)
            learner.load_state_dict(read_tensors(folder / MODEL)[0])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {one_line(error)}") from None
        found: Kind = learner.eval()
        return found

    def push_to_hub(self, repository: str, **options: Any) -> None:
        """Upload what `save_pretrained` writes to a repository on the Hugging Face Hub.

        Args:
            repository: its name, "user/name"; made if it is not there.
            options: of `save_pretrained`.

        Raises:
            ImportError: huggingface_hub is not installed.
            OSError: it cannot be uploaded.
        """
        import tempfile

        hub = _hub()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            hub.create_repo(repository, exist_ok=True)
            hub.upload_folder(repo_id=repository, folder_path=folder)


def _learners() -> dict[Any, type[Pretrained]]:
    from kernelmeta import nn as learners

    found = (getattr(learners, name) for name in learners.__all__)
    return {kind.__name__: kind for kind in found if isinstance(kind, type) and issubclass(kind, Pretrained)}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [asdict(phase) for phase in value] if name == "phases" else value for name, value in arguments.items()
    }


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("the Hugging Face Hub needs huggingface_hub: pip install 'kernelmeta[hub]'") from None
    return huggingface_hub


def _fetched(repository: str, revision: str | None) -> Path:
    try:
        hub = _hub()
    except ImportError as error:
        raise ImportError(f"{repository}: no such folder; {error}") from None
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, MODEL, CARD]))
    except Exception as error:  # of several kinds, by what the Hub or the network says
        raise OSError(f"{repository}: no folder, and not to be had from the Hub ({one_line(error)})") from None
