"""From a few labelled photos to a program without PyTorch: backbone and classifier as one ONNX file.

python examples/deployment.py        # needs: pip install 'kernelmeta[onnx]' onnxruntime
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import kernelmeta as km
from kernelmeta.data.glyphs import load_glyphs

glyphs = load_glyphs()
images = F.interpolate(glyphs.images[:, None].float() / 255, 16)
classes = (glyphs.class_split == 2).nonzero().flatten()[:5]  # five characters that nobody has trained on
rows = torch.stack([(glyphs.labels == c).nonzero().flatten()[:12] for c in classes])  # [5, 12]
support, query = rows[:, :3], rows[:, 3:]

torch.manual_seed(0)
backbone = nn.Sequential(km.nn.Conv4(64, 1), nn.Flatten()).eval()  # stands for yours; an untrained one does a little
with torch.no_grad():
    features = backbone(images)
head = km.nn.Prototypes(n_way=5)
labels = torch.arange(5).repeat_interleave(3)
classifier = head.adapt(features[support.flatten()][None], labels[None])
classifier.export("glyphs.onnx", backbone=backbone, example=images[:1])

# From here on neither kernelmeta nor PyTorch is needed.
session = onnxruntime.InferenceSession("glyphs.onnx")
answers = np.repeat(np.arange(5), query.shape[1])
(logits,) = session.run(None, {"rows": images[query.flatten()].numpy()})
print(f"{(logits.argmax(1) == answers).mean():.0%} of {len(answers)} images right, by onnxruntime alone")

expected = head(features[support.flatten()][None], labels[None], features[query.flatten()][None])[0]
difference = np.abs(logits - expected.detach().numpy()).max()
print(f"largest difference from kernelmeta: {difference:.1e}")
assert difference < 1e-4
