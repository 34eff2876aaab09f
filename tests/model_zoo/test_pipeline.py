"""The predict pipeline: stepping equals generating, seeds and batches do not mix, mistakes are named, files return."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.protocols import Generates, Steps, VideoTokenizer, capabilities
from worldloom.schema import GenerationRequest
from worldloom_model_zoo import load_model
from worldloom_model_zoo.predict import checkpoint
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig, SamplerConfig
from worldloom_model_zoo.predict.inputs import align_actions
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline

DIM = len(tiny_models.ACTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.mktemp("models"))


@pytest.fixture
def pipeline(folder: Path) -> PredictPipeline:
    return load_model(folder)


def video(frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return media.to_tensor(np.stack([tiny_models.moving_square(frames, seed + i) for i in range(batch)]))


def actions(steps: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, DIM, (batch, steps), generator=generator)
    return torch.nn.functional.one_hot(index, DIM).float()


def test_it_has_the_capabilities_it_says(pipeline: PredictPipeline) -> None:
    assert isinstance(pipeline, Generates)
    assert isinstance(pipeline, Steps)
    assert isinstance(pipeline.tokenizer, VideoTokenizer)


@pytest.mark.parametrize("sampler", [SamplerConfig(steps=2), SamplerConfig(steps=3, context_noise=0.2, shift=2.0)])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_stepping_gives_what_generating_gives(
    pipeline: PredictPipeline, sampler: SamplerConfig, guidance: float
) -> None:
    pipeline.sampler = replace(sampler, guidance_scale=guidance)
    start, done = video(5, batch=2), actions(16, batch=2)
    whole = pipeline.generate_video(start, done, 17, seed=7)
    seen = pipeline.reset(start, done[:, :4], seed=7)
    rolled = pipeline.rollout(done[:, 4:])
    pipeline.reset(start, done[:, :4], seed=7)
    stepped = torch.cat([pipeline.step(part) for part in done[:, 4:].split(4, dim=1)], dim=2)
    assert seen.shape == start.shape
    assert torch.equal(rolled, stepped)
    torch.testing.assert_close(rolled, whole[:, :, 5:], rtol=0, atol=1e-5)
    assert rolled.std() > 0.01  # something moved: the comparison is not of two blanks


def test_the_start_seen_by_the_world_is_its_reconstruction(pipeline: PredictPipeline) -> None:
    start = video(5)
    expected = pipeline.tokenizer.decode(pipeline.tokenizer.encode(start))
    torch.testing.assert_close(pipeline.reset(start), expected, rtol=0, atol=1e-5)


def test_seeds_reproduce_bits_and_differ(pipeline: PredictPipeline) -> None:
    start, done = video(1), actions(8)
    first = pipeline.generate_video(start, done, 9, seed=3)
    assert torch.equal(first, pipeline.generate_video(start, done, 9, seed=3))
    assert not torch.equal(first, pipeline.generate_video(start, done, 9, seed=4))


def test_a_row_does_not_depend_on_its_batch(pipeline: PredictPipeline) -> None:
    start, done = video(5, batch=3), actions(12, batch=3)
    together = pipeline.generate_video(start, done, 13, seed=10)
    for row in range(3):
        one = slice(row, row + 1)
        alone = pipeline.generate_video(start[one], done[one], 13, seed=10 + row)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0, :, 5:], together[1, :, 5:], atol=1e-2)


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("given", [1, 5])
def test_given_frames_are_kept_exactly(tmp_path: Path, attention: str, given: int) -> None:
    pipeline = load_model(tiny_models.world(tmp_path, attention=attention))
    start = video(given)
    made = pipeline.generate_video(start, actions(12), 13)
    assert made.shape == (1, 3, 13, 32, 32)
    assert torch.equal(made[:, :, :given], start)
    assert made.abs().max() <= 1


def test_a_model_with_a_condition_mask_is_told_which_frames_are_given() -> None:
    config = PredictConfig(
        latent_channels=4, width=32, blocks=1, heads=2, adaln_rank=8, condition_mask=True, attention="full"
    )
    model = PredictTransformer(config).eval()
    tiny_models.stir(model, 0)
    masks: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, options: masks.append(options["condition_mask"]), with_kwargs=True)
    checkpoint_config = PredictCheckpoint(height=32, width=32, model=config, sampler=SamplerConfig(steps=2))
    pipeline = PredictPipeline(model, tiny_models.tokenizer(), checkpoint_config)
    pipeline.generate_video(video(5), None, 13)
    assert len(masks) == 2
    assert masks[0].shape == (1, 1, 4, 4, 4)
    assert masks[0].mean(dim=(0, 1, 3, 4)).tolist() == [1, 1, 0, 0]


def test_actions_change_what_follows_and_not_what_came_before(pipeline: PredictPipeline) -> None:
    start, done = video(5), actions(12)
    other = done.clone()
    other[:, 8:] = other[:, 8:].roll(1, dims=-1)
    first, second = (pipeline.generate_video(start, a, 13, seed=1) for a in (done, other))
    assert torch.equal(first[:, :, :9], second[:, :, :9])
    assert not torch.allclose(first[:, :, 9:], second[:, :, 9:], atol=1e-3)


def test_guidance_one_is_off_and_others_are_not(pipeline: PredictPipeline) -> None:
    start, done = video(1), actions(4)
    results = {}
    for scale in (0.0, 1.0, 3.0):
        sampler = replace(pipeline.sampler, guidance_scale=scale)
        results[scale] = pipeline.generate_video(start, done, 5, sampler=sampler)
    null = pipeline.generate_video(start, None, 5)
    # v = uncond + 0 (cond - uncond)
    torch.testing.assert_close(results[0.0], null, rtol=0, atol=1e-5)
    assert not torch.allclose(results[1.0], results[3.0], atol=1e-3)
    assert not torch.allclose(results[1.0], null, atol=1e-3)


def test_progress_counts_steps_and_may_stop_the_work(pipeline: PredictPipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline.generate_video(video(5), None, 13, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]  # two latent frames of two steps

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        pipeline.generate_video(video(5), None, 13, progress=stop)


# -- actions by name -------------------------------------------------------------------------------------------------


def test_actions_are_aligned_by_name() -> None:
    given = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    aligned = align_actions(given, ("fire", "left"), ("left", "right", "fire"), 3)
    assert aligned.tolist() == [[[2.0, 0.0, 1.0], [4.0, 0.0, 3.0]]]
    assert align_actions(given, (), ("a", "b"), 2) is given
    assert align_actions(given, ("x", "y"), (), 2) is given


@pytest.mark.parametrize(
    ("names", "model_names", "dim", "what"),
    [
        (("jump", "left"), ("left", "right"), 2, "does not know these actions"),
        ((), ("left", "right", "fire"), 3, "another size"),
        (("left",), ("left", "right"), 2, "does not know these actions"),  # two columns, one name
        (("left", "right"), (), 0, "takes no actions"),
    ],
)
def test_actions_that_do_not_fit_are_refused(
    names: tuple[str, ...], model_names: tuple[str, ...], dim: int, what: str
) -> None:
    with pytest.raises(WorldloomError, match=what):
        align_actions(torch.zeros(1, 2, 2), names, model_names, dim)


# -- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("start")
    frames = tiny_models.moving_square(14, 5)
    media.write_image(root / "start.png", frames[0])
    media.write_video(root / "start.mp4", frames, 10.0)
    np.save(root / "actions.npy", actions(8)[0].numpy())
    (root / "names.json").write_text(json.dumps(["left", "fire"] * 4))
    (root / "some.csv").write_text("fire,left\n" + "1,0\n0,1\n" * 4)
    np.save(root / "wrong.npy", np.zeros((8, 5), np.float32))
    np.save(root / "nan.npy", np.full((8, DIM), np.nan, np.float32))
    np.save(root / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (root / "broken.json").write_text('[["a", 1], [2]]')
    (root / "nonsense.png").write_text("this is no image")
    return {path.name: str(path) for path in root.iterdir()}


def request(**given: object) -> GenerationRequest:
    return GenerationRequest("tiny", **given)  # pyright: ignore[reportArgumentType]


def test_a_request_is_completed_from_the_models_defaults(
    pipeline: PredictPipeline, start_files: dict[str, str]
) -> None:
    done = pipeline.complete(request(image=start_files["start.png"]))
    assert (done.frames, done.steps, done.guidance_scale, done.fps) == (17, 2, 1.0, 10.0)
    done = pipeline.complete(request(image=start_files["start.png"], actions=start_files["actions.npy"]))
    assert done.frames == 9
    assert pipeline.complete(request(image=start_files["start.png"], guidance_scale=0.0)).guidance_scale == 0
    made = pipeline.generate(request(image=start_files["start.png"], frames=5))
    assert made.shape == (1, 3, 5, 32, 32)


def test_a_video_is_continued_from_its_last_frames(pipeline: PredictPipeline, start_files: dict[str, str]) -> None:
    made = pipeline.generate(request(video=start_files["start.mp4"], frames=17))
    last = media.read_frames(start_files["start.mp4"])[-9:]  # context_frames of the sampler
    assert np.array_equal(media.to_frames(made)[0, :9], last)


def test_actions_for_the_new_frames_alone_are_enough(pipeline: PredictPipeline, start_files: dict[str, str]) -> None:
    made = pipeline.generate(request(video=start_files["start.mp4"], actions=start_files["actions.npy"], frames=17))
    padded = torch.cat([torch.zeros(1, 8, DIM), torch.from_numpy(np.load(start_files["actions.npy"]))[None]], dim=1)
    assert torch.equal(made, pipeline.generate_video(made[:, :, :9], padded, 17))


def test_action_files_of_every_kind_agree(pipeline: PredictPipeline, start_files: dict[str, str]) -> None:
    from worldloom_model_zoo.predict.inputs import read_actions

    named = read_actions(Path(start_files["names.json"]), pipeline.config)
    table = read_actions(Path(start_files["some.csv"]), pipeline.config)
    assert named.shape == table.shape == (1, 8, DIM)
    assert torch.equal(named, table.flip(1))  # the csv's columns are fire, left: rows alternate the other way round


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "a start is needed"),
        ({"image": "start.png", "video": "start.mp4"}, "a start is needed"),
        ({"image": "missing.png"}, "does not exist"),
        ({"image": "nonsense.png"}, "not an image"),
        ({"video": "nonsense.png"}, "not a video"),
        ({"image": "start.png", "prompt": "a cat"}, "takes no text"),
        ({"image": "start.png", "frames": 8}, "1 \\+ 4k"),
        ({"image": "start.png", "frames": 1}, "exceed the 1 given"),
        ({"video": "start.mp4", "frames": 9}, "exceed the 9 given"),
        ({"image": "start.png", "frames": 13, "actions": "actions.npy"}, "13 frames need 12 actions"),
        ({"image": "start.png", "actions": "wrong.npy"}, "another size"),
        ({"image": "start.png", "actions": "nan.npy"}, "finite"),
        ({"image": "start.png", "actions": "pickle.npy"}, "cannot be read"),
        ({"image": "start.png", "actions": "broken.json"}, "cannot be read"),
        ({"image": "start.png", "actions": "missing.npy"}, "no such file of actions"),
        ({"image": "start.png", "actions": "start.png"}, "read from .npy"),
        ({"image": "start.png", "steps": 0}, "steps >= 1"),
        ({"image": "start.png", "fps": 0.0}, "frame rate"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    pipeline: PredictPipeline, start_files: dict[str, str], given: dict[str, object], what: str
) -> None:
    files = {
        k: start_files.get(str(v), f"/nowhere/{v}") for k, v in given.items() if k in ("image", "video", "actions")
    }
    with pytest.raises(WorldloomError, match=what):
        pipeline.complete(request(**{**given, **files}))
    with pytest.raises(WorldloomError, match=what):
        pipeline.generate(request(**{**given, **files}))


def test_tensors_of_wrong_sizes_are_refused(pipeline: PredictPipeline) -> None:
    with pytest.raises(WorldloomError, match="actions do not fit"):
        pipeline.generate_video(video(5), torch.zeros(1, 12, DIM + 1), 13)
    with pytest.raises(WorldloomError, match=r"T = 1 \+ 4k"):
        pipeline.generate_video(video(4), None, 13)
    with pytest.raises(WorldloomError, match="multiples of 16"):
        pipeline.generate_video(video(5)[..., :30], None, 13)
    with pytest.raises(WorldloomError, match="multiple of 4 actions"):
        pipeline.rollout(actions(6))
    with pytest.raises(WorldloomError, match="no start yet"):
        pipeline.step(actions(4))


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(pipeline: PredictPipeline, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    checkpoint.save(pipeline.model, pipeline.config, copy, "# card\n", dtype=torch.float32)
    again = load_model(copy)
    assert again.config == pipeline.config
    start, done = video(5), actions(8)
    assert torch.equal(again.generate_video(start, done, 9), pipeline.generate_video(start, done, 9))
    assert again.ref.digest != ""
    with pytest.raises(WorldloomError, match="already exists"):
        checkpoint.save(pipeline.model, pipeline.config, copy, "# card\n")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny_models.tokenizer_folder(tmp_path / "other", seed=9)
    with pytest.raises(WorldloomError, match="another tokenizer"):
        load_model(folder, tokenizer=other)


def test_a_folder_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    text = (damaged / "config.toml").read_text()
    (damaged / "config.toml").write_text(text.replace("width = 32\nblocks", "width = 64\nblocks"))
    assert text != (damaged / "config.toml").read_text()
    with pytest.raises(WorldloomError, match="of another model"):
        load_model(damaged)
    (damaged / "config.toml").write_text(text)
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WorldloomError, match="cannot be read"):
        load_model(damaged)
    (damaged / "model.safetensors").unlink()
    (damaged / "model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read"):
        load_model(damaged)


@pytest.mark.parametrize("name", ["loom-world-nanno", "no/such/folder", "model-0123456789abcdef"])
def test_an_unknown_model_is_named(name: str) -> None:
    with pytest.raises(WorldloomError) as caught:
        load_model(name)
    assert name in str(caught.value)
    assert "loom-world-nano" in str(caught.value)


def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(WorldloomError, match="no such device"):
        load_model(folder, device="cuda:99")


def test_a_tokenizer_with_other_channels_is_refused() -> None:
    with pytest.raises(WorldloomError, match="do not fit the model"):
        PredictPipeline(
            PredictTransformer(PredictConfig(width=32, heads=2)), tiny_models.tokenizer(), PredictCheckpoint()
        )


# -- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(base: Path, path: Path, seed: int = 1) -> None:
    """A LoRA adapter of `base` with random weights, as training saves one."""
    import peft

    from worldloom import config as configs
    from worldloom.artifacts import file_digest

    pipeline = load_model(base)
    wrapped = peft.get_peft_model(
        pipeline.model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(str(path))
    adapter = checkpoint.PredictAdapter(str(base), file_digest(base / "model.safetensors"), pipeline.config)
    configs.save(adapter, path / "config.toml")


def test_an_adapter_changes_the_output_and_reloads_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "adapter")
    start, done = video(5), actions(8)
    base, first, again = (load_model(p) for p in (folder, tmp_path / "adapter", tmp_path / "adapter"))
    made = first.generate_video(start, done, 9)
    assert torch.equal(made, again.generate_video(start, done, 9))
    assert not torch.allclose(made, base.generate_video(start, done, 9), atol=1e-3)


def test_an_adapter_on_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    save_adapter(base, tmp_path / "adapter")
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(WorldloomError, match="trained on other base weights"):
        load_model(tmp_path / "adapter")
    shutil.rmtree(base)
    with pytest.raises(WorldloomError, match="has no weights"):
        load_model(tmp_path / "adapter")


def test_a_checkpoint_offers_what_it_can_do(pipeline: PredictPipeline) -> None:
    assert capabilities(pipeline) == ["Generates", "Steps"]
    tokenizer, config = pipeline.tokenizer, pipeline.config
    acting = PredictTransformer(replace(pipeline.model.config, action_head=True))
    assert capabilities(PredictPipeline(acting, tokenizer, config)) == ["Generates", "Steps", "InfersActions", "Acts"]
    whole = PredictTransformer(replace(pipeline.model.config, attention="full", window=0))
    assert capabilities(PredictPipeline(whole, tokenizer, config)) == ["Generates"]
