"""ANIL: a linear head shared by all tasks, adapted by gradient steps on the support rows."""

from __future__ import annotations

from kernelmeta.nn.program import Program
from kernelmeta.reference.phases import Phase


class ANIL(Program):
    """MAML's inner loop on the head alone (Raghu et al. 2020): the mean cross-entropy of the labelled support rows.

    The meta-gradient is that of MAML (Finn et al. 2017): exact, through all steps.

    Args:
        n_way: N.
        n_features: D.
        steps: K.
        inner_lr: of the steps; the first value of their rates where these are learned.
        first_order: steps are constants, as in first-order MAML: no gradient flows through them.
        learn_rates: learn one rate for each step (Meta-SGD's idea, Li et al. 2017).

    Parameters: ``weight`` [N, D], ``bias`` [N], and with ``learn_rates`` one ``rates`` [K].
    """

    def __init__(
        self,
        n_way: int,
        n_features: int,
        steps: int = 5,
        inner_lr: float = 0.01,
        first_order: bool = False,
        learn_rates: bool = False,
    ) -> None:
        phase = Phase("cross_entropy", steps, inner_lr, learn_rates=learn_rates)
        super().__init__(n_way, n_features, [phase], classifier="linear", start="learned")
        self.first_order = first_order
