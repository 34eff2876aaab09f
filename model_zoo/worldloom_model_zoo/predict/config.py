"""Configurations of the predict family: plain data, no torch import.

Sources: Cosmos-Predict2.5 (NVIDIA 2025) for the network; diffusion forcing (Chen et al. 2024) for per-frame noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from worldloom.errors import WorldloomError


@dataclass(frozen=True)
class PredictConfig:
    """The diffusion transformer. The defaults are the small model of ours; `cosmos_predict25_2b` gives NVIDIA's."""

    latent_channels: int = 16
    """Channels of the latents it denoises."""
    width: int = 256
    """Size of a token."""
    blocks: int = 8
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; width / heads is a multiple of 2 and at least 8."""
    mlp_ratio: float = 4.0
    """Hidden size of the MLP over width."""
    patch: int = 2
    """Latent pixels along the edge of a token."""
    adaln_rank: int = 64
    """Rank of the modulation of each sublayer (AdaLN-LoRA)."""
    qk_eps: float = 1e-6
    """Epsilon of the query and key norm; diffusers uses 1e-5."""
    rope_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """NTK extrapolation of the rotary embedding along time, height and width."""
    base_fps: float = 0.0
    """Frame positions are multiplied by base_fps over the video's rate (Cosmos 1: 24); 0 for plain frame numbers."""
    learned_positions: tuple[int, int, int] = (0, 0, 0)
    """Latent frames, rows and columns of tokens that have a learned position besides the rotary one (Cosmos 1:
    128, 120, 120); zeros for none."""
    timestep_scale: float = 1000.0
    """The noise level in [0, 1] is multiplied by this before its sinusoidal embedding; Cosmos 2.5 uses 1."""
    condition_mask: bool = False
    """Concatenate a channel that marks conditioning frames (Cosmos)."""
    padding_mask: bool = False
    """Concatenate a channel that marks padded pixels (Cosmos)."""
    previous_frame: bool = False
    """Concatenate each frame's predecessor to its latents, so that copying what does not change is linear."""
    context_dim: int = 0
    """Size of a text token in cross-attention; 0 leaves cross-attention out."""
    text_dim: int = 0
    """Size of the text encoder's output, projected to context_dim; 0 where it has that size already."""
    action_dim: int = 0
    """Size of an action; 0 for a model without actions."""
    actions_per_latent: int = 4
    """Actions between two latent frames: the tokenizer's temporal ratio."""
    action_hidden: int = 256
    """Hidden size of the two action MLPs."""
    action_layout: Literal["frame", "cosmos-frame", "cosmos-chunk"] = "frame"
    """How actions enter. ``frame``: per latent frame, after the norm of the timestep. The others are those of Cosmos,
    before the norm and with GELU: per latent frame, none at conditioning frames; or a whole chunk at once."""
    action_chunk: int = 12
    """Actions of a chunk in the layout ``cosmos-chunk``."""
    action_head: bool = False
    """Actions have a noise level of their own and are predicted too: forward dynamics, inverse dynamics and policy in
    one network (Zhu et al. 2025)."""
    step_size: bool = False
    """The network is told how far a sampler's step goes: a shortcut model (Frans et al. 2024)."""
    attention: Literal["full", "causal"] = "causal"
    """``full``: every frame sees every frame. ``causal``: it sees itself and earlier ones, so it can be stepped."""
    window: int = 0
    """Latent frames that a frame sees in causal attention, itself included; 0 for all."""
    sink: int = 0
    """Latent frames at the beginning that every frame sees besides its window (Xiao et al. 2024)."""
    views: int = 0
    """Cameras that have a learned embedding: their videos follow one another along time, each with its own text; 0 for
    a model of one view."""
    view_dim: int = 7
    """Channels of a view's embedding, concatenated to the latents."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2 or self.width // self.heads < 8:
            raise WorldloomError(
                "width / heads must be an even number of at least 8", got=f"width {self.width}, heads {self.heads}"
            )
        if self.width % 2 or min(self.blocks, self.patch, self.adaln_rank, self.latent_channels) < 1:
            raise WorldloomError("width, blocks, patch, adaln_rank and latent_channels must be positive", got=self)
        if self.text_dim and not self.context_dim:
            raise WorldloomError("text_dim needs context_dim", got=self.text_dim, do="set context_dim, e.g. 1024")
        if self.window < 0 or (self.window and self.attention == "full"):
            raise WorldloomError("window is for causal attention and not negative", got=self.window)
        if self.sink < 0 or (self.sink and not self.window):
            raise WorldloomError("sink goes with a window and is not negative", got=self.sink, do="set window")
        if self.action_head and not self.action_dim:
            raise WorldloomError("action_head needs actions", got="action_dim 0", do="set action_dim")
        if self.action_head and self.action_layout != "frame":
            raise WorldloomError("action_head goes with the action layout frame", got=self.action_layout)
        if self.action_layout == "cosmos-chunk" and self.attention != "full":
            raise WorldloomError("a chunk of actions reaches every frame at once", do="set attention = 'full'")
        if min(self.learned_positions) < 0 or any(self.learned_positions) != all(self.learned_positions):
            raise WorldloomError("learned_positions are three sizes, or three zeros", got=self.learned_positions)
        if self.views and (self.attention != "full" or any(self.learned_positions) or self.action_dim):
            raise WorldloomError(
                "several views go with full attention, without learned positions and without actions", got=self
            )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are drawn. Rectified flow: x_s = (1-s) clean + s noise, velocity = noise - clean."""

    steps: int = 4
    """Steps from noise to a clean frame; calls of the network, of which ``heun`` makes two a step."""
    method: Literal["euler", "heun", "ab2", "unipc", "shortcut", "consistency", "edm_euler", "edm_heun"] = "euler"
    """``euler``, ``heun``, ``ab2`` (two-step Adams-Bashforth, Predict2's), ``unipc`` (order 2): integrate the flow.
    ``shortcut``: the network is told its step, for models with step_size. ``consistency``: jumps to clean and adds
    fresh noise, for distilled models. ``edm_euler`` and ``edm_heun``: for models trained under EDM (Karras et al.
    2022)."""
    schedule: Literal["uniform", "karras"] = "uniform"
    """``uniform``: evenly from first_level to last_level, shifted. ``karras``: sigma_max to sigma_min after Karras et
    al. 2022, s = sigma / (1 + sigma). Either ends at 0."""
    shift: float = 1.0
    """Timestep shift s -> shift s / (1 + (shift-1) s); above 1 spends more steps at high noise (Esser et al. 2024)."""
    first_level: float = 1.0
    """Noise level at which a uniform schedule begins; 0.999 in Wan's and Cosmos 2.5's own code."""
    last_level: float = 0.0
    """Noise level towards which a uniform schedule falls, itself left out; 0.001 in diffusers' UniPC."""
    sigma_min: float = 0.01
    """Least sigma of a Karras schedule; 0.01 for Cosmos 2.5 post-trained, 0.002 for Predict2."""
    sigma_max: float = 200.0
    """Greatest sigma of a Karras schedule; 200 for Cosmos 2.5 post-trained, 80 for Predict2 and Cosmos 1."""
    sigma_data: float = 0.5
    """Standard deviation of the latents that an EDM model was trained with: 0.5 for Cosmos 1, about 1 for ours."""
    round_levels: bool = False
    """Show the network noise levels cut to whole thousandths, as NVIDIA's code does for Cosmos 2.5."""
    guidance_scale: float = 1.0
    """Strength g of guidance on actions and text; 1 switches it off (0 in the convention ``conditional``)."""
    guidance_convention: Literal["unconditional", "conditional"] = "unconditional"
    """``unconditional``: v = uncond + g (cond - uncond). ``conditional``: v = cond + g (cond - uncond), as in Cosmos,
    whose 7 is 8 in the other one."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels, both included, at which guidance acts (Kynkaanniemi et al. 2024); outside one call is saved."""
    guidance_batched: bool = False
    """Both predictions of guidance in one call of twice the batch, where a GPU has room; else one after the other."""
    negative_prompt: str = ""
    """Text of the other prediction; empty for the null text."""
    condition_level: float | None = 0.0
    """Noise level that the network is told for given frames, which stay clean (Predict2: 0.0001). Unset, with full
    attention: that of the frames being made (Predict2.5, pre-trained)."""
    context_noise: float = 0.0
    """Noise level at which context frames are shown to the model; a little counters drift."""
    context_frames: int = 9
    """Video frames that a rollout starts from when it is given more."""
    chunk_frames: int = 0
    """Longest video made at once with full attention, 1 + r k; a longer one is made in chunks. 0: no limit."""
    overlap_frames: int = 1
    """Last frames of a chunk from which the next one is continued, 1 + r k."""
    rolling_delay: int = 0
    """With causal attention: steps after which the next frame starts, while this one is still noisy (rolling
    diffusion, Ruhe et al. 2024), for models trained with a noise level of its own for each frame. 0: one by one."""
    skip_threshold: float = 0.0
    """Change of the first block's contribution, relative, up to which the others' is reused from an earlier step; 0
    computes every step whole. Start at 0.2."""

    def __post_init__(self) -> None:
        told = self.condition_level or 0.0
        if self.steps < 1 or self.shift <= 0 or not 0 <= self.context_noise < 1 or not 0 <= told < 1:
            raise WorldloomError(
                "sampler: steps >= 1, shift > 0, 0 <= context_noise < 1, 0 <= condition_level < 1", got=self
            )
        if not 0 <= self.last_level < self.first_level <= 1 or not 0 < self.sigma_min < self.sigma_max:
            raise WorldloomError(
                "sampler: 0 <= last_level < first_level <= 1, 0 < sigma_min < sigma_max",
                got=f"levels {self.first_level} to {self.last_level}, sigmas {self.sigma_max} to {self.sigma_min}",
            )
        if self.skip_threshold < 0 or self.rolling_delay < 0 or self.context_frames < 1:
            raise WorldloomError("sampler: skip_threshold, rolling_delay >= 0, context_frames >= 1", got=self)
        if self.overlap_frames < 1 or 0 < self.chunk_frames <= self.overlap_frames:
            raise WorldloomError(
                "sampler: 1 <= overlap_frames < chunk_frames, where chunk_frames is set",
                got=f"overlap_frames {self.overlap_frames}, chunk_frames {self.chunk_frames}",
            )
        if self.edm and self.schedule != "karras":
            raise WorldloomError("EDM samplers go with the schedule karras", got=self.schedule)
        if self.rolling_delay and self.method != "euler":
            raise WorldloomError("rolling_delay goes with the method euler", got=self.method)

    @property
    def guided(self) -> bool:
        """Whether guidance changes anything."""
        return self.guidance_scale != (1 if self.guidance_convention == "unconditional" else 0)

    @property
    def edm(self) -> bool:
        """Whether the network was trained under EDM."""
        return self.method.startswith("edm")

    @property
    def calls(self) -> int:
        """Calls of the network for a sample, guidance apart."""
        return 2 * self.steps - 1 if self.method in ("heun", "edm_heun") else self.steps


@dataclass(frozen=True)
class TokenizerRef:
    """Which tokenizer made the latents a model was trained on."""

    name: str = "loom-cv-nano"
    """Catalog name or folder."""
    fingerprint: str = ""
    """Its fingerprint; a checkpoint refuses another one. Empty: not checked."""


@dataclass(frozen=True)
class TextEncoderRef:
    """Which text encoder a model was trained with."""

    name: str = ""
    """Its name; empty for a model without text."""
    fingerprint: str = ""
    """Its fingerprint; another one is refused. Empty: not checked."""
    tokens: int = 24
    """Length to which texts are cut or filled up."""


@dataclass(frozen=True)
class PredictCheckpoint:
    """``config.toml`` of a checkpoint folder of this family."""

    family: str = "predict"
    """The catalog's name of the family."""
    height: int = 64
    """Pixels; the size it was trained at."""
    width: int = 64
    """Pixels."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Further sizes (height, width) that it was trained at."""
    fps: float = 17.5
    """Frames per second of the training videos."""
    action_names: tuple[str, ...] = ()
    """What each component of an action means, where that is known."""
    model: PredictConfig = field(default_factory=PredictConfig)
    """The network."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The default sampler."""
    tokenizer: TokenizerRef = field(default_factory=TokenizerRef)
    """The tokenizer it works with."""
    text: TextEncoderRef = field(default_factory=TextEncoderRef)
    """The text encoder it works with."""


def nano(action_dim: int = 0) -> PredictConfig:
    """The small causal world model that ships: trains and runs on two CPU cores.

    A frame sees five latent frames, itself included, in training as in a rollout: so a rollout may go on for ever.
    """
    return PredictConfig(width=192, heads=3, action_dim=action_dim, action_hidden=192, window=5, previous_frame=True)


def nano_text(action_dim: int = 0) -> PredictConfig:
    """The small world model that is told in words what to show: `nano`, wider, with MiniLM's text vectors."""
    return replace(nano(action_dim), width=256, heads=4, context_dim=256, text_dim=384)


def tiny(action_dim: int = 0) -> PredictConfig:
    """A model for tests: every part is there, nothing is large."""
    return PredictConfig(width=32, blocks=2, heads=2, adaln_rank=8, action_dim=action_dim, action_hidden=16)


_COSMOS = PredictConfig(
    adaln_rank=256,
    timestep_scale=1.0,
    condition_mask=True,
    padding_mask=True,
    context_dim=1024,
    attention="full",
)
_0_6B = {"width": 1280, "blocks": 20, "heads": 20}
_2B = {"width": 2048, "blocks": 28, "heads": 16}
_14B = {"width": 5120, "blocks": 36, "heads": 40}


def cosmos1_7b(condition_mask: bool = False) -> PredictConfig:
    """Cosmos-1.0-Diffusion-7B: learned positions and time in seconds; a condition mask in Video2World."""
    return replace(
        _COSMOS,
        width=4096,
        blocks=28,
        heads=32,
        condition_mask=condition_mask,
        rope_ratios=(2.0, 1.0, 1.0),
        base_fps=24.0,
        learned_positions=(128, 120, 120),
    )


def cosmos1_14b(condition_mask: bool = False) -> PredictConfig:
    """Cosmos-1.0-Diffusion-14B: 36 blocks of width 5120, 40 heads."""
    return replace(cosmos1_7b(condition_mask), **_14B, rope_ratios=(2.0, 2.0, 2.0))


def cosmos_predict2_text2image_0_6b() -> PredictConfig:
    """Cosmos-Predict2-0.6B-Text2Image: 20 blocks of width 1280, 20 heads; T5 text of size 1024, no condition mask."""
    return replace(_COSMOS, **_0_6B, condition_mask=False, rope_ratios=(1.0, 4.0, 4.0))


def cosmos_predict2_text2image_2b() -> PredictConfig:
    """Cosmos-Predict2-2B-Text2Image: 28 blocks of width 2048, 16 heads."""
    return replace(cosmos_predict2_text2image_0_6b(), **_2B)


def cosmos_predict2_text2image_14b() -> PredictConfig:
    """Cosmos-Predict2-14B-Text2Image: 36 blocks of width 5120, 40 heads."""
    return replace(cosmos_predict2_text2image_0_6b(), **_14B)


def cosmos_predict2_2b() -> PredictConfig:
    """Cosmos-Predict2-2B-Video2World: T5 text of size 1024, masks concatenated."""
    return replace(_COSMOS, **_2B, rope_ratios=(1.0, 3.0, 3.0))


def cosmos_predict2_14b() -> PredictConfig:
    """Cosmos-Predict2-14B-Video2World: other rotary ratios than the 2B has."""
    return replace(_COSMOS, **_14B, rope_ratios=(20 / 24, 2.0, 2.0))


def cosmos_predict2_2b_action() -> PredictConfig:
    """Cosmos-Predict2-2B-Sample-Action-Conditioned: 12 actions of 7 numbers at once."""
    return replace(
        cosmos_predict2_2b(), action_dim=7, action_layout="cosmos-chunk", action_chunk=12, action_hidden=4 * 2048
    )


def cosmos_predict2_2b_multiview() -> PredictConfig:
    """Cosmos-Predict2-2B-Multiview: seven cameras, eight latent frames each."""
    return replace(cosmos_predict2_2b(), rope_ratios=(8 / 24, 3.0, 3.0), views=7, view_dim=7)


def cosmos_predict25_2b() -> PredictConfig:
    """Cosmos-Predict2.5-2B: 28 blocks of width 2048, text of 100,352 projected to 1024, masks concatenated."""
    return replace(cosmos_predict2_2b(), text_dim=100_352)


def cosmos_predict25_14b() -> PredictConfig:
    """Cosmos-Predict2.5-14B: 36 blocks of width 5120, 40 heads."""
    return replace(cosmos_predict25_2b(), **_14B)


def cosmos_predict25_2b_action(layout: Literal["cosmos-frame", "cosmos-chunk"] = "cosmos-chunk") -> PredictConfig:
    """Cosmos-Predict2.5-2B/robot/action-cond: actions of 7 numbers, 12 at once or 4 a latent frame."""
    return replace(cosmos_predict25_2b(), action_dim=7, action_layout=layout, action_hidden=4 * 2048)


def cosmos_predict25_2b_multiview() -> PredictConfig:
    """Cosmos-Predict2.5-2B/auto/multiview: seven cameras, eight latent frames each."""
    return replace(cosmos_predict2_2b_multiview(), text_dim=100_352)
