"""All that processes of one run split among themselves; each writes what it gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stockpot.evaluation.accuracy import accuracy
from stockpot.evaluation.generation import generate
from stockpot.evaluation.language import choices, held_out_loss
from stockpot.evaluation.line import scores_along_line
from stockpot.evaluation.score import Score
from stockpot.methods.fisher_information import fisher_diagonal
from stockpot.models import MODELS
from stockpot.models.learner import ImageLearner, mlp
from stockpot.processes import Processes, leave, processes
from stockpot.streams import STREAMS
from stockpot.streams.data import ImageData
from stockpot.streams.text import Choices, Question


def plain(score: Score) -> dict[str, Any]:
    return {
        "value": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "items": None if score.items is None else score.items.tolist(),
    }


def fisher(learner: Any, data: Any, labels: Any, among: Processes) -> dict[str, Any]:
    passes: list[int] = []
    values = fisher_diagonal(learner, data, 23, labels, 3, passes.append, among)
    return {"passes": sum(passes), **{name: value.tolist() for name, value in values.items()}}


def images(count: int, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.randint(7, (count,), generator=generator))


def of_images(among: Processes) -> dict[str, Any]:
    torch.manual_seed(0)
    learner = ImageLearner(mlp((1, 6, 6), (300,), 7))
    found: dict[str, Any] = {}
    for count in (1, 2, 5, 230):
        found[f"accuracy on {count}"] = plain(accuracy(learner, images(count), 64, processes=among))
    for labels in ("sampled", "true", "exact"):
        found[f"fisher {labels}"] = fisher(learner, images(600), labels, among)
    anchor = {name: weight + 0.1 for name, weight in learner.weights().items()}
    points = scores_along_line(
        anchor,
        learner.weights(),
        learner,
        {"a": images(9), "b": images(1, 1)},
        3,
        4,
        "cpu",
        processes=among,
    )
    found["line"] = [[point.alpha, point.task, point.metric, point.value] for point in points]
    return found


def of_texts(among: Processes, folder: Path) -> dict[str, Any]:
    tasks = [{"name": "tea", "train": str(folder / "tea.jsonl")}]
    stream = STREAMS["tasks"].model_validate({"name": "tasks", "tasks": tasks, "test_share": 0.4})
    model = MODELS["huggingface"].model_validate(
        {"name": "huggingface", "id": str(folder / "model")}
    )
    data = model.encode(stream.load())
    torch.manual_seed(0)
    learner: Any = model.build(data)
    task = data.tasks[0]
    questions = [Question(f"{n} sea", ("boat", "red sun", "moon"), n % 3) for n in range(7)]
    prompts = [f"{word} is a" for word in ("boat", "the red sea", "sun", "dog", "moon and star")]
    found: dict[str, Any] = {
        "loss": plain(held_out_loss(learner, task.test, 2, processes=among)),
        "choices": [
            plain(score) for score in choices(learner, "q", Choices(questions), 3, processes=among)
        ],
    }
    for labels in ("sampled", "true"):
        found[f"fisher {labels}"] = fisher(learner, task.train, labels, among)
    for temperature in (0.0, 1.0):
        found[f"written at {temperature}"] = generate(
            learner,
            prompts,
            max_new_tokens=8,
            stop=(),
            batch_size=2,
            device="cpu",
            temperature=temperature,
            processes=among,
        )
    return found


def damaged(among: Processes) -> str:
    """NaN on images that one process alone has: all must hear of it."""
    learner = ImageLearner(nn.Sequential(nn.Flatten(), nn.Linear(36, 7)))
    pixels = torch.rand(40, 1, 6, 6)
    pixels[39] = torch.nan
    try:
        accuracy(learner, ImageData(pixels, torch.zeros(40, dtype=torch.long)), 4, processes=among)
    except Exception as error:
        return type(error).__name__
    return "nothing"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    mine = processes()
    result = {"images": of_images(mine), "texts": of_texts(mine, folder), "NaN": damaged(mine)}
    out.mkdir(exist_ok=True)
    (out / f"{mine.rank}.json").write_text(json.dumps(result))
    leave()
