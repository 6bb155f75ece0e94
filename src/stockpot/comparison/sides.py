"""From what a user writes to the models that are meant, among those that `stockpot run` scored.

A side is a run (``FOLDER/runs/RUN``), an experiment (``FOLDER``), or one setting of it with all its
seeds (``FOLDER:sfa-p0.25-beta0.5``, or ``FOLDER:"sfa p=0.25 beta=0.5"``); ``@`` and a stage may
follow: ``@start``, ``@0``, or ``@math``, the name of the task that was trained.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import ConfigError, nearest
from stockpot.experiment.record import Record

__all__ = ["Side", "Stage", "listed", "read_side"]

_RUN = re.compile(r"(.+)-seed(\d+)")
_START = "start"
_MOST = 12
"""Names in a message."""


@dataclass(frozen=True)
class Stage:
    """One finished stage of one run."""

    folder: Path
    run: str
    number: int
    """-1: the starting model."""
    tasks: tuple[str, ...]

    @property
    def file(self) -> Path:
        """Where its items are."""
        name = _START if self.number < 0 else f"stage-{self.number:04d}"
        return self.folder / "runs" / self.run / "items" / f"{name}.safetensors"

    @property
    def name(self) -> str:
        """``sequential-seed0, after law``."""
        if self.number < 0:
            return f"{self.run}, start"
        return f"{self.run}, after {' + '.join(self.tasks)}"


@dataclass(frozen=True)
class Side:
    """What one argument names: runs by setting and seed, each at one stage."""

    given: str
    folder: Path
    settings: Mapping[str, Mapping[int, Stage]]
    single: bool
    """Whether it is one run, to be held against any other."""


def read_side(given: str, name: str) -> Side:
    """The runs that an argument names.

    Args:
        given: what the user wrote.
        name: BEFORE or AFTER, for errors.

    Raises:
        ConfigError: if there is no such folder, setting or stage; with what there is.
        DamagedRecordError: if the record cannot be read.
    """
    path, selection, stage = _split(given)
    _check_complete(selection, stage, given, name)
    folder = path
    run = None
    if not (path / "experiment.json").is_file():
        whole = path if len(path.parts) > 2 else path.resolve()
        folder, run = whole.parent.parent, whole.name
        _check_folder(given, name, path, folder)
    stages = _finished_stages(folder)
    if run is not None:
        if run not in stages:
            raise ConfigError(
                f"{name}: run {run!r} in {folder} has no finished stage yet, so it has no scores"
                f"{listed('Finished', stages)}"
            )
        runs = [run]
    else:
        runs = _select(stages, selection, given, name)
    settings: dict[str, dict[int, Stage]] = {}
    for each in runs:
        setting, seed = _setting(each)
        chosen = _choose_stage(folder, each, stages[each], stage, given, name)
        settings.setdefault(setting, {})[seed] = chosen
    return Side(given, folder, settings, single=len(runs) == 1)


def _split(given: str) -> tuple[Path, str | None, str | None]:
    """Folder, setting and stage; what exists as a path is one, whatever signs its name has."""
    rest, stage = given, None
    if not Path(given).exists() and "@" in given:
        rest, _, stage = given.rpartition("@")
    if Path(rest).exists() or ":" not in rest:
        return Path(rest), None, stage
    folder, _, selection = rest.rpartition(":")
    return Path(folder), selection, stage


def _check_complete(selection: str | None, stage: str | None, given: str, name: str) -> None:
    """Refuse a ``:`` or ``@`` with nothing behind it: often a script's variable that is empty."""
    if selection is not None and not selection.strip():
        raise ConfigError(f"{name}: {given}: there is no setting after ':'; leave it out for all")
    if stage is not None and not stage.strip():
        raise ConfigError(
            f"{name}: {given}: there is no stage after '@'; leave it out for the last"
        )


def _check_folder(given: str, name: str, path: Path, experiment: Path) -> None:
    """Refuse what is neither an experiment's folder nor a run's, with a guess at what was meant."""
    if (experiment / "experiment.json").is_file() and path.parent.name == "runs" and path.is_dir():
        return
    if not path.exists():
        above = path.resolve().parent
        for folder in (above, above.parent):
            if (folder / "experiment.json").is_file():
                runs = _finished_stages(folder)
                raise ConfigError(
                    f"{name}: there is no {given}, and {folder.name} is an experiment. Write its "
                    f"runs as FOLDER:RUN, or as FOLDER:SETTING for all seeds"
                    f"{_nearest(path.name, runs)}"
                )
        raise ConfigError(f"{name}: there is no folder {str(path)!r}")
    if (path / "config.json").is_file():
        raise ConfigError(
            f"{name}: {given} is a model, and its items were not kept: say what to score both on "
            "with --task FILE or --stream EXPERIMENT.yaml"
        )
    if (path / "items").is_dir():
        raise ConfigError(
            f"{name}: {given} has items, but the record of its experiment is not above it "
            "(experiment.json, scores.jsonl), which says what they are"
        )
    raise ConfigError(
        f"{name}: {given} is neither the folder of an experiment (with experiment.json) nor one of "
        "its runs (FOLDER/runs/RUN)"
    )


def _finished_stages(folder: Path) -> dict[str, dict[int, tuple[str, ...]]]:
    """The tasks of every finished stage of every run."""
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for (run, number), line in Record(folder).load().stages().items():
        tasks = line.get("tasks") or [line.get("task", "?")]
        found.setdefault(run, {})[number] = tuple(map(str, tasks))
    if not found:
        raise ConfigError(f"{folder} has no finished stage of any run yet: nothing is scored")
    return found


def _setting(run: str) -> tuple[str, int]:
    match = _RUN.fullmatch(run)
    return (match[1], int(match[2])) if match else (run, 0)


def _select(runs: Iterable[str], selection: str | None, given: str, name: str) -> list[str]:
    """The runs of a setting: by its name, its label, a run's name, or a method with one setting."""
    runs = list(runs)
    if selection is None:
        return runs
    plain = selection.strip().replace(" ", "-").replace("=", "")
    settings = list(dict.fromkeys(_setting(run)[0] for run in runs))
    if plain in runs:
        return [plain]
    words = sorted(re.split(r"[-, ]+", plain))  # "sfa beta=0.5, p=0.25": any order will do
    chosen = (
        [plain] * (plain in settings)
        or [s for s in settings if s.startswith(f"{plain}-")]
        or [s for s in settings if sorted(re.split(r"[-, ]+", s)) == words]
    )
    if len(chosen) > 1:
        raise ConfigError(
            f"{name}: {given} could be any of {len(chosen)} settings{listed('Choose', chosen)}"
        )
    if not chosen:
        raise ConfigError(
            f"{name}: {given}: there is no finished run of {selection!r}{_nearest(plain, runs)}"
        )
    return [run for run in runs if _setting(run)[0] == chosen[0]]


def _nearest(name: str, runs: Iterable[str]) -> str:
    """The run or setting that is most like ``name``; where none is, the settings there are."""
    runs = list(runs)
    settings = list(dict.fromkeys(_setting(run)[0] for run in runs))
    if difflib.get_close_matches(name, [*settings, *runs], n=1):
        return nearest(name, {*settings, *runs})
    return listed("There are", settings)


def listed(head: str, names: Iterable[str]) -> str:
    """``". Choose: a, b, c"``: the end of a message, with as many names as can be read."""
    names = list(names)
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f". {head}: {', '.join(names[:_MOST])}{more}"


def _choose_stage(
    folder: Path,
    run: str,
    stages: Mapping[int, tuple[str, ...]],
    wanted: str | None,
    given: str,
    name: str,
) -> Stage:
    """The last stage, or the one that is asked for by its number, its task, or as ``start``."""
    last = max(stages)
    if wanted is None:
        number = last
    elif wanted == _START:
        number = -1
    elif wanted.isdecimal() and int(wanted) in stages:
        number = int(wanted)
    else:
        of_task = [number for number, tasks in stages.items() if wanted in tasks]
        if not of_task:
            there = [f"{n} ({' + '.join(tasks)})" for n, tasks in sorted(stages.items())]
            raise ConfigError(
                f"{name}: {given}: run {run!r} has no finished stage {wanted!r}; it has start, "
                f"{', '.join(there[:_MOST])}{' and more' if len(there) > _MOST else ''}"
            )
        number = max(of_task)
    return Stage(folder, run, number, stages.get(number, ()))
