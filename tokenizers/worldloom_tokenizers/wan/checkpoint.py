"""Released layouts of the Wan autoencoders, as one table of names; read in Wan2.1 and Wan2.2 (``wan/modules/vae*.py``).

``native`` is what Wan and Cosmos publish (``tokenizer.pth``, ``Wan2.1_VAE.pth``), ``diffusers`` is AutoencoderKLWan's.
Both hold the same tensors under other names; the statistics of the latents are in code there, in buffers here.
"""

from __future__ import annotations

from worldloom_tokenizers.layouts import Layout, Names
from worldloom_tokenizers.wan.config import WanVAEConfig

LAYOUTS: tuple[Layout, ...] = ("native", "diffusers")


def names(config: WanVAEConfig) -> Names:
    """Our prefix -> (native, diffusers) prefixes of every module that has weights."""
    rows: Names = {}

    def put(ours: str, native: str, diffusers: str) -> None:
        rows[ours] = {"native": native, "diffusers": diffusers}

    def block(ours: str, native: str, diffusers: str, shortcut: bool) -> None:
        for name, number in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
            put(f"{ours}.{name}", f"{native}.residual.{number}", f"{diffusers}.{name}")
        if shortcut:
            put(f"{ours}.shortcut", f"{native}.shortcut", f"{diffusers}.conv_shortcut")

    def ends(side: str) -> None:
        put(f"{side}.conv_in", f"{side}.conv1", f"{side}.conv_in")
        put(f"{side}.norm_out", f"{side}.head.0", f"{side}.norm_out")
        put(f"{side}.conv_out", f"{side}.head.2", f"{side}.conv_out")
        for i in (1, 2):
            block(f"{side}.middle.block_{i}", f"{side}.middle.{2 * i - 2}", f"{side}.mid_block.resnets.{i - 1}", False)
        for part in ("norm", "to_qkv", "proj"):
            put(f"{side}.middle.attention.{part}", f"{side}.middle.1.{part}", f"{side}.mid_block.attentions.0.{part}")

    put("quant", "conv1", "quant_conv")
    put("post_quant", "conv2", "post_quant_conv")
    ends("encoder")
    ends("decoder")
    levels = len(config.multipliers)
    encoder = [config.encoder_width * m for m in (1, *config.multipliers)]
    decoder = [config.decoder_width * m for m in (config.multipliers[-1], *config.multipliers[::-1])]
    flat = {"down": 0, "up": 0}
    for i in range(levels):
        for side, way, count, widths, temporal in (
            ("encoder", "down", config.blocks, encoder, config.temporal),
            ("decoder", "up", config.blocks + 1, decoder, config.temporal[::-1]),
        ):
            entering = widths[i] // (2 if side == "decoder" and i > 0 and not config.residual else 1)
            for j in range(count + (i < levels - 1)):
                native = f"{side}.{way}samples." + (f"{i}.{way}samples.{j}" if config.residual else str(flat[way]))
                if config.residual or side == "decoder":
                    diffusers = f"{side}.{way}_blocks.{i}.resnets.{j}"
                else:
                    diffusers = f"{side}.{way}_blocks.{flat[way]}"
                flat[way] += 1
                if j < count:
                    block(f"{side}.stages.{i}.blocks.{j}", native, diffusers, j == 0 and entering != widths[i + 1])
                    continue
                if config.residual:
                    diffusers = f"{side}.{way}_blocks.{i}.{way}sampler"
                elif side == "decoder":
                    diffusers = f"{side}.{way}_blocks.{i}.upsamplers.0"
                put(f"{side}.stages.{i}.resample.conv", f"{native}.resample.1", f"{diffusers}.resample.1")
                if temporal[i]:
                    put(f"{side}.stages.{i}.resample.time_conv", f"{native}.time_conv", f"{diffusers}.time_conv")
    return rows


def unused(config: WanVAEConfig) -> dict[str, tuple[int, ...]]:
    """Native keys of weights that no network uses: none here."""
    return {}
