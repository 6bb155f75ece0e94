"""What two models are scored on: rows of the user's own files, folders of images, or a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stockpot.errors import ConfigError

if TYPE_CHECKING:
    from stockpot.streams.base import StreamSettings
    from stockpot.streams.data import Stream, Task
    from stockpot.streams.text import TextStream, TextTask

__all__ = ["image_tasks", "stream_tasks", "text_tasks"]


def text_tasks(files: Sequence[str], limit: int | None) -> TextStream:
    """Every row of the files is scored; nothing is trained, so nothing has to be held out.

    Args:
        files: in the forms of the user's own tasks.
        limit: at most so many rows of each, drawn with a fixed seed.

    Raises:
        StockpotError: if there is no such file, or naming the row that is wrong.
    """
    from stockpot.streams.image_folder import is_image_folder
    from stockpot.streams.own import Source, TaskSource, load_own_tasks, task_name
    from stockpot.streams.rows import FILES, is_file

    sources = []
    for file in files:
        if is_file(file) and not Path(file).is_file():
            raise ConfigError(f"--task {file}: there is no such file")
        if is_image_folder(Path(file), {}):
            raise ConfigError(
                f"--task {file} holds images, and the models are language models; give files of "
                f"text ({', '.join(FILES)})"
            )
        rows = Source(file, "test", None, "--task")
        sources.append(TaskSource(task_name(file), rows, rows, {}, None))
    _distinct([source.name for source in sources])
    stream = load_own_tasks(sources, 0.5, None, limit, seed=0)
    return replace(stream, tasks=tuple(_one_to_train(task) for task in stream.tasks))


def _one_to_train(task: TextTask) -> TextTask:
    """Without the training rows, which would be tokenised for nothing (a task needs one)."""
    return replace(task, train=task.train[:1])


def image_tasks(
    folders: Sequence[str], limit: int | None, names: Sequence[Sequence[str] | None]
) -> Stream:
    """Folders of images in folders named after their labels, in alphabetical order.

    Where there is a test split, its images are scored, else all.

    Args:
        folders: each has an image folder for every label of the models.
        limit: at most so many images of each.
        names: of each model's labels, if its configuration names them.

    Raises:
        ConfigError: if the labels are not those of the models.
        StockpotError: if an image cannot be read.
    """
    from stockpot.streams.data import Stream

    _distinct([Path(folder).name for folder in folders])
    tasks, labels = [], []
    for folder in folders:
        task, own = _image_task(folder, limit)
        tasks.append(task)
        labels.append(own)
        if own != labels[0]:
            raise ConfigError(
                f"--task {folder} has the labels {', '.join(own)} and {folders[0]} "
                f"{', '.join(labels[0])}: tasks of one model need the same"
            )
    for known in names:
        if known is not None and list(known) != labels[0]:
            raise ConfigError(
                f"--task {folders[0]} has the labels {', '.join(labels[0])}, in this order, and a "
                f"model {', '.join(known)}: which folder is which label cannot be told"
            )
    first: Any = tasks[0].test
    channels, height, width = first.images.shape[1:]
    shape = (int(channels), int(height), int(width))
    return Stream("images", "class-incremental", tuple(tasks), len(labels[0]), shape)


def _image_task(folder: str, limit: int | None) -> tuple[Task, list[str]]:
    import torch

    from stockpot.streams.data import ImageData, Task
    from stockpot.streams.decoding import decode
    from stockpot.streams.image_folder import is_image_folder, open_image_folder

    place = Path(folder)
    if not place.is_dir() or not is_image_folder(place, {}):
        raise ConfigError(
            f"--task {folder}: the models are image classifiers, and this is no folder with images "
            "in folders named after their labels"
        )
    train, test, labels, notes = open_image_folder(place, {}, 0.5)
    if notes:  # there is no test split
        rows, order = torch.cat([train.rows, test.rows]).sort()
        test = replace(test, rows=rows, labels=torch.cat([train.labels, test.labels])[order])
    test = test.limited([(place.name, range(len(labels)))], limit)
    remedy = "; --stream EXPERIMENT.yaml with stream: {name: images, path: ..., size: 224} resizes"
    (images,) = decode((test,), None, remedy)
    data = ImageData(images, test.labels)
    return Task(place.name, data.subset(torch.arange(1)), data), list(labels)


def stream_tasks(settings: StreamSettings, limit: int | None) -> Stream | TextStream:
    """The test items of an experiment's stream, with as little to train on as it allows.

    Args:
        settings: the experiment's stream.
        limit: at most so many items of each task and benchmark.
    """
    known = type(settings).model_fields
    changes: dict[str, Any] = {"train_limit": 1}
    if limit is not None:
        changes |= {"test_limit": limit, "benchmark_limit": limit}
    changes = {key: value for key, value in changes.items() if key in known}
    return settings.model_copy(update=changes).load()


def _distinct(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tasks are named {name!r}; rename one of the files")
