"""Streams: which examples are in which task, under which labels, in each scenario."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits as sklearn_digits

from stockpot.errors import StockpotError
from stockpot.streams.data import ImageData, Mixture, Stream, Task
from stockpot.streams.hub import load_hub_images
from stockpot.streams.images import LabelledImages, permuted_stream, split_stream
from stockpot.streams.settings import EVEN_ODD, PAIRS, Digits, Mnist
from stockpot.streams.source import resolve_source


def digit_of(pixels, dataset):
    """Which original digit an image is, found by its pixels."""
    return dataset[pixels.numpy().tobytes()]


@pytest.fixture(scope="module")
def originals():
    bunch = sklearn_digits()
    images = (bunch.images / 16).astype(np.float32)
    return {
        image[None].tobytes(): int(label) for image, label in zip(images, bunch.target, strict=True)
    }


@pytest.mark.parametrize("scenario", ["domain", "class", "task"])
@pytest.mark.parametrize(("split", "groups"), [("even-odd", EVEN_ODD), ("pairs", PAIRS)])
def test_digits_labels_follow_the_scenario(originals, scenario, split, groups):
    stream = Digits(split=split, scenario=f"{scenario}-incremental").load()
    assert [task.name for task in stream.tasks] == [name for name, _ in groups]
    seen = 0
    for task, (_, members) in zip(stream.tasks, groups, strict=True):
        for data in (task.train, task.test):
            batch = data.__getitems__(list(range(len(data))))
            for pixels, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
                digit = digit_of(pixels, originals)
                assert digit in members
                assert label == (members.index(digit) if scenario == "domain" else digit)
            if scenario == "task":
                assert batch["allowed"].shape == (len(data), 10)
                assert (batch["allowed"].sum(1) == len(members)).all()
                assert batch["allowed"][:, list(members)].all()
            else:
                assert batch["allowed"] is None
            seen += len(data)
    assert seen == 1797
    assert stream.labels == {"domain": len(groups[0][1]), "class": 10, "task": 10}[scenario]


def test_even_odd_domain_label_is_digit_halved(originals):
    stream = Digits().load()
    for task in stream.tasks:
        batch = task.test.__getitems__(list(range(len(task.test))))
        for pixels, label in zip(batch["pixel_values"], batch["labels"].tolist(), strict=True):
            assert label == digit_of(pixels, originals) // 2


def test_train_and_test_do_not_overlap():
    stream = Digits(split="pairs").load()
    for task in stream.tasks:
        train = {image.numpy().tobytes() for image in task.train.images[task.train.rows]}
        test = {image.numpy().tobytes() for image in task.test.images[task.test.rows]}
        assert not train & test


def test_order_and_limits():
    stream = Digits(split="pairs", order=(4, 0), train_limit=7, test_limit=3).load()
    assert [task.name for task in stream.tasks] == ["8-9", "0-1"]
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(7, 3), (7, 3)]


def images(count=60, labels=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return LabelledImages(
        pixels, torch.arange(count) % labels, pixels, torch.arange(count) % labels
    )


def test_permuted_tasks_permute_the_same_pixels():
    data = images()
    stream = permuted_stream("p", data, 5, 10, seed=3)
    first = stream.tasks[0].train.__getitems__([4, 9])["pixel_values"]
    assert torch.equal(first, data.train_images[[4, 9]])
    orders = set()
    for task in stream.tasks[1:]:
        batch = task.train.__getitems__([4, 9])
        assert not torch.equal(batch["pixel_values"], first)
        assert torch.equal(batch["pixel_values"].flatten(1).sort(1)[0], first.flatten(1).sort(1)[0])
        assert torch.equal(batch["pixel_values"], task.test.__getitems__([4, 9])["pixel_values"]), (
            "training and test pixels must move alike"
        )
        orders.add(task.train.permutation.numpy().tobytes())
    assert len(orders) == 4
    assert stream.scenario == "domain-incremental"


def test_permuted_stream_is_a_prefix_of_a_longer_one():
    short, long = (permuted_stream("p", images(), n, 10, seed=0) for n in (3, 200))
    for a, b in zip(short.tasks, long.tasks[:3], strict=True):
        assert a.train.fingerprint() == b.train.fingerprint()


def test_permuting_at_the_fetch_is_permuting_the_pixels():
    """Against NumPy on a copy of all images; and the examples are those that they always were."""
    data = images()
    for task in permuted_stream("p", data, 6, 10, seed=1).tasks:
        order = task.train.permutation
        order = torch.arange(data.train_images[0].numel()) if order is None else order
        for split, whole, labels in (
            (task.train, data.train_images, data.train_labels),
            (task.test, data.test_images, data.test_labels),
        ):
            copy = whole.numpy().reshape(len(whole), -1)[:, order.numpy()].reshape(whole.shape)
            rows = list(range(len(whole)))[::-2]
            batch = split.__getitems__(rows)
            assert np.array_equal(batch["pixel_values"].numpy(), copy[rows])
            assert torch.equal(batch["labels"], labels[rows])
            own = ImageData(whole.clone(), labels.clone(), permutation=task.train.permutation)
            assert split.fingerprint() == own.fingerprint()


def test_a_thousand_permuted_tasks_cost_their_permutations_only():
    data = LabelledImages(
        *(torch.zeros(5000, 1, 28, 28, dtype=torch.uint8), torch.zeros(5000, dtype=torch.int64)) * 2
    )
    stream = permuted_stream("p", data, 1000, 10, seed=0)
    own = {
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for task in stream.tasks
        for split in (task.train, task.test)
        for tensor in (split.images, split.labels, split.rows, split.permutation)
        if tensor is not None
    }
    shared = {
        tensor.untyped_storage().data_ptr()
        for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels)
    }
    size = sum(nbytes for place, nbytes in own if place not in shared)
    assert size <= 2 * 5000 * 8 + 1000 * 784 * 8


def test_views_share_the_images():
    stream = permuted_stream("p", images(), 50, 10, seed=0)
    assert len({task.train.images.data_ptr() for task in stream.tasks}) == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_mixture_is_concatenation(data):
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    if not sum(sizes):
        return
    parts, begin = [], 0
    for size in sizes:
        pixels = torch.arange(begin, begin + size, dtype=torch.float32).view(-1, 1, 1, 1)
        parts.append(ImageData(pixels, torch.arange(begin, begin + size)))
        begin += size
    mixture = Mixture(parts)
    assert len(mixture) == sum(sizes)
    wanted = data.draw(st.lists(st.integers(0, len(mixture) - 1), min_size=1, max_size=8))
    batch = mixture.__getitems__(wanted)
    assert sorted(batch["labels"].tolist()) == sorted(wanted)
    assert batch["pixel_values"].flatten().tolist() == batch["labels"].tolist()
    chosen = data.draw(st.lists(st.integers(0, len(mixture) - 1), unique=True, max_size=8))
    subset = mixture.subset(torch.tensor(chosen, dtype=torch.int64))
    assert len(subset) == len(chosen)
    if chosen:
        got = subset.__getitems__(list(range(len(chosen))))["labels"].tolist()
        assert sorted(got) == sorted(chosen)


# What is refused.


def test_task_without_examples():
    with pytest.raises(StockpotError, match="task '8-9' has no training examples"):
        split_stream("s", images(labels=8), PAIRS, "class-incremental")


@pytest.mark.parametrize("bad", [-1, 3, 99])
def test_label_out_of_range(bad):
    data = ImageData(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, bad, 2]))
    with pytest.raises(StockpotError, match=f"example 2: label {bad} is out of range"):
        Stream("s", "class-incremental", (Task("t", data, data),), 3, (1, 2, 2))


def test_label_that_the_task_does_not_allow():
    allowed = torch.tensor([True, True, False])
    data = ImageData(torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]), allowed=allowed)
    with pytest.raises(StockpotError, match="only some of them"):
        Stream("s", "task-incremental", (Task("t", data, data),), 3, (1, 2, 2))


def test_unequal_groups_cannot_share_a_head():
    with pytest.raises(StockpotError, match="same number of labels"):
        split_stream("s", images(), (("a", (0, 1)), ("b", (2,))), "domain-incremental")


def test_permuted_needs_its_scenario():
    with pytest.raises(ValueError, match="domain-incremental"):
        Mnist(split="permuted", scenario="class-incremental")
    with pytest.raises(ValueError, match="belongs to split: permuted"):
        Mnist(split="pairs", tasks=3)


# Data sets on disk.


def png(array):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A tiny data set with the hub's layout and columns, under a mirror."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(labels=10, columns=("image", "label"), shape=(28, 28), splits=("train", "test")):
        folder = tmp_path / "mirror" / "ylecun" / "mnist" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for split in splits:
            arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(20)]
            values = {
                columns[0]: [png(a) for a in arrays],
                columns[1]: [i % labels for i in range(20)],
            }
            features = datasets.Features(
                {columns[0]: datasets.Image(), columns[1]: datasets.Value("int64")}
            )
            table = datasets.Dataset.from_dict(values, features=features)
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
            make.arrays[split] = np.stack(arrays)
        monkeypatch.setenv("STOCKPOT_DATA", str(tmp_path / "mirror"))
        return tmp_path / "mirror"

    make.arrays = {}
    return make


def test_mirror_takes_the_hubs_place(hub_folder):
    mirror = hub_folder()
    assert resolve_source("ylecun/mnist") == str((mirror / "ylecun/mnist").resolve())
    assert resolve_source("ylecun/other") == "ylecun/other"


def test_images_are_decoded_to_the_bit(hub_folder):
    hub_folder()
    data = load_hub_images("ylecun/mnist", labels=10)
    assert np.array_equal(data.train_images[:, 0].numpy(), hub_folder.arrays["train"])
    assert np.array_equal(data.test_images[:, 0].numpy(), hub_folder.arrays["test"])
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    stream = Mnist(split="even-odd").load()
    assert [len(task.train) for task in stream.tasks] == [10, 10]


def test_colour_images_have_channels_first(hub_folder):
    hub_folder(shape=(5, 6, 3))
    data = load_hub_images("ylecun/mnist", labels=10)
    assert np.array_equal(
        data.train_images.numpy(), hub_folder.arrays["train"].transpose(0, 3, 1, 2)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 12}, "row 10: label 10 is out of range"),
        ({"columns": ("picture", "label")}, "no column 'image'"),
        ({"columns": ("image", "digit")}, "no column 'label'"),
        ({"splits": ("train",)}, "no split 'test'"),
    ],
)
def test_bad_data_sets_are_named(hub_folder, options, message):
    hub_folder(**options)
    with pytest.raises(StockpotError, match=message):
        load_hub_images("ylecun/mnist", labels=10)


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("STOCKPOT_DATA", str(tmp_path))
    with pytest.raises(StockpotError, match="set STOCKPOT_DATA"):
        load_hub_images("nobody/nothing", labels=10)


def test_real_mnist(mirror):
    stream = Mnist(split="even-odd").load()
    assert [len(task.train) for task in stream.tasks] == [29492, 30508]
    assert sum(len(task.test) for task in stream.tasks) == 10_000
    batch = stream.tasks[1].train.__getitems__([0, 1])
    assert batch["pixel_values"].dtype == torch.uint8
    assert stream.image_shape == (1, 28, 28)


def test_settings_load_no_torch():
    code = (
        "from stockpot.streams import STREAMS; STREAMS['mnist'](split='permuted', tasks=200)\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
