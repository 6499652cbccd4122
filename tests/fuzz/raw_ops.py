"""Raw ops with arguments that no caller in the package passes: hostile sizes, shapes, types, values, layouts.

A call may raise what Python knows (and say so in words of this project); it must not take the process down.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernelmeta.ops._trace import padded
from kernelmeta.phases import ORACLES

CALLS = 200  # a case
HOSTILE = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62 - 1, 2**62, 2**63 - 1]
SIZES = {"T": (0, 1, 2, 3), "S": (0, 1, 5, 7), "Q": (0, 1, 4, 17), "N": (1, 2, 3, 5), "D": (0, 1, 8, 33), "H": (1, 4)}
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
# The shapes that arguments have in a call that makes sense; others have one element.
SHAPES = {
    "support": "TSD", "start": "TSD", "query": "TQD", "support_labels": "TS", "query_labels": "TQ", "logits": "TQN",
    "support_index": "TS", "start_index": "TS", "query_index": "TQ", "grad_logits": "TQN", "grad_theta0": "TND",
    "grad_gradients": "TQN", "grad_weights": "TND", "grad_coefficients": "TSN", "grad_support_coefficients": "TSN",
    "proportions": "TBN", "bag_offsets": "TC",
    "grad_query_coefficients": "TQN", "grad_start_coefficients": "TN", "theta0": "ND", "weight": "D", "weight1": "HN",
    "bias1": "H", "gain1": "H", "shift1": "H", "weight2": "HH", "bias2": "H", "gain2": "H", "shift2": "H",
    "new_logits": "QN", "old_logits": "QN", "labels": "Q", "class_weight": "N", "grad_distances": "Q",
    "grad_label_losses": "Q", "weight3": "NH", "bias3": "N", "rates": "K", "n_ways": "T", "support_offsets": "U",
    "query_offsets": "U", "targets": "TSN", "row_weights": "TS", "parameters": "P", "grad_outputs": "TQN",
    "grad_gram": "TSS", "grad_cross": "TQS", "grad_support_outputs": "TSN", "grad_query_outputs": "TQN",
}  # fmt: skip
NUMBERS = {"labels", "support_labels", "query_labels", "support_index", "start_index", "query_index", "n_ways",
           "support_offsets", "query_offsets", "bag_offsets"}  # fmt: skip
# As bits: relax or alpha, and weights.
RELAXED = np.array([1.0, 0.5, 2.0, 0.0]).view(np.int64).tolist()
WEIGHTS = np.array([1.0, 1.0, -0.5, np.inf]).view(np.int64).tolist()
USUAL = {"max_support": -1, "max_query": -1, "oracle": 0}
CHOICES = {"classifier": 3, "start": 4}  # from 0 on
OPS = sorted(
    name.removeprefix("kernelmeta::")
    for name in torch._C._dispatch_get_all_op_names()
    if re.match(r"kernelmeta::(?!triton_|cpu_isa|schemas)", name)
)


class Arguments:
    """Draws the arguments of one call; ``wild``: how many of them make no sense."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.sizes = {letter: int(random.choice(choices)) for letter, choices in SIZES.items()}
        self.sizes |= {"K": int(random.integers(3)), "U": self.sizes["T"] + 1, "B": 1, "C": 2}
        self.biased, self.widths = bool(random.integers(2)), [self.sizes[letter] for letter in "DHN"]
        self.sizes["P"] = sum(
            padded(units * (padded(inputs) if i else inputs)) + self.biased * padded(units)
            for i, (inputs, units) in enumerate(pairwise(self.widths))
        )
        self.type = TYPES[int(random.integers(2))]
        self.wild = float(random.choice([0.0, 0.05, 0.3]))

    def odd(self) -> bool:
        return bool(self.random.random() < self.wild)

    def hostile(self) -> int:
        return HOSTILE[int(self.random.integers(len(HOSTILE)))]

    def draw(self, name: str, kind: str) -> Any:
        if kind == "int":
            usual = {"n_way": self.sizes["N"], "steps": self.sizes["K"], **USUAL}
            if name in CHOICES:
                usual[name] = int(self.random.integers(CHOICES[name]))
            return self.hostile() if self.odd() else usual.get(name, 1)
        if kind == "float":
            return float(self.random.choice([0.0, 0.1, np.nan, np.inf, 1e308]))
        if kind == "bool":
            return self.biased if name == "biased" else bool(self.random.integers(2))
        if name == "widths":
            return [self.hostile() if self.odd() else n for n in self.widths]
        if kind == "List[int]":
            phases = [n for _ in range(int(self.random.integers(3))) for n in self.phase()]
            return [self.hostile() if self.odd() else n for n in phases]
        if kind == "Optional[Tensor]" and self.random.random() < 0.4:
            return None
        return self.tensor(name)

    def phase(self) -> list[int]:
        """One phase, or a sum of two or three: but for the last, whose steps they take, they join the next one."""
        last = int(self.random.integers(3)) if self.random.random() < 0.5 else 0
        return [
            number
            for i in range(last + 1)
            for number in (
                int(self.random.integers(len(ORACLES))),
                *map(int, self.random.integers(2, size=2)),
                self.sizes["K"] if i == last else 0,
                int(self.random.integers(3)) if self.random.random() < 0.5 else 0,
                RELAXED[int(self.random.integers(len(RELAXED)))],
                int(i < last),
                WEIGHTS[int(self.random.integers(len(WEIGHTS)))],
            )
        ]

    def tensor(self, name: str) -> torch.Tensor:
        shape = [self.sizes[letter] for letter in SHAPES.get(name, "")] if name in SHAPES else [1]
        if name == "trace":
            shape = [int(self.random.choice([0, 1, 100, 10_000]))]
        if self.odd():
            shape = [int(n) for n in self.random.choice([0, 1, 2, 9], size=int(self.random.integers(5)))]
        if name in NUMBERS and not self.odd():
            low, high = [(0, 1), (0, self.sizes["N"]), (-3, 9), (-(2**63), 2**63 - 1)][int(self.random.integers(4))]
            return torch.randint(low, max(high, low + 1), shape)
        made = torch.randn(shape).to(TYPES[int(self.random.integers(len(TYPES)))] if self.odd() else self.type)
        return made.mT if made.dim() >= 2 and self.random.random() < 0.1 else made


def check(random: np.random.Generator, folder: Path) -> None:
    torch.manual_seed(int(random.integers(2**31)))
    for _ in range(CALLS):
        name = OPS[int(random.integers(len(OPS)))]
        op = getattr(torch.ops.kernelmeta, name).default
        arguments = Arguments(random)
        values = [arguments.draw(argument.name, str(argument.type)) for argument in op._schema.arguments]
        try:
            op(*values)
        except (ValueError, TypeError, MemoryError, RuntimeError, NotImplementedError) as error:
            text = str(error)
            assert "bad_alloc" not in text, f"{name}: {text}"
            assert "API call failed" not in text, f"{name}: {text}"
