"""Models by configuration: the project's small networks, Hugging Face's, and the user's own.

The settings load no torch; ``settings.build(stream)`` gives the
:class:`~stockpot.models.learner.Learner`.
"""

from stockpot.models.settings import MODELS, ModelSettings, expand_model

__all__ = ["MODELS", "ModelSettings", "expand_model"]
