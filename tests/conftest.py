"""Settings of every test."""

from __future__ import annotations

import hypothesis
import torch

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
# The C++ tests use the other cores at the same time, and threads that wait for each other take long then.
torch.set_num_threads(1)
