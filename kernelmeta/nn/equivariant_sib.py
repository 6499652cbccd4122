"""SIB with a gradient that does not depend on how the classes are numbered, nor on how many there are."""

from __future__ import annotations

from dataclasses import replace

from kernelmeta.nn.program import Program
from kernelmeta.phases import Phase


class EquivariantSIB(Program):
    """SIB whose guessed gradient is equivariant: renumbering a task's classes renumbers its logits, and that is all.

    A :class:`Program` of one phase. As :class:`SIB` it proposes a cosine classifier from the support set and refines it
    on the unlabelled query rows (Hu et al. 2020), but by an :class:`EquivariantGradientMLP`, which has nothing to learn
    about permutations, and no size that depends on the number of classes: what was trained on tasks of one number of
    classes can be loaded for tasks of another, and one call takes tasks of any (``ragged``).

    Args:
        n_way: N, the classes of a task; of the one that has most, where they differ. No parameter depends on it.
        n_features: D.
        steps: K; may be lowered after training.
        inner_lr: their learning rate.
        hidden: hidden units of the MLP.
        norm_stats: whose statistics the MLP's BatchNorm uses: "task" (each task its own) or "running" (those in
            ``mlp.running_stats``, which training does not update).
        reduction: "sum" of the guessed gradient over the query rows, as in SIB, or "mean".
        transform, center: of the features, see :class:`Learner`.

    Parameters: ``weight`` [D], ``scale`` [1], ``bias`` [1] and those of ``mlp``.

    Raises:
        ValueError: an argument out of its range, named.
    """

    def __init__(
        self,
        n_way: int,
        n_features: int,
        steps: int = 3,
        inner_lr: float = 1e-2,
        hidden: int = 16,
        norm_stats: str = "task",
        *,
        reduction: str = "sum",
        transform: str = "none",
        center: str = "none",
    ) -> None:
        phase = Phase("equivariant_gradient", steps, inner_lr)
        super().__init__(
            n_way, n_features, [phase], norm_stats=norm_stats, hidden=hidden, reduction=reduction,
            transform=transform, center=center,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """K."""
        return self.phases[0].steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.phases = (replace(self.phases[0], steps=steps),)
