"""Cosmos 3 behind Loom's protocols: diffusers' own pipeline, tiny and random, asked for each of its modes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from worldloom import media
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.protocols import Acts, Generates, InfersActions
from worldloom.schema import GenerationRequest
from worldloom_model_zoo.predict.cosmos3 import Cosmos3Checkpoint, Cosmos3Pipeline

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

CONFIG = Cosmos3Checkpoint(
    source="", height=32, width=48, frames=5, steps=2, domain="pusht", resolution_tier=256, guard=False
)


def published(action_gen: bool = True) -> Any:
    """A Cosmos3OmniPipeline of random weights, with every component that makes video and actions."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", "<|im_end|>", "<|vision_start|>", "push", "the", "block"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|vision_start|>"],
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    )
    network = Cosmos3OmniTransformer(
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        latent_channel=4,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=1,
        patch_latent_dim=16,
        action_dim=12 if action_gen else None,
        action_gen=action_gen,
        vocab_size=16,
        rope_scaling={"mrope_section": [4, 2, 2]},
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return Cosmos3OmniPipeline(network, text, vae, scheduler, enable_safety_checker=False)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return published()


@pytest.fixture
def model(pipeline: Any) -> Cosmos3Pipeline:
    return Cosmos3Pipeline(pipeline, CONFIG)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (7, 64, 64, 3), dtype=np.uint8)
    media.write_image(tmp_path / "start.png", frames[0])
    media.write_video(tmp_path / "start.mp4", frames, fps=8)
    np.save(tmp_path / "actions.npy", rng.normal(size=(4, 2)).astype(np.float32))
    return tmp_path


def request(**given: Any) -> GenerationRequest:
    return GenerationRequest("cosmos3", **given)


def test_it_generates_infers_actions_and_acts(model: Cosmos3Pipeline) -> None:
    assert isinstance(model, Generates)
    assert isinstance(model, InfersActions)
    assert isinstance(model, Acts)
    assert model.action_dim == 2


def test_text_becomes_the_video_that_diffusers_makes(model: Cosmos3Pipeline, pipeline: Any) -> None:
    ticks: list[tuple[int, int]] = []
    video = model.generate(
        request(prompt="push the block", seed=3, negative_prompt="the"), lambda *tick: ticks.append(tick)
    )
    theirs = pipeline(
        "push the block",
        negative_prompt="the",
        num_frames=5,
        height=32,
        width=48,
        fps=24.0,
        num_inference_steps=2,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).video
    torch.testing.assert_close(video[0], theirs.permute(1, 0, 2, 3) * 2 - 1, atol=0, rtol=0)
    assert video.shape == (1, 3, 5, 32, 48)
    assert video.std() > 1e-3
    assert ticks == [(1, 2), (2, 2)]
    other = model.generate(request(prompt="push the block", seed=4, negative_prompt="the"))
    assert (other - video).abs().max() > 1e-3


def test_an_image_and_a_video_change_what_is_made(model: Cosmos3Pipeline, files: Path) -> None:
    made = [
        model.generate(request(prompt="push", image=str(files / "start.png"))),
        model.generate(request(prompt="push", video=str(files / "start.mp4"), frames=9)),
        model.generate(request(prompt="push")),
    ]
    assert [tuple(video.shape) for video in made] == [(1, 3, 5, 32, 48), (1, 3, 9, 32, 48), (1, 3, 5, 32, 48)]
    assert (made[0] - made[2]).abs().max() > 1e-3


def test_actions_are_forward_dynamics(model: Cosmos3Pipeline, files: Path) -> None:
    given = request(prompt="push", image=str(files / "start.png"), actions=str(files / "actions.npy"))
    assert model.complete(given).frames == 5
    video = model.generate(given)
    assert video.shape == (1, 3, 5, 64, 64)
    np.save(files / "others.npy", np.ones((4, 2), dtype=np.float32))
    other = model.generate(replace(given, actions=str(files / "others.npy")))
    assert (video - other).abs().max() > 1e-5


def test_inverse_dynamics_and_policy_give_actions(model: Cosmos3Pipeline, pipeline: Any) -> None:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
    from PIL import Image

    frames = np.random.default_rng(1).integers(0, 255, (2, 5, 64, 64, 3), dtype=np.uint8)
    video = media.to_tensor(frames)
    found = model.infer_actions(video, seed=5)
    assert found.shape == (2, 4, 2)
    condition = CosmosActionCondition(
        "inverse_dynamics", 4, "pusht", 256, video=[Image.fromarray(frame) for frame in frames[1]]
    )
    theirs = pipeline(
        "", action=condition, num_inference_steps=2, generator=torch.Generator().manual_seed(6), output_type="pt"
    )
    torch.testing.assert_close(found[1], theirs.action[0].float(), atol=0, rtol=0)

    actions, whole = model.act(video[:, :, :2], "push the block", 8)
    assert actions.shape == (2, 8, 2)
    assert whole.shape == (2, 3, 10, 64, 64)
    torch.testing.assert_close(whole[:, :, :2], video[:, :, :2])


def test_what_cosmos_3_does_not_heed_is_refused(model: Cosmos3Pipeline, files: Path) -> None:
    image, actions = str(files / "start.png"), str(files / "actions.npy")
    for given, message in (
        ({}, "nothing to start from"),
        ({"prompt": "x", "shift": 3.0}, "shift from the scheduler"),
        ({"prompt": "x", "image": image, "video": str(files / "start.mp4")}, "one of them"),
        ({"prompt": "x", "height": 40}, "multiples of 16"),
        ({"prompt": "x", "frames": 6}, "1 \\+ 4k"),
        ({"prompt": "x", "video": str(files / "start.mp4"), "frames": 5}, "exceed the 5 given"),
        ({"prompt": "x", "actions": actions}, "actions need a frame"),
        ({"image": image, "actions": actions, "height": 64}, "the size of the start"),
        ({"image": image, "actions": actions, "frames": 9}, "need 8 actions"),
    ):
        for ask in (model.complete, model.generate):
            with pytest.raises(WorldloomError, match=message):
                ask(request(**given))
    np.save(files / "three.npy", np.zeros((3, 2), dtype=np.float32))
    with pytest.raises(WorldloomError, match="multiple of 4 actions"):
        model.complete(request(image=image, actions=str(files / "three.npy")))
    np.save(files / "wide.npy", np.zeros((4, 5), dtype=np.float32))
    with pytest.raises(WorldloomError, match="another size than the model's"):
        model.complete(request(image=image, actions=str(files / "wide.npy")))
    with pytest.raises(WorldloomError, match="another size than its start"):
        model.act(torch.zeros(1, 3, 1, 72, 72), "push", 4)
    with pytest.raises(WorldloomError, match="no actions of that embodiment"):
        Cosmos3Pipeline(model.pipeline, replace(CONFIG, domain="car")).infer_actions(torch.zeros(1, 3, 5, 32, 32))
    plain = Cosmos3Pipeline(published(action_gen=False), CONFIG)
    with pytest.raises(WorldloomError, match="not trained with actions"):
        plain.infer_actions(torch.zeros(1, 3, 5, 32, 32))


def test_a_published_folder_is_imported_and_loaded(pipeline: Any, model: Cosmos3Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "published")
    words = ["models", "import", str(tmp_path / "published"), "--family", "cosmos3", "--variant", "pusht"]
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    config = (tmp_path / "ours" / "config.toml").read_text()
    config = config.replace("height = 720", "height = 32").replace("width = 1280", "width = 48")
    config = config.replace("frames = 189", "frames = 5").replace("steps = 35", "steps = 2")
    (tmp_path / "ours" / "config.toml").write_text(config)
    if not _guardrail():
        with pytest.raises(WorldloomError, match="not installed") as caught:
            load_model(tmp_path / "ours")
        assert "guard = false" in str(caught.value)
    (tmp_path / "ours" / "config.toml").write_text(config.replace("guard = true", "guard = false"))
    again = load_model(tmp_path / "ours")
    assert again.config.domain == "pusht"
    torch.testing.assert_close(
        again.generate(request(prompt="push", seed=1)), model.generate(request(prompt="push", seed=1))
    )
    facts = json.loads(json.dumps(again.provenance()))
    assert facts["guard"] == "none inside the pipeline"
    assert facts["model"]["kind"] == "cosmos3"
    with pytest.raises(WorldloomError, match="brings its own tokenizer"):
        load_model(tmp_path / "ours", tokenizer="loom-cv-nano")


def _guardrail() -> bool:
    from diffusers.utils import is_cosmos_guardrail_available

    return is_cosmos_guardrail_available()


def test_folders_that_are_not_cosmos_3_are_refused(tmp_path: Path) -> None:
    from worldloom_model_zoo.predict.cosmos3 import import_folder

    with pytest.raises(WorldloomError, match="not a published pipeline"):
        import_folder(tmp_path, tmp_path / "out")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(WorldloomError, match="another pipeline"):
        import_folder(tmp_path, tmp_path / "out")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos3OmniPipeline"}))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.bin").write_bytes(b"x")
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read"):
        import_folder(tmp_path, tmp_path / "out")
    with pytest.raises(WorldloomError, match="set by the embodiment"):
        import_folder(tmp_path, tmp_path / "out", action_dim=3)
