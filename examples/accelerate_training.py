"""A SIB head trained in a loop of Hugging Face Accelerate: mixed precision, gradient accumulation, checkpoints.

pip install . accelerate
accelerate launch examples/accelerate_training.py    # or: python examples/accelerate_training.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

WAY, STEPS = 5, 80

accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision="bf16", cpu=not torch.cuda.is_available())
torch.manual_seed(0)
glyphs = load_glyphs()
bank = km.data.FeatureBank(
    glyphs.images.flatten(1).float() / 255, glyphs.labels, glyphs.class_split.clamp(max=2), glyphs.class_names
)
sampler = km.data.EpisodeSampler(bank, "train", way=WAY, shot=1, query=15, seed=0)
head = km.nn.SIB(WAY, bank.n_features, steps=3, inner_lr=1e-2)
optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
head, optimizer = accelerator.prepare(head, optimizer)
features = bank.features.to(accelerator.device)

for step in range(STEPS):
    with accelerator.accumulate(head):
        # Each process draws its own tasks of the step: any episode can be drawn on its own.
        first = (step * accelerator.num_processes + accelerator.process_index) * 4
        tasks = sampler.draw(first, 4)
        index = tasks.support_index.to(accelerator.device), tasks.query_index.to(accelerator.device)
        labels = tasks.support_labels.to(accelerator.device), tasks.query_labels.to(accelerator.device)
        logits = head(features[index[0]], labels[0], features[index[1]])
        loss = F.cross_entropy(logits.flatten(0, 1), labels[1].flatten())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if step % 20 == 19:
        right = (logits.argmax(-1) == labels[1]).float().mean()
        accelerator.print(f"step {step + 1}: loss {loss.item():.2f}, {right.item():.0%} right")
accelerator.save_state("runs/accelerate")
accelerator.print("saved; accelerator.load_state('runs/accelerate') goes on from there")
