"""Fine-tuning: which layer learns how fast, what the network computes, and what its metrics count."""

import types

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2

from simmim.encoders import create_encoder
from simmim.encoders.names import to_timm
from simmim.tasks.classification import MOST_CONFUSED, Classification, ImageClassifier
from simmim.training.optimizer import create_optimizer

# Typed from the authors' rule: patches 0, block i is i + 1, a merging with the last block of its stage, the rest on
# top. SwinV2-T has 12 blocks, and so 14 layers.
LAYERS_OF_T = {
    "encoder.embed.": 0,
    "encoder.stages.0.0.": 1, "encoder.stages.0.1.": 2, "encoder.merges.0.": 2,
    "encoder.stages.1.0.": 3, "encoder.stages.1.1.": 4, "encoder.merges.1.": 4,
    "encoder.stages.2.0.": 5, "encoder.stages.2.1.": 6, "encoder.stages.2.2.": 7,
    "encoder.stages.2.3.": 8, "encoder.stages.2.4.": 9, "encoder.stages.2.5.": 10, "encoder.merges.2.": 10,
    "encoder.stages.3.0.": 11, "encoder.stages.3.1.": 12,
    "encoder.norm.": 13, "head.": 13,
}  # fmt: skip
DECAYED = ("embed.proj.weight", "attention.qkv.weight", "attention.proj.weight", "mlp.0.weight", "mlp.2.weight",
           "reduction.weight", "head.weight")  # fmt: skip

MODEL = {
    "name": "swinv2", "embed_dim": 16, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "extra_norm_every": 0,
    "window_size": 4, "in_channels": 3, "drop_path": 0.0,
}  # fmt: skip
NO_MIXING = {"mixup": 0, "cutmix": 0, "switch": 0}
MIXING = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5}
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05, "layer_decay": 0.8}
SCHEDULE = {"name": "cosine", "warmup_steps": 0, "total_steps": 10, "final_ratio": 0.0, "milestones": []}
NAMES = ["hat", "skirt", "dress", "shoes", "pants", "shirt", "shorts"]


def task(classes=NAMES, **changes):
    settings = {
        "model": MODEL, "classes": list(classes), "label_smoothing": 0.0, "mixing": NO_MIXING, "image_size": [32, 32],
        "preprocessing": {}, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "optimizer": OPTIMIZER,
        "schedule": SCHEDULE, "ema_decay": None, "seed": 0,
    }  # fmt: skip
    made = Classification(**{**settings, **changes})
    made.configure_model()
    made.log = lambda name, value, **_: made.__dict__.setdefault("logged", {}).update({name: float(value)})
    return made


def move(network, seed=0):
    """Post-norms start at zero, which would hide what every branch computes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def batch(size=6, fillers=0, seed=1, classes=7):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "label": torch.randint(0, classes, (size,), generator=generator),
        "counts": torch.arange(size) < size - fillers,
        "unreadable": [],
    }


@pytest.mark.parametrize("layer_decay", [0.75, 1.0])
def test_every_parameter_has_the_learning_rate_of_its_layer_and_its_weight_decay(layer_decay):
    with torch.device("meta"):
        network = ImageClassifier(create_encoder("swinv2_t", window_size=12), classes=1000, label_smoothing=0.1)
    settings = {**OPTIMIZER, "lr": 5e-3, "layer_decay": layer_decay}
    optimizer = create_optimizer(network, **settings)
    given = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    named = dict(network.named_parameters())
    assert not named.pop("encoder.mask_token").requires_grad  # nothing is hidden
    assert len(named) == len(given)
    for name, parameter in named.items():
        (layer,) = (layer for start, layer in LAYERS_OF_T.items() if name.startswith(start))
        lr, weight_decay = given[id(parameter)]
        assert lr == pytest.approx(5e-3 * layer_decay ** (14 - 1 - layer), rel=1e-12), name
        assert weight_decay == (0.05 if name.endswith(DECAYED) and "position_bias" not in name else 0), name


def test_the_mask_token_is_of_the_lowest_layer():
    with torch.device("meta"):
        assert create_encoder("swinv2_t", window_size=12).layer_of("mask_token") == 0


@pytest.mark.parametrize(("size", "window", "trained"), [(192, 12, None), (256, 16, (12, 12, 12, 6))])
def test_logits_are_those_of_timm(size, window, trained):
    shape = {"embed_dim": 24, "depths": (1, 2, 2, 2), "num_heads": (3, 3, 6, 12)}
    encoder = create_encoder(
        "swinv2", **shape, extra_norm_every=0, window_size=window,
        pretrained_window_size=None if trained is None else list(trained),
    )  # fmt: skip
    ours = move(ImageClassifier(encoder, classes=11, label_smoothing=0.1)).eval()
    theirs = TimmSwinV2(
        img_size=size, num_classes=11, window_size=window, pretrained_window_sizes=trained or (0, 0, 0, 0), **shape
    ).eval()
    head = {f"head.fc.{key}": value for key, value in ours.head.state_dict().items()}
    theirs.load_state_dict(to_timm(ours.encoder.state_dict()) | head)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, expected = ours.logits(images), theirs(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["classes", "shares"])
def test_the_loss_is_the_cross_entropy_with_smoothed_targets(smoothing, kind):
    network = task(label_smoothing=smoothing).network
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 6, 2, 2, 4])
    shares = torch.rand(5, 7).softmax(dim=1) if kind == "shares" else torch.eye(7)[labels]
    smoothed = shares * (1 - smoothing) + smoothing / 7
    expected = -(smoothed * network.logits(images).log_softmax(dim=1)).sum(dim=1).mean()
    loss = network(images, shares if kind == "shares" else labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_images_are_normalised_before_they_are_seen():
    made, images = task(), batch()["image"]
    seen = []
    made.network.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    made.loss({**batch(), "image": images})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    assert torch.allclose(seen[0], (images.float() / 255 - mean) / std, atol=1e-6)


def stepped(made, index, rank=0):
    made._trainer = types.SimpleNamespace(
        accumulate_grad_batches=1, global_step=index, global_rank=rank, strategy=types.SimpleNamespace(global_rank=rank)
    )
    made.__dict__.pop("logged", None)
    return made.training_step(batch(), index).item()


def test_a_training_step_draws_the_same_whatever_was_drawn_before():
    """Mixing and stochastic depth alike: a resumed run goes on as it would have."""
    made = task(mixing=MIXING, model={**MODEL, "drop_path": 0.5})
    move(made.network)
    losses = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        losses.append([stepped(made, index) for index in range(4)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4  # each step its own
    assert stepped(made, 0, rank=1) != losses[0][0]  # and each process


def test_validation_leaves_fillers_and_smoothing_out():
    made = task(label_smoothing=0.1, mixing=MIXING)
    move(made.network)
    full, filled = batch(6), batch(6, fillers=2)
    made.on_validation_epoch_start()
    with torch.no_grad():
        made.validation_step(filled, 0)
        logits = made.network.logits(made.normalize(full["image"]))[:4]
    labels = full["label"][:4]
    expected = -logits.log_softmax(dim=1)[range(4), labels].mean()
    made.on_validation_epoch_end()
    assert made.logged["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert made.hits_and_images()[1].sum() == 4 and made.confusion.compute().sum() == 4
    assert made.logged["val_top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    best = logits.topk(5, dim=1).indices
    assert made.logged["val_top5"] == pytest.approx((best == labels[:, None]).any(1).float().mean().item())


def test_a_batch_of_fillers_alone_counts_nothing():
    made = task()
    made.on_validation_epoch_start()
    with torch.no_grad():
        made.validation_step(batch(1), 0)
        before = float(made.val_loss.compute())
        made.validation_step(batch(1, fillers=1), 1)
    made.on_validation_epoch_end()
    assert made.logged["val_loss"] == before > 0
    assert made.hits_and_images()[1].sum() == 1


def test_the_metrics_of_a_validation_are_those_counted_by_hand(monkeypatch):
    """Four classes; the best answer of each image, and the others behind it."""
    made = task(classes=["a", "b", "c", "d", "e", "f"])
    order = [
        # label, classes from the most to the least likely
        (0, [0, 1, 2, 3, 4, 5]),  # hit
        (0, [1, 0, 2, 3, 4, 5]),  # taken for b, among the five
        (1, [2, 3, 4, 5, 0, 1]),  # taken for c, the last of six
        (2, [2, 0, 1, 3, 4, 5]),  # hit
        (4, [2, 0, 1, 3, 4, 5]),  # taken for c, the fifth
    ]
    scores = torch.zeros(5, 6)
    for row, (_, classes) in enumerate(order):
        scores[row, classes] = torch.arange(6, 0, -1.0)
    monkeypatch.setattr(made.network, "logits", lambda images: scores[: len(images)])
    labels = torch.tensor([label for label, _ in order])
    made.on_validation_epoch_start()
    made.validation_step({**batch(5), "label": labels}, 0)
    made.on_validation_epoch_end()
    hits, images = made.hits_and_images()
    assert hits.tolist() == [1, 0, 1, 0, 0, 0]
    assert images.tolist() == [2, 1, 1, 0, 1, 0]
    assert made.logged["val_top1"] == pytest.approx(2 / 5)
    assert made.logged["val_top5"] == pytest.approx(4 / 5)
    expected = torch.zeros(6, 6, dtype=torch.long)
    for row, column in [(0, 0), (0, 1), (1, 2), (2, 2), (4, 2)]:
        expected[row, column] += 1
    assert torch.equal(made.confusion.compute(), expected)
    assert made.describe({"val_loss": 1.5, "val_top1": 0.4, "val_top5": 0.8}) == "val 1.5000, top-1 40.0%, top-5 80.0%"
    made.on_validation_epoch_start()
    made.validation_step({**batch(5), "label": labels}, 0)
    assert made.hits_and_images()[1].sum() == 5  # counted anew


def test_with_few_classes_the_top_five_are_all_and_not_named():
    made = task(classes=["a", "b"])
    made.on_validation_epoch_start()
    with torch.no_grad():
        made.validation_step(batch(4, classes=2), 0)
    made.on_validation_epoch_end()
    assert made.logged["val_top5"] == 1
    assert "top-5" not in made.describe({"val_loss": 1, "val_top1": 0.5, "val_top5": 1})


def test_too_many_classes_are_not_counted_against_one_another():
    assert task(classes=[str(number) for number in range(MOST_CONFUSED)]).confusion is not None
    assert task(classes=[str(number) for number in range(MOST_CONFUSED + 1)]).confusion is None


def test_the_average_is_what_is_validated():
    made = task(ema_decay=0.9)
    move(made.network, 1)
    move(made.average, 2)
    assert made.best is made.average
    assert not any(parameter.requires_grad for parameter in made.average.parameters())
    images = batch()["image"]
    with torch.no_grad():
        expected = F.softmax(made.average.logits(made.normalize(images)), dim=1)
        made.on_validation_epoch_start()
        made.validation_step(batch(), 0)
    made.on_validation_epoch_end()
    assert made.logged["val_loss"] == pytest.approx(-expected.log()[range(6), batch()["label"]].mean().item(), rel=1e-5)


def test_the_classifier_starts_small_and_without_bias():
    made = task(classes=[str(number) for number in range(50)], model={**MODEL, "embed_dim": 64, "num_heads": [1, 1, 1]})
    head = made.network.head
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (head.bias == 0).all()
