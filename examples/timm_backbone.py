"""A backbone of timm under a SIB head, trained end to end on episodes: gradients go through the head's steps.

pip install '.[timm]'
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

WAY, QUERY, TASKS, STEPS = 5, 5, 4, 40

torch.manual_seed(0)
# pretrained=True takes timm's weights, which are downloaded once.
backbone = timm.create_model("resnet10t", pretrained=False, num_classes=0, in_chans=1)
head = km.nn.SIB(WAY, backbone.num_features, steps=3, inner_lr=1e-2)
optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)

glyphs = load_glyphs()
images = F.interpolate(glyphs.images[:, None].float() / 255, 32)
bank = km.data.FeatureBank(images.flatten(1), glyphs.labels, glyphs.class_split.clamp(max=2), glyphs.class_names)
sampler = km.data.EpisodeSampler(bank, "train", way=WAY, shot=1, query=QUERY, seed=0)
for step in range(STEPS):
    tasks = sampler.draw(step * TASKS, TASKS)
    index = torch.cat([tasks.support_index, tasks.query_index], 1)  # [T, rows]
    rows = backbone(images[index.flatten()]).view(*index.shape, -1)
    support, query = rows.split([tasks.support_index.shape[1], tasks.query_index.shape[1]], 1)
    logits = head(support, tasks.support_labels, query)
    loss = F.cross_entropy(logits.flatten(0, 1), tasks.query_labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        right = (logits.argmax(-1) == tasks.query_labels).float().mean()
        print(f"step {step + 1}: loss {loss.item():.2f}, {right.item():.0%} right", flush=True)
