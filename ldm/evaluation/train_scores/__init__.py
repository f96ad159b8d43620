"""Disentanglement scores during training."""

from ldm.evaluation.train_scores.callback import ScoreWhileTraining

__all__ = ["ScoreWhileTraining"]
