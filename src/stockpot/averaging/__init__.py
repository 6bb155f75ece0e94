"""Algorithm 1 for any trainer: when to average, with what, and how to write the result."""

from stockpot.averaging.anchor import Anchor
from stockpot.averaging.blend import average_
from stockpot.averaging.schedule import merge_steps, merge_steps_every
from stockpot.averaging.sfa import SFA, MergeEvent

__all__ = ["SFA", "Anchor", "MergeEvent", "average_", "merge_steps", "merge_steps_every"]
