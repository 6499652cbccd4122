"""Transductive few-shot methods in plain PyTorch, many tasks at once: the peers that `kernelmeta compare` sets beside
the learned ones. Nothing in them is trained.
"""

from kernelmeta.transductive.alpha_tim import alpha_tim
from kernelmeta.transductive.bd_cspn import bd_cspn
from kernelmeta.transductive.laplacian_shot import laplacian_shot
from kernelmeta.transductive.logistic_regression import logistic_regression
from kernelmeta.transductive.pt_map import pt_map
from kernelmeta.transductive.sinkhorn_kmeans import sinkhorn_kmeans
from kernelmeta.transductive.tim import tim
from kernelmeta.transductive.transport import transport
from kernelmeta.transforms import power_transform

__all__ = [
    "alpha_tim",
    "bd_cspn",
    "laplacian_shot",
    "logistic_regression",
    "power_transform",
    "pt_map",
    "sinkhorn_kmeans",
    "tim",
    "transport",
]
