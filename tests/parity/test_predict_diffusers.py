"""The predict transformer is the network of Cosmos 1, Predict2 and Predict2.5: same weights, same output and gradients
as diffusers' implementation.

diffusers computes norms, rotations and sinusoids in float32 whatever the weights are in. Two comparisons are made: with
its code as it is, and with its casts to float32 lifted to float64, where nothing but rounding is left between the two.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from worldloom_model_zoo.predict.config import PredictConfig
from worldloom_model_zoo.predict.keys import renaming
from worldloom_model_zoo.predict.model import PredictTransformer

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_processor, embeddings, normalization  # noqa: E402
from diffusers.models.transformers import transformer_cosmos  # noqa: E402

BASE = PredictConfig(
    latent_channels=4,
    width=64,
    blocks=2,
    heads=2,
    adaln_rank=8,
    qk_eps=1e-5,  # what diffusers uses
    rope_ratios=(1.0, 3.0, 2.0),
    timestep_scale=1.0,
    condition_mask=True,
    context_dim=16,
    attention="full",
)
CONFIGS = {
    "predict2": BASE,
    "predict2 14B ratios": replace(BASE, rope_ratios=(20 / 24, 2.0, 2.0)),
    "text2image": replace(BASE, condition_mask=False, padding_mask=True),
    "predict2.5": replace(BASE, text_dim=24, padding_mask=True),
    "cosmos 1": replace(BASE, padding_mask=True, learned_positions=(8, 6, 5), base_fps=24.0),
}


class _Double(types.ModuleType):
    """torch, whose float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift diffusers' casts to float32."""
    for module in (transformer_cosmos, embeddings, normalization, attention_processor):
        monkeypatch.setattr(module, "torch", _Double("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(autouse=True)
def transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers resizes the padding mask with torchvision, which is not installed: nearest, by indices."""

    def resize(mask: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        assert interpolation == "nearest"
        rows = [row * mask.shape[-2] // size[0] for row in range(size[0])]
        columns = [column * mask.shape[-1] // size[1] for column in range(size[1])]
        return mask[..., rows, :][..., columns]

    fake = types.SimpleNamespace(
        functional=types.SimpleNamespace(resize=resize), InterpolationMode=types.SimpleNamespace(NEAREST="nearest")
    )
    monkeypatch.setattr(transformer_cosmos, "transforms", fake, raising=False)


def pair(config: PredictConfig, dtype: torch.dtype = torch.float64) -> tuple[PredictTransformer, torch.nn.Module]:
    """Ours and theirs with the same random weights."""
    torch.manual_seed(0)
    ours = PredictTransformer(config)
    frames, rows, columns = config.learned_positions
    theirs = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=config.latent_channels + config.condition_mask,
        out_channels=config.latent_channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.blocks,
        mlp_ratio=config.mlp_ratio,
        text_embed_dim=config.context_dim,
        adaln_lora_dim=config.adaln_rank,
        max_size=(frames, 2 * rows, 2 * columns) if frames else (16, 16, 16),
        patch_size=(1, 2, 2),
        rope_scale=config.rope_ratios,
        concat_padding_mask=config.padding_mask,
        extra_pos_embed_type="learnable" if frames else None,
        use_crossattn_projection=bool(config.text_dim),
        crossattn_proj_in_channels=config.text_dim or 1024,
        encoder_hidden_states_channels=config.context_dim,
    )
    with torch.no_grad():
        for parameter in ours.parameters():  # nothing may stay at its zero or one initialisation
            parameter.normal_(std=0.2)
    names = renaming(ours.state_dict(), "diffusers")
    theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
    return ours.to(dtype), theirs.to(dtype)


def difference(
    config: PredictConfig, per_frame: bool, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[str, float]]:
    """Largest deviation over the largest value: of the velocity, and of the gradients of input and weights."""
    ours, theirs = pair(config, dtype)
    fps = 30 if config.base_fps else None
    x = torch.randn(2, 4, 3, 8, 6, dtype=dtype)
    text = torch.randn(2, 5, config.text_dim or 16, dtype=dtype)
    level = torch.rand(2, 3, dtype=dtype) if per_frame else torch.rand(2, dtype=dtype)
    masks = {}
    if config.condition_mask:
        masks["condition_mask"] = torch.randint(0, 2, (2, 1, 3, 8, 6)).to(dtype)
    padding = torch.zeros(1, 1, 64, 48, dtype=dtype)  # of the video's pixels
    padding[..., 40:, :] = 1
    padding[..., 30:] = 1
    if config.padding_mask:
        masks["padding_mask"] = padding
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    velocity = ours(x_ours, level, text=text, fps=fps, **masks)
    timestep = level[:, None, :, None, None] if per_frame else level
    expected = theirs(x_theirs, timestep, text, fps=fps, return_dict=False, **masks)[0]
    assert expected.std() > 0.1
    weight = torch.randn(expected.shape, dtype=dtype)
    (velocity * weight).sum().backward()
    (expected * weight).sum().backward()

    yield "velocity", relative(velocity, expected)
    yield "gradient of the latents", relative(x_ours.grad, x_theirs.grad)
    found = dict(theirs.named_parameters())
    for key, name in renaming(ours.state_dict(), "diffusers").items():
        yield f"gradient of {key}", relative(ours.get_parameter(key).grad, found[name].grad)


def relative(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("double")
def test_velocity_and_gradients_equal_diffusers_in_float64(name: str, per_frame: bool) -> None:
    for what, found in difference(CONFIGS[name], per_frame):
        assert found <= 1e-12, f"{what}: {found}"


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_and_gradients_equal_diffusers_as_it_is(name: str, per_frame: bool) -> None:
    config = CONFIGS[name]
    dtype = torch.float32 if any(config.learned_positions) else torch.float64  # where diffusers takes float32 only
    for what, found in difference(config, per_frame, dtype):
        assert found <= 1e-5, f"{what}: {found}"


@pytest.mark.usefixtures("double")
def test_another_epsilon_or_rate_is_another_network() -> None:
    """What the two comparisons would see."""
    changed = dict(difference(replace(BASE, qk_eps=1e-6), per_frame=True))
    assert changed["velocity"] > 1e-8
    ours, _ = pair(CONFIGS["cosmos 1"])
    x, level = torch.randn(1, 4, 3, 8, 6, dtype=torch.float64), torch.rand(1, 3)
    with torch.no_grad():
        assert relative(ours(x, level, fps=30.0), ours(x, level, fps=24.0)) > 1e-4
        assert relative(ours(x, level, fps=24.0), ours(x, level)) == 0


def embed(prefix: str, weights: dict[str, torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
    """The released MLP of actions, by its formula: linear, GELU in its tanh form, linear."""
    x = actions @ weights[f"{prefix}.0.weight"].T + weights[f"{prefix}.0.bias"]
    x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x @ weights[f"{prefix}.2.weight"].T + weights[f"{prefix}.2.bias"]


@pytest.mark.parametrize("layout", ["cosmos-frame", "cosmos-chunk"])
@pytest.mark.usefixtures("double")
@torch.no_grad()
def test_released_action_layouts_add_to_the_timestep_of_diffusers_network(layout: str) -> None:
    """Actions go into the embedding before its norm, and into the modulation (Cosmos-Predict2.5, robot/action-cond)."""
    config = replace(BASE, action_dim=3, action_layout=layout, action_hidden=32, action_chunk=12)
    torch.manual_seed(1)
    ours = PredictTransformer(config).double()
    for parameter in ours.parameters():
        parameter.normal_(std=0.2)
    weights = {key: value for key, value in ours.state_dict().items() if not key.startswith("action_embedder.")}
    _, theirs = pair(BASE)
    names = renaming(weights, "diffusers")
    theirs.load_state_dict({names[key]: value for key, value in weights.items()})

    x, text = torch.randn(2, 4, 4, 8, 6).double(), torch.randn(2, 5, 16).double()
    mask = torch.zeros(2, 1, 4, 8, 6).double()
    mask[:, :, :2] = 1  # the second frame has actions, but is given
    actions, level = torch.randn(2, 12, 3).double(), torch.rand(2, 4).double()
    mlps = {key.removeprefix("action_embedder."): value for key, value in ours.state_dict().items()}
    if layout == "cosmos-chunk":
        added = [
            embed(name, mlps, actions.flatten(1))[:, None].expand(-1, 4, -1)
            for name in ("to_embedding", "to_modulation")
        ]
    else:
        groups = actions.unflatten(1, (3, 4)).flatten(2)
        added = []
        for name in ("to_embedding", "to_modulation"):
            frames = embed(name, mlps, groups)
            frames[:, 0] = 0  # leads to the given second frame
            added.append(torch.cat([torch.zeros_like(frames[:, :1]), frames], dim=1))

    def time_embed(hidden: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sinusoid = theirs.time_embed.time_proj(timestep)
        shared = theirs.time_embed.t_embedder(sinusoid) + added[1].flatten(0, 1)
        return shared, theirs.time_embed.norm(sinusoid + added[0].flatten(0, 1))

    theirs.time_embed.forward = time_embed
    velocity = ours(x, level, actions, text, condition_mask=mask)
    expected = theirs(x, level[:, None, :, None, None], text, condition_mask=mask, return_dict=False)[0]
    assert relative(velocity, expected) <= 1e-12
    assert relative(ours(x, level, None, text, condition_mask=mask), expected) > 1e-2


@pytest.mark.usefixtures("double")
@torch.no_grad()
def test_a_view_is_diffusers_network_with_its_embedding_as_channels() -> None:
    """Cosmos-Predict2.5, auto/multiview: the embedding of a view is concatenated to its latents."""
    config = replace(BASE, views=3, view_dim=2)
    torch.manual_seed(2)
    ours = PredictTransformer(config).double()
    for parameter in ours.parameters():
        parameter.normal_(std=0.2)
    wide = transformer_cosmos.CosmosTransformer3DModel(
        in_channels=4 + 1 + 2,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(16, 16, 16),
        rope_scale=(1.0, 3.0, 2.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    ).double()
    weights = {key: value for key, value in ours.state_dict().items() if key != "view_embedding.weight"}
    names = renaming(weights, "diffusers")
    wide.load_state_dict({names[key]: value for key, value in weights.items()})
    x, text, level = torch.randn(1, 4, 3, 8, 6).double(), torch.randn(1, 5, 16).double(), torch.rand(1, 3).double()
    mask = torch.randint(0, 2, (1, 1, 3, 8, 6)).double()
    shown = ours.view_embedding.weight[2][None, :, None, None, None].expand(1, 2, 3, 8, 6)
    expected = wide(
        x, level[:, None, :, None, None], text, condition_mask=torch.cat([mask, shown], dim=1), return_dict=False
    )[0]
    velocity = ours(x, level, text=text, condition_mask=mask, views=torch.tensor([2]))
    assert relative(velocity, expected) <= 1e-12
