"""Models: shapes, preprocessing, loading from a local folder, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stockpot.errors import NonFiniteError, StockpotError
from stockpot.models import expand_model
from stockpot.models.huggingface import image_processing, preprocess_images
from stockpot.models.learner import (
    ImageLearner,
    check_finite,
    conv,
    copy_weights,
    load_weights_,
    mlp,
)
from stockpot.models.settings import Conv, Factory, HuggingFace, Mlp
from stockpot.streams.settings import Digits


@pytest.fixture(scope="module")
def stream():
    return Digits(train_limit=20, test_limit=10).load()


def test_mlp_is_the_network_of_the_recipe():
    module = mlp((1, 28, 28), (128,), 5)
    shapes = [tuple(p.shape) for p in module.parameters()]
    assert shapes == [(128, 784), (128,), (5, 128), (5,)]
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    first, _, last = module[1], module[2], module[3]
    x = images.flatten(1).float() / 255
    expected = torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(ImageLearner(module).logits(images), expected)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_conv_shapes(norm):
    module = conv((3, 32, 32), (4, 8, 16), 7, norm)
    assert ImageLearner(module).logits(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_masked_labels_never_win():
    learner = ImageLearner(mlp((1, 2, 2), (), 4))
    allowed = torch.tensor([[True, False, True, False], [False, False, False, True]])
    logits = learner.logits(torch.rand(2, 1, 2, 2), allowed)
    assert torch.isinf(logits[~allowed]).all()
    assert logits[1].argmax() == 3


@pytest.mark.parametrize(
    "settings", [Mlp(), Conv(channels=(4,)), Conv(channels=(4,), norm="batch")]
)
def test_weights_round_trip(stream, settings):
    torch.manual_seed(0)
    one = settings.build(stream).module
    torch.manual_seed(1)
    other = settings.build(stream).module
    weights = copy_weights(one)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(weights.values(), copy_weights(other).values(), strict=True)
    )
    load_weights_(other, weights)
    assert all(
        a.equal(b) for a, b in zip(weights.values(), copy_weights(other).values(), strict=True)
    )
    assert set(weights) == set(one.state_dict())


def test_weights_of_another_model_are_refused(stream):
    small, large = Mlp(hidden=(4,)).build(stream), Mlp(hidden=(5,)).build(stream)
    before = copy_weights(large.module)
    with pytest.raises(StockpotError, match="shape"):
        load_weights_(large.module, copy_weights(small.module))
    deep = Mlp(hidden=(4, 4)).build(stream)
    with pytest.raises(StockpotError, match="missing"):
        load_weights_(deep.module, copy_weights(small.module))
    assert all(
        a.equal(b)
        for a, b in zip(before.values(), copy_weights(large.module).values(), strict=True)
    )


def test_tied_weights_are_one():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert len(copy_weights(module)) == 3


def test_non_finite_weights_are_named():
    module = mlp((1, 2, 2), (3,), 2)
    module[1].bias.data[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight '1\.bias' is not finite"):
        check_finite(module, "here")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mlp", {"name": "mlp"}),
        ("my.module:make", {"name": "factory", "factory": "my.module:make"}),
        ("google/vit-base", {"name": "huggingface", "id": "google/vit-base"}),
        ({"factory": "a:b"}, {"name": "factory", "factory": "a:b"}),
        ({"id": "a/b"}, {"name": "huggingface", "id": "a/b"}),
    ],
)
def test_short_forms(given, expected):
    assert expand_model(given) == expected


# The user's own.


def test_factory(stream, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def make(image_shape, labels, width=3):\n"
        "    c, h, w = image_shape\n"
        "    layers = nn.Linear(c * h * w, width), nn.Linear(width, labels)\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    learner = Factory(factory="my_models:make", arguments={"width": 6}).build(stream)
    assert learner.module[1].out_features == 6
    assert learner.logits(stream.tasks[0].test.__getitems__([0, 1])["pixel_values"]).shape == (2, 5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module:make", "cannot be imported"),
        ("json:no_such_function", "cannot be imported"),
        ("builtins:dict", "not a torch.nn.Module"),
    ],
)
def test_bad_factories(stream, factory, message):
    with pytest.raises(StockpotError, match=message):
        Factory(factory=factory).build(stream)


# Hugging Face.


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A tiny, randomly initialised ViT with another head, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, num_channels=3, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_normalize": True,
        "size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7], "do_rescale": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_local_folder_with_a_fresh_head(vit_folder, stream):
    from transformers import ViTForImageClassification

    learner = HuggingFace(id=str(vit_folder)).build(stream)
    assert learner.module.config.num_labels == 5
    reference = ViTForImageClassification.from_pretrained(vit_folder)
    ours = learner.module.state_dict()
    for name, tensor in reference.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(tensor, ours[name]), name


def test_images_as_the_processor_wants_them(vit_folder, stream):
    learner = HuggingFace(id=str(vit_folder)).build(stream)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = images.numpy() / 255.0
    expected = (expected - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([0.5, 0.6, 0.7])[
        :, None, None
    ]
    np.testing.assert_allclose(learner.preprocess(images).numpy(), expected, rtol=1e-5, atol=1e-6)
    grey = learner.preprocess(torch.rand(4, 1, 8, 8))
    assert grey.shape == (4, 3, 16, 16)


def test_resizing_agrees_with_pillow(vit_folder, stream):
    from PIL import Image

    learner = HuggingFace(id=str(vit_folder)).build(stream)
    array = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR))
    mean, deviation = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    ours = learner.preprocess(torch.from_numpy(array).permute(2, 0, 1)[None])[0]
    back = ours.permute(1, 2, 0).numpy() * deviation + mean
    assert np.abs(back * 255 - pillow).max() <= 1.01  # Pillow rounds twice, to whole levels


# Image processors: what comes out is compared with what they make of each image themselves.


PLAIN = {
    "vit": ("vit", "ViT", {"size": {"height": 224, "width": 224}, "resample": 2}),
    "vit-grey": ("vit", "ViT", {"image_mean": [0.5], "image_std": [0.5]}),
    "swin": ("vit", "ViT", {"resample": 3, "image_mean": [0.485, 0.456, 0.406]}),
    "deit": ("deit", "DeiT", {}),
    "beit": ("beit", "Beit", {}),
    "convnext": ("convnext", "ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    "convnext-384": ("convnext", "ConvNext", {"size": {"shortest_edge": 384}}),
    "dinov2": ("bit", "Bit", {"size": {"shortest_edge": 256}}),
    "crop-only": ("bit", "Bit", {"do_resize": False, "crop_size": {"height": 51, "width": 36}}),
    "poolformer": ("poolformer", "PoolFormer", {}),
    "unscaled": ("vit", "ViT", {"do_rescale": False, "do_normalize": False}),
    "minus-one": (
        "vit",
        "ViT",
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
    ),
}


def processor_folder(folder, module, kind, settings):
    """A folder with the preprocessor_config.json of a processor, and the processor."""
    import importlib

    source = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(source, f"{kind}ImageProcessorPil")(**settings)
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (50, 37), (33, 70), (300, 260)])
@pytest.mark.parametrize("case", PLAIN)
def test_agrees_with_the_processor(case, shape, tmp_path):
    module, kind, settings = PLAIN[case]
    channels = 1 if case == "vit-grey" else 3
    processor = processor_folder(tmp_path, module, kind, settings)
    processing = image_processing(str(tmp_path), None, SimpleNamespace(num_channels=channels))
    # Beyond squares Pillow's versions differ where a filter overshoots: keep off black and white.
    low, high = (0, 256) if shape[0] == shape[1] else (64, 192)
    images = torch.randint(low, high, (2, channels, *shape), dtype=torch.uint8)
    theirs = processor(
        list(images.numpy()), input_data_format="channels_first", return_tensors="pt"
    )["pixel_values"]
    levels = 255 * min(processing["deviation"]) / processing["scale"]
    for given in (images, images / 255):
        ours = preprocess_images(given, **processing)
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() * levels <= 2


@pytest.mark.parametrize(
    ("model_type", "settings", "resize", "crop"),
    [
        ("convnext", {"size": 224, "crop_pct": 0.875, "resample": 3}, {"edge": 256}, (224, 224)),
        ("deit", {"size": 256, "crop_size": 224}, {"size": (256, 256)}, (224, 224)),
        ("vit", {"size": 384}, {"size": (384, 384)}, None),
    ],
)
def test_files_of_old_say_less(tmp_path, model_type, settings, resize, crop):
    """What they leave out, the processor's class knows: that a ConvNeXt's size is one side's."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    processing = image_processing(str(tmp_path), None, SimpleNamespace(num_channels=3))
    assert processing["crop"] == crop
    assert resize.items() <= processing["resize"].items()


@pytest.mark.parametrize(
    ("module", "kind", "settings", "message"),
    [
        ("mobilevit", "MobileViT", {}, r"does more than .*do_flip_channel_order = True"),
        ("efficientnet", "EfficientNet", {}, "include_top = True"),
        ("levit", "Levit", {}, "LevitImageProcessor does more"),
        ("vit", "ViT", {"resample": 1}, "resample = 1 cannot be followed"),
        ("vit", "ViT", {"do_pad": True, "pad_size": {"height": 300, "width": 300}}, "do_pad"),
        ("vit", "ViT", {"image_mean": [0.5] * 4, "image_std": [1] * 4}, "a model of 3 channels"),
    ],
)
def test_processors_that_do_more_are_refused(tmp_path, module, kind, settings, message):
    processor_folder(tmp_path, module, kind, settings)
    with pytest.raises(ValueError, match=message):
        image_processing(str(tmp_path), None, SimpleNamespace(num_channels=3))


def test_a_processor_that_does_more_is_refused_with_its_model(vit_folder, tmp_path, stream):
    import shutil

    shutil.copytree(vit_folder, tmp_path / "vit")
    processor_folder(tmp_path / "vit", "mobilevit", "MobileViT", {})
    with pytest.raises(StockpotError, match=r"preprocessor_config\.json of .* does more than"):
        HuggingFace(id=str(tmp_path / "vit")).build(stream)


def test_without_a_processor_only_the_size_is_known(tmp_path):
    processing = image_processing(str(tmp_path), None, SimpleNamespace(image_size=9))
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    torch.testing.assert_close(preprocess_images(images, **processing), images / 255)
    assert preprocess_images(images[:, :1, :5], **processing).shape == (2, 3, 9, 9)


def test_trains_in_an_experiment(vit_folder, tmp_path):
    from support.experiments import run_file, write_experiment

    path = write_experiment(tmp_path, "[{name: ewc, samples: 4}, sfa]")
    outcome = run_file(
        path, tmp_path / "out", [f"model={vit_folder}", "training.epochs=1", "stream.order=[0,1]"]
    )
    assert not outcome.failures
    assert len(outcome.summary) == 2


def test_unknown_model_without_network(stream):
    with pytest.raises(StockpotError, match="cannot load the model 'nobody/nothing'"):
        HuggingFace(id="nobody/nothing").build(stream)


def test_folder_without_weights(tmp_path, stream):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(StockpotError, match="cannot load the model"):
        HuggingFace(id=str(tmp_path)).build(stream)


def test_damaged_weights(vit_folder, tmp_path, stream):
    import shutil

    shutil.copytree(vit_folder, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(StockpotError, match="cannot load the model"):
        HuggingFace(id=str(tmp_path / "vit")).build(stream)


def test_weights_that_do_not_fit_are_refused(vit_folder, tmp_path, stream):
    """Only the head may be fresh: a body that did not load would train from noise, unnoticed."""
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(vit_folder, tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    body = next(n for n in weights if "attention" in n and n.endswith("weight"))
    del weights[body]
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(StockpotError, match="lacks"):
        HuggingFace(id=str(tmp_path / "vit")).build(stream)
