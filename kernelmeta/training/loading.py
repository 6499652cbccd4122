"""Trained learners from files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kernelmeta import nn
from kernelmeta.data.file_kinds import is_safetensors
from kernelmeta.data.files import read_weights
from kernelmeta.data.words import one_line
from kernelmeta.training.checkpoint import AVERAGED, CHECKPOINT, Checkpoint
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.finite import check_weights


def load_learner(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """A trained learner, and the settings of its training as far as the file tells them.

    Args:
        path: a run folder, its checkpoint, or a published checkpoint (a dict with keys netFeat, SIB, lr,
            nbStep).

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: truncated, foreign, a pickle that would run code, or its weights are not finite.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT
        if not file.exists():
            raise ValueError(f"{path}: no run of 'kernelmeta train': it holds no {CHECKPOINT}")
    if file.suffix == ".safetensors" or is_safetensors(file):
        checkpoint = Checkpoint.load(file, "train")
        config = TrainConfig.from_dict(checkpoint.state.get("config", {}))
        try:
            head = config.make_learner(int(checkpoint.state["bank"]["features"]), _image_shape(checkpoint))
            weights = checkpoint.tensors[AVERAGED if config.average else "model"]
            head.load_state_dict(weights)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: the weights do not fit the configuration ({one_line(error)})") from None
        check_weights(file, weights)
        return head.eval(), config.to_dict()
    return _published(file)


def _image_shape(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    shape = checkpoint.state.get("image_shape")
    return None if shape is None else tuple(int(side) for side in shape)


def _published(file: Path) -> tuple[nn.SIB, dict[str, Any]]:
    content = read_weights(file)
    missing = sorted({"SIB", "lr", "nbStep"} - content.keys())
    if missing:
        raise ValueError(f"{file}: no checkpoint of kernelmeta, and no published one: it has no {missing[0]!r}")
    try:
        state = nn.SIB.from_xfer(content["SIB"])
        way, D, hidden = state["mlp.weight1"].shape[1], len(state["weight"]), state["mlp.weight1"].shape[0]
        steps, inner_lr = int(content["nbStep"]), float(content["lr"])
        head = nn.SIB(n_way=way, n_features=D, steps=steps, inner_lr=inner_lr, hidden=hidden)
        head.load_state_dict(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no published checkpoint ({one_line(error)})") from None
    check_weights(file, state)
    return head.eval(), {"learner": "sib", "way": way, "steps": steps, "inner_lr": inner_lr, "hidden": hidden}
