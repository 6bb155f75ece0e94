"""One short file per continual-learning method, each on the same five hooks."""

from stockpot.methods.base import Memory, Method, TaskRun
from stockpot.methods.ewc import EWC
from stockpot.methods.fisher_merging import FisherMerging
from stockpot.methods.l1 import L1
from stockpot.methods.l2 import L2
from stockpot.methods.multitask import Multitask
from stockpot.methods.rehearsal import Rehearsal
from stockpot.methods.sequential import Sequential
from stockpot.methods.sfa import SFA
from stockpot.methods.task_arithmetic import TaskArithmetic
from stockpot.methods.ties import Ties
from stockpot.methods.wise_ft import WiseFT

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Sequential,
        Multitask,
        Rehearsal,
        L1,
        L2,
        EWC,
        SFA,
        WiseFT,
        TaskArithmetic,
        Ties,
        FisherMerging,
    )
}

__all__ = ["METHODS", "Memory", "Method", "TaskRun"]
