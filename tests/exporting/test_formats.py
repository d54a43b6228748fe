"""Every format holds what was exported: its library computes the same on photographs, and we read it back bit by bit.

What loads a file here is the code of its own model card, as a reader would copy it.
"""

import json
import math
import re
from pathlib import Path

import onnx
import pytest
import timm
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoImageProcessor, SwinForMaskedImageModeling, Swinv2ForMaskedImageModeling, Swinv2Model
from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

from simmim.checkpoint_files import save_file as save_checkpoint
from simmim.config import compose_config
from simmim.data.excerpt import read_excerpt
from simmim.data.transforms import centre_transform
from simmim.encoders import create_encoder, swin
from simmim.encoders.encoder_files import read_encoder_weights, save_encoder, trained_windows
from simmim.encoders.names import is_buffer, to_timm
from simmim.encoders.similarity import MAX_LOG_SCALE
from simmim.encoders.weights import load_encoder
from simmim.export import export
from simmim.exporting import onnx_file, timm_folder
from simmim.exporting.model import Model, Preprocessing
from simmim.masking import expand_mask
from simmim.pretrain import pretrain
from simmim.run_folder import list_checkpoints
from simmim.tasks.pretraining import Pretraining

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
CLASSES = ["cat", "dog", "a | b"]
SMALL = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "extra_norm_every": 0, "window_size": 4}
FULL = {"size": (64, 64)}  # maps of 16 and 8 tokens, windows of 4
SHRUNK = {"size": (64, 64), "depths": [1, 2, 2], "num_heads": [1, 2, 2], "window_size": 8, "patch_size": 4}
MOVED = {**SHRUNK, "pretrained_window_size": [6, 6, 3]}
WIDE = {"size": (32, 64), "pretrained_window_size": [[3, 4], 4]}
FIRST = {**FULL, **swin.V1}
FIRST_SHRUNK = {**SHRUNK, **swin.V1}
OUT = {"timm": "folder", "hf": "folder", "torchvision": "model.pth", "official": "model.pth",
       "safetensors": "model.safetensors", "onnx": "model.onnx"}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(module):
    """Nothing zero, a head beyond the clamp of its scale; else blocks are the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "logit_scale" in name:
            parameter.data = math.log(10) + 0.5 * noise
            parameter.data[0] = MAX_LOG_SCALE + 1
        else:
            parameter.data = parameter.data + (noise / parameter[0].numel() ** 0.5 if noise.ndim > 1 else 0.3 * noise)


def encoder_file(path, *, size=(64, 64), head=False, **changes):
    encoder = create_encoder("swinv2", **{**SMALL, **changes})
    randomize(encoder)
    classifier = {}
    if head:
        linear = torch.nn.Linear(encoder.channels[-1], len(CLASSES))
        classifier = {
            "head": linear.state_dict(), "classes": CLASSES, "test_crop": 0.875, "interpolation": "bicubic"
        }  # fmt: skip
    channels = encoder.config["in_channels"]
    statistics = {"mean": (2 * MEAN)[:channels], "std": (2 * STD)[:channels]}
    save_encoder(encoder, path, image_size=size, **statistics, **classifier)
    return path


def run(encoder, form, out, *overrides):
    words = [f"encoder={encoder}", f"format={form}", f"out={out}", *overrides]
    return export(compose_config("export", words, output_dir=Path("unused")))


def card_of(out):
    return ((out if out.is_dir() else out.parent) / "MODEL_CARD.md").read_text()


def load_as_the_card_says(out, images):
    """What the names of the card's first block of code stand for in the end, its images replaced by these."""
    code = re.findall(r"```python\n(.+?)```", card_of(out), flags=re.DOTALL)
    assert code and all(re.search(r"\nimages = [^\n]+", block) or "images" not in block for block in code)
    names = {"images": images}
    for block in code:
        with torch.no_grad():
            exec(re.sub(r"\nimages = [^\n]+", "", block), names)
    return names


def normalized(images):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


@pytest.fixture(scope="module")
def photos(shared_data):
    return shared_data / "imagenet-samples"


def crops(photos, size, share=1.0, interpolation="bilinear"):
    crop = centre_transform(size, share=share, interpolation=interpolation)
    return normalized(read_excerpt(photos, channels=3, max_value=255, crop=crop, count=3)[1])


@pytest.mark.parametrize("head", [False, True], ids=["encoder", "classifier"])
@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("timm", FULL), ("timm", MOVED), ("timm", WIDE), ("hf", FULL), ("hf", SHRUNK), ("hf", MOVED),
        ("official", FULL), ("official", MOVED), ("torchvision", FULL), ("safetensors", MOVED), ("timm", FIRST),
        ("timm", FIRST_SHRUNK), ("official", FIRST_SHRUNK), ("hf", FIRST), ("torchvision", FIRST),
        ("safetensors", FIRST_SHRUNK),
    ],
)  # fmt: skip
def test_there_and_back(form, model, head, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = encoder_file(tmp_path / "encoder.safetensors", head=head, **model)
    out = run(file, form, Path("there") / OUT[form], f"images={photos}")
    images, encoder = crops(photos, model["size"]), load_encoder(file).eval()
    weights, known = read_encoder_weights(file)
    with torch.no_grad():
        features = encoder(images)
        scores = torch.nn.functional.linear(features.mean((1, 2)), **known["head"]) if head else None
    names = load_as_the_card_says(out, images)
    masked_twice = form == "hf" and model is not FIRST  # see below
    if form == "hf":
        torch.testing.assert_close(
            names["features"].view_as(features), features, atol=9 if masked_twice else 1e-4, rtol=0
        )
        assert names["features"].shape == (3, math.prod(features.shape[1:3]), features.shape[3])
    elif form != "official":
        torch.testing.assert_close(names["features"], features, atol=1e-4, rtol=0)
    if head and "probabilities" in names and not masked_twice:
        torch.testing.assert_close(names["probabilities"], scores.softmax(-1), atol=1e-4, rtol=0)
    again, about = read_encoder_weights(out)
    lost = {"mask_token"} if form in ("timm", "hf", "torchvision", "official") else set()
    assert again.keys() == weights.keys()
    if form != "safetensors":  # of tables, what windows reach
        weights, again = (model_of(encoder, model["size"]).reached(state) for state in (weights, again))
    assert {key for key, value in weights.items() if not torch.equal(value, again[key])} == lost
    if form != "torchvision":  # which says nothing of the images
        assert trained_windows(about) == trained_windows(known)
        assert list(about["image_size"]) == list(model["size"])
    if form in ("timm", "hf", "safetensors"):
        keys = ["mean", "std", *(["classes", "interpolation"] if head else [])]
        assert [about[key] for key in keys] == [known[key] for key in keys]
    if head:
        assert all(torch.equal(value, about["head"][key]) for key, value in known["head"].items())


def halved_mask(layer, original):
    def once(*args, **kwargs):
        mask = original(*args, **kwargs)
        return None if mask is None else mask / 2

    layer.get_attn_mask = once


@pytest.mark.parametrize("extreme", [True, False], ids=["scales at the clamp", "scales as they begin"])
def test_transformers_is_compared_both_ways(extreme, photos, tmp_path, caplog):
    """Its mask counts twice. Where that shows, the figures say how much; counted once, nothing is left of it."""
    caplog.set_level("INFO")
    file = encoder_file(tmp_path / "encoder.safetensors", num_heads=[4, 8])  # 2 dims a head: cosines of -1
    encoder = load_encoder(file)
    for name, parameter in encoder.named_parameters():
        if "logit_scale" in name:
            parameter.data[...] = MAX_LOG_SCALE if extreme else math.log(10)
    save_encoder(encoder, file, image_size=(64, 64), mean=MEAN, std=STD)
    out = run(file, "hf", tmp_path / "hf", f"images={photos}")
    plain, once = (float(figure) for figure in re.findall(r"features by at most (\S+),", caplog.text))
    images, expected = crops(photos, (64, 64)), load_encoder(file).eval()(crops(photos, (64, 64)))
    model = Swinv2Model.from_pretrained(out).eval()
    difference = (model(images).last_hidden_state.view_as(expected) - expected).abs().max()
    for layer in model.modules():
        if isinstance(layer, Swinv2Layer):
            halved_mask(layer, layer.get_attn_mask)
    torch.testing.assert_close(model(images).last_hidden_state.view_as(expected), expected, atol=1e-4, rtol=0)
    assert once < 1e-4
    assert (plain > 1e-2 and difference > 1e-2) if extreme else (plain < 1e-4 and difference < 1e-4)
    for figure in (plain, once):
        assert f"{figure:.1e}" in card_of(out)


FIRST_RUN = ["model.window_size=2", *(f"model.{key}={value}" for key, value in swin.V1.items())]


@pytest.fixture(scope="module", params=[[], FIRST_RUN], ids=["v2", "v1"])
def pretrained(request, tmp_path_factory):
    """A run folder of the debug experiment after some steps, whose weights then are all made to matter."""
    folder = tmp_path_factory.mktemp("run")
    words = ["experiment=debug", "trainer.max_steps=2", *request.param]
    pretrain(compose_config("pretrain", words, output_dir=folder))
    [checkpoint] = list_checkpoints(folder)
    held = torch.load(checkpoint, weights_only=True)
    task = Pretraining(**held["hyper_parameters"])
    task.load_state_dict(held["state_dict"], assign=True)
    randomize(task.network)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "logit_scale" in name:  # where twice the mask of transformers makes no difference
                parameter.fill_(math.log(10))
    checkpoint.unlink()
    save_checkpoint({**held, "state_dict": task.state_dict()}, checkpoint)
    size, statistics = tuple(task.hparams["image_size"]), {key: task.hparams[key] for key in ("mean", "std")}
    save_encoder(task.network.encoder, folder / "encoder.safetensors", image_size=size, **statistics)
    return folder, task.eval()


def test_a_pretraining_run_keeps_its_decoder_in_transformers(pretrained, photos, tmp_path):
    folder, task = pretrained
    out = run(folder, "hf", tmp_path / "hf", f"images={photos}")
    first = task.network.encoder.config["norm"] == "pre"
    kind = SwinForMaskedImageModeling if first else Swinv2ForMaskedImageModeling
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    images = crops(photos, (32, 32))
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden = expand_mask(mask, 8, 8).flatten(1)
    with torch.no_grad():
        found = model.eval()(images, bool_masked_pos=hidden)
        torch.testing.assert_close(found.reconstruction, task.network.reconstruct(images, mask), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.loss, task.network(images, mask), atol=1e-5, rtol=0)
    names = load_as_the_card_says(out, images[:1])
    assert names["predicted"].shape == (1, 3, 32, 32)
    weights = read_encoder_weights(folder)[0]
    again = run(run(out, "official", tmp_path / "there" / "model.pth"), "hf", tmp_path / "again")  # and round about
    for place in (out, again):
        held, known = read_encoder_weights(place)
        assert all(torch.equal(value, weights[key]) for key, value in held.items())
        assert all(torch.equal(value, task.network.head.state_dict()[key]) for key, value in known["decoder"].items())
    processor = AutoImageProcessor.from_pretrained(out)
    picture = Image.open(next(iter(sorted(photos.glob("*.JPEG"))))).convert("RGB")
    seen = processor(picture, return_tensors="pt").pixel_values
    plain = task.normalize(centre_transform((32, 32))(pil_to_tensor(picture))[None])
    assert (seen - plain).abs().mean() < 0.05


def test_a_pretraining_run_in_the_authors_layout(pretrained, tmp_path):
    """Names and values of a SimMIM checkpoint of theirs, whose buffers timm computes in its own way."""
    folder, task = pretrained
    state = torch.load(run(folder, "official", tmp_path / "model.pth"), weights_only=True)["model"]
    network = task.network
    assert torch.equal(state.pop("decoder.0.weight").flatten(1), network.head.weight)
    assert torch.equal(state.pop("decoder.0.bias"), network.head.bias)
    assert torch.equal(state.pop("encoder.mask_token").flatten(), network.encoder.mask_token)
    config, (height, width) = network.encoder.config, task.hparams["image_size"]
    theirs = (TimmSwin if config["norm"] == "pre" else TimmSwinV2)(
        img_size=(height, width),
        num_classes=0,
        **{key: config[key] for key in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")},
    )
    buffers = {name: value for name, value in theirs.named_buffers() if not name.endswith("k_bias")}
    assert {f"encoder.{name}" for name in buffers} == {name for name in state if is_buffer(name)}
    for name, value in buffers.items():
        assert torch.equal(state[f"encoder.{name}"], value), name
        assert state[f"encoder.{name}"].dtype == value.dtype
    weights = {key.removeprefix("encoder.") for key in state} - buffers.keys()
    closing = {key.replace("layers.1.downsample", "layers.0.downsample") for key in theirs.state_dict()}
    assert weights == {key.replace("layers.2.downsample", "layers.1.downsample") for key in closing}


def test_onnx_computes_any_number_of_images(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    file = encoder_file(tmp_path / "encoder.safetensors", head=True, size=(32, 32), depths=[2], num_heads=[1])
    out = run(file, "onnx", "there/model.onnx", f"images={photos}")
    assert "onnxruntime" in caplog.text and "Replaced initializer" not in caplog.text
    images, encoder = crops(photos, (32, 32)), load_encoder(file).eval()
    head = read_encoder_weights(file)[1]["head"]
    for count in (1, 3):
        names = load_as_the_card_says(out, images[:count].numpy())
        with torch.no_grad():
            features = encoder(images[:count])
            logits = torch.nn.functional.linear(features.mean((1, 2)), **head)
        torch.testing.assert_close(torch.from_numpy(names["features"]), features, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.from_numpy(names["logits"]), logits, atol=1e-4, rtol=0)
    written = onnx.load(out)
    assert {item.domain: item.version for item in written.opset_import}[""] == onnx_file.OPSET
    facts = {item.key: json.loads(item.value) for item in written.metadata_props if item.key.startswith("simmim.")}
    assert (facts["simmim.mean"], facts["simmim.classes"]) == (MEAN, CLASSES)


@pytest.mark.parametrize(
    ("name", "window", "size", "expected"),
    [
        ("swinv2_b", 12, 192, ("swinv2_base_window12_192", {})),
        ("swinv2_t", 8, 256, ("swinv2_tiny_window8_256", {})),
        ("swinv2_s", 12, 192, ("swinv2_small_window8_256", {"img_size": [192, 192], "window_size": 12})),
        ("swinv2_l", 16, 256, ("swinv2_large_window12_192", {"img_size": [256, 256], "window_size": 16})),
        ("swin_b", 7, 224, ("swin_base_patch4_window7_224", {})),
        ("swin_l", 12, 384, ("swin_large_patch4_window12_384", {})),
        ("swin_l", 12, 192, ("swin_large_patch4_window7_224", {"img_size": [192, 192], "window_size": 12})),
    ],
)
def test_timm_knows_the_published_sizes_by_name(name, window, size, expected):
    with torch.device("meta"):
        encoder = create_encoder(name, window_size=window)
        found, arguments = timm_folder.architecture(model_of(encoder, (size, size)))
        made = timm.create_model(found, num_classes=0, **arguments)
    arguments.pop("pretrained_window_sizes", None)
    assert (found, arguments) == expected
    ours = to_timm(model_of(encoder, (size, size)).weights)
    assert {key: value.shape for key, value in made.state_dict().items()} == {k: v.shape for k, v in ours.items()}
    assert made.patch_embed.img_size == (size, size)
    assert made.layers[0].blocks[0].window_size == (window, window)


def model_of(encoder, size):
    windows = [height for height, _ in encoder.windows(*size)]
    return Model(encoder, size, windows, Preprocessing(MEAN, STD, 255, "bicubic", 0.875), None, None, None)


REFUSED = {
    "extra norms": ("timm", {"extra_norm_every": 2}, "timm, which lacks the extra norms"),
    "extra norms in transformers": ("hf", {"extra_norm_every": 2}, "transformers, which lacks the extra norms"),
    "another position bias": ("hf", {"position_bias": "linear_cpb"}, "V1 or V2, .*model.position_bias=linear_cpb"),
    "a table": (
        "torchvision",
        {"position_bias": "table"},
        "V1 or V2, .*model.position_bias=table, model.norm=res_post",
    ),
    "norms of the first version": ("timm", {"norm": "pre"}, "V1 or V2, .*log_cpb, model.norm=pre"),
    "wide windows of a table": (
        "timm",
        {**swin.V1, "size": (16, 64)},
        "4x4 tokens, shifted by 0 and 2: give format=onnx",
    ),
    "shrunk windows of a table": ("hf", {**swin.V1, "size": (16, 16)}, "has the same window in all .* has 4, 2 tokens"),
    "shrunk windows in torchvision": ("torchvision", {**swin.V1, "size": (16, 16)}, "the map of stage 2 has 2x2"),
    "wide images": ("hf", {"size": (32, 64)}, "square images, not 32x64 px"),
    "wide windows": ("official", {"size": (16, 64)}, "stage 1 has windows of 4x4 tokens, shifted by 0 and 2"),
    "wide trained windows": ("official", {"pretrained_window_size": [4, [3, 4]]}, "trained with, and here that is 3x4"),
    "one trained token": ("hf", {"pretrained_window_size": [4, 1]}, "windows of one token"),
    "shrunk windows": ("torchvision", {"size": (32, 32), "window_size": 8}, "the map of stage 2 has 4x4"),
    "trained windows": ("torchvision", {"pretrained_window_size": [8, 8]}, r"trained with \[8, 8\]"),
    "channels": ("torchvision", {"in_channels": 4}, "3 channels, not 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_refused(case, tmp_path):
    form, changes, reason = REFUSED[case]
    file = encoder_file(tmp_path / "encoder.safetensors", **changes)
    with pytest.raises(ValueError, match=reason) as caught:
        run(file, form, tmp_path / "there" / OUT[form])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("there/*")) == []


def test_other_channels_and_patches_go_where_there_is_room(tmp_path, caplog):
    caplog.set_level("INFO")
    changes = {"in_channels": 4, "patch_size": 2, "size": (32, 32)}
    file = encoder_file(tmp_path / "encoder.safetensors", **changes)
    for form in ("timm", "hf"):
        run(file, form, tmp_path / form)
    assert caplog.text.count("read back by simmim: ") == 2
