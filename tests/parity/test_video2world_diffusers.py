"""A video from a prefix and a text is what diffusers' pipeline for Cosmos-Predict2.5 makes: same weights and noise.

Tiny sizes, float32: autoencoder, network, UniPC schedule, guidance, conditioning frames and decoding together. Theirs
encodes the whole canvas, ours the given frames.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import scatter
from torch import Tensor

from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig, SamplerConfig
from worldloom_model_zoo.predict.keys import renaming
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline
from worldloom_tokenizers.layouts import from_released
from worldloom_tokenizers.wan import checkpoint as wan
from worldloom_tokenizers.wan.config import WanVAEConfig
from worldloom_tokenizers.wan.model import WanVAE

diffusers = pytest.importorskip("diffusers", reason="diffusers needs Python 3.11")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2

VAE = WanVAEConfig(
    encoder_width=8, decoder_width=8, latent_channels=4, mean=(0.1, -0.2, 0.0, 0.3), std=(1.2, 0.8, 1.0, 0.9)
)
NETWORK = PredictConfig(
    latent_channels=4, width=64, blocks=2, heads=2, adaln_rank=8, qk_eps=1e-5, rope_ratios=(1.0, 3.0, 3.0),
    timestep_scale=1.0, condition_mask=True, context_dim=16, attention="full",
)  # fmt: skip
SAMPLER = SamplerConfig(
    steps=5, method="unipc", shift=5.0, last_level=1e-3, guidance_scale=3.0, guidance_convention="conditional",
    condition_level=0.1, overlap_frames=1,
)  # fmt: skip
KARRAS = replace(SAMPLER, schedule="karras", sigma_min=0.01, sigma_max=200.0)


class NoGuardrail:
    """Stands where the pipeline wants its safety checker, which is a download."""

    def to(self, device: object) -> None:
        del device


def both(sampler: SamplerConfig) -> tuple[PredictPipeline, Any]:
    tokenizer, network = WanVAE(VAE).eval(), PredictTransformer(NETWORK).eval()
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, latents_mean=list(VAE.mean), latents_std=list(VAE.std)
    ).eval()
    scatter(vae, 0)
    from_released(tokenizer, wan.names(VAE), vae.state_dict(), "diffusers")
    scatter(network, 1)
    theirs = diffusers.CosmosTransformer3DModel(
        in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, text_embed_dim=16,
        adaln_lora_dim=8, max_size=(16, 16, 16), rope_scale=(1.0, 3.0, 3.0), concat_padding_mask=False,
        extra_pos_embed_type=None, encoder_hidden_states_channels=16,
    ).eval()  # fmt: skip
    names = renaming(network.state_dict(), "diffusers")
    theirs.load_state_dict({names[key]: value for key, value in network.state_dict().items()})
    options = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0} if sampler.schedule == "karras" else {}
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, flow_shift=5.0, **options
    )
    peer = diffusers.Cosmos2_5_PredictBasePipeline(None, None, theirs, vae, scheduler, NoGuardrail())
    peer.set_progress_bar_config(disable=True)
    config = PredictCheckpoint(height=32, width=48, model=NETWORK, sampler=sampler)
    return PredictPipeline(network, tokenizer, config), peer


def make_theirs(
    peer: Any, start: Tensor | None, context: Tensor | None, text: Tensor, negative: Tensor, known: int
) -> Tensor:
    noise = torch.randn(1, 4, 4 - known, 4, 6, generator=torch.Generator().manual_seed(3))
    if context is not None:
        # Theirs integrates given frames too, from their noise to themselves, and where a schedule starts below 1 it
        # misses them. Started from themselves they stay.
        noise = torch.cat([context, noise], dim=2)
    made = peer(
        video=start, prompt_embeds=text, negative_prompt_embeds=negative, height=32, width=48, num_frames=13,
        num_inference_steps=5, guidance_scale=3.0, latents=noise, num_latent_conditional_frames=known or 2,
        conditional_frame_timestep=0.1, output_type="pt",
    ).frames  # fmt: skip
    return made.transpose(1, 2) * 2 - 1  # (b, t, c, h, w) in [0, 1] -> (b, c, t, h, w) in [-1, 1]


@pytest.mark.parametrize(
    ("sampler", "known"),
    [(SAMPLER, 0), (SAMPLER, 1), (SAMPLER, 2), (KARRAS, 2), (replace(SAMPLER, guidance_batched=True), 2)],
)
def test_the_video_is_that_of_diffusers(sampler: SamplerConfig, known: int) -> None:
    ours, peer = both(sampler)
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(1, 3, 4 * known - 3, 32, 48, generator=generator) * 2 - 1 if known else None
    text, negative = torch.randn(2, 1, 7, 16, generator=generator).unbind()
    with torch.no_grad():
        made = ours.generate_video(start, None, 13, text=text, negative=negative, seed=3)
        context = ours.tokenizer.encode(start) if start is not None else None
        expected = make_theirs(peer, start, context, text, negative, known)
    given = start.shape[2] if start is not None else 0
    if start is not None:
        assert torch.equal(made[:, :, :given], start)
    assert expected[:, :, given:].std() > 0.1
    torch.testing.assert_close(made[:, :, given:], expected[:, :, given:], atol=5e-4, rtol=0)
    assert (made - expected)[:, :, given:].abs().mean() < 2e-5
