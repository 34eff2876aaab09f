"""From a sampler's configuration to latents: guidance, schedules, step skipping, chunks, rolling, kept conditioning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.schema import GenerationRequest
from worldloom_model_zoo.predict.caching import TensorCache, content_key, default_cache
from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig, SamplerConfig, tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline
from worldloom_model_zoo.predict.recipes import recipe
from worldloom_model_zoo.predict.sampling import GuidedNetwork, as_context, draw_latents, schedule
from worldloom_model_zoo.predict.skipping import FirstBlockCache

DIM = len(tiny_models.ACTIONS)
UNIFORM = SamplerConfig(steps=3)


def network(seed: int = 0, **options: Any) -> PredictTransformer:
    """A transformer in which no weight is at its zero initialisation."""
    torch.manual_seed(seed)
    config = replace(tiny(action_dim=DIM), **{"latent_channels": 4, "context_dim": 16, **options})
    model = PredictTransformer(config).double().eval()
    tiny_models.scatter(model, seed)
    return model


def pipeline(**options: Any) -> PredictPipeline:
    """With full attention unless told otherwise; in float32, on 32x32 pixels and latents of 4x4."""
    sampler = options.pop("sampler", UNIFORM)
    model = network(**{"attention": "full", "context_dim": 0, **options}).float()
    config = PredictCheckpoint(height=32, width=32, fps=10.0, model=model.config, sampler=sampler)
    return PredictPipeline(model, tiny_models.tokenizer(), config)


def video(frames: int, batch: int = 1) -> Tensor:
    return media.to_tensor(np.stack([tiny_models.moving_square(frames, i) for i in range(batch)]))


def actions(steps: int, batch: int = 1) -> Tensor:
    index = torch.randint(0, DIM, (batch, steps), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.one_hot(index, DIM).float()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def watch(model: PredictTransformer) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the network is called with from now on."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model.register_forward_pre_hook(lambda _, args, options: seen.append((args, options)), with_kwargs=True)
    return seen


# -- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["actions", "text", "both", "negative", "cache"])
@torch.no_grad()
def test_batched_guidance_gives_what_one_after_the_other_gives(given: str) -> None:
    model = network(attention="causal" if given == "cache" else "full", previous_frame=given == "cache")
    x, moves = randn(2, 4, 3, 4, 4), randn(2, 8, DIM)
    text, negative = randn(2, 5, 16), randn(2, 5, 16, seed=1)
    options: dict[str, Any] = {"text": None if given == "actions" else text}
    if given == "negative":
        options["negative"] = negative
    call: dict[str, Any] = {}
    if given == "cache":
        call["cache"] = KVCache()
        model(randn(2, 4, 2, 4, 4, seed=2), torch.zeros(2, 2), randn(2, 4, DIM), text, cache=call["cache"], commit=True)
        moves = randn(2, 12, DIM)
    sampler = SamplerConfig(guidance_scale=3.0)
    made = {}
    for batched in (False, True):
        guided = GuidedNetwork(model, replace(sampler, guidance_batched=batched), **options)
        chosen = None if given in ("text", "negative") else moves
        made[batched] = guided(x, [0.8, 0.7, 0.6], chosen, **call)
        assert guided.calls == (1 if batched else 2)
    assert made[False].std() > 0.1
    torch.testing.assert_close(made[True], made[False], atol=1e-6, rtol=1e-6)
    plain = GuidedNetwork(model, replace(sampler, guidance_scale=1.0), **options)(x, [0.8, 0.7, 0.6], moves, **call)
    assert (plain - made[False]).abs().max() > 1e-2


@torch.no_grad()
def test_guidance_acts_in_its_interval_only_and_saves_the_call_outside() -> None:
    model = network(attention="full")
    x, text = randn(1, 4, 3, 4, 4), randn(1, 5, 16)
    sampler = SamplerConfig(guidance_scale=4.0, guidance_interval=(0.3, 0.8))
    always = GuidedNetwork(model, replace(sampler, guidance_interval=(0.0, 1.0)), text)
    never = GuidedNetwork(model, replace(sampler, guidance_scale=1.0), text)
    guided = GuidedNetwork(model, sampler, text)
    torch.testing.assert_close(guided(x, [0.0, 0.9, 0.9], known=1), never(x, [0.0, 0.9, 0.9], known=1))
    assert guided.calls == 1
    torch.testing.assert_close(guided(x, [0.8, 0.5, 0.3]), always(x, [0.8, 0.5, 0.3]))
    assert guided.calls == 3
    mixed = guided(x, [0.9, 0.5, 0.2])  # frames at levels of their own: each by its own level
    torch.testing.assert_close(mixed[:, :, 1], always(x, [0.9, 0.5, 0.2])[:, :, 1])
    torch.testing.assert_close(mixed[:, :, [0, 2]], never(x, [0.9, 0.5, 0.2])[:, :, [0, 2]])


def test_both_guidance_conventions_make_the_same_video() -> None:
    world, done = pipeline(), actions(8)
    one = replace(UNIFORM, guidance_scale=4.0)
    other = replace(UNIFORM, guidance_scale=3.0, guidance_convention="conditional")
    made = [world.generate_video(video(1), done, 9, sampler=sampler) for sampler in (one, other)]
    torch.testing.assert_close(*made, atol=1e-5, rtol=0)
    assert not replace(other, guidance_scale=0.0).guided
    assert not replace(one, guidance_scale=1.0).guided


def test_batched_guidance_wants_texts_of_one_length() -> None:
    guided = GuidedNetwork(
        network(attention="full"),
        SamplerConfig(guidance_scale=2.0, guidance_batched=True),
        randn(1, 5, 16),
        randn(1, 4, 16),
    )
    with pytest.raises(WorldloomError, match="one length"):
        guided(randn(1, 4, 3, 4, 4), [0.5] * 3)


# -- schedules and methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["euler", "heun", "ab2", "unipc", "consistency", "shortcut", "edm_euler", "edm_heun"]
)
@pytest.mark.parametrize("attention", ["causal", "full"])
def test_every_method_runs_from_its_configuration(method: Any, attention: str) -> None:
    world = pipeline(attention=attention, step_size=method == "shortcut")
    sampler = SamplerConfig(
        steps=4, method=method, schedule="karras" if method.startswith("edm") else "uniform", context_noise=0.05
    )
    seen: list[tuple[int, int]] = []
    made = world.generate_video(
        video(5), actions(12), 13, seed=2, sampler=sampler, progress=lambda *done: seen.append(done)
    )
    assert torch.equal(made[:, :, :5], video(5))
    assert made[:, :, 5:].std() > 0.01
    assert torch.equal(made, world.generate_video(video(5), actions(12), 13, seed=2, sampler=sampler))
    euler = world.generate_video(video(5), actions(12), 13, seed=2, sampler=replace(sampler, method="euler"))
    assert method == "euler" or not torch.allclose(made, euler, atol=1e-3)
    total = sampler.calls * (2 if attention == "causal" else 1)  # two latent frames, one by one or together
    assert seen == [(i, total) for i in range(1, total + 1)]


@pytest.mark.parametrize("method", ["edm_euler", "edm_heun"])
def test_edm_sampling_ends_at_the_data_its_network_knows(method: Any) -> None:
    """Data normal of deviation sigma_data: the best denoiser is c_skip alone, so the network F is zero."""
    sampler = SamplerConfig(
        steps=200, method=method, schedule="karras", sigma_min=0.002, sigma_max=500.0, sigma_data=0.7
    )
    noise, told = randn(2, 4, 3, 4, 4), []

    def zero(x: Tensor, sigma: float, step: float | None) -> Tensor:
        told.append(sigma)
        return torch.zeros_like(x)

    made = draw_latents(zero, noise, sampler, lambda: noise)
    torch.testing.assert_close(made, 0.7 * noise, atol=0.05 if method == "edm_euler" else 2e-3, rtol=0)
    assert told[0] == pytest.approx(500)
    shown, sigma = as_context(noise, sampler, lambda: noise)
    assert sigma == 0.002
    torch.testing.assert_close(shown, noise / math.hypot(sigma, 0.7))


def test_predict2_is_sampled_from_its_strongest_noise_to_a_last_call_at_its_weakest() -> None:
    sampler, noise = recipe("cosmos-predict2-2b-video2world").sampler, randn(1, 4, 2, 4, 4)
    assert sampler is not None
    seen: list[tuple[Tensor, float]] = []

    def velocity(x: Tensor, level: float, step: float | None) -> Tensor:
        seen.append((x, level / (1 - level)))
        return x.sin()

    draw_latents(velocity, noise, sampler, lambda: noise)
    assert len(seen) == 35 + 1
    torch.testing.assert_close(seen[0][0], 80 / 81 * noise)
    assert (seen[0][1], seen[-1][1]) == (pytest.approx(80), pytest.approx(0.002))


@torch.no_grad()
def test_an_edm_network_is_told_a_quarter_of_the_logarithm_of_sigma() -> None:
    model = network(attention="full")
    seen = watch(model)
    guided = GuidedNetwork(model, SamplerConfig(method="edm_euler", schedule="karras"))
    guided(randn(1, 4, 3, 4, 4), [0.002, 5.0, 5.0], known=1)
    torch.testing.assert_close(seen[0][0][1], torch.tensor([[0.002, 5.0, 5.0]]).double().log() / 4)


@torch.no_grad()
def test_given_frames_have_a_level_of_their_own_and_levels_may_be_cut_to_thousandths() -> None:
    world = pipeline(condition_mask=True)
    seen = watch(world.model)
    sampler = SamplerConfig(steps=2, shift=3.0, first_level=0.999, condition_level=0.1, round_levels=True)
    world.generate_video(video(5), None, 13, sampler=sampler)
    levels = schedule(sampler)
    assert [args[1][0].tolist() for args, _ in seen] == [
        pytest.approx([0.1, 0.1, *[math.floor(1000 * float(level)) / 1000] * 2]) for level in levels[:-1]
    ]
    assert 1000 * float(levels[1]) % 1 > 0.1  # so that cutting shows
    context = world.tokenizer.encode(video(5))
    for args, _ in seen:
        assert torch.equal(args[0][:, :, :2], context)
    seen.clear()
    world.generate_video(video(5), None, 13, sampler=replace(sampler, condition_level=None))
    for args, _ in seen:
        assert len(set(args[1][0].tolist())) == 1  # given frames go by the level of the others


def test_a_shortcut_network_is_told_how_far_the_frames_go_that_are_made() -> None:
    world = pipeline(step_size=True, sampler=SamplerConfig(steps=2, method="shortcut"))
    seen = watch(world.model)
    world.generate_video(video(1), None, 9)
    assert [options["step"].tolist() for _, options in seen] == [[[0.0, 0.5, 0.5]]] * 2
    assert [args[1].tolist() for args, _ in seen] == [[[0.0, 1.0, 1.0]], [[0.0, 0.5, 0.5]]]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"first_level": 0.5, "last_level": 0.6}, "last_level < first_level"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
        ({"condition_level": 1.0}, "condition_level < 1"),
        ({"skip_threshold": -1.0}, "skip_threshold"),
        ({"chunk_frames": 5, "overlap_frames": 5}, "overlap_frames < chunk_frames"),
        ({"rolling_delay": 1, "method": "unipc"}, "goes with the method euler"),
        ({"method": "edm_heun"}, "go with the schedule karras"),
    ],
)
def test_samplers_that_cannot_be_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        SamplerConfig(**options)


def test_what_a_model_cannot_do_is_said() -> None:
    world = pipeline()
    with pytest.raises(WorldloomError, match="told its step"):
        world.generate_video(video(1), None, 9, sampler=SamplerConfig(method="shortcut"))
    with pytest.raises(WorldloomError, match="for causal models"):
        world.generate_video(video(1), None, 9, sampler=SamplerConfig(rolling_delay=1))
    with pytest.raises(WorldloomError, match=r"must be 1 \+ 4k"):
        world.generate_video(video(1), None, 17, sampler=SamplerConfig(chunk_frames=8))
    with pytest.raises(WorldloomError, match="as long as a chunk"):
        world.generate_video(video(9), None, 17, sampler=SamplerConfig(chunk_frames=9))
    with pytest.raises(WorldloomError, match="a start is needed"):
        world.generate_video(None, None, 9)
    with pytest.raises(WorldloomError, match="a start is a video"):
        world.generate_video(video(3), None, 9)


# -- step skipping ---------------------------------------------------------------------------------------------------


def test_the_first_block_decides_and_the_rest_is_added_again() -> None:
    skip = FirstBlockCache(0.1)
    before, first, last = randn(2, 3), randn(2, 3, seed=1), randn(2, 3, seed=2)
    assert skip.recall(before, before + first) is None
    skip.keep(before + first + last)
    moved = randn(2, 3, seed=3)
    reused = skip.recall(moved, moved + 1.05 * first)
    assert reused is not None
    torch.testing.assert_close(reused, moved + 1.05 * first + last)
    row = torch.tensor([[1.0], [1.2]])  # one row of the batch has changed too much
    assert skip.recall(moved, moved + row * first) is None
    skip.keep(moved + row * first + last)
    assert (skip.computed, skip.skipped, skip.share) == (2, 1, pytest.approx(1 / 3))


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("guided", ["", "sequential", "batched"])
def test_skipping_saves_blocks_and_errs_less_with_a_lower_threshold(attention: str, guided: str) -> None:
    world = pipeline(attention=attention, blocks=4, timestep_scale=1.0)  # random weights that change slowly
    runs = [0]
    world.model.blocks[-1].register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    sampler = replace(UNIFORM, steps=16, guidance_scale=2.0 if guided else 1.0, guidance_batched=guided == "batched")
    done = actions(4, batch=2)

    def make(threshold: float) -> tuple[Tensor, int]:
        runs[0] = 0
        made = world.generate_video(video(1, 2), done, 5, sampler=replace(sampler, skip_threshold=threshold))
        return made, runs[0]

    whole, all_runs = make(0.0)
    same, same_runs = make(1e-9)
    assert torch.equal(same, whole)
    assert same_runs == all_runs
    little, few = make(0.1)
    much, fewer = make(0.3)
    assert all_runs > few > fewer
    errors = [float((made - whole).abs().mean()) for made in (little, much)]
    assert 0 < errors[0] < errors[1] < 0.3


# -- long videos -----------------------------------------------------------------------------------------------------


def test_a_long_video_is_made_in_chunks_that_start_from_the_last_frames() -> None:
    world, start, done = pipeline(condition_mask=True), video(5), actions(28)
    sampler = SamplerConfig(steps=2, chunk_frames=13, overlap_frames=5)
    first = world.generate_video(start, done[:, :12], 13, sampler=sampler)
    seen, ticks = watch(world.model), []
    made = world.generate_video(start, done, 29, sampler=sampler, progress=lambda *at: ticks.append(at))
    assert made.shape == (1, 3, 29, 32, 32)
    assert torch.equal(made[:, :, :13], first)  # a chunk is what it would be alone
    assert ticks == [(i, 6) for i in range(1, 7)]
    for number, begin in enumerate((0, 8, 16)):
        args, options = seen[2 * number]
        assert torch.equal(args[0][:, :, :2], world.tokenizer.encode(made[:, :, begin : begin + 5]))
        assert options["condition_mask"].mean(dim=(0, 1, 3, 4)).tolist() == [1, 1, 0, 0]
        assert torch.equal(args[2], done[:, begin : begin + 12])
    assert torch.equal(made, world.generate_video(start, done, 29, sampler=sampler))


def test_the_last_chunk_is_cut_not_shortened() -> None:
    world, sampler = pipeline(), SamplerConfig(steps=2, chunk_frames=9, overlap_frames=1)
    seen = watch(world.model)
    made = world.generate_video(video(1), actions(20), 21, sampler=sampler)
    assert made.shape[2] == 21
    assert [args[0].shape[2] for args, _ in seen] == [3] * 6
    long = world.generate_video(video(1), torch.cat([actions(20), torch.zeros(1, 4, DIM)], dim=1), 25, sampler=sampler)
    assert torch.equal(made, long[:, :, :21])


@pytest.mark.parametrize("window", [0, 3])
def test_rolling_with_the_longest_delay_is_frame_by_frame(window: int) -> None:
    world = pipeline(attention="causal", window=window)
    start, done = video(5, 2), actions(16, 2)
    plain = world.generate_video(start, done, 17, sampler=UNIFORM, seed=4)
    ticks: list[tuple[int, int]] = []
    rolled = world.generate_video(
        start, done, 17, sampler=replace(UNIFORM, rolling_delay=3), seed=4, progress=lambda *at: ticks.append(at)
    )
    torch.testing.assert_close(rolled, plain, atol=1e-5, rtol=0)
    assert ticks == [(i, 9) for i in range(1, 10)]


def test_rolling_keeps_a_window_of_half_done_frames() -> None:
    world = pipeline(attention="causal", window=3)
    seen = watch(world.model)
    made = world.generate_video(video(1), actions(24), 25, sampler=SamplerConfig(steps=4, rolling_delay=2), seed=4)
    denoised = [args[1][0].tolist() for args, options in seen if not options.get("commit")]
    assert denoised[0] == [1.0]
    assert denoised[2] == [0.5, 1.0]
    assert {len(levels) for levels in denoised} == {1, 2}
    assert len(denoised) == 4 + 2 * 5
    assert made.std() > 0.01


# -- sizes and settings of requests ----------------------------------------------------------------------------------


def test_requests_choose_among_trained_sizes_and_set_the_sampler(tmp_path: Path) -> None:
    world = pipeline(sampler=SamplerConfig(steps=2, guidance_scale=1.5, guidance_convention="conditional"))
    world.config = replace(world.config, sizes=((48, 32),))
    media.write_image(tmp_path / "start.png", tiny_models.moving_square(1, 0)[0])
    request = GenerationRequest("tiny", image=str(tmp_path / "start.png"), frames=5)
    complete = world.complete(request)
    assert (complete.height, complete.width, complete.guidance_scale, complete.shift) == (32, 32, 2.5, 1.0)
    assert world.complete(complete) == complete
    assert world.generate(replace(request, height=48, shift=2.0)).shape == (1, 3, 5, 48, 32)
    assert world.complete(replace(request, height=48)).width == 32
    with pytest.raises(WorldloomError, match="not trained at this size") as error:
        world.complete(replace(request, height=64))
    assert "height 48, width 32" in str(error.value)
    with pytest.raises(WorldloomError, match="takes no text"):
        world.complete(replace(request, negative_prompt="blur"))


# -- kept conditioning -----------------------------------------------------------------------------------------------


def counted(world: PredictPipeline) -> list[int]:
    """How often the tokenizer has encoded."""
    encode, count = world.tokenizer.encode, [0]

    def counting(video: Tensor) -> Tensor:
        count[0] += 1
        return encode(video)

    world.tokenizer.encode = counting  # pyright: ignore[reportAttributeAccessIssue]
    return count


def test_a_start_is_encoded_once_for_all_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLOOM_CACHE", str(tmp_path / "cache"))
    media.write_image(tmp_path / "start.png", tiny_models.moving_square(1, 0)[0])
    media.write_image(tmp_path / "other.png", tiny_models.moving_square(1, 3)[0])
    request = GenerationRequest("tiny", image=str(tmp_path / "start.png"), frames=5)
    world = pipeline()
    count = counted(world)
    first = world.generate(request)
    assert torch.equal(world.generate(request), first)
    assert not torch.equal(world.generate(replace(request, seed=1)), first)
    assert count == [1]
    again = pipeline()  # in another process, so to say
    count_again = counted(again)
    assert torch.equal(again.generate(request), first)
    assert count_again == [0]
    world.generate(replace(request, image=str(tmp_path / "other.png")))
    assert count == [2]
    monkeypatch.setenv("WORLDLOOM_CACHE", "off")
    assert default_cache() is None
    assert torch.equal(world.generate(request), first)
    assert count == [3]


def test_what_is_kept_is_bounded_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache, made = TensorCache(tmp_path, limit_bytes=3000), []

    def get(name: str) -> Tensor:
        return cache.get(lambda: made.append(name) or torch.full((256,), float(len(name))), name)

    import os

    for age, name in enumerate(("a", "bb")):  # about 1,100 bytes each
        get(name)
        os.utime(tmp_path / f"{content_key(name)}.safetensors", (age + 1, age + 1))
    assert torch.equal(get("a"), torch.full((256,), 1.0))  # used: now the younger one
    get("ccc")
    assert (cache.hits, cache.misses) == (1, 3)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3000
    get("a")
    get("bb")
    assert made == ["a", "bb", "ccc", "bb"]
    assert torch.equal(TensorCache(tmp_path / "none", 0).get(lambda: torch.ones(3), "x"), torch.ones(3))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, damage: bytes | None) -> None:
    cache = TensorCache(tmp_path)
    whole = cache.get(lambda: torch.arange(100.0), "x")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7] if damage is None else damage)
    assert torch.equal(cache.get(lambda: torch.arange(100.0), "x"), whole)
    assert cache.misses == 2
    assert torch.equal(cache.get(lambda: torch.zeros(1), "x"), whole)  # mended


def test_content_is_told_apart_by_values_shapes_types_and_boundaries() -> None:
    x = torch.arange(6.0)
    parts: list[tuple[str | Tensor, ...]] = [
        (x,), (x + 1,), (x.view(2, 3),), (x.double(),), (x.to(torch.bfloat16),), (x[:5],), ("a", x), ("ab", "c"),
        ("a", "bc"), ("abc",), (),
    ]  # fmt: skip
    keys = [content_key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert content_key(x.view(2, 3).T.contiguous().T) == content_key(x.view(2, 3))


def test_texts_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder is not asked for, nor loaded, where all texts are kept."""
    world = pipeline(context_dim=16, text_dim=6)
    from worldloom_model_zoo.predict.config import TextEncoderRef

    world.config = replace(world.config, text=TextEncoderRef("words", "f" * 64, 4))
    asked: list[str] = []

    class Words:
        fingerprint = "f" * 64

        def encode(self, texts: list[str]) -> Tensor:
            asked.extend(texts)
            return torch.stack([torch.full((4, 6), float(len(text))) for text in texts])

    load: Callable[..., Words] = lambda *_: Words()  # noqa: E731
    monkeypatch.setattr("worldloom_tokenizers.load_text_encoder", load)
    sampler = replace(UNIFORM, guidance_scale=3.0, negative_prompt="blurred")
    cache = TensorCache(tmp_path)
    made = [world.generate_video(video(1), None, 5, text=["a cat"], sampler=sampler, cache=cache) for _ in range(2)]
    assert torch.equal(*made)
    assert asked == ["a cat", "blurred"]
    plain = world.generate_video(video(1), None, 5, text=["a cat"], sampler=replace(sampler, negative_prompt=""))
    assert not torch.allclose(made[0], plain, atol=1e-4)
    assert PredictConfig().text_dim == 0


@pytest.mark.parametrize("batched", [False, True])
def test_a_text_is_read_once_for_all_steps_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, batched: bool) -> None:
    torch.manual_seed(0)
    config = replace(tiny(), context_dim=16, text_dim=12, attention="full")
    model = PredictTransformer(config).double()
    tiny_models.scatter(model, 1)
    x, text = torch.randn(2, 16, 2, 4, 4).double(), torch.randn(2, 5, 12).double()
    level = torch.full((2, 2), 0.5).double()
    with torch.no_grad():
        direct = model(x, level, None, text)
        assert torch.equal(model(x, level, None, model.read_text(text, 2)), direct)
        reads = []
        original = PredictTransformer.read_text
        monkeypatch.setattr(
            PredictTransformer, "read_text", lambda self, *a, **k: reads.append(1) or original(self, *a, **k)
        )
        network = GuidedNetwork(model, SamplerConfig(guidance_scale=2.0, guidance_batched=batched), text)
        for _ in range(3):
            made = network(x, [0.5, 0.5])
    assert len(reads) == (1 if batched else 2)
    torch.testing.assert_close(made, 2 * direct - model(x, level), rtol=1e-9, atol=1e-9)
    with pytest.raises(WorldloomError, match="another batch"):
        model(x[:1], level[:1], None, model.read_text(text, 2))
