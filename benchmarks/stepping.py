"""Stepping a causal world model: key-value cache against recomputing the window, same weights, interleaved.

Both sides draw the same latent frames (checked). The figure is the ratio of their median times per frame, cached over
recomputed, for three lengths of the past. Peer: this network without
its cache, which is what a model without one has to do.

    python benchmarks/stepping.py [--frames 12] [--steps 4]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from worldloom_model_zoo.predict.causal import KVCache
from worldloom_model_zoo.predict.config import nano
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.samplers import flow_euler, flow_levels


@torch.no_grad()
def cached_step(model: PredictTransformer, cache: KVCache, noise: Tensor, actions: Tensor, levels: Tensor) -> Tensor:
    """Denoise one frame against the cache, then commit it."""
    frame = flow_euler(lambda x, level: model(x, x.new_full((1, 1), level), actions, cache=cache), noise, levels)
    model(frame, frame.new_zeros(1, 1), actions, cache=cache, commit=True)
    return frame


@torch.no_grad()
def recomputed_step(model: PredictTransformer, past: Tensor, noise: Tensor, actions: Tensor, levels: Tensor) -> Tensor:
    """Denoise one frame with the whole past in every call."""
    t = past.shape[2]

    def velocity(x: Tensor, level: float) -> Tensor:
        at = torch.cat([x.new_zeros(1, t), x.new_full((1, 1), level)], dim=1)
        return model(torch.cat([past, x], dim=2), at, actions)[:, :, -1:]

    return flow_euler(velocity, noise, levels)


@torch.no_grad()
def compare(context: int, frames: int, steps: int) -> tuple[float, float]:
    """Median seconds per latent frame: (cached, recomputed), at ``context`` latent frames of past."""
    torch.manual_seed(0)
    model = PredictTransformer(replace(nano(action_dim=6), window=0)).eval()
    for parameter in model.parameters():  # at its initialisation the network is zero, and any bug would pass
        parameter.normal_(std=0.05)
    levels = flow_levels(steps)
    past = torch.randn(1, 16, context, 8, 8)
    actions = torch.randn(1, 4 * (context - 1 + frames), 6)
    cache = KVCache()
    model(past, past.new_zeros(1, context), actions[:, : 4 * (context - 1)], cache=cache, commit=True)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(frames):
        t = past.shape[2]
        noise = torch.randn(1, 16, 1, 8, 8)
        began = time.perf_counter()
        fast = cached_step(model, cache, noise, actions[:, 4 * (t - 1) : 4 * t], levels)
        middle = time.perf_counter()
        slow = recomputed_step(model, past, noise, actions[:, : 4 * t], levels)
        seconds[0].append(middle - began)
        seconds[1].append(time.perf_counter() - middle)
        torch.testing.assert_close(fast, slow, atol=1e-3, rtol=1e-3)
        past = torch.cat([past, slow], dim=2)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=12, help="latent frames per measurement")
    parser.add_argument("--steps", type=int, default=4, help="sampler steps per frame")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"median of {args.frames} frames"
    )
    for context in (2, 8, 24):
        cached, recomputed = compare(context, args.frames, args.steps)
        print(f"past of {context} latent frames: cached {1e3 * cached:.1f} ms, recomputed {1e3 * recomputed:.1f} ms")
        print(f"ratio stepping-{context}: {cached / recomputed:.3f} (time, lower is better)")


if __name__ == "__main__":
    main()
