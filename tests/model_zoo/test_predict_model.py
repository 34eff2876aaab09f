"""The transformer's own invariants: causality, cached == uncached, null actions, shapes refused."""

from dataclasses import replace

import pytest
import torch

from worldloom import WorldloomError
from worldloom_model_zoo.predict import config as presets
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import PredictConfig, cosmos_predict25_2b, tiny
from worldloom_model_zoo.predict.model import PredictTransformer


def lively(config: PredictConfig, seed: int = 0) -> PredictTransformer:
    """A model in which no weight is at its zero initialisation."""
    torch.manual_seed(seed)
    model = PredictTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model


def inputs(config: PredictConfig, t: int, b: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, config.latent_channels, t, 4, 4, generator=generator)
    level = torch.rand(b, t, generator=generator)
    actions = torch.randn(b, 4 * (t - 1), config.action_dim, generator=generator)
    return x, level, actions


@pytest.mark.parametrize("previous_frame", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(0, 0), (1, 0), (3, 0), (1, 1), (2, 1), (2, 3)])
@torch.no_grad()
def test_stepping_with_a_cache_equals_the_whole_forward(window: int, sink: int, previous_frame: bool) -> None:
    config = replace(tiny(action_dim=3), window=window, sink=sink, previous_frame=previous_frame)
    model = lively(config)
    x, level, actions = inputs(config, t=7)
    whole = model(x, level, actions)

    cache = KVCache()
    parts = [model(x[:, :, :2], level[:, :2], actions[:, :4], cache=cache, commit=True)]
    for frame in range(2, 7):
        step = (x[:, :, frame : frame + 1], level[:, frame : frame + 1], actions[:, 4 * (frame - 1) : 4 * frame])
        peek = model(*step, cache=cache)  # a denoising call leaves the cache alone
        parts.append(model(*step, cache=cache, commit=True))
        torch.testing.assert_close(peek, parts[-1], atol=0, rtol=0)
    stepped = torch.cat(parts, dim=2)
    assert (stepped - whole).abs().max() < 1e-4
    assert whole.std() > 0.1
    if window:
        assert cache.keys[0].shape[2] == (sink + window - 1) * 4  # (h/p)*(w/p) = 4 tokens a frame


@pytest.mark.parametrize("sink", [0, 1, 2, 4])
@torch.no_grad()
def test_chunks_after_a_cache_equal_the_whole_forward(sink: int) -> None:
    config = replace(tiny(action_dim=3), window=3, sink=sink, previous_frame=True)
    model = lively(config)
    x, level, actions = inputs(config, t=9)
    cache = KVCache()
    parts = []
    for first, last in ((0, 3), (3, 5), (5, 9)):
        taken = actions[:, 4 * max(first - 1, 0) : 4 * (last - 1)]
        parts.append(model(x[:, :, first:last], level[:, first:last], taken, cache=cache, commit=True))
    assert (torch.cat(parts, dim=2) - model(x, level, actions)).abs().max() < 1e-4


@torch.no_grad()
def test_a_frame_sees_its_window_and_the_sink_and_nothing_between() -> None:
    model = lively(replace(tiny(), blocks=1, window=2, sink=1))
    x, level, _ = inputs(replace(tiny(), action_dim=1), t=6)
    reached = []
    for frame in range(6):
        changed = x.clone()
        changed[:, :, frame] += 1
        difference = (model(x, level) - model(changed, level)).abs().amax(dim=(0, 1, 3, 4))
        reached.append((difference > 1e-5).tolist())
    expected = [[row == column or column == row + 1 or row == 0 for column in range(6)] for row in range(6)]
    assert reached == expected


@pytest.mark.parametrize("previous_frame", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(0, 0), (1, 0), (3, 0), (2, 1)])
@torch.no_grad()
def test_one_call_with_a_context_equals_stepping_along_it(window: int, sink: int, previous_frame: bool) -> None:
    config = replace(tiny(action_dim=3), window=window, sink=sink, previous_frame=previous_frame)
    model = lively(config)
    x, level, actions = inputs(config, t=6)
    context, nearly = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), 0.2 * level.flip(1)
    keep = torch.tensor([False, True])
    forced = model(x, level, actions, action_mask=keep, context=context, context_timestep=nearly)

    cache, parts = KVCache(), []
    for frame in range(6):
        taken = actions[:, 4 * max(frame - 1, 0) : 4 * frame]
        one = slice(frame, frame + 1)
        parts.append(model(x[:, :, one], level[:, one], taken, action_mask=keep, cache=cache))
        model(context[:, :, one], nearly[:, one], taken, action_mask=keep, cache=cache, commit=True)
    assert (forced - torch.cat(parts, dim=2)).abs().max() < 1e-4
    if window != 1 or previous_frame:
        without = model(x, level, actions, action_mask=keep)  # frames see noisy ones
        assert (forced - without).abs()[:, :, 1:].amax() > 0.01


def test_a_context_that_does_not_fit_is_refused() -> None:
    model = lively(tiny(action_dim=3))
    x, level, actions = inputs(model.config, t=4)
    for wrong in (
        {"context": x[:, :, :3], "context_timestep": level[:, :3]},
        {"context": x},
        {"context": x, "context_timestep": level, "cache": KVCache()},
    ):
        with pytest.raises(WorldloomError, match="context"):
            model(x, level, actions, **wrong)
    with pytest.raises(WorldloomError, match="noise level per frame"):
        model(x, level[:, 0], actions, context=x, context_timestep=level)
    full = lively(replace(tiny(action_dim=3), attention="full"))
    with pytest.raises(WorldloomError, match="causal attention"):
        full(x, level, actions, context=x, context_timestep=level)


@torch.no_grad()
def test_causal_frames_do_not_see_later_ones_and_full_ones_do() -> None:
    for attention in ("causal", "full"):
        model = lively(replace(tiny(action_dim=3), attention=attention))
        x, level, actions = inputs(model.config, t=4)
        changed = x.clone()
        changed[:, :, 3] += 1
        difference = (model(x, level, actions) - model(changed, level, actions)).abs().amax(dim=(0, 1, 3, 4))
        assert difference[3] > 1e-3
        assert (difference[:3] > 1e-4).all() if attention == "full" else (difference[:3] == 0).all()


@torch.no_grad()
def test_actions_reach_their_own_frame_and_null_means_no_contribution() -> None:
    model = lively(tiny(action_dim=3))
    x, level, actions = inputs(model.config, t=4)
    changed = actions.clone()
    changed[:, 4:8] += 1  # leads to latent frame 2
    difference = (model(x, level, actions) - model(x, level, changed)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 1e-4).all()

    null = model(x, level, None)
    masked = model(x, level, actions, action_mask=torch.tensor([False, True]))
    torch.testing.assert_close(masked[0], null[0])
    torch.testing.assert_close(masked[1], model(x, level, actions)[1])
    assert (masked[1] - null[1]).abs().max() > 1e-3


@torch.no_grad()
def test_fresh_model_predicts_zero_velocity() -> None:
    config = replace(tiny(action_dim=2), action_head=True)
    x, level, actions = inputs(config, t=3)
    velocity, action_velocity = PredictTransformer(config)(x, level, actions, return_actions=True)
    assert (velocity == 0).all()
    assert (action_velocity == 0).all()
    assert action_velocity.shape == actions.shape


def test_without_an_action_head_a_model_has_the_parameters_it_had() -> None:
    config = tiny(action_dim=3)
    plain, headed = PredictTransformer(config), PredictTransformer(replace(config, action_head=True))
    added = headed.state_dict().keys() - plain.state_dict().keys()
    assert {key.rpartition(".")[0] for key in added} == {
        "action_embedder.noise.0",
        "action_embedder.noise.2",
        "action_head",
    }


@torch.no_grad()
def test_actions_have_their_own_noise_level_and_clean_is_zero() -> None:
    model = lively(replace(tiny(action_dim=3), action_head=True))
    x, level, actions = inputs(model.config, t=4)
    noise = torch.zeros(2, 3)
    clean = model(x, level, actions, return_actions=True)
    for given, default in zip(model(x, level, actions, action_timestep=noise, return_actions=True), clean, strict=True):
        torch.testing.assert_close(given, default, atol=0, rtol=0)
    torch.testing.assert_close(model(x, level, actions), clean[0], atol=0, rtol=0)

    noise[:, 1] = 0.7  # of the actions that lead to latent frame 2
    noisy = model(x, level, actions, action_timestep=noise, return_actions=True)
    frames = (noisy[0] - clean[0]).abs().amax(dim=(0, 1, 3, 4))
    assert (frames[:2] == 0).all()
    assert (frames[2:] > 1e-4).all()
    groups = (noisy[1] - clean[1]).abs().amax(dim=(0, 2)).unflatten(0, (3, 4)).amax(dim=1)
    assert groups[0] == 0
    assert (groups[1:] > 1e-4).all()


@torch.no_grad()
def test_the_actions_velocity_is_read_from_the_frame_that_they_lead_to() -> None:
    model = lively(replace(tiny(action_dim=3), action_head=True))
    x, level, actions = inputs(model.config, t=4)
    before = model(x, level, actions, return_actions=True)[1]
    changed = x.clone()
    changed[:, :, 2] += 1
    difference = (model(changed, level, actions, return_actions=True)[1] - before).abs().amax(dim=(0, 2))
    assert (difference[:4] == 0).all()
    assert (difference[4:8] > 1e-4).all()

    cache, parts = KVCache(), []
    model(x[:, :, :1], level[:, :1], cache=cache, commit=True)
    for frame in range(1, 4):
        step = (x[:, :, frame : frame + 1], level[:, frame : frame + 1], actions[:, 4 * (frame - 1) : 4 * frame])
        parts.append(model(*step, cache=cache, commit=True, return_actions=True)[1])
    assert (torch.cat(parts, dim=1) - before).abs().max() < 1e-4


def test_an_action_head_that_is_missing_or_misused_says_so() -> None:
    model = PredictTransformer(tiny(action_dim=3))
    x, level, actions = inputs(model.config, t=3)
    with pytest.raises(WorldloomError, match="no noise level of their own"):
        model(x, level, actions, return_actions=True)
    headed = PredictTransformer(replace(model.config, action_head=True))
    with pytest.raises(WorldloomError, match="needs noisy actions"):
        headed(x, level, return_actions=True)
    with pytest.raises(WorldloomError, match="per latent frame that they lead to"):
        headed(x, level, actions, action_timestep=torch.zeros(2, 3))
    with pytest.raises(WorldloomError, match="action_head needs actions"):
        replace(tiny(), action_head=True)
    with pytest.raises(WorldloomError, match="sink goes with a window"):
        replace(tiny(), sink=1)


def test_cosmos_configuration_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = PredictTransformer(cosmos_predict25_2b())
    blocks = sum(p.numel() for p in model.blocks.parameters())
    # Per block: 2 attentions, MLP x4, three AdaLN-LoRA of rank 256, four head norms.
    d, rank = 2048, 256
    expected = 4 * d * d + (2 * d * d + 2 * d * 1024) + 8 * d * d + 3 * (d * rank + rank * 3 * d) + 4 * 128
    assert blocks == 28 * expected
    assert model.patch_in.weight.shape == (2048, 18 * 4)
    assert model.patch_out.weight.shape == (64, 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(2, 8, 2)}, "actions do not fit"),
        ({"actions": torch.zeros(2, 7, 3)}, "actions do not fit"),
        ({"timestep": torch.zeros(2, 2)}, "noise level"),
        ({"views": torch.tensor([0])}, "one view only"),
        ({"text": torch.zeros(2, 4, 8)}, "text embedding"),
        ({"x": torch.zeros(2, 3, 3, 4, 4)}, "latents are"),
        ({"x": torch.zeros(2, 16, 3, 5, 4)}, "latents are"),
    ],
)
def test_wrong_shapes_are_refused(change: dict, message: str) -> None:
    model = PredictTransformer(tiny(action_dim=3))
    x, level, actions = inputs(model.config, t=3)
    with pytest.raises(WorldloomError, match=message):
        model(**({"x": x, "timestep": level, "actions": actions} | change))


def test_models_that_cannot_step_or_act_say_so() -> None:
    full = PredictTransformer(replace(tiny(), attention="full"))
    x, level, _ = inputs(full.config, t=3)
    with pytest.raises(WorldloomError, match="causal"):
        full(x, level, cache=KVCache())
    with pytest.raises(WorldloomError, match="takes no actions"):
        full(x, level, torch.zeros(2, 8, 3))
    with pytest.raises(WorldloomError, match="width / heads"):
        PredictConfig(width=100, heads=3)


@torch.no_grad()
def test_one_noise_level_for_all_frames_is_that_level_in_each() -> None:
    model = lively(tiny(action_dim=3))
    x, _, actions = inputs(model.config, t=3)
    level = torch.tensor([0.2, 0.9])
    torch.testing.assert_close(model(x, level, actions), model(x, level[:, None].expand(2, 3), actions))


MULTIVIEW = replace(tiny(), attention="full", context_dim=8, views=3, view_dim=2)


@torch.no_grad()
def test_views_change_places_with_their_texts_and_indices() -> None:
    """Positions start anew in each view, and each sees its own text."""
    model = lively(MULTIVIEW)
    first, second = torch.randn(2, 1, 16, 2, 4, 4)
    texts = torch.randn(2, 1, 5, 8)
    level = torch.rand(1, 2)
    levels = torch.cat([level, level], dim=1)
    together = model(
        torch.cat([first, second], dim=2), levels, text=torch.cat([*texts], dim=1), views=torch.tensor([0, 2])
    )
    swapped = model(
        torch.cat([second, first], dim=2), levels, text=torch.cat([*texts.flip(0)], dim=1), views=torch.tensor([[2, 0]])
    )
    torch.testing.assert_close(together, swapped.roll(2, dims=2), atol=1e-4, rtol=1e-4)
    other = model(
        torch.cat([first, second], dim=2), levels, text=torch.cat([*texts.flip(0)], dim=1), views=torch.tensor([0, 2])
    )
    assert (together - other).abs().max() > 1e-3


@torch.no_grad()
def test_views_meet_in_self_attention_only() -> None:
    model = lively(MULTIVIEW)
    for block in model.blocks:
        block.self_attn.output_proj.weight.zero_()
    x, text, level = torch.randn(2, 16, 6, 4, 4), torch.randn(2, 15, 8), torch.rand(2, 6)
    together = model(x, level, text=text, views=torch.arange(3))
    for view in range(3):
        frames = slice(2 * view, 2 * view + 2)
        alone = model(
            x[:, :, frames], level[:, frames], text=text[:, 5 * view : 5 * view + 5], views=torch.tensor([view])
        )
        torch.testing.assert_close(together[:, :, frames], alone, atol=1e-4, rtol=1e-4)


def test_views_that_do_not_fit_are_refused() -> None:
    model = PredictTransformer(MULTIVIEW)
    x, level = torch.zeros(1, 16, 4, 4, 4), torch.zeros(1, 4)
    for views, message in (([0, 3], "views 0 to 2"), ([0, 1, 2], "a multiple of v")):
        with pytest.raises(WorldloomError, match=message):
            model(x, level, views=torch.tensor(views))
    with pytest.raises(WorldloomError, match="a text each"):
        model(x, level, text=torch.zeros(1, 5, 8), views=torch.arange(2))
    assert model(x, level, views=torch.arange(2)).shape == x.shape
    with pytest.raises(WorldloomError, match="several views go with full attention"):
        replace(MULTIVIEW, attention="causal")


@torch.no_grad()
def test_learned_positions_are_added_before_each_block_and_end() -> None:
    model = lively(replace(tiny(), learned_positions=(4, 2, 3)))
    x, level = torch.randn(1, 16, 4, 4, 6), torch.rand(1, 4)
    whole = model(x, level)
    cache = KVCache()
    parts = [model(x[:, :, t : t + 1], level[:, t : t + 1], cache=cache, commit=True) for t in range(4)]
    assert (torch.cat(parts, dim=2) - whole).abs().max() < 1e-4
    assert model.positions is not None
    scale = model.positions(2, 2, 3, 1).square().mean(dim=-1)
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-4, rtol=0)
    with pytest.raises(WorldloomError, match="larger than this model's learned positions"):
        model(torch.zeros(1, 16, 5, 4, 6), torch.zeros(1, 5))
    with pytest.raises(WorldloomError, match="three sizes"):
        replace(tiny(), learned_positions=(4, 0, 3))


def test_chunks_of_actions_have_their_own_length() -> None:
    config = replace(tiny(action_dim=3), attention="full", action_layout="cosmos-chunk", action_chunk=5)
    model = PredictTransformer(config)
    x, level = torch.zeros(2, 16, 3, 4, 4), torch.zeros(2, 3)
    assert model(x, level, torch.zeros(2, 5, 3)).shape == x.shape
    with pytest.raises(WorldloomError, match="a whole chunk"):
        model(x, level, torch.zeros(2, 8, 3))
    with pytest.raises(WorldloomError, match="every frame at once"):
        replace(config, attention="causal")


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        ("cosmos_predict2_text2image_0_6b", 0.6, 17),
        ("cosmos_predict2_text2image_2b", 2.0, 17),
        ("cosmos_predict2_text2image_14b", 14.0, 17),
        ("cosmos_predict2_2b", 2.0, 18),
        ("cosmos_predict2_14b", 14.0, 18),
        ("cosmos_predict2_2b_action", 2.0, 18),
        ("cosmos_predict2_2b_multiview", 2.0, 25),
        ("cosmos_predict25_2b", 2.0, 18),
        ("cosmos_predict25_14b", 14.0, 18),
        ("cosmos_predict25_2b_action", 2.0, 18),
        ("cosmos_predict25_2b_multiview", 2.0, 25),
        ("cosmos1_7b", 7.0, 17),
        ("cosmos1_14b", 14.0, 17),
    ],
)
def test_presets_have_the_size_in_their_name(name: str, parameters: float, channels: int) -> None:
    config = getattr(presets, name)()
    with torch.device("meta"):
        model = PredictTransformer(config)
    count = sum(p.numel() for p in model.parameters()) / 1e9
    assert abs(count - parameters) / parameters < 0.12
    assert model.patch_in.in_features == 4 * channels
    assert config.head_dim == (64 if "0_6b" in name else 128)
