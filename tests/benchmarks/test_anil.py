"""The peers of the ANIL benchmark do the same work."""

from __future__ import annotations

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not part of the installed package")

from benchmarks import anil

SIZE = anil.AnilSize(T=3, N=3, S=7, D=13, K=2)


@pytest.mark.parametrize("name", [name for name in anil.PEERS if name != "compile"])  # which takes half a minute
def test_peers_agree_with_the_loop_in_float64(name: str) -> None:
    runners, notes = anil.checked(anil.draw(SIZE).double(), [name], 1e-9)
    if any("not installed" in note for note in notes):
        pytest.skip(notes[0])
    assert list(runners) == [name], notes


def test_first_order_is_noticed() -> None:
    """Without the derivative of the steps the gradients are others."""
    problem = anil.draw(SIZE)
    want = anil._loop(problem.double())(0)
    fewer = anil._loop(problem._replace(size=SIZE._replace(K=1)))(0)
    assert max(anil.agreement.errors(fewer, want)) > 1e-4
