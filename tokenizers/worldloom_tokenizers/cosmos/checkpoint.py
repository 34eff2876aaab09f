"""Released layouts of Cosmos-Tokenizer, as one table of names; read in Cosmos-Tokenizer (``modules/layers*d.py``).

``native`` is NVIDIA's (``autoencoder.jit``, ``model.pt``), ``diffusers`` is AutoencoderKLCosmos's, which has the
continuous video tokenizers only. The native video networks also carry convolutions of ways that neither halve nor
double, which nothing uses: they are tolerated, named exactly, and written as zeros, so that the native code loads
what is written.
"""

from __future__ import annotations

from worldloom_tokenizers.codec import VideoCodec
from worldloom_tokenizers.cosmos.config import CosmosConfig
from worldloom_tokenizers.layouts import Layout, Names

LAYOUTS: tuple[Layout, ...] = ("native", "diffusers")


def build(config: CosmosConfig) -> VideoCodec:
    """The network of a configuration, with new weights."""
    if config.image:
        from worldloom_tokenizers.cosmos.image import CosmosImageTokenizer

        return CosmosImageTokenizer(config)
    from worldloom_tokenizers.cosmos.model import CosmosTokenizer

    return CosmosTokenizer(config)


def names(config: CosmosConfig) -> Names:
    """Our prefix -> (native, diffusers) prefixes of every module that has weights."""
    return _image_names(config) if config.image else _video_names(config)


def _video_names(config: CosmosConfig) -> Names:
    from worldloom_tokenizers.cosmos.model import down_plan, up_plan

    rows: Names = {}

    def put(ours: str, native: str, diffusers: str) -> None:
        rows[ours] = {"native": native} if config.levels else {"native": native, "diffusers": diffusers}

    def conv(ours: str, native: str, diffusers: str) -> None:
        put(f"{ours}.space", f"{native}.0.conv3d", f"{diffusers}.conv_s")
        put(f"{ours}.time", f"{native}.1.conv3d", f"{diffusers}.conv_t")

    def block(ours: str, native: str, diffusers: str, shortcut: bool = False) -> None:
        for i in (1, 2):
            put(f"{ours}.norm{i}", f"{native}.norm{i}.norm", f"{diffusers}.norm{i}.norm")
            conv(f"{ours}.conv{i}", f"{native}.conv{i}", f"{diffusers}.conv{i}")
        if shortcut:
            put(f"{ours}.shortcut", f"{native}.nin_shortcut.conv3d", f"{diffusers}.conv_shortcut")

    def attention(ours: str, native: str, diffusers: str) -> None:
        put(f"{ours}.norm", f"{native}.norm.norm", f"{diffusers}.norm.norm")
        for name in "qkv":
            put(f"{ours}.{name}", f"{native}.{name}.conv3d", f"{diffusers}.to_{name}")
        put(f"{ours}.out", f"{native}.proj_out.conv3d", f"{diffusers}.to_out.0")

    put("quant", "quant_conv.conv3d", "quant_conv")
    put("post_quant", "post_quant_conv.conv3d", "post_quant_conv")
    for side, way, multipliers, blocks, plan in (
        ("encoder", "down", (1, *config.multipliers), config.blocks, down_plan(config)),
        (
            "decoder", "up", (config.decoder_multipliers[-1], *config.decoder_multipliers[::-1]),
            config.blocks + 1, up_plan(config),
        ),
    ):  # fmt: skip
        for end in ("conv_in", "conv_out"):
            conv(f"{side}.{end}", f"{side}.{end}", f"{side}.{end}")
        put(f"{side}.norm_out", f"{side}.norm_out.norm", f"{side}.norm_out.norm")
        for i in (1, 2):
            block(f"{side}.middle.block_{i}", f"{side}.mid.block_{i}", f"{side}.mid_block.resnets.{i - 1}")
        attention(f"{side}.middle.space", f"{side}.mid.attn_1.0", f"{side}.mid_block.attentions.0")
        attention(f"{side}.middle.time", f"{side}.mid.attn_1.1", f"{side}.mid_block.temp_attentions.0")
        stages = len(multipliers) - 1
        for i in range(stages):
            native = f"{side}.{way}.{i if way == 'down' else stages - 1 - i}"
            diffusers = f"{side}.{way}_blocks.{i}"
            for j in range(blocks):
                shortcut = j == 0 and multipliers[i] != multipliers[i + 1]
                block(f"{side}.stages.{i}.blocks.{j}", f"{native}.block.{j}", f"{diffusers}.resnets.{j}", shortcut)
            if i < len(plan):
                for number in _used(way, *plan[i]):
                    put(
                        f"{side}.stages.{i}.resample.conv{number}",
                        f"{native}.{way}sample.conv{number}.conv3d",
                        f"{diffusers}.{way}samplers.0.conv{number}",
                    )
    return rows


def _used(way: str, space: bool, time: bool) -> list[int]:
    """Which of its three convolutions a way between resolutions uses; the encoder halves space first."""
    in_space, in_time = (1, 2) if way == "down" else (2, 1)
    return sorted([*([in_space] if space else []), *([in_time] if time else []), *([3] if space or time else [])])


def unused(config: CosmosConfig) -> dict[str, tuple[int, ...]]:
    """Native keys of weights that no network uses, with their shapes."""
    if config.image:
        return {}
    from worldloom_tokenizers.cosmos.model import down_plan, up_plan

    found: dict[str, tuple[int, ...]] = {}
    kernels = {"down": ((1, 3, 3), (3, 1, 1), (1, 1, 1)), "up": ((3, 1, 1), (1, 3, 3), (1, 1, 1))}
    for side, way, multipliers, plan in (
        ("encoder", "down", config.multipliers, down_plan(config)),
        ("decoder", "up", config.decoder_multipliers[::-1], up_plan(config)),
    ):
        for i, (space, time) in enumerate(plan):
            native = f"{side}.{way}.{i if way == 'down' else len(multipliers) - 1 - i}.{way}sample"
            c = config.width * multipliers[i]
            for number in {1, 2, 3} - set(_used(way, space, time)):
                found[f"{native}.conv{number}.conv3d.weight"] = (c, c, *kernels[way][number - 1])
                found[f"{native}.conv{number}.conv3d.bias"] = (c,)
    return found


def _image_names(config: CosmosConfig) -> Names:
    rows: Names = {}

    def put(ours: str, native: str) -> None:
        rows[ours] = {"native": native}

    def block(ours: str, native: str, shortcut: bool = False) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{ours}.{name}", f"{native}.{name}")
        if shortcut:
            put(f"{ours}.shortcut", f"{native}.nin_shortcut")

    put("quant", "quant_conv")
    put("post_quant", "post_quant_conv")
    halvings = (config.spatial_ratio // config.patch).bit_length() - 1
    for side, way, multipliers, blocks in (
        ("encoder", "down", (1, *config.multipliers), config.blocks),
        ("decoder", "up", (config.decoder_multipliers[-1], *config.decoder_multipliers[::-1]), config.blocks + 1),
    ):
        for end in ("conv_in", "norm_out", "conv_out"):
            put(f"{side}.{end}", f"{side}.{end}")
        for i in (1, 2):
            block(f"{side}.middle.block_{i}", f"{side}.mid.block_{i}")
        for ours, native in (("norm", "norm"), ("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
            put(f"{side}.middle.attention.{ours}", f"{side}.mid.attn_1.{native}")
        stages = len(multipliers) - 1
        for i in range(stages):
            native = f"{side}.{way}.{i if way == 'down' else stages - 1 - i}"
            for j in range(blocks):
                shortcut = j == 0 and multipliers[i] != multipliers[i + 1]
                block(f"{side}.stages.{i}.blocks.{j}", f"{native}.block.{j}", shortcut)
            if i < halvings:
                put(f"{side}.stages.{i}.resample", f"{native}.{way}sample.conv")
    return rows
