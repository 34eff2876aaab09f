"""Video tokenizers against diffusers' AutoencoderKLWan and AutoencoderKLCosmos: same random weights, same input.

Every case runs in a process of its own, which holds both networks with equal weights, checks that they give the same,
and measures them in turn, ours first, then theirs, then ours again. The figures are the medians of seconds and their
ratio theirs / ours. Peak memory is measured in further processes, several for each side in turn, above what the process
holds with its network loaded and after the same call has run once, so that the weights, and what our convolutions keep
of them between calls, count on neither side; the figures are medians over processes, with the least and the most.

    python benchmarks/tokenizers.py [--quick] [--models wan cosmos] [--frames 1 9 17 49] [--sizes 128 256]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Python puts this folder first on its path, where this very file would be Hugging Face's package of the same name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

BUDGET = 240.0  # seconds of measuring per case, after which no further pair is begun


@torch.inference_mode(False)  # as a user makes them: parameters that count their versions
def networks(model: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and theirs, at the published size, with equal random weights."""
    import diffusers

    from worldloom_tokenizers.cosmos import checkpoint as cosmos
    from worldloom_tokenizers.cosmos.config import cv
    from worldloom_tokenizers.layouts import from_released
    from worldloom_tokenizers.wan import checkpoint as wan
    from worldloom_tokenizers.wan.config import wan21
    from worldloom_tokenizers.wan.model import WanVAE

    torch.manual_seed(0)
    if model == "wan":
        theirs, config, table = diffusers.AutoencoderKLWan(), wan21(), wan
        ours = WanVAE(config)
    else:
        theirs, config, table = diffusers.AutoencoderKLCosmos(), cv(8, 8), cosmos
        ours = cosmos.build(config)
    from_released(ours, table.names(config), theirs.state_dict(), "diffusers")
    ours.latent_mean.zero_()  # diffusers leaves raw latents as they are
    ours.latent_std.fill_(1)
    return ours.eval(), theirs.eval()


def operations(side: torch.nn.Module, op: str, video: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """Encode or decode by one side."""
    if hasattr(side, "fingerprint"):  # ours
        return lambda: side.encode(video) if op == "encode" else side.decode(latents)
    if op == "encode":
        return lambda: side.encode(video).latent_dist.mode()
    return lambda: side.decode(latents).sample.clamp(-1, 1)


@torch.inference_mode()
def measure(model: str, op: str, frames: int, size: int, pairs: int) -> dict[str, float]:
    """Seconds of both sides, interleaved."""
    ours, theirs = networks(model)
    video = torch.rand(1, 3, frames, size, size) * 2 - 1
    latents = ours.encode(video)
    calls = [operations(side, op, video, latents) for side in (ours, theirs)]
    made = [call() for call in calls]  # the warm-up
    difference = float((made[0] - made[1]).abs().max())
    assert difference < 2e-3 * max(1.0, float(made[1].abs().max())), f"the two sides differ by {difference}"
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for _ in range(pairs):
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        if time.perf_counter() - began > BUDGET:
            break
    return {
        "ours": statistics.median(seconds[0]),
        "theirs": statistics.median(seconds[1]),
        "ratio": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "difference": difference,
    }


@torch.inference_mode()
def memory(model: str, op: str, frames: int, size: int, side: int) -> dict[str, float]:
    """Peak bytes of one call of one side."""
    from worldloom.memory import peak_memory

    networks_ = list(networks(model))
    network = networks_[side]
    del networks_
    video = torch.rand(1, 3, frames, size, size) * 2 - 1
    ratio = 4 if model == "wan" else 8
    latents = torch.randn(1, 16, 1 + (frames - 1) // ratio, size // 8, size // 8)
    call = operations(network, op, video, latents)
    call()
    with peak_memory("cpu") as peak:
        call()
    assert peak.bytes is not None, "this machine does not tell peak memory"
    return {"bytes": float(peak.bytes)}


@torch.inference_mode()
def prefix(model: str, size: int, pairs: int) -> dict[str, float]:
    """Encoding the 5 or 9 frames that condition a generator, against encoding the 93 of its whole canvas."""
    ours, _ = networks(model)
    frames, total = (5, 93) if model == "wan" else (9, 89)
    video = torch.rand(1, 3, total, size, size) * 2 - 1
    ours.encode_prefix(video, frames)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        started = time.perf_counter()
        ours.encode_prefix(video, frames)
        between = time.perf_counter()
        ours.encode(video)
        seconds[0].append(between - started)
        seconds[1].append(time.perf_counter() - between)
    part, whole = statistics.median(seconds[0]), statistics.median(seconds[1])
    return {"frames": frames, "total": total, "ours": part, "theirs": whole, "ratio": whole / part}


@torch.inference_mode()
def length(model: str, size: int, frames: int) -> dict[str, float]:
    """Peak bytes of encoding a stream of frames that are made as they are asked for, and those of the whole process."""
    from worldloom.memory import peak_memory

    ours, theirs = networks(model)
    del theirs
    ratio = ours.temporal_ratio

    def stream(count: int) -> Iterator[Tensor]:
        for start in range(0, count, ratio):
            yield torch.rand(1, 3, 1 if start == 0 else ratio, size, size) * 2 - 1

    for latents in ours.stream_encode(stream(1 + 2 * ratio)):  # the warm-up
        del latents
    with peak_memory("cpu") as peak:
        for latents in ours.stream_encode(stream(frames)):
            del latents
    assert peak.bytes is not None, "this machine does not tell peak memory"
    most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"bytes": float(peak.bytes), "process": 1024 * float(most.split()[1])}


def apart(task: str, **options: object) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    words = [sys.executable, __file__, "--task", task, "--options", json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peaks(task: str, options: Sequence[dict[str, object]], repeats: int) -> list[dict[str, list[float]]]:
    """Peak memory in MiB of each of several cases, sorted, from as many processes each, the cases in turn; by kind."""
    found = [[apart(task, **case) for case in options] for _ in range(repeats)]
    return [{kind: sorted(run[kind] / 2**20 for run in runs) for kind in runs[0]} for runs in zip(*found, strict=True)]


def spread(figures: Sequence[float]) -> str:
    """A median with the least and the most."""
    return f"{statistics.median(figures):.0f} MiB ({figures[0]:.0f} to {figures[-1]:.0f})"


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["wan", "cosmos"], choices=["wan", "cosmos"])
    parser.add_argument("--frames", nargs="+", type=int, default=[1, 9, 17, 49])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--pairs", type=int, default=5, help="at most this many measurements of each side")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure of memory")
    parser.add_argument("--quick", action="store_true", help="128x128, 1 and 17 frames, no memory")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        tasks = {"measure": measure, "memory": memory, "prefix": prefix, "length": length}
        print(json.dumps(tasks[args.task](**json.loads(args.options))))
        return
    import diffusers

    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}; float32, medians, pairs interleaved; ratio = diffusers / ours, higher is better"
    )
    sizes, frames = ([128], [1, 17]) if args.quick else (args.sizes, args.frames)
    for model in args.models:
        for size in sizes:
            for count in frames:
                for op in ("encode", "decode"):
                    case = {"model": model, "op": op, "frames": count, "size": size}
                    found = apart("measure", **case, pairs=args.pairs)
                    line = (
                        f"{model} {op} {count} frames of {size}x{size}: ours {found['ours']:.2f} s, "
                        f"theirs {found['theirs']:.2f} s (largest difference {found['difference']:.1e})"
                    )
                    label = f"{model}-{op}-{count}-{size}"
                    ratios = [f"ratio {label}: {found['ratio']:.2f} (time)"]
                    if not args.quick:
                        sides = peaks("memory", [{**case, "side": side} for side in (0, 1)], args.repeats)
                        ours, theirs = (side["bytes"] for side in sides)
                        line += f"; peak memory ours {spread(ours)}, theirs {spread(theirs)}"
                        ratio = statistics.median(ours) / statistics.median(theirs)
                        ratios.append(f"ratio {label}-memory: {ratio:.2f} (ours / theirs, lower is better)")
                    print(line, *ratios, sep="\n", flush=True)
        found = apart("prefix", model=model, size=sizes[0], pairs=1 if args.quick else 2)
        print(
            f"{model} encode_prefix: {found['frames']:.0f} of {found['total']:.0f} frames {found['ours']:.2f} s, "
            f"all {found['theirs']:.2f} s\nratio {model}-prefix: {found['ratio']:.1f} (time)",
            flush=True,
        )
        if not args.quick:
            options = [{"model": model, "size": sizes[-1], "frames": n} for n in (33, 193)]
            lengths = peaks("length", options, args.repeats)
            for kind, what in (("bytes", "above the weights"), ("process", "of the whole process")):
                short, long = (length[kind] for length in lengths)
                ratio = statistics.median(long) / statistics.median(short)
                print(
                    f"{model} peak memory {what}, encoding a stream of {sizes[-1]}x{sizes[-1]}: 33 frames "
                    f"{spread(short)}, 193 frames {spread(long)}\n"
                    f"ratio {model}-length-{kind}: {ratio:.2f} (193 / 33 frames, lower is better)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
