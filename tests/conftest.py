"""Settings of every test."""

from __future__ import annotations

import signal

import hypothesis
import torch

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
# The C++ tests use the other cores at the same time, and threads that wait for each other take long then.
torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore Ctrl-C, and nohup the end of the terminal, and what
# they start as well: some send these.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
