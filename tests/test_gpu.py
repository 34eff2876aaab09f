"""On a GPU: the same numbers as on the CPU, streams equal to the whole, training in bfloat16 with compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import Tensor

from worldloom.schema import LatentBatch
from worldloom_finetune.distillation import world_loss
from worldloom_finetune.noise import normal
from worldloom_finetune.objectives import ObjectiveConfig
from worldloom_model_zoo import load_model
from worldloom_model_zoo.predict.config import PredictConfig
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.codec import VideoCodec
from worldloom_tokenizers.cosmos.config import cv
from worldloom_tokenizers.cosmos.model import CosmosTokenizer
from worldloom_tokenizers.wan.config import WanVAEConfig
from worldloom_tokenizers.wan.model import WanVAE

pytestmark = pytest.mark.gpu
MODEL = PredictConfig(width=64, blocks=3, heads=2, adaln_rank=8, action_dim=3, window=3, previous_frame=True)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions and products in float32, not in TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def codec(name: str) -> VideoCodec:
    if name == "loom-cv-nano":
        return load_tokenizer(name)
    if name == "wan":
        model: VideoCodec = WanVAE(
            WanVAEConfig(encoder_width=16, decoder_width=16, latent_channels=4, mean=(0.1,) * 4, std=(2.0,) * 4)
        )
    else:
        model = CosmosTokenizer(replace(cv(4, 8), width=32, z_channels=6, latent_channels=6))
    tiny_models.scatter(model, 0)
    return model.eval()


def close(made: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """By the norm of the difference over that of what is wanted."""
    difference = (made.cpu().double() - wanted.double()).norm() / wanted.double().norm()
    return bool(difference < tolerance)


@pytest.mark.parametrize("name", ["loom-cv-nano", "wan", "cosmos"])
@torch.no_grad()
def test_tokenizers(name: str) -> None:
    model = codec(name)
    video = torch.rand(2, 3, 17, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode(video)
    pixels = model.decode(latents)
    model = model.cuda()
    there = model.encode(video.cuda())
    assert close(there, latents, 1e-3)
    assert close(model.decode(latents.cuda()), pixels, 1e-3)
    assert (model.encode(video.cuda(), chunk=1) - there).abs().max() < 1e-4 * there.abs().max()


@torch.no_grad()
def test_the_world_model_makes_the_same_video() -> None:
    clip = torch.rand(2, 3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    actions = torch.eye(6)[torch.randint(6, (2, 24), generator=torch.Generator().manual_seed(2))]
    made = [load_model("loom-world-nano", device).generate_video(clip.to(device), actions.to(device), 25).cpu()
            for device in ("cpu", "cuda")]  # fmt: skip
    assert close(made[1], made[0], 1e-2)


def batch(device: str) -> LatentBatch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(8, 16, 5, 4, 4, generator=generator)
    return LatentBatch(latents, torch.randn(8, 16, 3, generator=generator)).to(device, torch.float32)


@torch.no_grad()
def test_one_call_with_a_context() -> None:
    model = PredictTransformer(MODEL)
    tiny_models.scatter(model, 0)
    data = batch("cpu")
    level = torch.rand(8, 5, generator=torch.Generator().manual_seed(4))
    wanted = model(data.latents, level, data.actions, context=data.latents, context_timestep=0.1 * level)
    there = [x.cuda() for x in (data.latents, level, data.actions)]
    made = model.cuda()(*there, context=there[0], context_timestep=0.1 * there[1])
    assert close(made, wanted, 1e-4)


def test_noise_is_a_function_of_the_seed_and_normal() -> None:
    like = torch.zeros(1, device="cuda")
    first, again, other = (normal((512, 512), like, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.device.type == "cuda"
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < 0.01
    assert abs(float(first.mean())) < 0.01
    assert float(first.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.filterwarnings("ignore")  # torch warns itself of much while it compiles
@pytest.mark.parametrize("kind", ["flow", "distill"])
def test_gradients_of_compiled_blocks_in_bfloat16(kind: str) -> None:
    config = ObjectiveConfig(kind=kind, context="teacher_forcing", steps=2, teacher_substeps=2, teacher_guidance=1.5)
    teacher = PredictTransformer(MODEL).cuda()
    tiny_models.scatter(teacher, 1)
    gradients = []
    for compiled in (False, True):
        model = PredictTransformer(MODEL).cuda()
        tiny_models.scatter(model, 0)
        if compiled:
            for block in model.blocks:
                block.compile()
        with torch.autocast("cuda", torch.bfloat16, enabled=compiled):
            loss, _ = world_loss(
                model,
                batch("cuda"),
                config,
                torch.Generator().manual_seed(0),
                None,
                teacher if kind == "distill" else None,
            )
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu())
    assert close(gradients[1], gradients[0], 0.05)
