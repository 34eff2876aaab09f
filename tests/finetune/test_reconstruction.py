"""The terms of a tokenizer's loss: each changes it and can be switched off exactly; two players share no gradient."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_finetune.discriminator import PatchDiscriminator, constant, discriminator_loss, generator_loss
from worldloom_finetune.reconstruction import ReconstructionConfig, temporal_loss, tokenizer_loss
from worldloom_tokenizers.causal_vae import CausalVAE
from worldloom_tokenizers.config import CausalVAEConfig

PLAIN = ReconstructionConfig()
DISCRETE = dataclasses.replace(tiny_models.VAE, levels=(5, 5))


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Stands where a network of features does."""
    return (one.mean(dim=(-2, -1)) - other.mean(dim=(-2, -1))).square().mean()


@pytest.fixture(scope="module")
def video() -> Tensor:
    from worldloom import media

    return torch.cat([media.to_tensor(tiny_models.moving_square(9, seed)) for seed in (1, 2)])


@pytest.fixture(scope="module")
def discriminator() -> nn.Module:
    torch.manual_seed(5)
    return PatchDiscriminator(8)


def loss(
    config: ReconstructionConfig, video: Tensor, step: int | None = 0, vae: CausalVAEConfig = tiny_models.VAE, **more
):
    generator = torch.Generator().manual_seed(7)
    value, metrics = tokenizer_loss(tiny_models.tokenizer(0, vae), video, config, generator, step=step, **more)
    return value, metrics


def test_without_extra_terms_the_loss_is_the_plain_formula(video: Tensor) -> None:
    model, generator = tiny_models.tokenizer(), torch.Generator().manual_seed(7)
    raw = model.encode_raw(video)
    made = model.decode_raw(raw + 0.05 * torch.randn(raw.shape, generator=generator))
    mse = (made - video).square().mean()
    expected = (made - video).abs().mean() + 2 * mse + 1e-4 * raw.square().mean()
    value, metrics = loss(PLAIN, video)
    assert torch.equal(value, expected)
    assert metrics["psnr"] == pytest.approx(10 * torch.log10(4 / mse).item())
    assert metrics.keys() == {"psnr", "latent_rms"}


@pytest.mark.parametrize("term", ["l1", "l2", "temporal", "perceptual", "latent_noise", "latent_penalty"])
def test_each_switch_changes_the_loss_and_off_is_as_if_it_were_not_there(term: str, video: Tensor) -> None:
    on = dataclasses.replace(PLAIN, **{term: 0.7})
    off = dataclasses.replace(PLAIN, **{term: 0.0})
    given = {"perceptual": distance}
    assert loss(on, video, **given)[0] != loss(off, video, **given)[0]
    model, generator = tiny_models.tokenizer(), torch.Generator().manual_seed(7)
    raw = model.encode_raw(video)
    noise = 0.05 * torch.randn(raw.shape, generator=generator)
    error = model.decode_raw(raw if term == "latent_noise" else raw + noise) - video
    parts = {"l1": error.abs().mean(), "l2": 2 * error.square().mean(), "latent_penalty": 1e-4 * raw.square().mean()}
    without = [value for name, value in parts.items() if name != term]
    assert torch.equal(loss(off, video, **given)[0], functools.reduce(torch.add, without))


def test_the_terms_are_weighed_and_logged(video: Tensor) -> None:
    base, _ = loss(PLAIN, video)
    for term in ("temporal", "perceptual"):
        values = []
        for weight in (0.5, 2.0):
            value, metrics = loss(dataclasses.replace(PLAIN, **{term: weight}), video, perceptual=distance)
            assert value.item() == pytest.approx(base.item() + weight * metrics[term], abs=1e-6)
            values.append(metrics[term])
        assert values[0] == values[1] > 0


def test_the_temporal_term_measures_flicker_and_not_a_constant_error(video: Tensor) -> None:
    assert temporal_loss(video + 0.25, video) < 1e-6
    flicker = video + 0.25 * torch.tensor([1.0, -1] * 4 + [1.0])[None, None, :, None, None]
    assert temporal_loss(flicker, video).item() == pytest.approx(0.5, rel=1e-4)


def test_codes_get_no_noise_and_no_penalty(video: Tensor) -> None:
    values = [
        loss(ReconstructionConfig(latent_noise=noise, latent_penalty=penalty), video, vae=DISCRETE)[0]
        for noise, penalty in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


# -- two players -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_one_backward_pass_gives_the_gradients_of_two(penalty: float, video: Tensor, discriminator: nn.Module) -> None:
    config = ReconstructionConfig(adversarial=0.3, adversarial_penalty=penalty)
    video, discriminator = video.double(), copy.deepcopy(discriminator).double()
    model, generator = tiny_models.tokenizer().double(), torch.Generator().manual_seed(7)
    both, _ = tokenizer_loss(model, video, config, generator, step=0, discriminator=discriminator)
    both.backward()
    ours = _take_gradients(model), _take_gradients(discriminator)

    # The tokenizer against a discriminator that cannot move.
    generator = torch.Generator().manual_seed(7)
    raw = model.encode_raw(video)
    made = model.decode_raw(raw + config.latent_noise * torch.randn(raw.shape, generator=generator).double())
    error = made - video
    plain = error.abs().mean() + 2 * error.square().mean() + config.latent_penalty * raw.square().mean()
    (plain - config.adversarial * discriminator(made).mean()).backward()
    expected = _take_gradients(model)
    _take_gradients(discriminator)
    assert _difference(ours[0], expected) < 1e-12
    # The discriminator against reconstructions that cannot move.
    real, fake = discriminator(video), discriminator(made.detach())
    against = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
    if penalty:
        noise = 0.1 * torch.randn(video.shape, generator=generator).double()
        against = against + penalty * ((discriminator(video + noise) - real) / 0.1).square().mean()
    against.backward()
    assert _take_gradients(model) == {}
    assert _difference(ours[1], _take_gradients(discriminator)) < 1e-12
    assert all(g.abs().max() > 0 for g in ours[0].values())
    assert all(g.abs().max() > 0 for g in ours[1].values())


def _take_gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def _difference(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max((ours[name] - expected[name]).abs().max().item() for name in ours)


def test_the_discriminator_begins_at_its_step_and_never_validates(video: Tensor, discriminator: nn.Module) -> None:
    config = ReconstructionConfig(adversarial=0.3, adversarial_start=4)
    off, _ = loss(PLAIN, video)
    for step in (0, 3, None):
        value, metrics = loss(config, video, step=step, discriminator=discriminator)
        assert torch.equal(value, off)
        assert "adversarial" not in metrics
    value, metrics = loss(config, video, step=4, discriminator=discriminator)
    expected = off.item() + 0.3 * metrics["adversarial"] + metrics["discriminator"]
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_a_discriminator_learns_to_tell_and_a_generator_to_be_taken_for_real(video: Tensor) -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(8)
    blurred = torch.nn.functional.avg_pool3d(video, (1, 5, 5), stride=1, padding=(0, 2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = discriminator_loss(model, video, blurred, 0.0, torch.Generator())
    for _ in range(40):
        value = discriminator_loss(model, video, blurred, 0.0, torch.Generator())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.5 * first
    made = blurred.clone().requires_grad_()
    before = generator_loss(model, made)
    before.backward()
    assert made.grad is not None
    assert generator_loss(model, made.detach() - 0.5 * made.grad / made.grad.abs().max()) < before
    assert all(p.requires_grad for p in model.parameters())


def test_the_penalty_is_the_squared_gradient_at_real_videos() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.01, 0.05, 3 * 2 * 8 * 8).view(1, 3, 2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).sum(dim=(1, 2, 3, 4))

    model, real = Linear().double(), torch.zeros(2000, 3, 2, 8, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    base = discriminator_loss(model, real, real, 0.0, generator)
    value = discriminator_loss(model, real, real, 3.0, generator) - base
    assert value.item() == pytest.approx(3.0 * model.weight.square().sum().item(), rel=0.1)  # 2000 draws: 3 % spread


def test_a_constant_module_is_trainable_again_even_after_an_error(discriminator: nn.Module) -> None:
    parameter = next(iter(discriminator.parameters()))
    parameter.requires_grad_(False)
    try:
        with pytest.raises(ZeroDivisionError), constant(discriminator):
            _fail_where_nothing_is_trained(discriminator)
        assert [p.requires_grad for p in discriminator.parameters()][:2] == [False, True]
    finally:
        parameter.requires_grad_(True)


def _fail_where_nothing_is_trained(module: nn.Module) -> None:
    assert not any(p.requires_grad for p in module.parameters())
    raise ZeroDivisionError


# -- refusals and starting points --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"l1": -1.0}, {"l1": 0.0, "l2": 0.0}, {"adversarial_channels": 12}, {"adversarial_start": -1}, {"temporal": -0.1}],
)
def test_an_objective_that_cannot_be_is_refused(options: dict) -> None:
    with pytest.raises(WorldloomError):
        ReconstructionConfig(**options)


def test_a_loss_that_is_not_finite_is_refused(video: Tensor) -> None:
    with pytest.raises(WorldloomError, match="not finite"):
        loss(PLAIN, video * float("inf"))


def test_training_starts_at_the_quality_of_principal_components() -> None:
    torch.manual_seed(0)
    model = CausalVAE(CausalVAEConfig(widths=(8, 8, 16)))
    ramp = torch.linspace(-1, 1, 16)
    video = (ramp[None, None, None, :, None] * torch.rand(4, 3, 5, 1, 1) + 0.3 * ramp).clamp(-1, 1)
    config = ReconstructionConfig(latent_noise=0.0)
    _, before = tokenizer_loss(model, video, config, torch.Generator())
    model.initialise(video)
    value, after = tokenizer_loss(model, video, config, torch.Generator())
    assert after["psnr"] > 35 > before["psnr"]
    value.backward()
    assert model.linear_in.weight.grad is not None
    assert model.linear_in.weight.grad.abs().max() > 0
