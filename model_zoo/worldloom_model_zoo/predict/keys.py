"""Names of the predict network's weights in the layouts that others publish: one table, both directions.

``native`` is NVIDIA's own (Cosmos-Predict2 and 2.5), whose files put ``net.`` before each name; ``diffusers`` that of
diffusers' CosmosTransformer3DModel. All are renames: a patch enters as (channel, row, column) and leaves as (row,
column, channel) in every layout, so no weight is transposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from worldloom.errors import WorldloomError

Layout = Literal["native", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("native", "diffusers")

NATIVE_PREFIX = "net."
"""What published native files put before each name."""

_MODULES: dict[str, tuple[str, str | None]] = {
    "patch_in": ("x_embedder.proj.1", "patch_embed.proj"),
    "time_embedder": ("t_embedder.1", "time_embed.t_embedder"),
    "time_norm": ("t_embedding_norm", "time_embed.norm"),
    "text_proj": ("crossattn_proj.0", "crossattn_proj.0"),
    "positions.frames": ("extra_pos_embedder.pos_emb_t", "learnable_pos_embed.pos_emb_t"),
    "positions.rows": ("extra_pos_embedder.pos_emb_h", "learnable_pos_embed.pos_emb_h"),
    "positions.columns": ("extra_pos_embedder.pos_emb_w", "learnable_pos_embed.pos_emb_w"),
    "view_embedding": ("view_embeddings", None),
    "action_embedder.to_embedding.0": ("action_embedder_B_D.fc1", None),
    "action_embedder.to_embedding.2": ("action_embedder_B_D.fc2", None),
    "action_embedder.to_modulation.0": ("action_embedder_B_3D.fc1", None),
    "action_embedder.to_modulation.2": ("action_embedder_B_3D.fc2", None),
    "final_modulation.down": ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    "final_modulation.up": ("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    "patch_out": ("final_layer.linear", "proj_out"),
}
_BLOCK: dict[str, tuple[str, str]] = {
    "modulate_self.down": ("adaln_modulation_self_attn.1", "norm1.linear_1"),
    "modulate_self.up": ("adaln_modulation_self_attn.2", "norm1.linear_2"),
    "modulate_cross.down": ("adaln_modulation_cross_attn.1", "norm2.linear_1"),
    "modulate_cross.up": ("adaln_modulation_cross_attn.2", "norm2.linear_2"),
    "modulate_mlp.down": ("adaln_modulation_mlp.1", "norm3.linear_1"),
    "modulate_mlp.up": ("adaln_modulation_mlp.2", "norm3.linear_2"),
    "mlp.layer1": ("mlp.layer1", "ff.net.0.proj"),
    "mlp.layer2": ("mlp.layer2", "ff.net.2"),
    **{
        f"{own}.{part}": (f"{own}.{part}", f"{theirs}.{name}")
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            ("q_proj", "to_q"),
            ("k_proj", "to_k"),
            ("v_proj", "to_v"),
            ("output_proj", "to_out.0"),
            ("q_norm", "norm_q"),
            ("k_norm", "norm_k"),
        )
    },
}
_BLOCKS = {"native": "blocks", "diffusers": "transformer_blocks"}


def released_key(key: str, layout: Layout) -> str:
    """The layout's name of one of our weights.

    Raises:
        WorldloomError: the layout has no such weight.
    """
    column = LAYOUTS.index(layout)
    if key.startswith("blocks."):
        _, index, rest = key.split(".", 2)
        prefix = _prefix(rest, _BLOCK)
        if prefix is not None:
            return f"{_BLOCKS[layout]}.{index}.{_BLOCK[prefix][column]}{rest[len(prefix) :]}"
    prefix = _prefix(key, _MODULES)
    theirs = None if prefix is None else _MODULES[prefix][column]
    if prefix is None or theirs is None:
        raise WorldloomError(
            f"the {layout} layout has no such part",
            got=key,
            do="keep this model in its own folder"
            if prefix is None
            else "actions and views are in the native layout only",
        )
    return theirs + key[len(prefix) :]


def renaming(keys: Iterable[str], layout: Layout) -> dict[str, str]:
    """Our key -> the layout's key.

    Raises:
        WorldloomError: the layout has no such weight.
    """
    return {key: released_key(key, layout) for key in keys}


def dropped(key: str) -> bool:
    """Whether a native file may hold this key although no network uses it: position tables and training counters."""
    return key.startswith(("pos_embedder", "accum_")) or key.endswith("_extra_state")


def _prefix(key: str, table: Iterable[str]) -> str | None:
    return next((prefix for prefix in table if key == prefix or key.startswith(f"{prefix}.")), None)
