"""Scorers: records in, one reward for every completion out."""

from exalign.scoring.classifier import ClassifierScorer
from exalign.scoring.function import FunctionScorer
from exalign.scoring.protocol import Scorer, scored
from exalign.scoring.reward_model import RewardModelScorer

__all__ = ["ClassifierScorer", "FunctionScorer", "RewardModelScorer", "Scorer", "scored"]
