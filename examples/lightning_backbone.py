"""A backbone trained through km.nn.SIB by Lightning: bfloat16, a checkpoint, and going on from it.

python examples/lightning_backbone.py        # needs: pip install lightning
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import nn

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

WAY, TASKS = 5, 4
glyphs = load_glyphs()
IMAGES = F.interpolate(glyphs.images[:, None].float() / 255, 16)  # small, so that this takes seconds
BANK = km.data.FeatureBank(IMAGES.flatten(1), glyphs.labels, glyphs.class_split.clamp(max=2), glyphs.class_names)


class Steps(torch.utils.data.Dataset):
    """A step of the optimizer is an item: the images and labels of its tasks."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.sampler = km.data.EpisodeSampler(BANK, "train", way=WAY, shot=1, query=5, seed=0)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        drawn = self.sampler.draw(step * TASKS, TASKS)
        return IMAGES[drawn.support_index], drawn.support_labels, IMAGES[drawn.query_index], drawn.query_labels


class FewShot(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(km.nn.Conv4(32, 1), nn.Flatten())
        self.head = km.nn.SIB(WAY, 32, steps=3, inner_lr=1e-2)

    def training_step(self, batch: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        support, labels, query, answers = batch
        rows = self.backbone(torch.cat([support, query], 1).flatten(0, 1)).unflatten(0, (TASKS, -1))
        logits = self.head(rows[:, :WAY], labels, rows[:, WAY:])
        self.log("accuracy", (logits.argmax(-1) == answers).float().mean(), prog_bar=True, on_epoch=True, on_step=False)
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


quiet = {"accelerator": "cpu", "precision": "bf16-mixed", "logger": False, "enable_model_summary": False}
for epochs, checkpoint in ((1, None), (2, "last.ckpt")):  # the second goes on where the first stopped
    trainer = lightning.Trainer(max_epochs=epochs, enable_progress_bar=False, enable_checkpointing=False, **quiet)
    trainer.fit(FewShot(), torch.utils.data.DataLoader(Steps(30), batch_size=None), ckpt_path=checkpoint)
    trainer.save_checkpoint("last.ckpt")
    print(f"epoch {epochs}: {float(trainer.callback_metrics['accuracy']):.0%} right, step {trainer.global_step}")
