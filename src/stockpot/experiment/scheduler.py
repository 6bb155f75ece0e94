"""Which run next, when several run at once and some wait for what others train.

A content key that several stages have is trained, and its scores are taken, by one run: the first
in the plan that is not over and has yet to do a stage with that key. It is the key's *owner*. A
stage may begin if each of its keys is either there or owned by its own run.

Nobody waits for ever: a run only ever waits for an owner that comes before it in the plan, so the
first run that is not over waits for none. If an owner fails for good, the next in the plan is the
owner.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stockpot.experiment.plan import Plan, Run, Stage

__all__ = ["Scheduler"]


@dataclass
class _State:
    """Where a run is."""

    run: Run
    place: int
    """In the plan."""
    done: int
    """Finished stages."""
    ready: int
    """Stages from the first one on that may be trained now, as far as was looked."""
    attempts: int = 0
    """Deaths of its workers since a stage was last finished."""
    running: bool = False
    over: bool = False
    """Finished, with all that comes after its last stage, or failed."""


class Scheduler:
    """Decides, and remembers where every run is; it starts nothing itself.

    Args:
        plan: all runs.
        finished: how many stages of each run are finished.
        trained: whether the weights of a content key are in the store.
        scored: whether the scores of the weights of a content key are in the store.
        retries: how often a run is tried again whose worker died, before it has failed.
    """

    def __init__(
        self,
        plan: Plan,
        finished: Mapping[str, int],
        trained: Callable[[str], bool],
        scored: Callable[[str], bool],
        retries: int = 2,
    ) -> None:
        self._states = {
            run.id: _State(run, place, finished.get(run.id, 0), finished.get(run.id, 0))
            for place, run in enumerate(plan.runs)
        }
        for state in self._states.values():
            state.over = state.done == len(state.run.stages)
        self._there = {"trained": trained, "scored": scored}
        self._found: set[tuple[str, str]] = set()
        """What is in the store: it stays while a run needs it."""
        self._retries = retries
        self._users: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
        """By kind and key the runs, in the plan's order, and the number of their stage."""
        for run in plan.runs:
            for stage in run.stages:
                for need in _needs(stage):
                    self._users[need].append((run.id, stage.number))
        self._users = {need: users for need, users in self._users.items() if len(users) > 1}
        for need in self._users:
            self._find(need)

    @property
    def over(self) -> bool:
        """Whether every run is finished or has failed."""
        return all(state.over for state in self._states.values())

    def done(self, run: str) -> int:
        """How many stages of a run are finished."""
        return self._states[run].done

    def next(self) -> tuple[Run, int] | None:
        """A run that may begin or go on, and up to which stage; None if all that may are running.

        Runs that others wait for come first, then the longest, then the plan's order. A run that
        can only do some of its stages is taken if there is no other.
        """
        waiting = self._waited_for()
        best: tuple[tuple[bool, bool, int, int], _State] | None = None
        for state in self._states.values():
            if state.running or state.over:
                continue
            self._look(state)
            whole = state.ready == len(state.run.stages)
            if state.ready == state.done and not whole:
                continue
            steps = self._steps(state)
            rank = (not whole, not waiting[state.run.id], -steps, state.place)
            if best is None or rank < best[0]:
                best = rank, state
        if best is None:
            return None
        best[1].running = True
        return best[1].run, best[1].ready

    def stage_ends(self, run: str, number: int) -> None:
        """A stage is finished."""
        state = self._states[run]
        state.done = max(state.done, number + 1)
        state.ready = max(state.ready, state.done)
        state.attempts = 0
        self._find(*_needs(state.run.stages[number]))

    def job_ends(self, run: str) -> None:
        """A job is done as it was asked for."""
        state = self._states[run]
        state.running = False
        state.over = state.done == len(state.run.stages)

    def fails(self, run: str) -> None:
        """A run is over without a result."""
        state = self._states[run]
        self._stops(state)
        state.over = True

    def dies(self, run: str) -> bool:
        """A worker died with its job; whether the run will be tried again."""
        state = self._states[run]
        self._stops(state)
        state.attempts += 1
        state.over = state.attempts > self._retries
        return not state.over

    def _stops(self, state: _State) -> None:
        """A job ended early; what it was about to bring may be in the store all the same."""
        state.running = False
        if state.done < len(state.run.stages):
            self._find(*_needs(state.run.stages[state.done]))

    def _find(self, *needs: tuple[str, str]) -> None:
        for kind, key in needs:
            if (kind, key) in self._users and self._there[kind](key):
                self._found.add((kind, key))

    def _steps(self, state: _State) -> int:
        """The optimizer steps that a run can make now."""
        stages = state.run.stages[state.done : state.ready]
        return sum(s.steps for s in stages if ("trained", s.trained) not in self._found)

    def _look(self, state: _State) -> None:
        """Go on to the first stage that has to wait."""
        stages = state.run.stages
        state.ready = max(state.ready, state.done)
        while state.ready < len(stages) and not any(
            self._owner(need) not in (None, state.run.id) for need in _needs(stages[state.ready])
        ):
            state.ready += 1

    def _owner(self, need: tuple[str, str]) -> str | None:
        """Whose part it is to bring what several need; None if it is there, or nobody's."""
        if need not in self._users or need in self._found:
            return None
        for run, number in self._users[need]:
            state = self._states[run]
            if not state.over and state.done <= number:
                return run
        return None

    def _waited_for(self) -> Counter[str]:
        """How many needs of others each run is to bring."""
        owners = (self._owner(need) for need in self._users)
        return Counter(owner for owner in owners if owner is not None)


def _needs(stage: Stage) -> tuple[tuple[str, str], tuple[str, str]]:
    """What of a stage another run may have brought."""
    return ("trained", stage.trained), ("scored", stage.deployed)
