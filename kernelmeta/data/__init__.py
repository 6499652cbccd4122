"""Feature banks and the episodes drawn from them."""

from __future__ import annotations

from kernelmeta.data.bank import FeatureBank
from kernelmeta.data.episodes import Episodes, EpisodeSampler

__all__ = ["EpisodeSampler", "Episodes", "FeatureBank"]
