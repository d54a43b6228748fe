"""The names that an encoder's weights have elsewhere: in the authors' files, timm, transformers and torchvision.

The functions `to_*` and `from_*` rename a state dict, or a dict of gradients alike, bit by bit: there and back changes
nothing, of either version of Swin Transformer. One thing is an exception: V1's bias of the keys, which makes no
difference to a softmax over keys, is not read, and is written as zeros.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from torch import Tensor

from simmim.encoders.attention_weights import COSINE, TABLE, in_attentions, packed, unpacked

BUFFERS = ("relative_coords_table", "relative_position_index", "attn_mask", "k_bias")
"""What others store, or once stored, though it can be recomputed."""


@dataclass(frozen=True)
class Layout:
    """How a library names the weights of Swin Transformer, of either version.

    Args:
        library: Its name, in words.
        names: Rules of renaming, ours to theirs: {s} stage, {b} block, {l} layer. What follows (.weight, .bias) stays.
        block: How the names of a block begin.
        prefixes: What the names of the encoder begin with in a model that holds more.
        heads: How the names of everything behind the encoder begin.
        mask_token: Whether there is one, and then of shape (1, 1, C).
        qkv: "whole" where queries, keys and values share a weight, and V2 has a bias of queries and one of values;
            "one bias" where they share that as well; "apart" where each has its own. V1 has a bias of the keys.
    """

    library: str
    names: dict[str, str]
    block: str
    prefixes: tuple[str, ...]
    heads: tuple[str, ...]
    mask_token: bool
    qkv: str


_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.logit_scale": "attn.logit_scale",
    "attention.position_bias.mlp.{l}": "attn.cpb_mlp.{l}",
    "attention.position_bias.table": "attn.relative_position_bias_table",
    "attention.proj": "attn.proj",
    "attention.qkv": "attn.qkv",
}
_BIASES = {"attention.q_bias": "attn.q_bias", "attention.v_bias": "attn.v_bias"}
_MLP = {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}


def _of_blocks(names: Mapping[str, str], place: str) -> dict[str, str]:
    return {f"stages.{{s}}.{{b}}.{ours}": f"{place}.{theirs}" for ours, theirs in names.items()}


_OFFICIAL_BLOCK = "layers.{s}.blocks.{b}"
_TRANSFORMERS_BLOCK = "encoder.layers.{s}.blocks.{b}"
_TORCHVISION_BLOCK = "features.{2s+1}.{b}"

_OFFICIAL_AND_TIMM = {
    "embed.proj": "patch_embed.proj",
    "embed.norm": "patch_embed.norm",
    "norm": "norm",
    **_of_blocks(_BLOCK | _BIASES | _MLP, _OFFICIAL_BLOCK),
}

OFFICIAL = Layout(
    "the authors' code",
    {
        "mask_token": "mask_token",
        "merges.{s}.reduction": "layers.{s}.downsample.reduction",  # closes the stage
        "merges.{s}.norm": "layers.{s}.downsample.norm",
        **_OFFICIAL_AND_TIMM,
    },
    block=_OFFICIAL_BLOCK,
    prefixes=("encoder.",),
    heads=("head.", "decoder."),
    mask_token=True,
    qkv="whole",
)

TIMM = Layout(
    "timm",
    {
        "merges.{s}.reduction": "layers.{s+1}.downsample.reduction",  # opens the next stage
        "merges.{s}.norm": "layers.{s+1}.downsample.norm",
        **_OFFICIAL_AND_TIMM,
    },
    block=_OFFICIAL_BLOCK,
    prefixes=(),
    heads=("head.",),
    mask_token=False,
    qkv="whole",
)

TRANSFORMERS = Layout(
    "transformers",
    {
        "mask_token": "embeddings.mask_token",
        "embed.proj": "embeddings.patch_embeddings.projection",
        "embed.norm": "embeddings.norm",
        "merges.{s}.reduction": "encoder.layers.{s}.downsample.reduction",
        "merges.{s}.norm": "encoder.layers.{s}.downsample.norm",
        "norm": "layernorm",
        **_of_blocks(
            {
                "attention.query": "attention.self.query",
                "attention.key": "attention.self.key",
                "attention.value": "attention.self.value",
                "attention.logit_scale": "attention.self.logit_scale",
                "attention.position_bias.mlp.{l}": "attention.self.continuous_position_bias_mlp.{l}",
                "attention.position_bias.table": "attention.self.relative_position_bias_table",
                "attention.proj": "attention.output.dense",
                "norm1": "layernorm_before",
                "mlp.0": "intermediate.dense",
                "mlp.2": "output.dense",
                "norm2": "layernorm_after",
            },
            _TRANSFORMERS_BLOCK,
        ),
    },
    block=_TRANSFORMERS_BLOCK,
    prefixes=("swinv2.", "swin."),
    heads=("classifier.", "decoder."),
    mask_token=True,
    qkv="apart",
)

TORCHVISION = Layout(
    "torchvision",
    {
        "embed.proj": "features.0.0",
        "embed.norm": "features.0.2",
        "merges.{s}.reduction": "features.{2s+2}.reduction",  # stages and mergings take turns
        "merges.{s}.norm": "features.{2s+2}.norm",
        "norm": "norm",
        **_of_blocks(_BLOCK | {"mlp.0": "mlp.0", "mlp.2": "mlp.3"}, _TORCHVISION_BLOCK),  # 1 and 2 have no weights
    },
    block=_TORCHVISION_BLOCK,
    prefixes=(),
    heads=("head.",),
    mask_token=False,
    qkv="one bias",
)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as the authors' code does, with SimMIM's mask token.

    A SimMIM checkpoint of theirs has `encoder.` before each name; a plain encoder has no mask token.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or a position bias of neither version.
    """
    return _rename_ours(state, OFFICIAL)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the weights of the authors' released files as our encoder does; the mask token is there if theirs has one.

    SimMIM's checkpoints keep the encoder below `encoder.`: that prefix goes, and so do the heads (`head.`,
    `decoder.`). Older files call the network of the position bias `rpe_mlp`; some, of models with extra norms, call
    these `enorm`.

    Raises:
        ValueError: If a key is neither the encoder's, nor a head's, nor a buffer of the geometry.
    """
    current = {key.replace(".rpe_mlp.", ".cpb_mlp."): value for key, value in state.items()}
    return _rename_theirs(current, OFFICIAL, also={"stages.{s}.{b}.extra_norm": "layers.{s}.blocks.{b}.enorm"})


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as timm does; it has no mask token, which is left out.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or a position bias of neither version.
    """
    return _rename_ours(state, TIMM)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names timm's weights as our encoder does: all but the mask token. The classifier (`head.`) is left out.

    Raises:
        ValueError: If a key is neither the encoder's, nor the classifier's, nor a buffer of the geometry. The
            authors' released files are such a case: their patch mergings close a stage.
    """
    return _rename_theirs(state, TIMM)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as files of transformers' models do, made with `use_mask_token=True`.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or a position bias of neither version.
    """
    return _rename_ours(state, TRANSFORMERS)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names the weights of transformers' `Swinv2Model` or `SwinModel` as our encoder does.

    Models with a head keep the encoder below `swinv2.` or `swin.`: that prefix goes, and so do the heads
    (`classifier.`, `decoder.`). The mask token is there if theirs has one.

    Raises:
        ValueError: If a key is neither the encoder's, nor a head's, nor a buffer of the geometry.
    """
    return _rename_theirs(state, TRANSFORMERS)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names an encoder's weights as torchvision's `SwinTransformer` does.

    It has no mask token, which is left out. The bias of the keys, which the `forward` of V2's blocks takes as zero, is
    zero. What it stores besides, `relative_coords_table` and `relative_position_index`, follows from the window.

    Raises:
        ValueError: If a weight has no place there: the extra norms of H and G, or a position bias of neither version.
    """
    return _rename_ours(state, TORCHVISION)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names torchvision's weights as our encoder does: all but the mask token. The classifier (`head.`) is left out.

    So is the bias of the keys, whatever it holds: it makes no difference in V1, and V2's `forward` takes it as zero.

    Raises:
        ValueError: If a key is neither the encoder's, nor the classifier's, nor a buffer of the geometry.
    """
    return _rename_theirs(state, TORCHVISION)


def without_prefix(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The state dict of a model that may hold more than the encoder, with the encoder's names as if it stood alone."""
    for prefix in layout.prefixes:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def stage_of(key: str, layout: Layout) -> int | None:
    """The stage, counted from 0, of something in a block; None for what is in no block."""
    block = ".".join(key.split(".")[: layout.block.count(".") + 1])
    place = _translate(block, layout.block, "{s}")
    return None if place is None else int(place)


def is_buffer(key: str) -> bool:
    """Whether a name is that of something which can be recomputed."""
    return key.rpartition(".")[2] in BUFFERS


def _rename_ours(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    library = layout.library
    cosine = any(key.endswith(COSINE) for key in state)
    known = "position_bias.mlp." if cosine else TABLE
    if other := next((key for key in state if "position_bias." in key and known not in key), None):
        bias = "log_cpb" if cosine else "table"
        raise ValueError(f"{library} knows model.position_bias={bias} alone for such attention, and there is {other}")
    complaint = f"the encoder has weights without a place in {library}, which lacks the extra norms of H and G"
    state = in_attentions(state, partial(packed, qkv=layout.qkv))
    kept = {key: value for key, value in state.items() if layout.mask_token or key != "mask_token"}
    if "mask_token" in kept:
        kept["mask_token"] = kept["mask_token"].view(1, 1, -1)
    return _rename(kept, layout.names.items(), complaint)


def _rename_theirs(
    state: Mapping[str, Tensor], layout: Layout, *, also: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    plain = without_prefix(state, layout)
    needed = {key: value for key, value in plain.items() if not key.startswith(layout.heads) and not is_buffer(key)}
    rules = [(theirs, ours) for ours, theirs in (layout.names | dict(also or {})).items()]
    complaint = f"these are not the weights of a Swin encoder of {layout.library}: unknown keys"
    renamed = in_attentions(_rename(needed, rules, complaint), unpacked)
    return {key: value.flatten() if key == "mask_token" else value for key, value in renamed.items()}


def _rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]], complaint: str) -> dict[str, Tensor]:
    rules = list(rules)
    names = {key: next(filter(None, (_translate(key, *rule) for rule in rules)), None) for key in state}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"{complaint}: {', '.join(unknown[:3])}{more}")
    return {name: state[key] for key, name in names.items() if name is not None}


_SLOT = re.compile(r"\{(\d*)([sbl])(?:\+(\d+))?\}")
"""{s} stands for the number of a stage, {2s+1} for twice that and one more."""


def _translate(key: str, source: str, target: str) -> str | None:
    """The key in the form of target if it has the form of source."""
    found = _pattern(source).fullmatch(key)
    if found is None:
        return None
    numbers = {}
    for factor, slot, offset in _SLOT.findall(source):
        number, rest = divmod(int(found[slot]) - int(offset or 0), int(factor or 1))
        if rest or number < 0:
            return None
        numbers[slot] = number
    filled = _SLOT.sub(lambda m: str(int(m[1] or 1) * numbers[m[2]] + int(m[3] or 0)), target)
    return filled + (found["leaf"] or "")


@lru_cache(maxsize=128)
def _pattern(template: str) -> re.Pattern[str]:
    escaped = _SLOT.sub(r"(?P<\2>\\d+)", template.replace(".", r"\."))
    return re.compile(escaped + r"(?P<leaf>\.weight|\.bias)?")
