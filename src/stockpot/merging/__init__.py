"""Combining finished models: rules from named tensors to named tensors.

Each rule is one pure function. It takes models as mappings from names to tensors (a state dict, or
the tensors of a safetensors file) and returns a new mapping; what it is given is never modified.
"""

from stockpot.merging.rules import Weights, fisher, linear, task_arithmetic, ties, wise_ft

__all__ = ["Weights", "fisher", "linear", "task_arithmetic", "ties", "wise_ft"]
