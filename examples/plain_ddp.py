"""A backbone trained through km.nn.SIB over two processes, with PyTorch's own DistributedDataParallel.

torchrun --standalone --nproc-per-node=2 examples/plain_ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

WAY, SHOT, QUERY, TASKS, STEPS = 5, 1, 5, 4, 60


class FewShotNetwork(nn.Module):
    """A Conv-4 and a SIB head: episodes of images in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(km.nn.Conv4(32, 1), nn.Flatten())
        self.head = km.nn.SIB(WAY, 32, steps=3, inner_lr=1e-2)

    def forward(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        T, S = labels.shape
        rows = self.backbone(torch.cat([support, query], 1).flatten(0, 1)).view(T, S + query.shape[1], -1)
        return self.head(rows[:, :S], labels, rows[:, S:])


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
glyphs = load_glyphs()
images = F.interpolate(glyphs.images[:, None].float() / 255, 16)  # small, so that this takes seconds
bank = km.data.FeatureBank(images.flatten(1), glyphs.labels, glyphs.class_split.clamp(max=2), glyphs.class_names)
sampler = km.data.EpisodeSampler(bank, "train", way=WAY, shot=SHOT, query=QUERY, seed=0)
network = DistributedDataParallel(FewShotNetwork())
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
for step in range(STEPS):
    # Each process draws its own tasks of the step: any episode can be drawn on its own.
    mine = sampler.draw((step * dist.get_world_size() + rank) * TASKS, TASKS)
    logits = network(images[mine.support_index], mine.support_labels, images[mine.query_index])
    loss = F.cross_entropy(logits.flatten(0, 1), mine.query_labels.flatten())
    optimizer.zero_grad()
    loss.backward()  # through the head's steps; gradients are averaged over the processes
    optimizer.step()
    if rank == 0 and step % 20 == 19:
        right = (logits.argmax(-1) == mine.query_labels).float().mean()
        print(f"step {step + 1}: loss {loss.item():.2f}, {right.item():.0%} right", flush=True)
dist.destroy_process_group()
