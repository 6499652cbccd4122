"""Trained learners from files."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from kernelmeta import nn
from kernelmeta.data.file_kinds import is_safetensors
from kernelmeta.data.files import read_json, read_weights
from kernelmeta.data.words import one_line
from kernelmeta.nn.pretrained import CONFIG, MODEL, Pretrained
from kernelmeta.training.calibration import LEAST, MOST
from kernelmeta.training.checkpoint import AVERAGED, BEST, CHECKPOINT, Checkpoint, count
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.finite import check_weights
from kernelmeta.training.learners import SOFT_KMEANS, TITLES
from kernelmeta.training.settings import as_size, size_words

AT = ("best", "last")
# Classes of `kernelmeta.nn` -> learners of `kernelmeta train`.
_NAMES = {
    "Prototypes": "prototypes", "ANIL": "anil", "RidgeHead": "ridge", "SIB": "sib", "EquivariantSIB": "equivariant",
    "Program": "combined",
}  # fmt: skip


def load_learner(path: str | os.PathLike[str], at: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A trained learner, and the settings of its training as far as the file tells them.

    Args:
        path: a run folder, its checkpoint, a folder that ``kernelmeta share`` wrote, or a published checkpoint (a dict
            with keys netFeat, SIB, lr, nbStep).
        at: which weights of the training: "best" on the validation classes, or the "last"; None for the best where the
            training looked at validation classes, else the last.

    Returns:
        The learner, in evaluation mode, and the settings; among them, of a run, ``at`` ("best" or "last"),
        ``at_episodes`` (those trained on until then), ``trained_episodes`` and ``temperature``, by which its logits are
        to be divided for probabilities, and ``features_of``, the backbone whose features it was trained on, as a bank
        names it, if that is known.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: truncated, foreign, a pickle that would run code, or its weights are not finite.
    """
    if at not in (None, *AT):
        raise ValueError(f"at: expected {' or '.join(AT)}, got {at!r}")
    file = Path(path)
    if file.is_dir():
        if (file / MODEL).exists() and not (file / CHECKPOINT).exists():
            return _shared(file)
        file = file / CHECKPOINT
        if not file.exists():
            raise ValueError(f"{path}: no run of 'kernelmeta train': it holds no {CHECKPOINT}")
    if file.suffix == ".safetensors" or is_safetensors(file):
        checkpoint = Checkpoint.load(file, "train")
        config = TrainConfig.from_dict(checkpoint.state.get("config", {}))
        best = checkpoint.state.get("best")
        if at == "best" and best is None:
            raise ValueError(f"at: {file} has no best weights: its training looked at no validation classes")
        at = at or ("last" if best is None else "best")
        try:
            head = config.make_learner(int(checkpoint.state["bank"]["features"]), _image_shape(checkpoint))
            weights = checkpoint.tensors[BEST if at == "best" else AVERAGED if config.average else "model"]
            head.load_state_dict(weights)
            seen = count(checkpoint.state, "step") * config.tasks_per_step
            of_run = {
                "at": at,
                "at_episodes": seen if best is None or at == "last" else int(best[0]),
                "trained_episodes": seen,
                "temperature": _temperature(checkpoint.state, at),
            }
            if checkpoint.state.get("features_of"):
                of_run["features_of"] = str(checkpoint.state["features_of"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: the weights do not fit the configuration ({one_line(error)})") from None
        check_weights(file, weights)
        return head.eval(), {**config.to_dict(), **of_run}
    return _published(file)


def _shared(folder: Path) -> tuple[Any, dict[str, Any]]:
    learner = Pretrained.from_pretrained(folder)
    name = _NAMES.get(type(learner).__name__)
    if name is None:
        raise ValueError(f"{folder}: a {type(learner).__name__} needs no weights; name the method instead")
    settings = read_json(folder / CONFIG).get("settings", {})
    # (a learner for any number of classes may have been trained on several)
    way = settings.get("way", learner.n_way) if learner.takes_any_ways else learner.n_way
    return learner, {**settings, "learner": name, "way": as_size("way", way)}


def _temperature(state: dict[str, Any], at: str) -> float:
    """1 where the validation classes were not looked at."""
    found = float(state.get("temperatures", {}).get(at, 1.0))
    if not LEAST <= found <= MOST:
        raise ValueError(f"temperature: expected {LEAST}..{MOST}, got {found}")
    return found


def checksum(path: str | os.PathLike[str]) -> int:
    """CRC-32 of the weights of a run folder, or of its checkpoint. Raises OSError."""
    file = Path(path)
    within = (file / name for name in (CHECKPOINT, MODEL) if (file / name).exists())
    return zlib.crc32((next(within, file / CHECKPOINT) if file.is_dir() else file).read_bytes())


def for_ways(learner: Any, n_way: int) -> Any:
    """A trained learner for another number of classes than it was trained on.

    Raises:
        ValueError: its parameters are those of a fixed number of classes.
    """
    if learner.n_way == n_way:
        return learner
    if not getattr(learner, "takes_any_ways", False):
        raise ValueError(
            f"was trained for {learner.n_way} classes at a time, not {n_way}; equivariant, prototypes, ridge and"
            f" {SOFT_KMEANS} take any number"
        )
    return learner.for_ways(n_way)


def learner_text(settings: dict[str, Any]) -> str:
    """What a checkpoint is, in a few words, from the settings of `load_learner`."""
    title = TITLES[settings["learner"]]
    if "trained_episodes" not in settings:
        return f"a published checkpoint of {title}, {settings['way']}-way"
    tasks = f"{size_words(settings['way'])}-way {size_words(settings['shot'])}-shot episodes"
    of = f" of {settings['data']}" if settings.get("data") else ""
    return f"{title}, trained on {settings['trained_episodes']:,} {tasks}{of}"


def at_text(settings: dict[str, Any]) -> str:
    """Which weights of a run they are, from the settings of `load_learner` or from results; empty if nobody knows."""
    if "at" not in settings:
        return ""
    episodes, of = settings["at_episodes"], settings["trained_episodes"]
    if settings["at"] == "last":
        return f"the last, after {episodes:,} episodes"
    return f"the best on the validation classes, after {episodes:,} of {of:,} episodes"


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
