"""Merging files of any size in little memory, on all cores, with the same bytes every time.

The output is cut into units: some hundred thousand consecutive elements of one tensor. Workers take
them in file order; for each they read the same elements of every input, apply the formula in
float32, round once, and write the result where it belongs. What a formula has to know of a whole
tensor or model first is surveyed in a pass before, over a window of tensors that the system still
has in its cache afterwards, or over everything where the rule looks at the whole model.

No result depends on which worker does what or on where tensors are cut: parts begin at multiples
of a block, sums over a tensor are exact, and draws are keyed by name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stockpot.errors import NonFiniteError
from stockpot.files import read_json, write_json
from stockpot.merging.arrays import Array, Store, ops_for
from stockpot.merging.checkpoint import CheckpointError
from stockpot.merging.dtypes import as_bytes, fits, narrow, stored_as
from stockpot.merging.formulas import Facts, Notes, Part, Rule
from stockpot.merging.hashing import Hasher
from stockpot.merging.output import ModelFolder
from stockpot.merging.plan import Entry, MergePlan
from stockpot.merging.reading import Reader
from stockpot.merging.survey import BLOCK, sample_places
from stockpot.merging.window import Survey, Unit

__all__ = ["Engine", "Unit"]

_WINDOW_BYTES = 256 << 20
_KEEP_SECONDS = float(os.environ.get("STOCKPOT_MERGE_KEEP_SECONDS", "0.5"))
_GUESSES = 16
_ALTERNATIVES_BYTES = 64 << 20

Progress = Callable[[str, int], None]
"""Called with a phase (``survey``, ``merge``) and the bytes of input read since the last call, or,
negative, how many there will be."""


@dataclass
class _Ledger:
    """What is done, kept on the disk now and then so that a stopped merge goes on."""

    plan: str
    chunk: int
    done: int = 0
    """Units before this one are on the disk."""
    facts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By the first unit of a window: what was surveyed, for each point."""
    balance: list[int] = field(default_factory=list)
    """Per point: of the units before ``done``."""
    undecided: list[list[int]] = field(default_factory=list)
    majority: list[int] = field(default_factory=list)
    """Per point: the sign that undecided coordinates take for now."""


class Engine:
    """One merge of a plan into staging folders, one per point.

    Args:
        plan: what to merge.
        outputs: one per point of the plan.
        staging: folder for the ledger.
        token: tells this merge from others; the ledger of another is not followed.
        threads: workers; each computes on one core.
        chunk: elements of a unit, rounded up to a multiple of 4,096.
        device: where to compute.
        hasher: hashes the inputs meanwhile; what it finds stops the merge.
        progress: is told about bytes.
    """

    def __init__(
        self,
        plan: MergePlan,
        outputs: Sequence[ModelFolder],
        staging: Path,
        token: str,
        threads: int,
        chunk: int,
        device: str,
        hasher: Hasher,
        progress: Progress | None = None,
    ) -> None:
        self._plan = plan
        self._outputs = outputs
        self._state_path = staging / "merge-state.json"
        self._token = token
        self._threads = threads
        self._chunk = max(BLOCK, -(-chunk // BLOCK) * BLOCK)
        self._hasher = hasher
        self._progress = progress or (lambda phase, count: None)
        self._rules = plan.rules()
        self._units = list(_units(plan.entries, self._chunk))
        self._reader = Reader(
            [path for checkpoint in plan.inputs for path in checkpoint.files],
            stored_as(plan.wide),
            device,
        )
        self._copied_unlike: set[str] = set()
        self._notes: dict[int, list[Notes]] = {}
        self._alternatives: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._alternatives_bytes = 0
        self._store = Store(1 << 20)
        self._lock = threading.Lock()

    def run(self) -> list[str]:
        """Merge everything that is not on the disk yet; returns notes for the user.

        Raises:
            StockpotError: for inputs or results that are not finite, a full disk, and damage.
        """
        _keep_freed_memory()
        try:
            # The same threads throughout: the C library keeps memory for each that ever was.
            with ThreadPoolExecutor(self._threads) as self._pool:
                self._run()
        finally:
            self._reader.close()
        return [
            f"{name} is not floating and differs between the models: taken from the last"
            for name in sorted(self._copied_unlike)
        ]

    def _run(self) -> None:
        ledger = self._open_ledger()
        if any(rule.survey is not None for rule in self._rules):
            self._progress("survey", -self._plan.nbytes)
        self._progress("merge", -self._plan.nbytes)
        done = self._units[: ledger.done]
        self._progress("merge", sum(_bytes_of(self._plan.entries[u.entry], u) for u in done))
        keeper = _Keeper(lambda: self._keep(ledger))
        with keeper:
            for first, last in self._windows():
                if last <= ledger.done:
                    continue
                self._merge_window(first, last, ledger)
            self._settle_majority(ledger)

    def _open_ledger(self) -> _Ledger:
        fresh = _Ledger(
            self._token,
            self._chunk,
            balance=[0] * len(self._rules),
            undecided=[[] for _ in self._rules],
        )
        if not self._state_path.is_file():
            return fresh
        ledger = _Ledger(**read_json(self._state_path))
        return ledger if (ledger.plan, ledger.chunk) == (self._token, self._chunk) else fresh

    def _windows(self) -> Iterator[tuple[int, int]]:
        """Ranges of units that are surveyed and then merged."""
        if any(rule.passes_over_whole_model for rule in self._rules):
            yield 0, len(self._units)
            return
        first = size = 0
        for number, unit in enumerate(self._units):
            entry = self._plan.entries[unit.entry]
            # A window ends with a tensor: what is surveyed is a tensor at least.
            if unit.start == 0 and size >= _WINDOW_BYTES:
                yield first, number
                first, size = number, 0
            size += _bytes_of(entry, unit)
        yield first, len(self._units)

    def _merge_window(self, first: int, last: int, ledger: _Ledger) -> None:
        facts = self._facts(first, last, ledger)
        if not ledger.majority:
            ledger.majority = self._guess_majority(facts, first, last)
        for known, majority in zip(facts, ledger.majority, strict=True):
            known.majority = majority
        self._each(range(max(first, ledger.done), last), lambda n: self._merge(n, facts))

    # Units.

    def _each(self, numbers: Iterable[int], work: Callable[[int], None]) -> None:
        """Do some work for each number, on all workers, in order; the first failure stops all."""
        pending = iter(numbers)
        failures: list[BaseException] = []

        def worker() -> None:
            np.seterr(all="ignore")  # of this thread; what is not finite is found and named
            while not failures:
                with self._lock:
                    number = next(pending, None)
                if number is None:
                    return
                try:
                    self._hasher.check()
                    work(number)
                except BaseException as error:
                    failures.append(error)
                    return

        workers = [self._pool.submit(worker) for _ in range(self._threads)]
        try:
            wait(workers)
        except BaseException as error:  # Ctrl-C: workers end with their units
            failures.append(error)
            wait(workers)
        if failures:
            raise failures[0]

    def _merge(self, number: int, facts: Sequence[Facts]) -> None:
        unit = self._units[number]
        entry = self._plan.entries[unit.entry]
        notes = [Notes() for _ in self._rules]
        if entry.copied:
            self._copy(unit, entry)
        else:
            looked = any(known.looked for known in facts)
            part = self._reader.part(entry, unit.start, unit.stop, check=not looked)
            for rule, known, note, output in zip(
                self._rules, facts, notes, self._outputs, strict=True
            ):
                merged = rule.blend(part, known, note)
                if note.problem is not None:
                    raise CheckpointError(f"tensor {entry.name!r}: {note.problem}")
                self._write(output, unit, entry, merged)
            for point, note in enumerate(notes):
                if note.undecided is not None:
                    self._prepare(number, point, part, facts[point], note)
        with self._lock:
            self._notes[number] = notes
        self._progress("merge", _bytes_of(entry, unit))

    def _prepare(self, number: int, point: int, part: Part, facts: Facts, notes: Notes) -> None:
        """Merge the undecided coordinates with the other sign, in case the majority is that.

        They are few: a second pass over everything for their sake would cost as much as the first.
        """
        ops = ops_for(part.models[0])
        places = np.flatnonzero(ops.to_numpy(notes.undecided) != 0)
        notes.undecided = ()  # its memory goes; that there were some stays
        rule = self._rules[point]
        if rule.positional or self._alternatives_bytes > _ALTERNATIVES_BYTES:
            return  # the unit is merged anew
        few = Part(
            part.name,
            part.start,
            part.base[places] if part.base is not None else None,
            [model[places] for model in part.models],
        )
        other = rule.blend(few, replace(facts, majority=-facts.majority), Notes())
        values = narrow(ops.to_numpy(other), self._plan.entries[self._units[number].entry].dtype)
        with self._lock:
            kept = self._store.keep(places.astype(np.int32)), self._store.keep(values)
            self._alternatives[number, point] = kept
            self._alternatives_bytes += 4 * places.size + values.nbytes

    def _copy(self, unit: Unit, entry: Entry) -> None:
        kept = bytes(self._reader.raw(entry.models[-1], unit.start, unit.stop))
        for source in (*((entry.base,) if entry.base else ()), *entry.models[:-1]):
            if bytes(self._reader.raw(source, unit.start, unit.stop)) != kept:
                with self._lock:
                    self._copied_unlike.add(entry.name)
        for output in self._outputs:
            output.write(unit.entry, unit.start * entry.models[-1].itemsize, memoryview(kept))

    def _write(self, output: ModelFolder, unit: Unit, entry: Entry, merged: Array) -> None:
        values = ops_for(merged).to_numpy(merged)
        if not values.size:
            return
        if not fits(values, entry.dtype):
            raise NonFiniteError(
                f"tensor {entry.name!r}: merged values overflow {entry.dtype}; lower the scale or "
                "the weights, or merge in a wider --dtype"
            )
        result = narrow(values, entry.dtype)
        output.write(unit.entry, unit.start * result.itemsize, as_bytes(result))

    # Surveys.

    def _facts(self, first: int, last: int, ledger: _Ledger) -> list[Facts]:
        known = ledger.facts.get(str(first))
        if known is not None:
            return [Facts(**each) for each in known]
        surveys = {
            rule.survey: Survey(rule, self._plan.entries, self._units[first:last])
            for rule in self._rules
        }
        needed = [survey for survey in surveys.values() if survey.needed]
        if needed:
            self._survey(needed, first, last)
        facts = [surveys[rule.survey].facts(self._pool, self._parts) for rule in self._rules]
        if needed:
            with self._lock:
                ledger.facts[str(first)] = [asdict(each) for each in facts]
            self._reader.rewind()
        return facts

    def _survey(self, surveys: Sequence[Survey], first: int, last: int) -> None:
        entries = sorted({unit.entry for unit in self._units[first:last]})
        entries = [number for number in entries if not self._plan.entries[number].copied]
        if any(survey.ranked for survey in surveys):
            self._each(entries, lambda number: self._sample(surveys, number))
            self._reader.rewind()

        def look(number: int) -> None:
            unit = self._units[number]
            entry = self._plan.entries[unit.entry]
            if entry.copied:
                return
            part = self._reader.part(entry, unit.start, unit.stop)
            for survey in surveys:
                survey.add(part)
            self._progress("survey", _bytes_of(entry, unit))

        for survey in surveys:
            survey.begin(self._pool)
        self._each(range(first, last), look)

    def _sample(self, surveys: Sequence[Survey], number: int) -> None:
        entry = self._plan.entries[number]
        for survey in surveys:
            if survey.ranked:
                for start, stop in sample_places(entry.numel, survey.elements_of(entry.name)):
                    survey.sample(self._reader.part(entry, start, stop))

    def _parts(self, names: set[str]) -> Iterator[Part]:
        """All parts of some tensors, one by one."""
        for unit in self._units:
            entry = self._plan.entries[unit.entry]
            if entry.name in names and not entry.copied:
                yield self._reader.part(entry, unit.start, unit.stop)

    def _guess_majority(self, facts: Sequence[Facts], first: int, last: int) -> list[int]:
        """The sign that most coordinates elect in a few units: right, it saves a second pass."""
        if not any(rule.elects for rule in self._rules):
            return [1] * len(self._rules)
        balance = [0] * len(self._rules)
        step = max(1, (last - first) // _GUESSES)
        for number in range(first, last, step):
            unit = self._units[number]
            entry = self._plan.entries[unit.entry]
            if entry.copied:
                continue
            part = self._reader.part(entry, unit.start, unit.stop)
            for point, rule in enumerate(self._rules):
                notes = Notes()
                rule.blend(part, facts[point], notes)
                balance[point] += notes.balance
        self._reader.rewind()
        return [1 if each > 0 else -1 for each in balance]

    def _settle_majority(self, ledger: _Ledger) -> None:
        """Mend the coordinates that waited for the majority's sign, if it was not as assumed."""
        self._account(ledger, len(self._units))
        for number, rule in enumerate(self._rules):
            balance = ledger.balance[number]
            # No majority counts as a negative one: see the formula.
            majority = 1 if balance > 0 else -1
            redo = ledger.undecided[number] if majority != ledger.majority[number] else []
            for unit_number in redo:
                if (unit_number, number) in self._alternatives:
                    unit = self._units[unit_number]
                    places, values = self._alternatives[unit_number, number]
                    self._outputs[number].patch(unit.entry, unit.start, unit.stop, places, values)
            redo = [each for each in redo if (each, number) not in self._alternatives]
            if not redo:
                continue
            self._reader.rewind()
            facts = {}
            for first, last in self._windows():
                if any(first <= unit < last for unit in redo):
                    found = self._facts(first, last, ledger)[number]
                    found.majority = majority
                    facts.update(dict.fromkeys(range(first, last), found))

            def again(
                unit_number: int,
                rule: Rule = rule,
                facts: dict[int, Facts] = facts,
                output: ModelFolder = self._outputs[number],
            ) -> None:
                unit = self._units[unit_number]
                entry = self._plan.entries[unit.entry]
                part = self._reader.part(entry, unit.start, unit.stop)
                merged = rule.blend(part, facts[unit_number], Notes())
                self._write(output, unit, entry, merged)

            self._each(redo, again)

    # The ledger.

    def _account(self, ledger: _Ledger, upto: int) -> None:
        """Move the notes of finished units into the ledger."""
        with self._lock:
            for number in sorted(self._notes):
                if number >= upto:
                    break
                for point, notes in enumerate(self._notes.pop(number)):
                    ledger.balance[point] += notes.balance
                    if notes.undecided is not None:
                        ledger.undecided[point].append(number)
            ledger.done = max(ledger.done, upto)

    def _keep(self, ledger: _Ledger) -> None:
        """Bring finished units onto the disk, then write down that they are there."""
        with self._lock:
            # A unit has notes when it is written; all before the first without are finished.
            upto = ledger.done
            while upto in self._notes:
                upto += 1
        for output in self._outputs:
            output.flush()
        self._account(ledger, upto)
        with self._lock:
            kept = asdict(ledger)
        write_json(self._state_path, kept)


class _Keeper(threading.Thread):
    """Calls a function every few seconds until its block ends; its failure ends the block's."""

    def __init__(self, keep: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._keep = keep
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        while not self._ended.wait(_KEEP_SECONDS):
            try:
                self._keep()
            except BaseException as error:
                self._error = error
                return

    def __enter__(self) -> _Keeper:
        self.start()
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._ended.set()
        self.join()
        if value is None and self._error is not None:
            raise self._error
        if isinstance(value, KeyboardInterrupt):
            self._keep()


def _keep_freed_memory() -> None:
    """Let the C library keep the formulas' temporary arrays for the next part.

    glibc gives freed blocks back to the system, which clears each page when it is asked for again:
    a third of the time of TIES. Freeing one large block raises its thresholds for this (mallopt(3),
    M_MMAP_THRESHOLD); elsewhere it does nothing.
    """
    np.empty(31 << 20, dtype=np.uint8)


def _units(entries: Sequence[Entry], chunk: int) -> Iterator[Unit]:
    for number, entry in enumerate(entries):
        # Copied tensors may be large: bytes in pieces, too.
        for start in range(0, max(1, entry.numel), chunk):
            yield Unit(number, start, min(start + chunk, entry.numel))


def _bytes_of(entry: Entry, unit: Unit) -> int:
    return sum(info.itemsize for info in entry.sources) * (unit.stop - unit.start)
