"""Feature banks and the episodes drawn from them."""

from __future__ import annotations

from kernelmeta.data.bank import FeatureBank
from kernelmeta.data.episodes import Episodes, EpisodeSampler
from kernelmeta.data.ragged_episodes import RaggedEpisodes, RaggedEpisodeSampler

__all__ = ["EpisodeSampler", "Episodes", "FeatureBank", "RaggedEpisodeSampler", "RaggedEpisodes"]
