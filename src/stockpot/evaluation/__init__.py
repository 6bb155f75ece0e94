"""The score of one model on one task."""

from stockpot.evaluation.accuracy import Score, accuracy

__all__ = ["Score", "accuracy"]
