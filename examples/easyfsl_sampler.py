"""easyfsl draws the tasks, kernelmeta's heads answer them, beside easyfsl's own prototypes.

pip install . easyfsl
"""

from __future__ import annotations

import torch
from easyfsl.datasets import FeaturesDataset
from easyfsl.methods import PrototypicalNetworks
from easyfsl.samplers import TaskSampler
from torch.utils.data import DataLoader, Sampler

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

WAY, SHOT, QUERY, TASKS = 5, 1, 15, 200

# easyfsl 1.5 gives Sampler an argument that recent versions of PyTorch no longer take.
Sampler.__init__ = lambda self, data_source=None: None

torch.manual_seed(0)
glyphs = load_glyphs()
chosen = (glyphs.class_split[glyphs.labels] == 2).nonzero().flatten()  # classes kept for tests
dataset = FeaturesDataset(
    glyphs.labels[chosen].tolist(),
    list(glyphs.images[chosen].flatten(1).float() / 255),
    [glyphs.class_names[c] for c in glyphs.labels[chosen].tolist()],
)
sampler = TaskSampler(dataset, n_way=WAY, n_shot=SHOT, n_query=QUERY, n_tasks=TASKS)
loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)

theirs = PrototypicalNetworks(torch.nn.Identity(), feature_normalization=2.0)
heads = {"kernelmeta prototypes": km.nn.Prototypes(WAY), "kernelmeta soft k-means": km.nn.SoftKMeans(WAY)}
right = dict.fromkeys(["easyfsl prototypes", *heads], 0.0)
for support, support_labels, query, query_labels, _ in loader:
    theirs.process_support_set(support, support_labels)
    answers = {"easyfsl prototypes": theirs(query)}
    for name, head in heads.items():  # [T, rows, D], here T = 1; thousands of tasks may go into one call
        answers[name] = head(support[None], support_labels[None], query[None])[0]
    for name, logits in answers.items():
        right[name] += (logits.argmax(-1) == query_labels).float().mean().item() / TASKS
for name, accuracy in right.items():
    print(f"{name:24} {accuracy:.1%} right")
