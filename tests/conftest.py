"""Settings of every test."""

from __future__ import annotations

import hypothesis
import torch

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
torch.set_num_threads(min(2, torch.get_num_threads()))
