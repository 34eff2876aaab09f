"""Published predict checkpoints: Cosmos 1, Predict2 and Predict2.5, read and written in their authors' and diffusers'
layouts.

A published file becomes one of our folders once (`import_released`, ``worldloom models import``) and is used like any
other checkpoint from then on; a folder goes back by `export_released`. The network is read off the shapes of the
weights and held against the released ones (`worldloom_model_zoo.predict.recipes`), or taken from diffusers'
``config.json``; what neither tells is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from worldloom import config as configs
from worldloom.artifacts import atomic_dir, atomic_file, file_digest
from worldloom.convert import PICKLED
from worldloom.errors import WorldloomError
from worldloom.weights import find_pickles, misfit, pickle_refused, read_weights, write_weights
from worldloom_model_zoo.predict.config import (
    PredictCheckpoint,
    PredictConfig,
    TextEncoderRef,
    TokenizerRef,
)
from worldloom_model_zoo.predict.keys import LAYOUTS, NATIVE_PREFIX, Layout, dropped, renaming
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.recipes import RECIPES, Recipe, named, recipe

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = ".safetensors.index.json"
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_DIFFUSERS_CLASS = "CosmosTransformer3DModel"
_PATCH = 2  # of every released checkpoint; the shapes give its square times the channels

_SHAPED = (
    "latent_channels",
    "width",
    "blocks",
    "heads",
    "mlp_ratio",
    "adaln_rank",
    "condition_mask",
    "padding_mask",
    "learned_positions",
    "context_dim",
    "text_dim",
    "views",
    "view_dim",
)
"""Fields of a configuration that the shapes of its weights tell."""


@dataclass(frozen=True)
class Released:
    """A published checkpoint, read."""

    weights: Mapping[str, Tensor]
    """Under our names, in the precision of the file."""
    config: PredictConfig
    """The network."""
    layout: Layout
    """The layout it was in."""
    recipe: Recipe | None
    """How it is sampled, where that is known."""


def read_released(path: str | Path, variant: str = "", action_dim: int = 0) -> Released:
    """A published checkpoint.

    Args:
        path: a safetensors file, an index of shards, or a folder with either: the transformer's or, in the diffusers
            layout, the whole pipeline's.
        variant: a name of `RECIPES`; may be left out where names, ``config.json`` or shapes leave no doubt.
        action_dim: size of an action, of a network fine-tuned to another than the variant's; 0 is the variant's.

    Raises:
        WorldloomError: a pickle (with the command that converts it), a damaged or incomplete file, another layout,
            weights that do not fit the variant or are not finite, or a variant that has to be named.
    """
    given = recipe(variant) if variant else None
    folder, name = _locate(Path(path))
    weights = _read(folder, name)
    layout, weights = _strip(weights, folder / name)
    settings = _diffusers_settings(folder) if layout == "diffusers" else {}
    row = given or named(name)
    config = _config(weights, layout, row, settings, folder / name, action_dim)
    with torch.device("meta"):
        own = PredictTransformer(config).state_dict()
    names = renaming(own, layout)
    _match(own, names, weights, layout)
    bad = next((key for key, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise WorldloomError("the weights hold values that are not finite", got=f"{folder / name}: {bad}")
    return Released({key: weights[names[key]] for key in own}, config, layout, row)


def load_released(path: str | Path, variant: str = "", device: str = "cpu", action_dim: int = 0) -> PredictTransformer:
    """The network of a published checkpoint in evaluation mode, in the precision of the file; see `read_released`."""
    released = read_released(path, variant, action_dim)
    with torch.device("meta"):
        model = PredictTransformer(released.config)
    model.load_state_dict(dict(released.weights), assign=True)
    return model.to(device).eval()


def import_released(
    path: str | Path,
    out: str | Path,
    variant: str = "",
    tokenizer: str | Path = "",
    text_encoder: str | Path = "",
    action_dim: int = 0,
) -> str:
    """Make a checkpoint folder of published weights, bit by bit the same numbers, all or nothing.

    Args:
        tokenizer: name or folder of the tokenizer that it works with; "" writes the name of the published one, which
            `worldloom tokenize import` makes.
        text_encoder: folder of its text encoder, as `worldloom_tokenizers.load_text_encoder` reads it; "" writes the
            name of the published one, and prompts are refused.
        variant, action_dim: as in `read_released`.

    Returns:
        What was made and what it still needs, for a person.

    Raises:
        WorldloomError: as `read_released`, a recipe that has to be named, a sampler that is not one of ours, or a text
            encoder with vectors of another size.
    """
    released = read_released(path, variant, action_dim)
    row = released.recipe or _only_recipe(released.config, str(path))
    if row.sampler is None:
        raise WorldloomError(
            "this checkpoint cannot be sampled here",
            got=f"{row.name}: {row.note}",
            do="its network alone loads with worldloom_model_zoo.predict.released.load_released",
        )
    width, height = row.size
    checkpoint = PredictCheckpoint(
        height=height,
        width=width,
        fps=row.fps,
        model=released.config,
        sampler=replace(
            row.sampler, chunk_frames=row.frames if row.frames > 1 else 0, overlap_frames=max(1, *row.given)
        ),
        tokenizer=TokenizerRef(str(tokenizer) or row.tokenizer),
        text=_text_encoder(text_encoder, released.config, row),
    )
    with atomic_dir(Path(out)) as folder:
        write_weights(released.weights, folder)
        configs.save(checkpoint, folder / "config.toml")
        (folder / "README.md").write_text(_card(Path(path), row, released.layout), encoding="utf-8")
    parameters = sum(tensor.numel() for tensor in released.weights.values())
    lines = [f"{row.name}, {parameters / 1e6:.1f} M parameters, {released.layout} layout: {out}"]
    if not tokenizer:
        lines.append(
            f"its tokenizer is {row.tokenizer}: worldloom tokenize import, then give the folder in config.toml"
        )
    if not text_encoder:
        lines.append(f"its text encoder is {row.text_encoder}: import with --text-encoder FOLDER, or it reads no text")
    if row.note:
        lines.append(f"sampling: {row.note}")
    return "\n".join(lines)


def _text_encoder(folder: str | Path, config: PredictConfig, row: Recipe) -> TextEncoderRef:
    """The reference to a text encoder in a folder, or to the published one by name."""
    if not folder:
        return TextEncoderRef(row.text_encoder, tokens=row.text_tokens)
    from worldloom_tokenizers import load_text_encoder

    encoder = load_text_encoder(folder, row.text_tokens)
    wanted = config.text_dim or config.context_dim
    if encoder.dim != wanted:
        raise WorldloomError(
            "the text encoder's vectors have another size than the network reads",
            got=f"{folder}: {encoder.dim}, {row.name}: {wanted}",
            do=f"give {row.text_encoder}",
        )
    return TextEncoderRef(encoder.name, encoder.fingerprint, row.text_tokens)


def export_released(folder: str | Path, out: str | Path, layout: str) -> Path:
    """Write a checkpoint folder's weights as others publish them, bit by bit the same numbers, all or nothing.

    Args:
        out: ``native``: a safetensors file. ``diffusers``: a folder with ``config.json``, which
            `CosmosTransformer3DModel.from_pretrained` reads.
        layout: ``native`` or ``diffusers``.

    Raises:
        WorldloomError: no checkpoint, another layout, or a network that the layout cannot hold.
    """
    folder, out = Path(folder), Path(out)
    if layout not in LAYOUTS:
        raise WorldloomError("there is no such layout", got=layout, do=f"use {' or '.join(LAYOUTS)}")
    if not (folder / "config.toml").is_file():
        raise WorldloomError("this is not a checkpoint folder", got=folder, do="give a folder with config.toml")
    config = configs.load(PredictCheckpoint, folder / "config.toml").model
    _check_exportable(config, layout)
    weights = read_weights(folder)
    names = renaming(weights, layout)
    tensors = {names[key]: tensor for key, tensor in weights.items()}
    if layout == "native":
        if out.suffix != ".safetensors":
            raise WorldloomError("the native layout is one safetensors file", got=out, do="for example x.safetensors")
        with atomic_file(out) as file:
            write_weights({NATIVE_PREFIX + key: tensor for key, tensor in tensors.items()}, file.parent, file.name)
        return out
    with atomic_dir(out) as made:
        write_weights(tensors, made, _DIFFUSERS_FILE)
        (made / "config.json").write_text(json.dumps(_to_diffusers(config), indent=2) + "\n", encoding="utf-8")
    return out


# -- files -----------------------------------------------------------------------------------------------------------


def _locate(path: Path) -> tuple[Path, str]:
    """The folder and the name of the file that is read: a safetensors file or an index."""
    if path.is_file():
        if "natten" in path.name.lower():
            raise WorldloomError("checkpoints with sparse attention (NATTEN) are not read", got=path)
        if path.suffix in PICKLED:
            raise pickle_refused(path, path.with_suffix(".safetensors"))
        if not path.name.endswith((".safetensors", _INDEX)):
            raise WorldloomError("this is not a safetensors file", got=path, do="give a .safetensors file or a folder")
        return path.parent, path.name
    if not path.is_dir():
        raise WorldloomError("there is no such file or folder", got=path, do="give the path of a checkpoint")
    if (path / "transformer").is_dir() and not any(path.glob("*.safetensors")):
        return _locate(path / "transformer")
    found = sorted(path.glob(f"*{_INDEX}")) or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return path, found[0].name
    if found:
        names = ", ".join(file.name for file in found[:5])
        raise WorldloomError("the folder holds several checkpoints", got=f"{path}: {names}", do="give one of the files")
    if pickles := find_pickles(path):
        raise pickle_refused(pickles[0], pickles[0].with_suffix(".safetensors"))
    raise WorldloomError("there is no checkpoint here", got=path, do="give a folder that holds a safetensors file")


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    if not name.endswith(_INDEX):
        return read_weights(folder, name=name)
    try:
        places = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorldloomError("the index of shards cannot be read", got=folder / name, do="copy it again") from error
    weights: dict[str, Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise WorldloomError("the index names a file outside its folder", got=f"{folder / name}: {shard}")
        if not (folder / shard).is_file():
            raise WorldloomError("a shard of the checkpoint is missing", got=folder / shard, do="copy all its files")
        held = read_weights(folder, name=shard)
        wrong = {key for key, place in places.items() if place == shard} ^ held.keys()
        if wrong:
            raise WorldloomError(
                "the index and the shard do not agree",
                got=f"{folder / shard}: {sorted(wrong)[:3]}",
                do="copy them again",
            )
        weights |= held
    return weights


def _strip(weights: dict[str, Tensor], file: Path) -> tuple[Layout, dict[str, Tensor]]:
    """The layout, and the network's weights without prefix and without what no network uses."""
    if "patch_embed.proj.weight" in weights:
        if any(key.startswith("controlnet_blocks.") for key in weights):
            raise _transfer(file)
        return "diffusers", weights
    prefixes = [prefix for prefix in ("net.", "net_ema.", "") if f"{prefix}x_embedder.proj.1.weight" in weights]
    if not prefixes:
        cosmos1 = any(".blocks.0.block.attn" in key for key in weights)
        raise WorldloomError(
            "these weights are in none of the layouts of the predict family",
            got=f"{file}: keys such as {sorted(weights)[:3]}",
            do="Cosmos 1 is read in the diffusers layout only"
            if cosmos1
            else "give the weights of a Cosmos transformer",
        )
    if len(prefixes) > 1:
        raise WorldloomError(
            "the file holds several networks", got=f"{file}: {' and '.join(prefixes)}", do="keep one of them"
        )
    prefix = prefixes[0]
    if other := [key for key in weights if not key.startswith(prefix) and not dropped(key)]:
        raise WorldloomError("unmatched weights beside the network", got=f"{file}: {sorted(other)[:3]}")
    stripped = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    kept = {key: tensor for key, tensor in stripped.items() if not dropped(key)}
    if any("control" in key for key in kept):
        raise _transfer(file)
    return "native", kept


def _transfer(file: Path) -> WorldloomError:
    return WorldloomError(
        "this is a checkpoint of the transfer family, with control blocks",
        got=file,
        do="give one of the predict family",
    )


def _diffusers_settings(folder: Path) -> dict[str, Any]:
    """diffusers' ``config.json`` beside the weights; empty where there is none."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WorldloomError("config.json cannot be read", got=file, do="copy it again") from error
    if settings.get("_class_name", _DIFFUSERS_CLASS) != _DIFFUSERS_CLASS:
        raise WorldloomError("these are the weights of another network", got=f"{file}: {settings['_class_name']}")
    return settings


# -- which network ---------------------------------------------------------------------------------------------------


def _config(
    weights: Mapping[str, Tensor],
    layout: Layout,
    row: Recipe | None,
    settings: Mapping[str, Any],
    file: Path,
    action_dim: int,
) -> PredictConfig:
    """The network of these weights.

    Raises:
        WorldloomError: they do not fit, or what their shapes do not tell has to be named.
    """
    facts = _facts(weights, layout, file)
    actions, hidden = facts.pop("actions"), facts.pop("action_hidden")
    if row is not None:
        config = row.network()
        if action_dim and config.action_dim:
            config = replace(config, action_dim=action_dim)
        if wrong := _differences(facts, config):
            found = ", ".join(f"{name} {facts[name]}, not {getattr(config, name)}" for name in wrong)
            raise WorldloomError(
                "these weights are of another variant than the one asked for",
                got=f"{file} is not {row.name}: {found}",
                do="name the variant that the checkpoint is of",
            )
        return _with_actions(config, actions, hidden, file)
    if settings:
        config = replace(
            PredictConfig(timestep_scale=1.0, attention="full", patch=_PATCH),
            **facts,
            rope_ratios=tuple(float(ratio) for ratio in settings.get("rope_scale", (2.0, 1.0, 1.0))),
            base_fps=24.0 if any(facts["learned_positions"]) else 0.0,  # Cosmos 1 alone has either
        )
        heads = settings.get("num_attention_heads", config.heads)
        if heads != config.heads:
            raise WorldloomError("config.json is of other weights", got=f"{file}: {config.heads} heads, not {heads}")
        return config
    if actions:
        raise WorldloomError(
            "how many actions of which size a network takes at once cannot be read off its weights",
            got=f"{file}: {actions} numbers",
            do=f"name its variant: {_list(row for row in RECIPES.values() if row.network().action_dim)}",
        )
    networks = [known.network() for known in RECIPES.values()]
    fitting = [known for known in networks if not known.action_dim and not _differences(facts, known)]
    if not fitting:
        raise WorldloomError(
            "no released network has weights of these shapes",
            got=f"{file}: {', '.join(f'{name} {value}' for name, value in facts.items() if value)}",
            do="give the folder with diffusers' config.json, or check which model it is",
        )
    if any(known != fitting[0] for known in fitting):
        raise WorldloomError("several released networks have weights of these shapes", got=file, do="name the variant")
    return fitting[0]


def _only_recipe(config: PredictConfig, path: str) -> Recipe:
    """The one released checkpoint with this network."""
    rows = [row for row in RECIPES.values() if replace(row.network(), qk_eps=config.qk_eps) == config]
    if len(rows) == 1:
        return rows[0]
    if not rows:
        raise WorldloomError(
            "no released checkpoint has this network, so how it is sampled is not known",
            got=path,
            do="name the variant that it was trained from",
        )
    raise WorldloomError(
        "several released checkpoints have this network, and are sampled differently",
        got=path,
        do=f"name its variant: {_list(rows)}",
    )


def _facts(weights: Mapping[str, Tensor], layout: Layout, file: Path) -> dict[str, Any]:
    """What the shapes tell of a configuration, and ``actions``: the numbers that its action embedding takes at once.

    Raises:
        WorldloomError: a weight that every predict network has is missing, or shapes that none has.
    """
    names = renaming(_PROBED, layout) if layout == "native" else _diffusers_probes()

    def shape(key: str) -> tuple[int, ...]:
        found = weights.get(names.get(key, ""))
        return () if found is None else tuple(found.shape)

    def need(key: str, dims: int) -> tuple[int, ...]:
        if len(found := shape(key)) != dims:
            raise WorldloomError(
                "a weight that every predict network has is missing or damaged",
                got=f"{file}: {names[key]} {found or 'is not there'}",
                do="copy the checkpoint again, whole",
            )
        return found

    width, channels_in = need("patch_in.weight", 2)
    head_dim = need("blocks.0.self_attn.q_norm.weight", 1)[0]
    latent_channels = need("patch_out.weight", 2)[0] // _PATCH**2
    views = shape("view_embedding.weight")
    masks = channels_in // _PATCH**2 - latent_channels - (views[1] if views else 0)
    prefix = "blocks." if layout == "native" else "transformer_blocks."
    indices = {int(key.split(".")[1]) for key in weights if key.startswith(prefix)}
    positions = [shape(f"positions.{axis}") for axis in ("frames", "rows", "columns")]
    if masks not in (0, 1, 2) or width % head_dim:
        raise WorldloomError(
            "these shapes are of no predict network",
            got=f"{file}: {channels_in} numbers a patch, width {width}, head size {head_dim}",
        )
    return {
        "latent_channels": latent_channels,
        "width": width,
        "blocks": max(indices) + 1,
        "heads": width // head_dim,
        "mlp_ratio": need("blocks.0.mlp.layer1.weight", 2)[0] / width,
        "adaln_rank": need("blocks.0.modulate_self.down.weight", 2)[0],
        "padding_mask": masks > 0,
        "condition_mask": masks == 2,
        "learned_positions": tuple(found[0] if found else 0 for found in positions),
        "context_dim": (shape("blocks.0.cross_attn.k_proj.weight") or (0, 0))[1],
        "text_dim": (shape("text_proj.weight") or (0, 0))[1],
        "views": views[0] if views else 0,
        "view_dim": views[1] if views else PredictConfig.view_dim,
        "action_hidden": (shape("action_embedder.to_embedding.0.weight") or (0, 0))[0],
        "actions": (shape("action_embedder.to_embedding.0.weight") or (0, 0))[1],
    }


_COMMON = (
    "patch_in.weight",
    "patch_out.weight",
    "text_proj.weight",
    "positions.frames",
    "positions.rows",
    "positions.columns",
    "blocks.0.self_attn.q_norm.weight",
    "blocks.0.cross_attn.k_proj.weight",
    "blocks.0.mlp.layer1.weight",
    "blocks.0.modulate_self.down.weight",
)
_PROBED = (*_COMMON, "view_embedding.weight", "action_embedder.to_embedding.0.weight")


def _diffusers_probes() -> dict[str, str]:
    return renaming(_COMMON, "diffusers")


def _with_actions(config: PredictConfig, size: int, hidden: int, file: Path) -> PredictConfig:
    """The configuration in the action layout that takes ``size`` numbers at once."""
    if not config.action_dim and not size:
        return config
    for layout, count in (("cosmos-chunk", config.action_chunk), ("cosmos-frame", config.actions_per_latent)):
        if config.action_dim and size == count * config.action_dim:
            return replace(config, action_layout=layout, action_hidden=hidden)
    expected = f"{config.action_chunk} or {config.actions_per_latent} actions of {config.action_dim} numbers"
    raise WorldloomError(
        "the weights take other actions than the variant asked for",
        got=f"{file}: {size} numbers at once, not {expected if config.action_dim else 'none'}",
        do="name the variant that the checkpoint is of, and the size of an action if it was fine-tuned to another",
    )


def _differences(facts: Mapping[str, Any], config: PredictConfig) -> list[str]:
    return [name for name in _SHAPED if facts[name] != getattr(config, name)]


def _match(own: Mapping[str, Tensor], names: Mapping[str, str], weights: Mapping[str, Tensor], layout: Layout) -> None:
    if found := misfit(own, names, weights):
        raise WorldloomError(
            f"these weights do not fit the {layout} layout of the network",
            got=found,
            do="name the variant that the checkpoint is of, or copy it again, whole",
        )


def _list(rows: Any) -> str:
    return ", ".join(row.name for row in rows)


# -- what is written -------------------------------------------------------------------------------------------------


def _card(source: Path, row: Recipe, layout: Layout) -> str:
    digest = f" (sha256 `{file_digest(source)}`)" if source.is_file() else ""
    sampling = f"\nSampling: {row.note}.\n" if row.note else ""
    return (
        f"# {row.name}\n\nWritten by `worldloom models import` from `{source.name}`{digest}, in the {layout} layout. "
        f"Its authors' card and licence apply: https://huggingface.co/{row.repository}\n\n"
        f"Latents of `{row.tokenizer}`, text of `{row.text_encoder}`.\n{sampling}"
    )


def _check_exportable(config: PredictConfig, layout: str) -> None:
    """Refuse a network that is more than the layout's.

    Raises:
        WorldloomError: naming what the layout cannot hold.
    """
    plain = replace(
        config,
        **{
            name: next(field.default for field in fields(PredictConfig) if field.name == name)
            for name in ("previous_frame", "step_size", "action_head", "window", "sink")
        },
        attention="full",
        patch=_PATCH,
    )
    wrong = [name.name for name in fields(PredictConfig) if getattr(plain, name.name) != getattr(config, name.name)]
    if config.timestep_scale != 1:
        wrong.append("timestep_scale")
    if config.action_dim and config.action_layout == "frame":
        wrong.append("action_layout")
    if not config.context_dim:
        wrong.append("context_dim")
    if layout == "diffusers" and (config.action_dim or config.views):
        wrong.append("action_dim" if config.action_dim else "views")
    if wrong:
        raise WorldloomError(
            f"the {layout} layout cannot hold this network",
            got=f"settings that it does not have: {', '.join(wrong)}",
            do="export a model of the Cosmos configurations",
        )


def _to_diffusers(config: PredictConfig) -> dict[str, Any]:
    """diffusers' ``config.json`` of a network."""
    frames, rows, columns = config.learned_positions
    return {
        "_class_name": _DIFFUSERS_CLASS,
        "in_channels": config.latent_channels + config.condition_mask,
        "out_channels": config.latent_channels,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "num_layers": config.blocks,
        "mlp_ratio": config.mlp_ratio,
        "text_embed_dim": config.context_dim,
        "adaln_lora_dim": config.adaln_rank,
        "max_size": [frames, rows * _PATCH, columns * _PATCH] if frames else [128, 240, 240],
        "patch_size": [1, _PATCH, _PATCH],
        "rope_scale": list(config.rope_ratios),
        "concat_padding_mask": config.padding_mask,
        "extra_pos_embed_type": "learnable" if frames else None,
        "use_crossattn_projection": bool(config.text_dim),
        "crossattn_proj_in_channels": config.text_dim or 1024,
        "encoder_hidden_states_channels": config.context_dim,
    }
