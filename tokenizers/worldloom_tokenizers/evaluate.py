"""How well a tokenizer reconstructs clips, how fast, in how much memory, and what its latents or codes are like.

PSNR is ``10 log10(255^2 / MSE)`` of 8-bit frames: ``psnr`` takes the mean error of all frames of all windows, as
torchmetrics has it, ``psnr_per_frame`` is the mean of every frame's own. SSIM, MS-SSIM and flicker are means over the
same frames. See `worldloom.compare`. Frame 0 of a window is encoded alone, the others in groups.

A tokenizer is discrete where it has a ``codebook_size`` above 0, and then ``codebooks`` and ``to_indices(latents)``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from worldloom import media
from worldloom.artifacts import Store, atomic_write, code_version
from worldloom.compare import flicker, ms_ssim, ms_ssim_scales, mse, psnr, ssim
from worldloom.errors import WorldloomError
from worldloom.memory import peak_memory
from worldloom.order import spread
from worldloom.progress import progress as show_progress
from worldloom.protocols import VideoTokenizer
from worldloom.shards import Dataset, open_dataset


@dataclass(frozen=True)
class TokenizerEvalConfig:
    """What is measured."""

    frames: int = 17
    """Length of a window, 1 + temporal ratio * k."""
    size: tuple[int, int] | None = (64, 64)
    """(height, width) that clips are cropped and resized to; unset keeps their own."""
    clips: int = 128
    """Windows to test, spread evenly over the dataset's non-overlapping ones; 0 for all."""
    batch_size: int = 4
    """Windows at a time."""
    videos: int = 12
    """Windows kept for the report."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.batch_size < 1 or min(self.clips, self.videos) < 0:
            raise WorldloomError("frames and batch_size must be positive", got=self)


@dataclass(frozen=True)
class CodeUse:
    """How a discrete tokenizer uses its codes on the test windows."""

    size: int
    """Codes of one codebook."""
    seen: int
    """Codes that each codebook gave, repetitions counted: no more than this many can have been used."""
    usage: tuple[float, ...]
    """Of each codebook, the share that was used at least once, 0 to 1."""
    perplexity: tuple[float, ...]
    """Of each codebook, ``exp(entropy)`` of how often its codes were used: 1 to ``size``, that of even use."""


@dataclass(frozen=True)
class Example:
    """A window for the report."""

    label: str
    """Clip and first frame."""
    psnr: float
    """dB, mean over its frames."""
    truth: np.ndarray
    """uint8 ``(t, h, w, 3)``."""
    made: np.ndarray
    """The reconstruction, of the same shape."""


@dataclass(frozen=True)
class TokenizerEval:
    """What was measured; None where there is no such figure."""

    psnr: float
    """dB of the mean error."""
    psnr_per_frame: float
    """dB, mean over frames."""
    psnr_worst: float
    """dB of the worst frame."""
    psnr_first: float
    """dB, mean over the frames that are encoded alone."""
    ssim: float
    """Mean over frames."""
    ms_ssim: float
    """Mean over frames."""
    ms_ssim_scales: tuple[int, ...]
    """Scales it was taken at, of five; more than one number where clips differ in size."""
    flicker: float | None
    """Mean over all pairs of neighbouring frames, in 8-bit levels; 0 is perfect."""
    curve: tuple[float, ...]
    """dB for each frame of a window."""
    encode_fps: float
    """Frames encoded per second of wall-clock time, in the batches of the test."""
    decode_fps: float
    """Frames decoded per second."""
    encode_peak_bytes: int | None
    """Memory that encoding the first batch took beyond weights and video; see `worldloom.memory`."""
    decode_peak_bytes: int | None
    """Memory that decoding it took beyond weights and latents."""
    latent_mean: float
    """Of all latent values; 0 is intended."""
    latent_std: float
    """Of all latent values; 1 is intended."""
    bits_per_pixel: float
    """Bits of the latents per pixel (frame x row x column) of video: 16 for each value of a continuous tokenizer,
    ``log2(codebook_size)`` for each code of a discrete one. Before any entropy coding."""
    compression: float
    """The 24 bits of an 8-bit RGB pixel over ``bits_per_pixel``."""
    codes: CodeUse | None
    """Of a discrete tokenizer."""
    windows: int
    """Test cases."""
    frames: int
    """Frames compared."""
    tokenizer: dict[str, Any]
    """Name and fingerprint."""
    dataset: dict[str, Any]
    """Folder and id."""
    config: TokenizerEvalConfig
    """What was asked."""
    examples: tuple[Example, ...] = field(default=(), compare=False)
    """For a report; not written to JSON."""
    code_counts: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """Of each codebook, how often every used code was used, most used first; not written to JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but frames and counts, JSON-ready."""
        left_out = ("examples", "code_counts")
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        return json.loads(json.dumps(plain, default=dataclasses.asdict))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TokenizerEval:
        """The reverse of `to_dict`."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        size = plain["config"]["size"]
        values["config"] = TokenizerEvalConfig(**{**plain["config"], "size": tuple(size) if size else None})
        if (codes := plain["codes"]) is not None:
            lists = {key: tuple(codes[key]) for key in ("usage", "perplexity")}
            values["codes"] = CodeUse(**{**codes, **lists})
        return cls(**values)


def evaluate(
    tokenizer: VideoTokenizer,
    dataset: Dataset | str | Path,
    config: TokenizerEvalConfig | None = None,
    *,
    name: str = "tokenizer",
    progress: Callable[[int, int], None] | None = None,
) -> TokenizerEval:
    """Encode and decode windows of a dataset of clips and compare.

    Args:
        name: the tokenizer's, for the record.
        progress: called with (windows done, windows in all).

    Raises:
        WorldloomError: lengths or sizes that the tokenizer cannot take, no clip long enough, torchmetrics missing.
    """
    import torch

    config = config or TokenizerEvalConfig()
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    if dataset.index.kind != "clips":
        raise WorldloomError("evaluation compares pixels", got=f"{dataset.root} holds latents", do="give the clips")
    if not len(dataset):
        raise WorldloomError("the dataset is empty", got=dataset.root, do="give one with clips")
    if (config.frames - 1) % tokenizer.temporal_ratio:
        ratio, whole = tokenizer.temporal_ratio, (config.frames - 1) // tokenizer.temporal_ratio
        use = f"use {1 + whole * ratio} or {1 + (whole + 1) * ratio}"
        raise WorldloomError(f"a window has 1 + {ratio}k frames", got=config.frames, do=use)
    windows = _plan(dataset, config)
    device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
    codebook_size = int(getattr(tokenizer, "codebook_size", 0))
    kept = set(spread(len(windows), config.videos))
    errors, similarity, multiscale, flickers = [], [], [], []
    examples: list[Example] = []
    codes: list[np.ndarray] = []
    scales: set[int] = set()
    peaks: tuple[int | None, int | None] = (None, None)
    seconds, moments, pixels, values = [0.0, 0.0], np.zeros(2), 0, 0
    for done, truth in _batches(dataset, windows, config):
        video = media.to_tensor(truth).to(device)
        with torch.inference_mode():
            if not done:
                peaks = _peaks(tokenizer, video)
            started = _now(device)
            latents = tokenizer.encode(video)
            between = _now(device)
            decoded = tokenizer.decode(latents)
            seconds[0] += between - started
            seconds[1] += _now(device) - between
            if codebook_size:
                indices: Any = tokenizer.to_indices(latents)  # pyright: ignore[reportAttributeAccessIssue]
                codes.append(indices.transpose(0, 1).flatten(1).cpu().numpy())  # (b, n, t, h, w) -> (n, b*t*h*w)
        made = media.to_frames(decoded)
        errors.extend(mse(made, truth))
        similarity.extend(ssim(made, truth))
        multiscale.extend(ms_ssim(made, truth))
        flickers.extend(flicker(made, truth))
        scales.add(ms_ssim_scales(truth.shape[2:4]))
        plain = latents.double().cpu().numpy()
        moments += (plain.sum(), np.square(plain).sum())
        pixels, values = pixels + math.prod(truth.shape[:4]), values + plain.size
        for row in sorted(kept & set(range(done, done + len(truth)))):
            number, start = windows[row]
            label = f"{dataset.clip(number).id[:12]} @ {start}"
            quality = float(psnr(errors[row]).mean())
            examples.append(Example(label, quality, truth[row - done], made[row - done]))
        if progress is not None:
            progress(done + len(truth), len(windows))
    error, count = np.stack(errors), len(windows) * config.frames
    mean = moments[0] / values
    counts = _code_counts(np.concatenate(codes, axis=1)) if codes else ()
    bits = sum(part.size for part in codes) * math.log2(codebook_size) if codes else 16 * values
    return TokenizerEval(
        psnr=float(psnr(error.mean())),
        psnr_per_frame=float(psnr(error).mean()),
        psnr_worst=float(psnr(error.max())),
        psnr_first=float(psnr(error[:, 0]).mean()),
        ssim=float(np.mean(similarity)),
        ms_ssim=float(np.mean(multiscale)),
        ms_ssim_scales=tuple(sorted(scales)),
        flicker=float(np.mean(flickers)) if config.frames > 1 else None,
        curve=tuple(psnr(error).mean(axis=0).tolist()),
        encode_fps=count / max(seconds[0], 1e-9),
        decode_fps=count / max(seconds[1], 1e-9),
        encode_peak_bytes=peaks[0],
        decode_peak_bytes=peaks[1],
        latent_mean=float(mean),
        latent_std=float(np.sqrt(max(moments[1] / values - mean**2, 0))),
        bits_per_pixel=bits / pixels,
        compression=24 * pixels / bits,
        codes=_code_use(counts, codebook_size) if counts else None,
        windows=len(windows),
        frames=count,
        tokenizer={"name": name, "fingerprint": tokenizer.fingerprint},
        dataset={"path": str(dataset.root), "id": dataset.index.id},
        config=config,
        examples=tuple(examples),
        code_counts=counts,
    )


def _peaks(tokenizer: VideoTokenizer, video: Any) -> tuple[int | None, int | None]:
    """Peak memory of encoding and of decoding a batch, in bytes; None where it is not measured."""
    tokenizer.decode(tokenizer.encode(video[:1, :, :1]))  # loads what is loaded on first use
    with peak_memory(video.device) as encoding:
        latents = tokenizer.encode(video)
    with peak_memory(video.device) as decoding:
        tokenizer.decode(latents)
    return encoding.bytes or None, decoding.bytes or None  # 0: less than a page, below what can be measured


def _code_counts(codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """``(codebooks, n)`` -> of each codebook, the numbers of uses of the codes that were used, descending."""
    return tuple(np.sort(np.unique(row, return_counts=True)[1])[::-1] for row in codes)


def _code_use(counts: tuple[np.ndarray, ...], size: int) -> CodeUse:
    shares = [each / each.sum() for each in counts]
    return CodeUse(
        size=size,
        seen=int(counts[0].sum()),
        usage=tuple(len(each) / size for each in counts),
        perplexity=tuple(float(np.exp(-(p * np.log(p)).sum())) for p in shares),
    )


def _plan(dataset: Dataset, config: TokenizerEvalConfig) -> list[tuple[int, int]]:
    """(sample, first frame) of each window, thinned evenly."""
    found: list[tuple[int, int]] = []
    for number, clip in enumerate(dataset.clips()):
        found += [(number, start) for start in range(0, clip.frames - config.frames + 1, config.frames)]
    if not found:
        raise WorldloomError(
            f"no clip has the {config.frames} frames of a window", got=dataset.root, do="set fewer --frames"
        )
    if config.clips and len(found) > config.clips:
        found = [found[i] for i in spread(len(found), config.clips)]
    return found


def _batches(
    dataset: Dataset, windows: list[tuple[int, int]], config: TokenizerEvalConfig
) -> Iterator[tuple[int, np.ndarray]]:
    held: list[np.ndarray] = []
    pixels, number, first = None, -1, 0
    for sample, start in windows:
        if sample != number:
            video = dataset.load(sample).video
            assert video is not None
            pixels, number = media.read_frames(video, size=config.size), sample
        assert pixels is not None
        part = pixels[start : start + config.frames]
        if len(part) != config.frames:
            raise WorldloomError("a clip has fewer frames than its record says", got=dataset.clip(sample).id)
        if held and part.shape != held[0].shape:  # clips of different sizes go in batches of their own
            yield first, np.stack(held)
            first, held = first + len(held), []
        held.append(part)
        if len(held) == config.batch_size:
            yield first, np.stack(held)
            first, held = first + len(held), []
    if held:
        yield first, np.stack(held)


def _now(device: Any) -> float:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


# -- the command -----------------------------------------------------------------------------------------------------


def run(
    tokenizers: Mapping[str, VideoTokenizer], data: str | Path, config: TokenizerEvalConfig, out: str | Path
) -> list[TokenizerEval]:
    """What ``worldloom tokenize eval`` does: measure, or find the finished measurement; write it, and record it.

    ``metrics.json`` and ``summary.json`` hold the figures of one tokenizer, or a list ``tokenizers`` of several.

    Args:
        tokenizers: name -> tokenizer; all see the same windows.
    """
    from worldloom_tokenizers.evaluate_report import write_report

    out, dataset = Path(out), open_dataset(data)
    fingerprints = {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()}
    decides = [fingerprints, dataset.index.id, dataclasses.asdict(config), code_version()]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    if (found := _finished(out, key)) is not None:
        return found
    results = []
    for name, tokenizer in tokenizers.items():
        with show_progress(f"evaluating {name}" if len(tokenizers) > 1 else "evaluating") as shown:
            results.append(evaluate(tokenizer, dataset, config, name=name, progress=shown))
    atomic_write(out / "metrics.json", json.dumps({"key": key, **_written(results)}, indent=1) + "\n")
    inputs = [*(f"model:{name}@{fingerprint}" for name, fingerprint in fingerprints.items()), dataset.index.id]
    artifact = Store().put(out / "metrics.json", kind="evaluation", inputs=inputs, config=dataclasses.asdict(config))
    write_report(results, out / "report.html")
    summary = {"id": artifact.id, **_written(results, ("curve",)), "key": key}
    summary |= {"report": str(out / "report.html"), "code_version": code_version()}
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: the evaluation is whole
    return results


def _written(results: list[TokenizerEval], but: tuple[str, ...] = ()) -> dict[str, Any]:
    plain = [{key: value for key, value in result.to_dict().items() if key not in but} for result in results]
    return plain[0] if len(plain) == 1 else {"tokenizers": plain}


def _finished(out: Path, key: str) -> list[TokenizerEval] | None:
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        if summary["key"] != key or metrics.pop("key") != key or not (out / "report.html").is_file():
            return None
        return [TokenizerEval.from_dict(plain) for plain in metrics.get("tokenizers", [metrics])]
    except (OSError, ValueError, KeyError, TypeError):
        return None
