"""The objectives of world models: pure functions of a model, a batch, a configuration and a CPU generator.

What they share is here: which frames are context and which are noisy, and what is dropped; with it the losses of
rectified flow, alone or jointly with that of the actions, and of EDM. Those of few-step models are in `.distillation`,
which also chooses among all of them (`world_loss`); rollouts under a model's own errors in `.self_forcing`.

Letters: b batch, t latent frames, c channels, h w latent size, r actions between latent frames, a action size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom.schema import LatentBatch
from worldloom_finetune.noise import normal
from worldloom_finetune.self_forcing import roll_out
from worldloom_model_zoo.samplers import flow_interpolate, flow_levels, shift_noise_level

_SIGMA_MIN = 0.002  # the least noise of EDM


@dataclass(frozen=True)
class ObjectiveConfig:
    """What a world model is trained for."""

    kind: Literal["flow", "edm", "distill", "shortcut"] = "flow"
    """``flow``: the velocity of rectified flow. ``edm``: the denoiser of Karras et al. 2022. ``distill``: a frozen
    teacher, of whose many sampler steps the model learns to make few. ``shortcut``: flow, and
    steps of every size that agree with two of half the size (Frans et al. 2024); for models with ``step_size``."""
    context: Literal["prefix", "independent", "mixed", "teacher_forcing"] = "mixed"
    """``prefix``: a random number of first frames is nearly clean, the rest noisy.
    ``independent``: every frame has its own level (diffusion forcing, Chen et al. 2024). ``mixed``: half of each.
    ``teacher_forcing``: every frame but the first is noisy and sees all frames before it nearly clean, which is what
    sampling frame by frame meets; a step costs twice as much and trains all frames. For causal models."""
    shared_level: bool = False
    """Noisy frames of a sample share one level, as where all frames are sampled at once (full attention)."""
    context_noise: float = 0.1
    """Prefix frames get a level uniform in [0, this]."""
    logit_mean: float = 0.0
    """Mean of the logit-normal noise level (Esser et al. 2024)."""
    logit_std: float = 1.0
    """Its standard deviation."""
    shift: float = 1.0
    """Timestep shift; above 1 trains more at high noise."""
    action_dropout: float = 0.1
    """Share of samples that get the null action, so that guidance on actions is possible."""
    text_dropout: float = 0.1
    """Share of samples that get the null text, so that guidance on text is possible."""
    pixel_weighting: float = 0.0
    """Exponent p: a latent channel weighs (its part in the error of pixels) ** p. 0: all alike; 1: as pixels do."""
    action_weight: float = 0.0
    """Weight of the actions' velocity in the loss, for models with ``action_head``; 0 leaves actions clean."""
    modes: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """With ``action_weight``, how often a sample trains forward dynamics (clean actions, noisy frames), inverse
    dynamics (noisy actions, clean frames) and policy (both noisy, each at its own level), relative to each other."""
    rollout_share: float = 0.0
    """Share of samples that are rolled out as in use (self forcing, Huang et al. 2025), so that a model meets its own
    errors in training. For causal models."""
    rollout_target: Literal["endpoint", "context"] = "endpoint"
    """``endpoint``: frames of a rollout are to be the true ones, with gradients through the last sampler step of each
    (plain ``flow``). ``context``: true frames are denoised after a rollout (always so in ``distill`` and with
    ``action_weight``)."""
    rollout_frames: int = 3
    """Latent frames of such a rollout, at most."""
    rollout_steps: int = 2
    """Sampler steps of each of them; ``distill`` takes ``steps``."""
    rollout_guidance: float = 1.0
    """Guidance on actions and text of such a rollout, as in use; the rollouts of ``distill`` have none where the
    teacher's is built in."""
    steps: int = 2
    """``distill``: sampler steps that remain. ``shortcut``: the largest number of steps, a power of two."""
    teacher: str = ""
    """``distill``: the teacher, a checkpoint that knows the data's actions; empty: the base itself. Another than the
    base where a student is distilled on, for instance with rollouts, which set back one that is not good yet."""
    teacher_substeps: int = 4
    """``distill``: teacher's steps for one of the model's."""
    teacher_guidance: float = 1.0
    """``distill``: the teacher's guidance on actions and text; the model then needs none."""
    teacher_context: Literal["true", "own"] = "true"
    """``distill`` with rollouts: whether the teacher sees the true frames before those it denoises, or like the student
    the student's own. Own ones are for a teacher that was trained on rollouts: after frames that have left the truth,
    true ones cannot be foreseen, and the mean of them is a blur."""
    bootstrap_share: float = 0.25
    """``shortcut``: share of samples that train steps longer than the shortest."""
    sigma_data: float = 1.0
    """``edm``: standard deviation of the latents."""
    sigma_mean: float = 0.3
    """``edm``: mean of the logarithm of sigma; for a ``sigma_data`` of 0.5 DIAMOND has -0.4 (Alonso et al. 2024)."""
    sigma_std: float = 1.2
    """``edm``: its standard deviation."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.teacher_substeps < 1 or self.rollout_steps < 1 or self.rollout_frames < 1:
            raise WorldloomError("objective: steps, teacher_substeps, rollout_steps and rollout_frames are 1 or more")
        if not 0 <= self.rollout_share <= 1 or not 0 <= self.bootstrap_share <= 1:
            raise WorldloomError("objective: rollout_share and bootstrap_share are in [0, 1]")
        if min(self.modes) < 0 or sum(self.modes) <= 0:
            raise WorldloomError("objective.modes are three weights, not all zero", got=self.modes)
        if self.kind == "shortcut" and self.steps & (self.steps - 1):
            raise WorldloomError("objective.steps of a shortcut model is a power of two", got=self.steps, do="use 32")
        if self.context == "teacher_forcing" and (self.kind in ("edm", "shortcut") or self.action_weight):
            raise WorldloomError(
                "objective.context = 'teacher_forcing' goes with the kinds flow and distill, without action_weight",
                got=f"kind {self.kind}, action_weight {self.action_weight}",
                do="use context = 'mixed'",
            )
        if self.kind in ("edm", "shortcut") and (self.rollout_share or self.action_weight):
            raise WorldloomError(
                f"objective.kind = {self.kind!r} has neither rollouts nor actions of its own",
                do="set rollout_share and action_weight to 0",
            )


@dataclass(frozen=True)
class Past:
    """What each frame sees before it under teacher forcing; tensors are ``(b, c, t, h, w)`` and ``(b, t)``."""

    latents: Tensor
    noise: Tensor
    level: Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """As the model takes it."""
        return {"context": flow_interpolate(self.latents, self.noise, self.level), "context_timestep": self.level}


@dataclass(frozen=True)
class Drawn:
    """What is random about the loss of one batch, on the latents' device."""

    latents: Tensor
    """``(b, c, t, h, w)`` what the model is shown, before noise: the truth, or frames of its own in the context."""
    level: Tensor
    """``(b, t)`` noise level of each frame."""
    weight: Tensor
    """``(b, t)`` 1 at frames that are to be denoised, 0 at context."""
    noise: Tensor
    """``(b, c, t, h, w)``."""
    keep_action: Tensor
    """``(b,)`` False where a sample gets the null action."""
    keep_text: Tensor | None
    """``(b,)`` False where a sample gets the null text; None without text."""
    past: Past | None = None
    """Under teacher forcing; then all of ``latents`` is the truth."""

    @property
    def noisy(self) -> Tensor:
        """What the model is shown: ``(b, c, t, h, w)``."""
        return flow_interpolate(self.latents, self.noise, self.level)

    @property
    def masks(self) -> dict[str, Any]:
        """The dropped actions and texts, as the model takes them."""
        return {"action_mask": self.keep_action, "text_mask": self.keep_text}

    @property
    def inputs(self) -> dict[str, Any]:
        """All that the model takes by name."""
        return self.masks | ({} if self.past is None else self.past.inputs)


def noise_levels(
    b: int, t: int, config: ObjectiveConfig, generator: torch.Generator, prefix: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Noise level of each frame ``(b, t)`` and its loss weight ``(b, t)``: 0 on a clean prefix, else 1.

    ``prefix (b, 1)`` gives the number of context frames, where it is not to be drawn. Under teacher forcing it is one.
    """
    logit = torch.randn(b, 1 if config.shared_level else t, generator=generator) * config.logit_std + config.logit_mean
    level = shift_noise_level(torch.sigmoid(logit), config.shift).expand(b, t)
    drawn = torch.randint(1, max(t, 2), (b, 1), generator=generator)  # at least one context frame, one noisy one
    if config.context == "teacher_forcing":
        drawn = torch.ones_like(drawn)
    context = torch.rand(b, t, generator=generator) * config.context_noise
    independent = torch.rand(b, 1, generator=generator) < 0.5
    if prefix is not None or config.context in ("prefix", "teacher_forcing"):
        independent = torch.zeros_like(independent)
    elif config.context == "independent":
        independent = torch.ones_like(independent)
    is_context = (torch.arange(t)[None] < (drawn if prefix is None else prefix)) & ~independent & (t > 1)
    return torch.where(is_context, context, level), (~is_context).float()


def step_levels(
    b: int, t: int, config: ObjectiveConfig, generator: torch.Generator, prefix: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `noise_levels`, but noisy frames are at one of the levels that ``steps`` sampler steps start from."""
    level, weight = noise_levels(b, t, config, generator, prefix)
    index = torch.randint(config.steps, (b, 1 if config.shared_level else t), generator=generator)
    start = flow_levels(config.steps, config.shift, dtype=torch.float32)[index].expand(b, t)
    return torch.where(weight > 0, start, level), weight


def draw(model: nn.Module, batch: LatentBatch, config: ObjectiveConfig, generator: torch.Generator) -> Drawn:
    """Noise levels, noise and what is dropped; a ``rollout_share`` of the samples with own frames as context."""
    latents = batch.latents
    b, _, t = latents.shape[:3]
    levels = step_levels if config.kind == "distill" else noise_levels
    level, weight = levels(b, t, config, generator)
    noise = normal(latents.shape, latents, generator)
    keep_action = torch.rand(b, generator=generator) >= config.action_dropout
    keep_text = None
    if batch.text is not None:
        keep_text = (torch.rand(b, generator=generator) >= config.text_dropout).to(latents.device)
    level, weight, keep_action = (x.to(latents.device) for x in (level, weight, keep_action))
    past = None
    if config.context == "teacher_forcing":
        context_level = (torch.rand(b, t, generator=generator) * config.context_noise).to(level)
        past = Past(latents, normal(latents.shape, latents, generator), context_level)
    drawn = Drawn(latents, level, weight, noise, keep_action, keep_text, past)

    frames = min(config.rollout_frames, t - 2)  # one given before them, one to be denoised after them
    if not config.rollout_share or frames < 1:
        return drawn
    rows = max(1, round(config.rollout_share * b))
    start = int(torch.randint(1, t - frames, (1,), generator=generator))
    steps = config.steps if config.kind == "distill" else config.rollout_steps
    own = roll_out(
        model,
        _rows(batch, slice(rows)),
        start=start,
        frames=frames,
        levels=flow_levels(steps, config.shift if config.kind == "distill" else 1.0),
        context_noise=config.context_noise,
        generator=generator,
        masks={name: None if x is None else x[:rows] for name, x in drawn.masks.items()},
        guidance=1.0 if config.kind == "distill" and config.teacher_guidance != 1 else config.rollout_guidance,
    )
    shown = latents.clone()
    shown[:rows, :, start : start + frames] = own
    if past is not None:  # true frames are denoised, each after own ones
        weight = weight.clone()
        weight[:rows, : start + 1] = weight[:rows, start + frames + 1 :] = 0
        return replace(drawn, weight=weight, past=replace(past, latents=shown))
    prefix = start + torch.randint(1, frames + 1, (rows, 1), generator=generator)
    changed, changed_weight = levels(rows, t, config, generator, prefix)
    target = changed_weight.to(latents.device).bool()[:, None, :, None, None]  # frames to be denoised are true ones
    shown[:rows] = torch.where(target, latents[:rows], shown[:rows])
    level, weight = level.clone(), weight.clone()
    level[:rows], weight[:rows] = changed.to(level), changed_weight.to(weight)
    return replace(drawn, latents=shown, level=level, weight=weight)


@torch.no_grad()
def channel_weights(tokenizer: Any, latents: Tensor, exponent: float) -> Tensor:
    """How much each latent channel matters to pixels, ``(c,)`` of mean 1.

    The share of channel i is the mean squared change of the decoded video when noise is added to that channel alone.
    Normalised latents make all channels equally large, though the first may carry most of the picture.

    Args:
        latents: some real ones, ``(b, c, t, h, w)``.
        exponent: 0 gives ones, 1 weighs as the squared error of pixels would.
    """
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(latents[:, :1].shape, generator=generator).to(latents)
    still = tokenizer.decode(latents)
    shares = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel : channel + 1] += noise
        shares.append((tokenizer.decode(moved) - still).square().mean())
    weights = torch.stack(shares).clamp_min(1e-12) ** exponent
    return weights / weights.mean()


def frame_loss(made: Tensor, wanted: Tensor, drawn: Drawn, weights: Tensor | None) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error over the frames that are not context, and that of the frames at more than half noise."""
    squares = (made - wanted).square()
    if weights is not None:
        squares = squares * weights.to(squares)[None, :, None, None, None]
    error = squares.mean(dim=(1, 3, 4))  # (b, c, t, h, w) -> (b, t)
    loss = (error * drawn.weight).sum() / drawn.weight.sum().clamp_min(1)
    high = (drawn.level > 0.5) & (drawn.weight > 0)
    return loss, {"loss_high_noise": float(error.detach()[high].mean())} if bool(high.any()) else {}


def finite(loss: Tensor) -> Tensor:
    """The loss.

    Raises:
        WorldloomError: if it is not finite.
    """
    if not torch.isfinite(loss):
        raise WorldloomError(
            "the training loss is not finite",
            got=loss.item(),
            do="lower optim.lr, or check the latents for values that are not finite",
        )
    return loss


def rectified_flow_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error of the velocity, noise - clean, over the frames that are not clean context.

    ``generator`` is a CPU generator; equal states give equal losses. ``weights (c,)`` are those of `channel_weights`.
    Returns the loss and metrics to log.

    Raises:
        WorldloomError: if the loss is not finite.
    """
    if config.rollout_share and config.rollout_target == "endpoint":
        return _flow_and_rollout(model, batch, config, generator, weights)
    drawn = draw(model, batch, config, generator)
    velocity = model(drawn.noisy, drawn.level, batch.actions, batch.text, **drawn.inputs)
    loss, metrics = frame_loss(velocity, drawn.noise - batch.latents, drawn, weights)
    return finite(loss), metrics


def _flow_and_rollout(
    model: nn.Module, batch: LatentBatch, config: ObjectiveConfig, generator: torch.Generator, weights: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """The mean, by samples, of flow on some and of `rollout_loss` on the others."""
    b, t = len(batch.latents), batch.latents.shape[2]
    plain = replace(config, rollout_share=0.0)
    if t < 2:
        return rectified_flow_loss(model, batch, plain, generator, weights)
    rows = max(1, round(config.rollout_share * b))
    own = rollout_loss(model, _rows(batch, slice(rows)), config, generator, weights)
    metrics = {"loss_rollout": float(own.detach())}
    if rows == b:
        return finite(own), metrics
    loss, of_flow = rectified_flow_loss(model, _rows(batch, slice(rows, None)), plain, generator, weights)
    return finite((rows * own + (b - rows) * loss) / b), metrics | of_flow


def rollout_loss(
    model: nn.Module, batch: LatentBatch, config: ObjectiveConfig, generator: torch.Generator, weights: Tensor | None
) -> Tensor:
    """Mean squared error of a rollout's frames, in units of velocity: divided by the level of its last sampler step."""
    b, t = len(batch.latents), batch.latents.shape[2]
    frames = min(config.rollout_frames, t - 1)
    start = int(torch.randint(1, t - frames + 1, (1,), generator=generator))
    masks: dict[str, Any] = {
        "action_mask": torch.rand(b, generator=generator) >= config.action_dropout,
        "text_mask": None if batch.text is None else torch.rand(b, generator=generator) >= config.text_dropout,
    }
    levels = flow_levels(config.rollout_steps)
    made = roll_out(
        model,
        batch,
        start=start,
        frames=frames,
        levels=levels,
        context_noise=config.context_noise,
        generator=generator,
        masks={name: None if x is None else x.to(batch.latents.device) for name, x in masks.items()},
        guidance=config.rollout_guidance,
        gradients=True,
    )
    squares = ((made - batch.latents[:, :, start : start + frames]) / float(levels[-2])).square()
    if weights is not None:
        squares = squares * weights.to(squares)[None, :, None, None, None]
    return squares.mean()


def _rows(batch: LatentBatch, which: slice) -> LatentBatch:
    """Some samples of a batch."""
    given = (batch.latents, batch.actions, batch.text)
    return LatentBatch(*(None if x is None else x[which] for x in given))  # type: ignore[arg-type]


def edm_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Denoising under EDM (Karras et al. 2022, table 1 and eq. 8), with a sigma per frame.

    The network F sees c_in x and, as its timestep, c_noise = ln(sigma) / 4; the denoiser is D = c_skip x + c_out F,
    what `worldloom_model_zoo.samplers.edm_denoiser` samples from. With the weight 1 / c_out^2 the loss is the mean
    squared error of F. ln(sigma) is normal; context frames have a sigma uniform in [0, context_noise], at least 0.002.

    Raises:
        WorldloomError: if the loss is not finite.
    """
    drawn = draw(model, batch, config, generator)
    b, t = drawn.level.shape
    normal = torch.randn(b, 1 if config.shared_level else t, generator=generator)
    sigma = (normal * config.sigma_std + config.sigma_mean).exp().expand(b, t).to(batch.latents)
    sigma = torch.where(drawn.weight > 0, sigma, drawn.level.to(sigma)).clamp_min(_SIGMA_MIN)
    drawn = replace(drawn, level=sigma / (1 + sigma))
    each, data = sigma[:, None, :, None, None], config.sigma_data  # (b, t) -> (b, 1, t, 1, 1)
    whole = each.square() + data**2
    noisy = batch.latents + each * drawn.noise
    made = model(noisy * whole.rsqrt(), sigma.log() / 4, batch.actions, batch.text, **drawn.masks)
    wanted = (batch.latents - data**2 / whole * noisy) * whole.sqrt() / (each * data)
    loss, metrics = frame_loss(made, wanted, drawn, weights)
    return finite(loss), metrics


def joint_levels(
    drawn: Drawn, config: ObjectiveConfig, generator: torch.Generator
) -> tuple[Drawn, Tensor, Tensor, Tensor]:
    """Frames and actions at noise levels of their own: every sample takes one of the three ``modes``.

    Returns:
        `drawn` with all frames context where a sample trains inverse dynamics; levels ``(b, t-1)`` of the actions that
        lead to each latent frame; the weights ``(b, t-1)`` of their errors, 1 at noisy actions; and the samples' modes
        ``(b,)``, 0 forward dynamics, 1 inverse dynamics, 2 policy.
    """
    b, t = drawn.level.shape
    mode = torch.multinomial(torch.tensor(config.modes, dtype=torch.float32), b, replacement=True, generator=generator)
    logit = torch.randn(b, 1, generator=generator) * config.logit_std + config.logit_mean
    context = torch.rand(b, t, generator=generator) * config.context_noise
    device = drawn.level.device
    mode, level, context = mode.to(device), torch.sigmoid(logit).to(device), context.to(device)

    inverse = (mode == 1)[:, None]
    drawn = replace(
        drawn,
        level=torch.where(inverse, context, drawn.level),
        weight=torch.where(inverse, torch.zeros_like(drawn.weight), drawn.weight),
    )
    noisy = inverse | ((mode == 2)[:, None] & (drawn.weight[:, 1:] > 0))  # a policy's past actions are known
    return drawn, torch.where(noisy, level, 0), noisy.float(), mode


def joint_loss(
    model: nn.Module,
    batch: LatentBatch,
    config: ObjectiveConfig,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Velocity of the frames plus ``action_weight`` times that of the actions (Unified World Models, Zhu et al. 2025).

    Frames and actions have noise levels of their own, so that one network learns forward dynamics, inverse dynamics
    and a policy: see `joint_levels`. Samples with the null action have no action error.

    Raises:
        WorldloomError: data without actions, or a loss that is not finite.
    """
    if batch.actions is None:
        raise WorldloomError("objective.action_weight needs data with actions", do="set objective.action_weight = 0")
    drawn, level, weight, mode = joint_levels(draw(model, batch, config, generator), config, generator)
    actions, r = batch.actions, batch.actions.shape[1] // level.shape[1]
    noise = normal(actions.shape, actions, generator)
    each = level.to(actions).repeat_interleave(r, dim=1)[..., None]  # (b, t-1) -> (b, r*(t-1), 1)
    velocity, action_velocity = model(
        drawn.noisy,
        drawn.level,
        (1 - each) * actions + each * noise,
        batch.text,
        **drawn.masks,
        action_timestep=level,
        return_actions=True,
    )
    loss, metrics = frame_loss(velocity, drawn.noise - batch.latents, drawn, weights)
    squares = (action_velocity - (noise - actions)).square().mean(dim=2).unflatten(1, (-1, r)).mean(dim=2)  # (b, t-1)
    weight = weight * drawn.keep_action[:, None]
    action_loss = (squares * weight).sum() / weight.sum().clamp_min(1)
    for name, which in (("inverse", 1), ("policy", 2)):
        counted = weight * (mode == which)[:, None]
        if bool(counted.any()):
            metrics[f"loss_{name}"] = float((squares.detach() * counted).sum() / counted.sum())
    return finite(loss + config.action_weight * action_loss), metrics
