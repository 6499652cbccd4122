"""Backbones of other libraries, each with its own preprocessing: timm, torchvision, transformers, one's own function.

The libraries are imported when they are asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from kernelmeta.data.files import read_weights
from kernelmeta.data.words import one_line

Prepare = Callable[[Image.Image], Tensor]
NAMES = "timm:NAME, torchvision:NAME, hf:FOLDER or module.path:function"


class ImageBackbone(NamedTuple):
    """What turns images into features.

    Args:
        module: [B, C, H, W] -> [B, D].
        name: what it is called in a bank's text.
        prepare: from an RGB image to [C, H, W]; None: as the set of images does it.
    """

    module: nn.Module
    name: str
    prepare: Prepare | None = None


def is_foreign(name: str | None) -> bool:
    """Whether a backbone of this name is another library's."""
    return name is not None and ":" in name


def foreign_backbone(name: str, weights: str | os.PathLike[str] | None = None) -> ImageBackbone:
    """A backbone with the preprocessing that it was trained with, and without its classifier.

    Args:
        name: ``timm:NAME`` and ``torchvision:NAME``, whose weights are downloaded if they aren't there yet;
            ``hf:FOLDER``, what transformers' ``save_pretrained`` wrote, or a name on its hub; ``module.path:function``,
            which returns a module [B, 3, H, W] -> [B, D], or a pair of it and its preprocessing (from a
            PIL.Image.Image to [3, H, W]). The module is looked for in the current folder as well.
        weights: a state dict to take instead of the library's weights.

    Raises:
        ImportError: the library is not installed.
        ValueError: it knows no such backbone, its weights can't be had, or those given don't fit.
        OSError: there is no such file of weights.
    """
    library, _, what = name.partition(":")
    try:
        if library == "timm":
            return _from_timm(name, what, weights)
        if library == "torchvision":
            return _from_torchvision(name, what, weights)
        if library == "hf":
            return _from_transformers(name, what, weights)
        return _from_function(name, library, what, weights)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # (of the library, of the network, of the user's function)
        if isinstance(error, OSError) and weights is not None and error.filename == os.fspath(weights):
            raise
        raise ValueError(f"backbone: {name}: {one_line(error)}") from error


@contextmanager
def _needing(library: str) -> Any:
    try:
        yield
    except ImportError as error:
        extra = {"transformers": "hf"}.get(library, library)
        message = f"the backbone needs {library}: pip install 'kernelmeta[{extra}]' ({one_line(error)})"
        raise ImportError(message) from None


def _from_timm(name: str, what: str, weights: str | os.PathLike[str] | None) -> ImageBackbone:
    with _needing("timm"):
        import timm
    if what.partition(".")[0] not in timm.list_models():
        raise ValueError(f"backbone: timm knows no model {what!r}; timm.list_models() lists them")
    module = timm.create_model(what, pretrained=weights is None, num_classes=0)
    _load(module, weights)
    settings = timm.data.resolve_model_data_config(module)
    return ImageBackbone(module, name, timm.data.create_transform(**settings, is_training=False))


def _from_torchvision(name: str, what: str, weights: str | os.PathLike[str] | None) -> ImageBackbone:
    with _needing("torchvision"):
        from torchvision import models
    if what not in models.list_models(models):
        raise ValueError(
            f"backbone: torchvision knows no classifier {what!r}; torchvision.models.list_models() lists them"
        )
    published = models.get_model_weights(what).DEFAULT
    module = models.get_model(what, weights=published if weights is None else None)
    module = _without_last_layer(module, name)
    _load(module, weights)
    return ImageBackbone(nn.Sequential(module, nn.Flatten()), name, published.transforms())


def _without_last_layer(module: nn.Module, name: str) -> nn.Module:
    """The classifier's linear layer gone; what else it has (a norm, say) stays."""
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(module, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(module, attribute, nn.Identity())
            return module
        if isinstance(head, nn.Sequential) and any(isinstance(layer, nn.Linear) for layer in head):
            last = max(i for i, layer in enumerate(head) if isinstance(layer, nn.Linear))
            head[last] = nn.Identity()
            return module
    raise ValueError(f"backbone: {name}: which of its layers classifies isn't known; write a function that returns it")


class _Transformer(nn.Module):
    """The features of a model of transformers."""

    def __init__(self, model: Any, pooled: bool) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=pixels)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = self.model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None) if self.pooled else None
        if pooled is not None:
            return pooled.flatten(1)
        last: Tensor = output.last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.flatten(2).mean(-1)


def _from_transformers(name: str, what: str, weights: str | os.PathLike[str] | None) -> ImageBackbone:
    with _needing("transformers"):
        from transformers import AutoImageProcessor, AutoModel
    if weights is not None:
        raise ValueError("weights: those of hf:FOLDER are in the folder")
    own = Path(what).is_dir()
    processor = AutoImageProcessor.from_pretrained(what, local_files_only=own)
    model, report = AutoModel.from_pretrained(what, local_files_only=own, output_loading_info=True)
    # Weights that the folder lacks are random. A pooler may be left out; anything else is needed.
    missing = list(report["missing_keys"])
    needed = [key for key in missing if "pooler" not in key]
    if needed:
        raise ValueError(f"backbone: {name}: {len(needed)} weights are missing, {needed[0]} among them")

    def prepare(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return ImageBackbone(_Transformer(model, pooled=not missing), name, prepare)


def _from_function(name: str, path: str, function: str, weights: str | os.PathLike[str] | None) -> ImageBackbone:
    if weights is not None:
        raise ValueError(f"weights: {name} returns a backbone with its weights")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(path), function)()
    except (ImportError, AttributeError, ValueError) as error:
        known = NAMES if isinstance(error, ModuleNotFoundError) and error.name == path else ""
        hint = f"; a foreign backbone is {known}" if known else ""
        raise ValueError(f"backbone: {name}: {one_line(error)}{hint}") from error
    finally:
        sys.path.remove(os.getcwd())
    module, prepare = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, nn.Module) or not (prepare is None or callable(prepare)):
        expected = "a torch.nn.Module, or a pair of one and its preprocessing"
        raise ValueError(f"backbone: {name}: expected {expected}, got {type(made).__name__}")
    return ImageBackbone(module, name, prepare)


def _load(module: nn.Module, weights: str | os.PathLike[str] | None) -> None:
    """A state dict, also that of a whole classifier, whose last layer isn't needed."""
    if weights is None:
        return
    found = module.load_state_dict(
        {key: value for key, value in read_weights(weights).items() if isinstance(value, torch.Tensor)}, strict=False
    )
    if found.missing_keys:
        raise ValueError(f"{weights}: not the weights of this backbone: {found.missing_keys[0]} is missing")
