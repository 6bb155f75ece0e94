"""The four trackers: a run is opened once, logged to by step over all its tasks, and closed.

A run that was stopped goes on in a server's store where it was. What lies in files of this machine
that are not safe from a kill is written anew, so that no point is there twice and none is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stockpot.errors import ConfigError
from stockpot.tracking.names import STEP, encoded, summary

__all__ = ["TRACKERS", "Points", "Status", "TrackedRun", "Tracker", "check_trackers"]

Points = Mapping[int, Mapping[str, float]]
"""Values by name, by step of the run."""
Status = Literal["finished", "failed", "stopped"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    id: str
    label: str
    """The method with its settings: the same for all seeds."""
    experiment: str
    config: Mapping[str, Any]
    """Nested settings, of plain values."""
    folder: Path
    """Where trackers of this experiment keep what they keep on disk."""


class Tracker(ABC):
    """One tracked run in one tracker."""

    package: str
    """What must be installed."""

    @abstractmethod
    def open(self, run: TrackedRun, known: str | None) -> str:
        """Begin the run, or go on with the one that is ``known``.

        Returns:
            Its id. Another than ``known`` says that nothing is logged in it yet.
        """

    @abstractmethod
    def log(self, points: Points) -> None:
        """Log values, at steps that ascend for each name; they are safe when this returns."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """End the run; it may be opened again."""


class TensorBoard(Tracker):
    """Event files in ``tracking/tensorboard/<run>``, written anew when a run goes on."""

    package = "tensorboard"

    def open(self, run: TrackedRun, known: str | None) -> str:
        """Start with an empty folder."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.folder / "tensorboard" / run.id
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        assert self._writer.file_writer is not None
        # For its page HPARAMS. SummaryWriter.add_hparams would write to a folder of its own.
        for part in hparams(_flat(run.config), {summary("average"): 0.0}):
            self._writer.file_writer.add_summary(part)
        return uuid.uuid4().hex

    def log(self, points: Points) -> None:
        """Write and flush."""
        for step, values in sorted(points.items()):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: Status) -> None:
        """Close the file."""
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases, online or offline as its own settings say.

    Offline a kill takes what is not written yet: the file is written anew when a run goes on.
    """

    package = "wandb"

    def open(self, run: TrackedRun, known: str | None) -> str:
        """A run beside any that this process has open."""
        self._run = self._begin(run, known)
        if known is not None and self._run.offline:
            self.close("stopped")  # nothing is written any more to what is removed
            for folder in Path(self._run.settings.sync_dir).parent.glob(f"*run-*-{known}*"):
                if not list(folder.glob("*.synced")):
                    shutil.rmtree(folder, ignore_errors=True)
            self._run = self._begin(run, None)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        return str(self._run.id)

    def _begin(self, run: TrackedRun, known: str | None) -> Any:
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _wandb_project(run.experiment),
            group=os.environ.get("WANDB_RUN_GROUP") or run.experiment[:128],
            job_type=run.label[:64],
            name=run.id,
            id=known or uuid.uuid4().hex[:16],
            resume="allow" if known else None,
            config=dict(run.config),
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            reinit="create_new",
            # What the terminal shows is not sent.
            settings=wandb.Settings(console="off", quiet=True),
        )

    def log(self, points: Points) -> None:
        """One row a step; W&B's own process writes and sends it."""
        for step, values in sorted(points.items()):
            self._run.log({**values, STEP: step})

    def close(self, status: Status) -> None:
        """Wait until all is sent, or in the file.

        Offline ``finish`` returns before W&B's own process has written the last 32 KB. To end that
        process waits for it, so that nothing is lost when ours is killed next. It is left alone
        where others use it: runs that are open here, or the process that it belongs to.
        """
        import wandb

        self._run.finish(exit_code=0 if status == "finished" else 1)
        if self._run.offline and wandb.setup().most_recent_active_run is None:
            wandb.teardown()


class MLflow(Tracker):
    """A run in the MLflow store that the environment names, else in the run folder's own."""

    package = "mlflow"

    def open(self, run: TrackedRun, known: str | None) -> str:
        """By the client's API: a run that this process has open is left alone."""
        import mlflow
        from mlflow.entities import Param

        own = not mlflow.is_tracking_uri_set()  # which looks at MLFLOW_TRACKING_URI, too
        place = (run.folder / "mlflow").resolve()
        if own:
            place.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(f"sqlite:///{place}/mlflow.db" if own else None)
        if known is not None and self._alive(known):
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment[:500]
        experiment = self._client.get_experiment_by_name(name)
        number = (
            self._client.create_experiment(name, (place / "artifacts").as_uri() if own else None)
            if experiment is None
            else experiment.experiment_id
        )
        tags = {"stockpot.experiment": run.experiment[:500], "stockpot.label": run.label[:500]}
        self._id = self._client.create_run(number, run_name=run.id, tags=tags).info.run_id
        # Older servers take 500 characters.
        params = [Param(key, str(value)[:500]) for key, value in _flat(run.config).items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def _alive(self, known: str) -> bool:
        """Whether the run is still there: it may have been deleted, or the store be another."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(known).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def log(self, points: Points) -> None:
        """A thousand values at a time, which is what MLflow takes."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for step, values in sorted(points.items())
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])

    def close(self, status: Status) -> None:
        """Say how it ended."""
        words = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
        self._client.set_terminated(self._id, words[status])


class Trackio(Tracker):
    """A run of Trackio: on this machine, unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set.

    It writes a second late: on this machine a run that goes on is written anew.
    """

    package = "trackio"

    def open(self, run: TrackedRun, known: str | None) -> str:
        """Trackio goes on with the latest run of a name, so its id is compared."""
        import trackio

        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        if known is not None and not remote:
            with contextlib.suppress(ValueError):  # the project is gone
                for earlier in trackio.Api().runs(run.experiment):
                    if earlier.id == known:
                        earlier.delete()
            known = None
        self._run = self._begin(run, "never" if known is None else "allow")
        if known is not None and self._run.id != known:
            self._run = self._begin(run, "never")
        return str(self._run.id)

    def _begin(self, run: TrackedRun, resume: str) -> Any:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            return trackio.init(
                project=run.experiment,
                name=run.id,
                group=run.label,
                config=dict(run.config),
                resume=resume,
                embed=False,
            )

    def log(self, points: Points) -> None:
        """A thread of Trackio's writes within a second."""
        for step, values in sorted(points.items()):
            self._run.log(dict(values), step=step)

    def close(self, status: Status) -> None:
        """Wait until all is written."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker whose package is not there; nothing is imported.

    Raises:
        ConfigError: naming the extra that brings it.
    """
    missing = [name for name in names if importlib.util.find_spec(TRACKERS[name].package) is None]
    if missing:
        raise ConfigError(
            f"training.report_to: {', '.join(missing)} is not installed. Get it with "
            f"pip install 'stockpot[{','.join(missing)}]', or leave it out"
        )


def _wandb_project(experiment: str) -> str:
    """A project name that W&B takes: some characters are not allowed, nor more than 128."""
    return re.sub(r"[/\\#?%:]", "-", experiment)[:128]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings with dotted names; what is no number, text or truth value as JSON."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        name = prefix + encoded(str(key))
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif value is not None:
            plain = isinstance(value, str | int | float)
            flat[name] = value if plain else json.dumps(value, ensure_ascii=False)
    return flat
