"""Streams of photographs, against the files read by other means: pyarrow and Pillow alone."""

import io
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from stockpot.errors import StockpotError
from stockpot.streams import STREAMS, decoding
from stockpot.streams.settings import Digits
from stockpot.streams.vision import Cifar100, Food101, Images


def rows_of(mirror, name, split, image, label, size=None):
    """(label, pixels) of every row, by pyarrow and Pillow."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(mirror / name / "data" / f"{split}-00000-of-00001.parquet")
    rows = []
    for encoded, answer in zip(table[image].to_pylist(), table[label].to_pylist(), strict=True):
        picture = Image.open(io.BytesIO(encoded["bytes"])).convert("RGB")
        if size:
            picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        rows.append((answer, np.asarray(picture).transpose(2, 0, 1).tobytes()))
    return rows


def content(data):
    """(label, pixels) of every example of a task, sorted."""
    batch = data.__getitems__(list(range(len(data))))
    pixels = [image.numpy().tobytes() for image in batch["pixel_values"]]
    return sorted(zip(batch["labels"].tolist(), pixels, strict=True))


MIRRORED = {
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test"),
    "food101": ("ethz/food101", "image", "label", "validation"),
}


@pytest.fixture(params=MIRRORED)
def mirrored(request, mirror):
    folder, image, label, test = MIRRORED[request.param]
    return (
        STREAMS[request.param],
        rows_of(mirror, folder, "train", image, label),
        rows_of(mirror, folder, test, image, label),
    )


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_twenty_tasks_of_five_labels(mirrored, scenario):
    kind, train, test = mirrored
    stream = kind(scenario=f"{scenario}-incremental").load()
    assert [task.name for task in stream.tasks] == [f"{n}-{n + 4}" for n in range(0, 100, 5)]
    assert stream.labels == (5 if scenario == "domain" else 100)
    assert stream.tasks[0].train.images.dtype == torch.uint8
    for number, task in enumerate(stream.tasks):
        begin = number * 5
        for data, rows in ((task.train, train), (task.test, test)):
            own = [(n, pixels) for n, pixels in rows if begin <= n < begin + 5]
            shift = begin if scenario == "domain" else 0
            assert content(data) == sorted((n - shift, pixels) for n, pixels in own)
            if scenario == "task":
                assert data.allowed.nonzero().flatten().tolist() == list(range(begin, begin + 5))
            else:
                assert data.allowed is None


def test_food101_takes_all_its_labels_if_asked(mirror):
    stream = Food101(labels=None, tasks=20, train_limit=6, test_limit=6).load()
    assert stream.labels == 101
    assert [len(task.train.labels[task.train.rows].unique()) for task in stream.tasks] == [
        6, *[5] * 19
    ]  # fmt: skip


def test_resized_as_pillow_does(mirror):
    stream = Food101(size=24, labels=4, tasks=2).load()
    train = rows_of(mirror, "ethz/food101", "train", "image", "label", size=24)
    assert stream.image_shape == (3, 24, 24)
    assert content(stream.tasks[1].train) == sorted(row for row in train if row[0] in (2, 3))


def test_seeded_label_order(mirror):
    settings = Cifar100(label_order_seed=1993, train_limit=5, test_limit=5)
    stream, again = settings.load(), settings.load()
    assert stream.fingerprint() == again.fingerprint()
    groups = [tuple(task.train.labels[task.train.rows].tolist()) for task in stream.tasks]
    order = [label for _, labels in settings.groups([""] * 100) for label in labels]
    assert sorted(order) == list(range(100))
    assert [set(group) for group in groups] == [set(order[n : n + 5]) for n in range(0, 100, 5)]
    # The order that is published with this seed (iCaRL's, in NumPy's legacy generator).
    assert order[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    other = Cifar100(label_order_seed=1994).groups([""] * 100)
    assert [labels for _, labels in other] != [labels for _, labels in settings.groups([""] * 100)]


def test_limits_keep_every_label(mirror):
    stream = Cifar100(train_limit=7, test_limit=3, order=(19, 0)).load()
    assert [task.name for task in stream.tasks] == ["95-99", "0-4"]
    for task in stream.tasks:
        assert len(task.test) == 3
        counts = task.train.labels[task.train.rows].bincount()
        assert sorted(counts[counts > 0].tolist()) == [1, 1, 1, 2, 2]
    assert len(stream.tasks[0].train.images) == 14, "what no task uses must not be decoded"


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({}, [5] * 20),
        ({"tasks": 3}, [34, 33, 33]),
        ({"labels_per_task": 30}, [30, 30, 30, 10]),
        ({"labels": 12}, [6, 6]),
        ({"labels": 7, "tasks": 7}, [1] * 7),
    ],
)
def test_group_sizes(given, sizes):
    groups = Cifar100(**given).groups([""] * 100)
    assert [len(labels) for _, labels in groups] == sizes
    assert [label for _, labels in groups for label in labels] == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": 30, "scenario": "domain-incremental"}, "tasks may be 2, 4, 5, 10, 20, 25, 50"),
        ({"tasks": 101}, "at most 100 tasks"),
        ({"tasks": 4, "labels_per_task": 25}, "give one"),
        ({"labels": 101}, "the data set has 100"),
        ({"tasks": 100, "scenario": "task-incremental"}, "leaves nothing to choose"),
        ({"order": [0, 20]}, "numbered 0 to 19"),
        ({"order": [0, 0]}, "names a task twice"),
        ({"tasks": 0}, "greater than or equal to 1"),
    ],
)
def test_cuts_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Cifar100(**given)


def test_digits_still_check_their_order():
    with pytest.raises(ValueError, match="numbered 0 to 1"):
        Digits(order=(2,))


def test_settings_load_no_torch():
    code = (
        "from stockpot.streams import STREAMS; STREAMS['food101'](label_order_seed=1)\n"
        "STREAMS['images'](path='x'); import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The user's own folder.


LABELS = ("cat", "dog", "newt", "owl")


@pytest.fixture
def folder(tmp_path):
    """Images of four labels, and what they are made of by path."""
    rng = np.random.default_rng(0)

    def make(splits=("train", "test"), count=5, shape=(6, 8, 3), suffix="png"):
        made = {}
        for split in splits:
            for label in LABELS:
                (tmp_path / split / label).mkdir(parents=True)
                for number in range(count):
                    path = tmp_path / split / label / f"{number}.{suffix}"
                    array = rng.integers(0, 256, shape, dtype=np.uint8)
                    Image.fromarray(array).save(path)
                    made[path] = array
        return made

    make.path = tmp_path
    return make


def load(folder, **given):
    return Images(path=str(folder.path), **given).load()


@pytest.mark.parametrize("test", ["test", "validation", "val", "valid"])
def test_image_folder_round_trip(folder, test):
    made = folder(("train", test))
    stream = load(folder)
    assert [task.name for task in stream.tasks] == ["cat+dog", "newt+owl"]
    assert (stream.labels, stream.image_shape) == (4, (3, 6, 8))
    for number, task in enumerate(stream.tasks):
        for split, data in (("train", task.train), (test, task.test)):
            expected = [
                (LABELS.index(path.parent.name), array.transpose(2, 0, 1).tobytes())
                for path, array in made.items()
                if path.parts[-3] == split and LABELS.index(path.parent.name) // 2 == number
            ]
            assert content(data) == sorted(expected)


@pytest.mark.parametrize("flat", [False, True])
def test_one_split_is_divided(folder, flat):
    made = folder(["" if flat else "train"], count=10)
    stream, again = load(folder, test_share=0.3), load(folder, test_share=0.3)
    assert stream.fingerprint() == again.fingerprint()
    parts = [content(data) for task in stream.tasks for data in (task.train, task.test)]
    assert sorted(example for part in parts for example in part) == sorted(
        (LABELS.index(path.parent.name), array.transpose(2, 0, 1).tobytes())
        for path, array in made.items()
    )
    for task in stream.tasks:
        counts = task.test.labels[task.test.rows].bincount()
        assert counts[counts > 0].tolist() == [3, 3]
    assert "30% of each label" in stream.notes[0]


def test_other_names_of_the_splits(folder):
    folder(("training", "exam", "test"))
    stream = load(folder, splits={"train": "training", "test": "exam"})
    assert len(stream.tasks[0].train) == 10
    with pytest.raises(StockpotError, match=r"no folder 'quiz' \(it has exam, test, training\)"):
        load(folder, splits={"train": "training", "test": "quiz"})


def test_more_labels_get_short_names(folder):
    folder()
    assert [t.name for t in load(folder, labels_per_task=3).tasks] == ["cat+dog+newt", "owl"]
    (folder.path / "train" / "cat").rename(folder.path / "train" / ("cat" * 20))
    (folder.path / "test" / "cat").rename(folder.path / "test" / ("cat" * 20))
    assert [t.name for t in load(folder, labels_per_task=3).tasks] == ["0-2", "3"]
    mixed = load(folder, labels_per_task=2, label_order_seed=0)
    assert [t.name for t in mixed.tasks] == ["task-0", "task-1"]


def test_a_broken_file_is_named(folder):
    made = folder()
    path = sorted(made)[13]
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(StockpotError, match=rf"{path}: not an image that can be read"):
        load(folder)
    path.write_text("no image")
    with pytest.raises(StockpotError, match=rf"{path}: not an image that can be read"):
        load(folder)


def test_an_empty_label_is_named(folder):
    folder()
    for file in (folder.path / "test" / "dog").iterdir():
        file.unlink()
    with pytest.raises(StockpotError, match=r"test/dog holds no images \(.*\.png"):
        load(folder)


def test_labels_of_one_split_only(folder):
    folder()
    (folder.path / "test" / "newt").rename(folder.path / "test" / "toad")
    with pytest.raises(StockpotError, match="label 'newt' is in 'train' and not in 'test'"):
        load(folder)


def test_a_missing_training_split(folder):
    folder(("test",))
    with pytest.raises(StockpotError, match="has a folder 'test' and no folder 'train'"):
        load(folder)


def test_a_label_of_one_image_cannot_be_divided(folder):
    folder(("train",), count=1)
    with pytest.raises(StockpotError, match="label 'cat' has one image; two are needed"):
        load(folder)


def test_no_such_folder(folder):
    with pytest.raises(StockpotError, match="there is no such folder"):
        Images(path=str(folder.path / "nowhere")).load()
    with pytest.raises(StockpotError, match="no images at train/<label>/"):
        load(folder)


def test_sizes_that_differ(folder):
    folder()
    odd = folder.path / "test" / "owl" / "0.png"
    Image.new("RGB", (30, 20)).save(odd)
    with pytest.raises(StockpotError, match=r"owl/0\.png has 20x30 pixels .* stream\.size = 224"):
        load(folder)
    assert load(folder, size=5).image_shape == (3, 5, 5)


def test_too_many_tasks_for_the_labels(folder):
    folder()
    with pytest.raises(StockpotError, match="tasks = 5: 4 labels make at most 4 tasks"):
        load(folder, tasks=5)
    with pytest.raises(StockpotError, match="numbered 0 to 1"):
        load(folder, order=(2,))


def test_hidden_and_other_files_are_left_alone(folder):
    folder()
    (folder.path / "train" / "cat" / "._0.png").write_text("a Mac's")
    (folder.path / "train" / "cat" / "Thumbs.db").write_text("a Windows'")
    (folder.path / "train" / ".cache").mkdir()
    assert len(load(folder).tasks[0].train) == 10


# Kinds of pixels.


def test_all_grey_stays_grey_and_one_colour_makes_all_rgb(folder):
    made = folder(shape=(6, 8))
    grey = load(folder)
    assert grey.image_shape == (1, 6, 8)
    last = sorted(made)[-1]  # read after all others
    Image.fromarray(np.full((6, 8, 3), (10, 20, 30), np.uint8)).save(last)
    colour = load(folder)
    assert colour.image_shape == (3, 6, 8)
    one, three = (s.tasks[0].test.__getitems__([0])["pixel_values"] for s in (grey, colour))
    assert torch.equal(one.expand(-1, 3, -1, -1), three)


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[0, 65535]], np.uint16)), [[0, 255]]),
        (Image.fromarray(np.array([[257, 3000]], np.uint16)), [[1, 12]]),
        (Image.fromarray(np.array([[False, True]])), [[0, 255]]),
        (palette(), [[[255, 0, 0], [0, 0, 255]]]),
        (
            Image.fromarray(np.array([[[9, 8, 7, 255], [1, 2, 3, 0]]], np.uint8)),
            [[[9, 8, 7], [255, 255, 255]]],
        ),
        (Image.fromarray(np.array([[[9, 255], [7, 0]]], np.uint8)), [[9, 255]]),
    ],
    ids=["16 bit", "16 bit, dark", "1 bit", "palette", "transparent", "grey, transparent"],
)
def test_kinds_of_pixels(image, expected, tmp_path):
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert np.asarray(decoding.eight_bits(opened)).tolist() == expected


def test_a_photograph_on_its_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert decoding.eight_bits(opened).size == (20, 30)


def test_floating_point_is_refused(folder):
    folder(suffix="tif", shape=(6, 8))
    path = folder.path / "train" / "cat" / "0.tif"
    Image.fromarray(np.zeros((6, 8), np.float32)).save(path)
    with pytest.raises(StockpotError, match=rf"{path}.*mode F; up to 16 bits"):
        load(folder)


# Any data set.


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    """A small parquet data set with columns and splits of one's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rng = np.random.default_rng(0)

    def make(labels, splits=("train", "test"), kind=None, count=24):
        (tmp_path / "set" / "data").mkdir(parents=True)
        for split in splits:
            pictures = []
            for _ in range(count):
                out = io.BytesIO()
                array = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(array).save(out, "PNG")
                pictures.append({"bytes": out.getvalue(), "path": None})
            answers = [labels[n % len(labels)] for n in range(count)]
            features = datasets.Features(
                {
                    "picture": datasets.Image(),
                    "species": kind or datasets.Value("string"),
                }
            )
            table = datasets.Dataset.from_dict(
                {"picture": pictures, "species": answers}, features=features
            )
            table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
        return str(tmp_path / "set")

    return make


COLUMNS = {"image": "picture", "label": "species"}


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (("owl", "cat", "newt", "dog"), None),
        ((3, 0, 2, 1), "class"),
        ((30, 7, 20, 10), "int64"),
    ],
)
def test_columns_and_labels_of_a_data_set(data_set, labels, kind):
    import datasets

    kinds = {"class": datasets.ClassLabel(names=list(LABELS)), "int64": datasets.Value("int64")}
    path = data_set(labels, kind=kinds.get(kind))
    stream = Images(path=path, columns=COLUMNS).load()
    names = {"int64": ["7+10", "20+30"]}.get(kind, ["cat+dog", "newt+owl"])
    assert [task.name for task in stream.tasks] == names
    assert [len(task.train) for task in stream.tasks] == [12, 12]
    assert stream.labels == 4
    rows = stream.tasks[1].train.labels[stream.tasks[1].train.rows].tolist()
    assert rows == [3, 2] * 6


def test_a_data_set_of_one_split(data_set):
    path = data_set(LABELS, splits=("train",))
    stream = Images(path=path, columns=COLUMNS).load()
    assert [(len(task.train), len(task.test)) for task in stream.tasks] == [(10, 2), (10, 2)]
    with pytest.raises(StockpotError, match=r"no split 'dev' \(it has train\)"):
        Images(path=path, columns=COLUMNS, splits={"test": "dev"}).load()


def test_columns_that_are_not_there(data_set):
    path = data_set(LABELS)
    with pytest.raises(StockpotError, match=r"no column 'image' \(it has picture, species\)"):
        Images(path=path).load()
    with pytest.raises(StockpotError, match="not images; name the column"):
        Images(path=path, columns={"image": "species", "label": "species"}).load()
    with pytest.raises(ValueError, match=r"unknown key 'picture' \(valid: image, label\)"):
        Images(path=path, columns={"picture": "image"})


def test_a_label_only_the_test_split_has(data_set, tmp_path):
    path = data_set(LABELS, splits=("train",))
    other = tmp_path / "set"
    other.rename(tmp_path / "kept")
    data_set((*LABELS, "yak"), splits=("test",))
    for file in (tmp_path / "kept" / "data").iterdir():
        file.rename(other / "data" / file.name)
    with pytest.raises(StockpotError, match=r"row 4: label yak is out of range.*those of training"):
        Images(path=path, columns=COLUMNS).load()


def test_saved_to_disk(data_set, tmp_path):
    import datasets

    datasets.load_dataset(data_set(LABELS)).save_to_disk(tmp_path / "saved")
    stream = Images(path=str(tmp_path / "saved"), columns=COLUMNS).load()
    assert [len(task.test) for task in stream.tasks] == [12, 12]


# Large sets lie in a file.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    return tmp_path / "cache" / "stockpot" / "images"


def test_large_sets_are_mapped_and_kept(folder, cache, monkeypatch):
    made = folder()
    kept = load(folder)
    assert len(list(cache.glob("*.pixels"))) == 2
    monkeypatch.setattr(decoding, "IN_MEMORY", 2**30)
    assert kept.fingerprint() == load(folder).fingerprint()
    monkeypatch.setattr(decoding, "IN_MEMORY", 0)

    def refuse(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Decoder, "_block", refuse)
        assert load(folder).fingerprint() == kept.fingerprint()
        with pytest.raises(AssertionError, match="decoded again"):
            load(folder, size=4)
    # Another file under the same name is another data set.
    changed = sorted(made)[0]
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(changed)
    assert load(folder).fingerprint() != kept.fingerprint()


def test_a_failure_leaves_nothing_to_reuse(folder, cache):
    made = folder()
    sorted(made)[-1].write_text("no image")
    with pytest.raises(StockpotError, match="not an image"):
        load(folder)
    assert not list(cache.glob("*.pixels"))
    assert not list(cache.glob(".*"))


def test_a_kill_leaves_nothing_to_reuse(folder, cache, monkeypatch):
    folder()
    code = textwrap.dedent(
        f"""
        import os, signal
        from stockpot.streams import STREAMS, decoding
        decoding.IN_MEMORY = 0
        decoding._BLOCK = 1
        read = decoding._Decoder._blocks
        def killed(self, *arguments):
            for number, block in enumerate(read(self, *arguments)):
                if number == 7:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield block
        decoding._Decoder._blocks = killed
        STREAMS["images"](path={str(folder.path)!r}).load()
        """
    )
    ended = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(cache.glob(".*.tmp"))
    assert not list(cache.glob("*.pixels"))
    stream = load(folder)
    assert not list(cache.glob(".*.tmp"))
    monkeypatch.setattr(decoding, "IN_MEMORY", 2**30)
    assert stream.fingerprint() == load(folder).fingerprint()


def test_a_cut_file_is_made_again(folder, cache):
    folder()
    fingerprint = load(folder).fingerprint()
    file = sorted(cache.glob("*.pixels"))[0]
    file.write_bytes(file.read_bytes()[:100])
    assert load(folder).fingerprint() == fingerprint


def test_a_cache_that_cannot_be_written_to(folder, cache):
    folder()
    cache.parent.parent.write_text("a file")
    with pytest.raises(StockpotError, match="set XDG_CACHE_HOME"):
        load(folder)
