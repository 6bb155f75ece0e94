"""One task, fine-tuned by ``transformers.Trainer`` with a method's hooks."""

from stockpot.training.settings import TrainingSettings

__all__ = ["TrainingSettings"]
