"""The published implementation's own numbers, through km.nn.SIB and the published names of its parameters."""

from __future__ import annotations

import pytest
from episodes import relative_error
from golden import load, part
from torch.nn.functional import cross_entropy

import kernelmeta as km

NORM_STATS = {
    "sib_5way1shot_paper": ("task", "batch"),
    "sib_5way5shot_strong": ("task", "batch"),
    "sib_3way_batch_of_3": ("batch",),
    "sib_eval_running_stats": ("running",),
}


@pytest.mark.parametrize("backend", ["automatic", "reference"])
@pytest.mark.parametrize(("name", "norm_stats"), [(n, m) for n, modes in NORM_STATS.items() for m in modes])
def test_published_numbers(name: str, norm_stats: str, backend: str) -> None:
    golden = load(name)
    head = km.nn.SIB(
        int(golden["n_way"]), golden["support"].shape[2], int(golden["steps"]), float(golden["inner_lr"]),
        norm_stats=norm_stats,
    ).double()  # fmt: skip
    state = part(golden, "state.")
    head.load_state_dict(km.nn.SIB.from_xfer(state))
    support, query = (golden[k].double().requires_grad_() for k in ("support", "query"))
    with km.use_backend(None if backend == "automatic" else backend):
        logits, weights = head(support, golden["support_labels"], query, return_weights=True)
        loss = cross_entropy(logits.flatten(0, 1), golden["query_labels"].flatten())
        loss.backward()

    errors = {
        "logits": relative_error(logits, golden["logits"]),
        "weights": relative_error(weights.weight, golden["weights"]),
        "loss": relative_error(loss, golden["loss"]),
        "support": relative_error(support.grad, golden["grad_support"]),
        "query": relative_error(query.grad, golden["grad_query"]),
    }
    # The published names map onto ours: so do their gradients, and the statistics after the call.
    stats = {k: v for k, v in state.items() if "running" in k}
    want = km.nn.SIB.from_xfer({**part(golden, "grad."), **stats})
    for key, parameter in head.named_parameters():
        errors[key] = float((parameter.grad - want[key]).abs().max() / want[key].abs().max())
    after = km.nn.SIB.from_xfer({**state, **part(golden, "after.")})
    errors["running_stats"] = relative_error(head.mlp.running_stats, after["mlp.running_stats"])
    assert max(errors.values()) <= 1e-9, errors
