"""The ops count their operations, whoever imports PyTorch's counter, and whenever."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
with FlopCounterMode(display=False) as counter:
    km.nn.RidgeHead(3)(torch.randn(2, 6, 8), torch.arange(6).remainder(3).repeat(2, 1), torch.randn(2, 4, 8))
assert counter.get_total_flops() > 0, counter.get_flop_counts()
"""
ORDERS = {
    "counter first": "import torch\nfrom torch.utils.flop_counter import FlopCounterMode\nimport kernelmeta as km\n",
    "counter last": "import sys, torch, kernelmeta as km\nassert 'torch.utils.flop_counter' not in sys.modules\n"
    "from torch.utils.flop_counter import FlopCounterMode\n",
}


@pytest.mark.parametrize("order", ["counter first", "counter last"])
def test_operations_are_counted(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + COUNT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
