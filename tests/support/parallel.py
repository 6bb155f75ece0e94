"""Small trainings in one process or in several.

As a program, ``support.parallel cases.json folder``, it trains every case and leaves its weights in
the folder; :func:`train` does one in this process, alone.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from pydantic import PrivateAttr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stockpot.methods import METHODS, Memory, Method, TaskRun
from stockpot.models.learner import ImageLearner, Learner
from stockpot.processes import ALONE, Processes, processes
from stockpot.streams.data import ImageData, Task, TaskData
from stockpot.training import TrainingSettings, losses
from stockpot.training.trainer import TaskTrainer, Trained, Watch, train_task
from support.experiments import SETTINGS
from support.launch import launch

LABELS = 4
SEED = 11
WIDE = 50_000


@dataclass(frozen=True)
class Case:
    """A few tasks to be trained one after the other with one method."""

    name: str
    method: str = "sequential"
    """Of ``SETTINGS``, or settings of a method."""
    model: str = "mlp"
    stages: int = 2
    examples: int = 23
    settings: Mapping[str, Any] = field(default_factory=dict)
    die_at: int | None = None
    """Be killed in this step of the last task, in all processes."""
    stop_at: int | None = None
    """Fail in this step of the last task, in all processes."""
    poison: int | None = None
    """In the last task this row's pixels are not numbers."""
    probe: int | None = None
    """Look at the weights every so many steps."""
    weigh: bool = False
    """Whether to look at how much memory is taken meanwhile and afterwards."""
    as_on_a_gpu: bool = False
    """Look at the loss as on a GPU, where each process does so by its own clock."""


@dataclass
class Outcome:
    """What a case gave."""

    weights: dict[str, Tensor]
    losses: list[tuple[int, float]]
    merges: list[dict[str, float]]
    probed: list[float]
    """A sum over all weights, each time they were looked at."""
    error: str = ""
    held: int = 0
    """Bytes of tensors after a step of the last task, less those before its training."""
    left: int = 0
    """The same after its training."""


# What is trained.


def tensor_bytes() -> int:
    """Of all tensors that this process holds."""
    gc.unfreeze()  # what was frozen is not found
    sizes: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor):
            local = found.to_local() if isinstance(found, DTensor) else found
            for tensor in (local, local.grad if local.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def images(examples: int, seed: int) -> ImageData:
    """Pictures of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(examples, 1, 3, 3, generator=generator)
    return ImageData(pixels, torch.randint(LABELS, (examples,), generator=generator))


def texts(examples: int, seed: int) -> TaskData:
    """Tokens at random, of which each example learns another number."""
    from stockpot.streams.tokens import Ragged, TextData

    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    learned: list[bool] = []
    for _ in range(examples):
        length = int(torch.randint(4, 14, (1,), generator=generator))
        rows.append(torch.randint(1, 40, (length,), generator=generator).tolist())
        said = int(torch.randint(1, length - 1, (1,), generator=generator))
        learned += [False] * (length - said) + [True] * said
    return TextData(Ragged.of(rows), torch.tensor(learned), None, 0)


class Odd(nn.Module):
    """A part that is read and not called, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 5), nn.Linear(5, LABELS)
        self.unused = nn.Linear(3, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(pixels.flatten(1)))
        return nn.functional.linear(hidden, self.second.weight, self.second.bias)


def learner_of(model: str) -> Learner:
    """The same weights at every call."""
    torch.manual_seed(1)
    if model == "mlp":
        layers = nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, LABELS)
        return ImageLearner(nn.Sequential(nn.Flatten(), *layers))
    if model == "odd":
        return ImageLearner(Odd())
    if model == "wide":
        wide = nn.Linear(9, WIDE), nn.Linear(WIDE, LABELS)
        return ImageLearner(nn.Sequential(nn.Flatten(), *wide))
    if model == "batchnorm":
        layers = nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Linear(7, LABELS)
        return ImageLearner(nn.Sequential(nn.Flatten(), *layers))
    return _language_learner(model)


def _language_learner(model: str) -> Learner:
    from transformers import LlamaConfig, LlamaForCausalLM

    from stockpot.models.language import TextLearner
    from stockpot.models.rendering import Format
    from support.text import byte_tokenizer

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    module: Any = LlamaForCausalLM(config)
    if model == "lora":
        import peft

        module = peft.get_peft_model(
            module, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        )
    return TextLearner(module, Format(byte_tokenizer(), False, 32, False, context=32))


def tasks_of(case: Case) -> list[Task]:
    """The stream."""
    make = images if case.model in ("mlp", "odd", "wide", "batchnorm") else texts
    tasks = []
    for number in range(case.stages):
        data = make(case.examples, 100 + number)
        if case.poison is not None and number == case.stages - 1:
            assert isinstance(data, ImageData)
            data.images[case.poison] = float("nan")
        tasks.append(Task(f"task {number}", data, data))
    return tasks


class Mortal(Method):
    """Another method, and a step in which its process is killed or fails."""

    name: ClassVar[str] = "mortal"
    _inner: Any = PrivateAttr()
    _case: Any = PrivateAttr()

    def start_task(self, run: TaskRun) -> None:
        self._inner.start_task(run)

    def take_parts(self, run: TaskRun, parts: Any) -> None:
        self._inner.take_parts(run, parts)

    def before_step(self, run: TaskRun) -> Tensor | None:
        result: Tensor | None = self._inner.before_step(run)
        return result

    def after_step(self, run: TaskRun, step: int) -> None:
        self._inner.after_step(run, step)
        if step == self._case.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._case.stop_at:
            raise RuntimeError("stopped")


def _method_of(case: Case) -> Method:
    given = yaml.safe_load(SETTINGS.get(case.method, case.method))
    return METHODS[given.pop("name")](**given)


def train(case: Case, folder: Path, alone: Processes = ALONE) -> Outcome:
    """Train a case as a run does: start, train, end, one task after the other."""
    learner = learner_of(case.model)
    start = previous = learner.weights()
    tasks = tasks_of(case)
    method = _method_of(case)
    given = {"learning_rate": 0.01, "epochs": 2, "batch_size": 8, "checkpoint_seconds": None}
    using = TrainingSettings(**{"device": "cpu", **given, **case.settings})
    for stage, task in enumerate(tasks):
        run = TaskRun(
            stage=stage,
            last=stage == len(tasks) - 1,
            tasks=(task,),
            past=tuple(tasks[:stage]),
            learner=learner,
            start=start,
            previous=previous,
            memory=Memory(folder / f"{case.name}-memory", stage, alone),
            seed=SEED + stage,
            total_steps=using.steps_for(case.examples),
            device=torch.device("cpu"),
            processes=alone,
            in_parts=alone.several and using.parallel != "ddp",
        )
        torch.manual_seed(run.seed)
        method.start_task(run)
        trains = method
        if run.last and (case.die_at or case.stop_at):
            trains = Mortal()
            trains._inner, trains._case = method, case
        probed: list[float] = []

        def probe(step: int, moment: str, run: TaskRun = run, to: list[float] = probed) -> None:
            weights = run.weights().values()
            to.append(sum(float(weight.double().sum()) for weight in weights))
            assert all(type(p) is nn.Parameter for p in run.model.parameters())

        held: list[int] = []

        def weigh(step: int, loss: float | None, to: list[int] = held) -> None:
            if case.weigh:
                to.append(tensor_bytes())

        data = method.training_data(run)
        scratch = folder / f"{case.name}-scratch-{stage}"
        watch = Watch(probe, every=case.probe)
        before, on_step = tensor_bytes() if case.weigh else 0, weigh
        if case.as_on_a_gpu:
            # Class attributes with a setter win over what an instance is given.
            TaskTrainer._on_cpu = property(lambda it: False, lambda it, value: None)  # type: ignore
            losses._GLIMPSE_SECONDS = 1e6 * alone.rank
        trained: Trained = train_task(trains, run, data, using, scratch, on_step, watch=watch)
        left = tensor_bytes() - before if case.weigh else 0
        assert run.learner is learner
        assert all(type(p) is nn.Parameter for p in run.model.parameters())
        method.end_task(run)
        previous = run.weights()
        run.load(previous)
        alone.wait()
    growth = max(held) - before if held else 0
    return Outcome(previous, trained.losses, run.merges, probed, held=growth, left=left)


# Processes.


def train_in_processes(
    cases: Sequence[Case],
    folder: Path,
    count: int = 2,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Outcome]:
    """Train cases one after the other in a group of processes.

    Those that are killed leave none, and no case after them is trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    arguments = [folder / "cases.json", folder]
    done = launch(count, "support.parallel", arguments, environment)
    killed = any(case.die_at is not None for case in cases)
    assert killed or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return {case.name: outcome for case in cases if (outcome := _read(folder, case.name))}


def _read(folder: Path, name: str) -> Outcome | None:
    files = sorted(folder.glob(f"{name}.*.json"))
    outcomes = []
    for file in files:
        held = json.loads(file.read_text())
        weights = load_file(file.with_suffix(".safetensors")) if not held["error"] else {}
        losses = [(int(step), float(loss)) for step, loss in held.pop("losses")]
        outcomes.append(Outcome(weights, losses, **held))
    for outcome in outcomes:
        for merge in outcome.merges:
            del merge["seconds"]
    for other in outcomes[1:]:  # all processes have come to the same
        assert replace_weights(other) == replace_weights(outcomes[0])
        for weight_name, weight in outcomes[0].weights.items():
            torch.testing.assert_close(other.weights[weight_name], weight, rtol=0, atol=0)
    return outcomes[0] if outcomes else None


def replace_weights(outcome: Outcome) -> Outcome:
    """All but the weights, to be compared."""
    return replace(outcome, weights={}, held=0, left=0)


def main() -> None:
    """In each of the processes."""
    cases = [Case(**given) for given in json.loads(Path(sys.argv[1]).read_text())]
    folder = Path(sys.argv[2])
    mine = processes()
    for case in cases:
        outcome = Outcome({}, [], [], [])
        gc.freeze()  # the Trainer collects garbage at every call; what is alive now stays
        try:
            outcome = train(case, folder, mine)
        except Exception as error:  # to be looked at by the test
            traceback.print_exc()
            outcome.error = f"{type(error).__name__}: {error}"
        held = asdict(replace(outcome, weights={}))
        del held["weights"]
        stem = folder / f"{case.name}.{mine.rank}"
        if outcome.weights:
            save_file(outcome.weights, f"{stem}.safetensors")
        Path(f"{stem}.json").write_text(json.dumps(held))
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
