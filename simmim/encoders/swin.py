"""Swin Transformer, the first version (Liu et al., ICCV 2021, arXiv 2103.14030).

It is V2's encoder with the norms, the attention and the position bias that V2 has replaced. In `simmim.encoders.swinv2`
each of these is a setting, so that studies can change them one at a time.
"""

from typing import Any

V1: dict[str, Any] = {"extra_norm_every": 0, "norm": "pre", "attention_similarity": "dot", "position_bias": "table"}
"""What makes the encoder the first version."""

RESIZING = {"table_resizing": "geometric"}
"""How SimMIM moves its tables to the windows of fine-tuning."""

SIZES: dict[str, dict[str, Any]] = {
    "swin_t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), **V1},
    "swin_s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), **V1},
    "swin_b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), **V1},
    "swin_l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), **V1},
}
"""The published sizes (section 3.3)."""
