"""Experiments of the paper on synthetic gradients (Hu et al. 2020) that are no few-shot classification."""
