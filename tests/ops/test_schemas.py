"""What Python declares and what C++ reads from the dispatcher's stack are the same, by name and by type."""

from __future__ import annotations

import pytest
import torch

import kernelmeta as km

pytestmark = pytest.mark.skipif(not km.backends()["cpu"].available, reason=km.backends()["cpu"].reason)


def _native(device: str) -> dict[str, str]:
    lines = torch.ops.kernelmeta.schemas(device).splitlines()
    return {line.partition("(")[0]: line for line in lines}


def _declared(name: str) -> str:
    return str(getattr(torch.ops.kernelmeta, name).default._schema).removeprefix("kernelmeta::")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_is_read_as_it_is_declared(device: str) -> None:
    native = _native(device)
    assert {name: _declared(name) for name in native} == native


def test_every_op_has_a_kernel() -> None:
    ours = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kernelmeta::")]
    names = {name.removeprefix("kernelmeta::") for name in ours}
    kernels = {name for name in names if not name.startswith(("triton_", "schemas", "cpu_isa"))}
    assert kernels == set(_native("cpu"))
    training = {"sib_gradients", "linear_head_gradients", "noop"}
    assert set(_native("cuda")) == kernels - training
