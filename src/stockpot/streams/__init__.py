"""Where tasks come from: streams of tasks cut from data sets.

The settings (:data:`STREAMS`) load no torch, so that an experiment is checked before anything heavy
is imported; ``settings.load()`` gives the :class:`~stockpot.streams.data.Stream`.
"""

from stockpot.streams.settings import STREAMS, StreamSettings

__all__ = ["STREAMS", "StreamSettings"]
