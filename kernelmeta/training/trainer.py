"""Meta-training on episodes from a feature bank."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from kernelmeta.data import FeatureBank, RaggedEpisodes
from kernelmeta.data.bank import SPLITS
from kernelmeta.data.words import one_line
from kernelmeta.nn.training_step import TrainsAtOnce
from kernelmeta.ops import focal_distillation
from kernelmeta.ranks import Ranks
from kernelmeta.tasks import Ragged
from kernelmeta.training.calibration import Calibration
from kernelmeta.training.checkpoint import (
    AVERAGED,
    BEST,
    CHECKPOINT,
    Checkpoint,
    count,
    fingerprint,
    optimizer_tensors,
    restore_optimizer,
    rows,
)
from kernelmeta.training.config import TrainConfig
from kernelmeta.training.evaluation import episode_accuracies, interval
from kernelmeta.training.finite import NotFiniteError, not_finite
from kernelmeta.training.flat_parameters import FlatParameters, can_be_flat
from kernelmeta.training.interruptions import interruptions
from kernelmeta.training.learners import LEARNERS
from kernelmeta.training.proportions import query_shares
from kernelmeta.training.settings import bounds, check_memory

if TYPE_CHECKING:
    from kernelmeta.training.predecessor import Predecessor

# Steps are run in blocks: drawn at once, looked at once. A function of the configuration alone, so that a
# resumed run cuts its blocks where an uninterrupted one does.
BLOCK_STEPS, BLOCK_EPISODES = 128, 1024
# Where a task takes a tenth of a second.
BLOCK_EPISODES_WHOLE_NETWORK = 64
# The running mean of the weights takes them in every so many steps, so that it costs nothing.
AVERAGE_EVERY = 32
CHECKPOINT_SECONDS = 5.0
VALIDATION_EPISODES = 400
# Of each cell, where there are several.
LEAST_VALIDATION_EPISODES = 100
# Validation episodes come from the far end of their sequence, apart from any evaluation on the same classes.
VALIDATION_FIRST = 1 << 40

# (name, value, episodes seen): "loss", "accuracy", "validation accuracy", in percent the latter two.
Report = Callable[[str, float, int], None]


# Settings that may differ between a checkpoint and the run that goes on from it: training longer, and where the data
# are, which have a fingerprint.
FREE = ("episodes", "data", "weights", "backbone", "update_from")


class Trainer:
    """Runs the steps of one configuration; its state is a checkpoint.

    Args:
        config: the settings.
        bank: where the episodes come from.
        device: where the features lie and the steps run.
        ranks: the processes over which every step's tasks are split.
        predecessor: the learner that this one must not flip, where ``config.update_from`` names one.

    Raises:
        ValueError: the bank does not suit the configuration.
        MemoryError: the learner, or the episodes of a step, would not fit into the machine's memory.
    """

    def __init__(
        self,
        config: TrainConfig,
        bank: FeatureBank,
        *,
        device: str = "cpu",
        ranks: Ranks | None = None,
        predecessor: Predecessor | None = None,
    ) -> None:
        if (config.update_from is None) != (predecessor is None):
            raise ValueError("predecessor: expected where config.update_from names a run, and only there")
        self.predecessor = predecessor
        self.config = config
        self.ranks = ranks or Ranks()
        self.first_task, self.tasks = self.ranks.share(config.tasks_per_step)
        if self.ranks.size > 1 and config.norm_stats == "batch":
            raise ValueError('norm_stats: "batch" couples the tasks of a step; they cannot be split over processes')
        self.sampler = config.make_sampler(bank, "train")
        self.validation = {}
        if config.validate_every != 0 and len(bank.classes("val")):
            self.validation = config.cells(bank, "val")
        self.fingerprint = fingerprint(bank)
        self.kind = LEARNERS[config.learner]
        block = BLOCK_EPISODES_WHOLE_NETWORK if self.kind.whole_network else BLOCK_EPISODES
        self.block_steps = max(1, min(BLOCK_STEPS, block // config.tasks_per_step))
        way, shot, query = (bounds(size)[1] for size in (config.way, config.shot, config.query))
        index_bytes = 16 * way * (shot + query)  # of an episode: rows and labels
        check_memory(f"tasks_per_step: {config.tasks_per_step}", self.block_steps * config.tasks_per_step * index_bytes)
        self.features = bank.features.to(device)
        self.image_shape, self.features_of = bank.image_shape, bank.backbone
        # Parameters, their gradients, an optimizer's two numbers each; the best so far.
        copies = 5 if self.validation else 4
        self.head = config.make_learner(bank.n_features, bank.image_shape, copies=copies).to(device)
        config.check_learner(self.head)
        if predecessor is not None and getattr(self.head, "needs_proportions", False):
            raise ValueError(
                "update_from: a learner that is told the classes' shares of the query rows updates no other"
            )
        if config.center == "train":
            self.head.center_on(self.features[(bank.class_split[bank.labels] == SPLITS["train"]).to(device)])
        self.head.train()
        # What counts: the running mean of the weights, or the weights as they are.
        self.learner = copy.deepcopy(self.head) if config.average else self.head
        self.parameters = [p for p in self.head.parameters() if p.requires_grad]
        self.flat = FlatParameters(self.parameters) if can_be_flat(self.parameters, config.optimizer) else None
        self.optimizer = config.make_optimizer(self.parameters if self.flat is None else [self.flat.flat])
        self.step = 0
        self.history: list[tuple[int, float, float]] = []  # episodes, loss, accuracy in percent
        self.validations: list[tuple[int, float, float]] = []  # episodes, accuracy in percent, ci95; the cells' mean
        # Of each cell, where there are several.
        self.cell_validations: dict[str, list[tuple[int, float, float]]] = (
            {name: [] for name in self.validation} if len(self.validation) > 1 else {}
        )
        # The validation that was the best so far, the later one of equals, and the weights of then.
        self.best: tuple[int, float, float] | None = None
        self.best_weights: dict[str, Tensor] = {}
        # Of the probabilities: with the best weights, and at the last validation.
        self.temperatures = {"best": 1.0, "last": 1.0}

    @property
    def seen(self) -> int:
        """Episodes trained on so far."""
        return self.step * self.config.tasks_per_step

    def checkpoint(self) -> Checkpoint:
        """All that the run needs to go on."""
        tensors = {"model": self.head.state_dict(), "optimizer": optimizer_tensors(self.optimizer)}
        if self.config.average:
            tensors[AVERAGED] = self.learner.state_dict()
        if self.best is not None:
            tensors[BEST] = self.best_weights
        return Checkpoint(
            "train",
            tensors,
            {
                "step": self.step,
                "seed": self.config.seed,
                "config": self.config.to_dict(),
                "bank": self.fingerprint,
                "updates": self.predecessor and self.predecessor.fingerprint,
                "image_shape": self.image_shape,
                "features_of": self.features_of,
                "history": self.history,
                "validations": self.validations,
                "cell_validations": self.cell_validations,
                "best": self.best,
                "temperatures": self.temperatures,
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same configuration and bank; more episodes than it had are welcome.

        Raises:
            ValueError: it does not fit.
        """
        state = checkpoint.state
        try:
            if state["bank"] != self.fingerprint:
                raise ValueError(f"data: not the bank that the run began with ({state['bank']})")
            updates = self.predecessor and self.predecessor.fingerprint
            if state.get("updates") != updates:
                raise ValueError(
                    f"update_from: not the run, on its bank, that this one began with ({state.get('updates')})"
                )
            trained = TrainConfig.from_dict(state["config"]).to_dict()
            # A rate that depends on how far the end is, is another one for another end.
            free = set(FREE) - ({"episodes"} if self.config.schedule != "constant" else set())
            for name, value in self.config.to_dict().items():
                if name not in free and trained.get(name) != value:
                    raise ValueError(f"{name}: the checkpoint was trained with {trained.get(name)!r}, not {value!r}")
            step, history, validations = count(state, "step"), rows(state, "history"), rows(state, "validations")
            self.head.load_state_dict(checkpoint.tensors["model"])
            if self.config.average:
                self.learner.load_state_dict(checkpoint.tensors[AVERAGED])
            best = state.get("best")
            best_weights = {} if best is None else checkpoint.tensors[BEST]
            for name, tensor in (self.learner.state_dict() if best_weights else {}).items():
                if best_weights[name].shape != tensor.shape:
                    raise KeyError(f"{BEST}.{name}")
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"])
            of_cells = state.get("cell_validations", {})
            self.cell_validations = {name: rows(of_cells, name) for name in self.cell_validations}
            self.step, self.history, self.validations = step, history, validations
            self.temperatures = {name: float(state.get("temperatures", {}).get(name, 1)) for name in self.temperatures}
            self.best = None if best is None else rows({"best": [best]}, "best")[0]
            self.best_weights = {name: t.to(self.features.device) for name, t in best_weights.items()}
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"the checkpoint does not fit the run ({one_line(error)})") from None
        bad = not_finite(self._tensors())
        if bad:
            raise ValueError(f"the checkpoint holds NaN or infinite numbers ({bad[0]})")

    def run(self, out: Path, *, report: Report | None = None, progress: bool = False, keep_bar: bool = True) -> bool:
        """Train from where it stands to the end, with checkpoints in ``out`` every few seconds and at the
        end.

        Args:
            report: takes losses and accuracies.
            progress: show a bar, and with ``keep_bar`` leave it on the screen.

        Returns:
            False if Ctrl-C, SIGTERM or SIGHUP ended it early; the checkpoint holds where.

        Raises:
            OSError: a checkpoint could not be written.
            NotFiniteError: the loss or a parameter became NaN or infinite; the last checkpoint is one from before.
            ValueError: the bank's file was written to.
        """
        total, per_step = self.config.n_steps, self.config.tasks_per_step
        saved_at = -math.inf  # the first block's end shows whether there is room for checkpoints
        bar = tqdm(
            total=total * per_step,
            initial=min(self.step, total) * per_step,
            desc="train",
            unit="episode",
            disable=not (progress and self.ranks.first),
            leave=keep_bar,
        )
        # One task of a kernel runs on one core; other threads would only wait, and be in the way.
        alone = self.tasks == 1 and self.features.device.type == "cpu" and not self.kind.whole_network
        with bar, _threads(1 if alone else torch.get_num_threads()), interruptions() as interrupted:
            while self.step < total:
                n = min(self.block_steps - self.step % self.block_steps, total - self.step)
                loss, accuracy = self._run_block(n)
                seen = self.seen
                self.history.append((seen, loss, accuracy))
                if report:
                    report("loss", loss, seen)
                    report("accuracy", accuracy, seen)
                if self._validate_now(n):
                    value = self._validate()
                    self.validations.append((seen, *value))
                    self._keep_if_best()
                    if report:
                        report("validation accuracy", value[0], seen)
                        for name, of_cell in self.cell_validations.items():
                            report(f"validation accuracy/{name}", of_cell[-1][1], seen)
                stop = self.ranks.any(interrupted())
                now = time.monotonic()
                if self.ranks.first and (stop or self.step == total or now - saved_at >= CHECKPOINT_SECONDS):
                    self.checkpoint().save(out / CHECKPOINT)
                    saved_at = now
                # After the checkpoint: where the terminal is gone, this is an error.
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.1f} %", refresh=False)
                bar.update(n * per_step)
                if stop and self.step < total:
                    break
        return self.step >= total

    def _run_block(self, n: int) -> tuple[float, float]:
        """``n`` steps. Returns their mean loss and accuracy (percent), over all processes."""
        at_once = isinstance(self.head, TrainsAtOnce) and self.predecessor is None and not self.config.uneven
        step = self._step_at_once if at_once else self._step_by_autograd
        measures = []
        for episodes in self._steps(n):
            measures.append(step(*episodes))
            parameters = self.parameters
            if self.flat is not None:
                self.flat.gather()
                parameters = [self.flat.flat]
            if self.ranks.size > 1:
                buffers = [b for b in self.head.buffers() if b.is_floating_point()]
                self.ranks.average([p.grad for p in parameters if p.grad is not None] + buffers)
            if self.config.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
            if self.config.schedule != "constant":
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.rate(self.step)
            self.optimizer.step()
            self.step += 1
            if self.config.average and (self.step < AVERAGE_EVERY or self.step % AVERAGE_EVERY == 0):
                self._average()
        each = torch.stack([torch.stack(values) for values in zip(*measures, strict=True)])  # [2, n]
        self.ranks.average([each])
        self._check_finite(each[0])
        means = each.mean(1)
        return float(means[0]), 100 * float(means[1])

    def _steps(self, n: int) -> Iterator[tuple[Any, ...]]:
        """The episodes of the next ``n`` steps, this process's share of each: indices and labels of support and query
        rows, and `Ragged` where their sizes differ.
        """
        T, device, first = self.config.tasks_per_step, self.features.device, self.first_task
        episodes = self.sampler.draw(self.step * T, n * T)
        if isinstance(episodes, RaggedEpisodes):
            for step in range(n):
                *of_rows, ragged = episodes.tasks(step * T + first, self.tasks)
                assert ragged.n_ways is not None
                where = Ragged(
                    ragged.support_offsets.to(device), ragged.query_offsets.to(device), ragged.n_ways.to(device)
                )
                yield *(t.to(device) for t in of_rows), where
        else:
            yield from zip(*(t.view(n, T, -1)[:, first : first + self.tasks].to(device) for t in episodes), strict=True)

    def _check_finite(self, losses: Tensor) -> None:
        """Raises NotFiniteError if the steps done last, whose losses these are, led to what is not finite."""
        T, first = self.config.tasks_per_step, self.step - len(losses)
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            value, at = float(losses[bad[0]]), first + bad[0]
            episodes = f"episode {at}" if T == 1 else f"episodes {at * T} to {at * T + T - 1}"
            what = f"the loss of {episodes} (step {at}) is {value}"
        else:
            names = not_finite(self._tensors())
            if not names:
                return
            what = f"{names[0]} is NaN or infinite after episodes {first * T} to {self.step * T - 1}"
        raise NotFiniteError(
            f"training stopped: {what}; are the features very large, or the rates (lr {self.config.lr:g}"
            + ("" if self.config.inner_lr is None else f", inner_lr {self.config.inner_lr:g}")
            + ")? The last checkpoint, if there is one, is from before"
        )

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name."""
        return {f"{group}.{name}": t for group, named in self.checkpoint().tensors.items() for name, t in named.items()}

    def _step_at_once(
        self, support_index: Tensor, support_labels: Tensor, query_index: Tensor, answers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the mean cross entropy, set; returns it and the accuracy."""
        for parameter in self.parameters:
            parameter.grad = None
        results = self.head.gradients(
            self.features, support_labels, self.features, answers, support_index=support_index,
            query_index=query_index, loss_scale=1, process_group="local",
        )  # fmt: skip
        return results.loss, results.accuracy

    def _step_by_autograd(
        self,
        support_index: Tensor,
        support_labels: Tensor,
        query_index: Tensor,
        answers: Tensor,
        ragged: Ragged | None = None,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {} if ragged is None else {"ragged": ragged}
        if getattr(self.head, "needs_proportions", False):
            options["proportions"] = query_shares(answers, self.head.n_way, ragged)
        logits = self.head.from_bank(self.features, support_index, support_labels, query_index, **options)
        for parameter in self.parameters:
            parameter.grad = None
        if ragged is not None:  # every task counts alike, however many rows it has
            counts = ragged.query_offsets.diff()
            shares = (1 / (len(counts) * counts)).repeat_interleave(counts, output_size=len(answers)).to(logits.dtype)
            loss = shares @ F.cross_entropy(logits, answers, reduction="none")
            loss.backward()
            return loss.detach(), shares @ (logits.detach().argmax(-1) == answers).to(shares.dtype)
        if self.predecessor is None:
            loss = F.cross_entropy(logits.flatten(0, -2), answers.flatten())
        else:
            old_logits = self.predecessor.logits(support_index, support_labels, query_index)
            loss = focal_distillation(logits, old_logits, answers, **self.config.distillation)
        loss.backward()
        return loss.detach(), (logits.detach().argmax(-1) == answers).float().mean()

    @torch.no_grad()
    def _average(self) -> None:
        """The mean of all steps so far (of the first few, the last one), later one that forgets over ``average``."""
        share = max(AVERAGE_EVERY / self.config.average, AVERAGE_EVERY / self.step)
        for mean, value in zip(self._floating(self.learner), self._floating(self.head), strict=True):
            mean.lerp_(value, min(1.0, share))

    @staticmethod
    def _floating(module: torch.nn.Module) -> list[Tensor]:
        return [t for t in module.state_dict().values() if t.is_floating_point()]

    def _validate_now(self, n: int) -> bool:
        """Whether the ``n`` steps done last passed a multiple of ``validate_every`` (default: a tenth of
        the run), or were the last.
        """
        if not self.validation:
            return False
        if self.step == self.config.n_steps:
            return True
        every = self.config.validate_every or max(1, self.config.episodes // 10)
        T = self.config.tasks_per_step
        return self.step * T // every > (self.step - n) * T // every

    def _validate(self) -> tuple[float, float]:
        """Accuracy and its interval on the validation classes, the mean of all cells; computed by the first process for
        all.
        """
        if not self.ranks.first:
            return 0.0, 0.0  # only the first process writes a history
        self.learner.eval()
        calibration = Calibration()
        found = []
        episodes = max(LEAST_VALIDATION_EPISODES, VALIDATION_EPISODES // len(self.validation))
        for name, sampler in self.validation.items():
            learner = self.learner if sampler.way == self.learner.n_way else self.learner.for_ways(sampler.way)
            values = episode_accuracies(
                {"own": learner}, self.features, sampler, episodes, first=VALIDATION_FIRST,
                each=lambda _, logits, answers: calibration.add(logits, answers),
            )  # fmt: skip
            found.append(interval(values["own"]))
            if self.cell_validations:
                self.cell_validations[name].append((self.seen, *found[-1]))
            if values.not_finite["own"]:
                where = f", {name}" if self.cell_validations else ""
                tqdm.write(f"validation after {self.seen} episodes{where}: {values.warning()}", file=sys.stderr)
        self.temperatures["last"] = calibration.temperature()
        self.head.train()
        accuracies, halves = zip(*found, strict=True)
        return sum(accuracies) / len(found), math.hypot(*halves) / len(found)

    def _keep_if_best(self) -> None:
        if self.ranks.first and (self.best is None or self.validations[-1][1] >= self.best[1]):
            self.best = self.validations[-1]
            self.temperatures["best"] = self.temperatures["last"]
            self.best_weights = {name: t.detach().clone() for name, t in self.learner.state_dict().items()}

    def learner_at(self, at: str) -> tuple[Any, dict[str, Any]]:
        """The learner to evaluate, in evaluation mode, and which one that is.

        Args:
            at: "best", with the weights that were best on the validation classes (the last ones, where none were looked
                at), or "last".

        Returns:
            The learner, and ``{at, at_episodes, trained_episodes, temperature}``.
        """
        if at == "last" or self.best is None:
            which = {"at": "last", "at_episodes": self.seen, "temperature": self.temperatures["last"]}
            return self.learner.eval(), {**which, "trained_episodes": self.seen}
        learner = copy.deepcopy(self.learner)
        learner.load_state_dict(self.best_weights)
        which = {"at": "best", "at_episodes": self.best[0], "temperature": self.temperatures["best"]}
        return learner.eval(), {**which, "trained_episodes": self.seen}


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """PyTorch on n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
