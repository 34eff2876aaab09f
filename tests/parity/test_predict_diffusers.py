"""The predict transformer is Cosmos-Predict2.5's network: same weights, same output as diffusers' implementation."""

import re

import pytest
import torch

from worldloom_model_zoo.predict.config import PredictConfig
from worldloom_model_zoo.predict.model import PredictTransformer

RENAMES = (
    (r"^patch_in\.", "patch_embed.proj."),
    (r"^time_embedder\.", "time_embed.t_embedder."),
    (r"^time_norm\.", "time_embed.norm."),
    (r"^text_proj\.", "crossattn_proj.0."),
    (r"^final_modulation\.down\.", "norm_out.linear_1."),
    (r"^final_modulation\.up\.", "norm_out.linear_2."),
    (r"^patch_out\.", "proj_out."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.modulate_self\.down", ".norm1.linear_1"),
    (r"\.modulate_self\.up", ".norm1.linear_2"),
    (r"\.modulate_cross\.down", ".norm2.linear_1"),
    (r"\.modulate_cross\.up", ".norm2.linear_2"),
    (r"\.modulate_mlp\.down", ".norm3.linear_1"),
    (r"\.modulate_mlp\.up", ".norm3.linear_2"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])_proj\.", r".to_\1."),
    (r"\.output_proj\.", ".to_out.0."),
    (r"\.([qk])_norm\.", r".norm_\1."),
    (r"\.mlp\.layer1\.", ".ff.net.0.proj."),
    (r"\.mlp\.layer2\.", ".ff.net.2."),
)


def to_diffusers(key: str) -> str:
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize("text_dim", [0, 24])
@pytest.mark.parametrize("per_frame", [False, True])
def test_velocity_and_gradient_equal_diffusers(text_dim: int, per_frame: bool) -> None:
    from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel

    torch.manual_seed(0)
    config = PredictConfig(
        latent_channels=4,
        width=64,
        blocks=2,
        heads=2,
        adaln_rank=8,
        qk_eps=1e-5,  # what diffusers uses
        rope_ratios=(1.0, 3.0, 3.0),
        timestep_scale=1.0,
        condition_mask=True,
        context_dim=16,
        text_dim=text_dim,
        attention="full",
    )
    ours = PredictTransformer(config)
    theirs = CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        mlp_ratio=4.0,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(16, 16, 16),
        patch_size=(1, 2, 2),
        rope_scale=(1.0, 3.0, 3.0),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
        use_crossattn_projection=bool(text_dim),
        crossattn_proj_in_channels=text_dim or 1024,
        encoder_hidden_states_channels=16,
    )
    with torch.no_grad():
        for parameter in ours.parameters():  # nothing may stay at its zero or one initialisation
            parameter.normal_(std=0.2)
    theirs.load_state_dict({to_diffusers(key): value for key, value in ours.state_dict().items()})
    ours.double()
    theirs.double()

    x = torch.randn(2, 4, 3, 4, 6, dtype=torch.float64)
    mask = torch.randint(0, 2, (2, 1, 3, 4, 6)).double()
    text = torch.randn(2, 5, text_dim or 16, dtype=torch.float64)
    level = torch.rand(2, 3) if per_frame else torch.rand(2, 1).expand(2, 3)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    velocity = ours(x_ours, level, text=text, condition_mask=mask)
    timestep = level[:, None, :, None, None] if per_frame else level[:, 0]
    expected = theirs(x_theirs, timestep, text, condition_mask=mask, return_dict=False)[0]

    # diffusers computes rotary angles, and the sinusoid of the timestep, in float32, as we do.
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-6)
    velocity.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-5)
