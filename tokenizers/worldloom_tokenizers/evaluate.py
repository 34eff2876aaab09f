"""How well a tokenizer reconstructs clips, how fast, and how its latents are spread.

PSNR is ``10 log10(255^2 / MSE)`` of 8-bit frames: ``psnr`` takes the mean error of all frames of all windows, as
torchmetrics has it, ``psnr_per_frame`` is the mean of every frame's own. SSIM is the mean over the same frames. See
`worldloom.compare`. Frame 0 of a window is encoded alone, the others in groups.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.artifacts import Store, atomic_write, code_version
from worldloom.compare import mse, psnr, side_by_side, ssim
from worldloom.errors import WorldloomError
from worldloom.progress import progress as show_progress
from worldloom.protocols import VideoTokenizer
from worldloom.shards import Dataset, open_dataset

if TYPE_CHECKING:
    from worldloom.report import Report


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
class TokenizerEval:
    """What was measured."""

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
    curve: tuple[float, ...]
    """dB for each frame of a window."""
    encode_fps: float
    """Frames encoded per second of wall-clock time, in the batches of the test."""
    decode_fps: float
    """Frames decoded per second."""
    latent_mean: float
    """Of all latent values; 0 is intended."""
    latent_std: float
    """Of all latent values; 1 is intended."""
    compression: float
    """Bytes of 8-bit video over bytes of float16 latents."""
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
    examples: tuple[tuple[str, np.ndarray, np.ndarray], ...] = field(default=(), compare=False)
    """Caption, original, reconstruction, for a report; not written to JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, JSON-ready."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "examples"}
        return {**plain, "curve": list(self.curve), "config": dataclasses.asdict(self.config)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> TokenizerEval:
        """The reverse of `to_dict`, without frames."""
        config = {**plain["config"], "size": tuple(plain["config"]["size"]) if plain["config"]["size"] else None}
        return cls(**{**plain, "config": TokenizerEvalConfig(**config), "curve": tuple(plain["curve"])})


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
    if (config.frames - 1) % tokenizer.temporal_ratio:
        raise WorldloomError(f"a window has 1 + {tokenizer.temporal_ratio}k frames", got=config.frames)
    windows = _plan(dataset, config)
    device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
    kept = set(np.linspace(0, len(windows) - 1, min(config.videos, len(windows))).round().astype(int).tolist())
    errors: list[np.ndarray] = []
    similarity: list[np.ndarray] = []
    examples: list[tuple[str, np.ndarray, np.ndarray]] = []
    seconds, moments, pixels, values = [0.0, 0.0], np.zeros(2), 0, 0
    for done, truth in _batches(dataset, windows, config):
        video = media.to_tensor(truth).to(device)
        with torch.inference_mode():
            started = _now(device)
            latents = tokenizer.encode(video)
            between = _now(device)
            decoded = tokenizer.decode(latents)
            seconds[0] += between - started
            seconds[1] += _now(device) - between
        made = media.to_frames(decoded)
        errors.extend(mse(made, truth))
        similarity.extend(ssim(made, truth))
        plain = latents.double().cpu().numpy()
        moments += (plain.sum(), np.square(plain).sum())
        pixels, values = pixels + truth.size, values + plain.size
        for row in sorted(kept & set(range(done, done + len(truth)))):
            number, start = windows[row]
            caption = f"{dataset.clip(number).id[:12]} @ {start}: {psnr(errors[row]).mean():.1f} dB"
            examples.append((caption, truth[row - done], made[row - done]))
        if progress is not None:
            progress(done + len(truth), len(windows))
    error, count = np.stack(errors), len(windows) * config.frames
    mean = moments[0] / values
    return TokenizerEval(
        psnr=float(psnr(error.mean())),
        psnr_per_frame=float(psnr(error).mean()),
        psnr_worst=float(psnr(error.max())),
        psnr_first=float(psnr(error[:, 0]).mean()),
        ssim=float(np.mean(similarity)),
        curve=tuple(psnr(error).mean(axis=0).tolist()),
        encode_fps=count / max(seconds[0], 1e-9),
        decode_fps=count / max(seconds[1], 1e-9),
        latent_mean=float(mean),
        latent_std=float(np.sqrt(max(moments[1] / values - mean**2, 0))),
        compression=pixels / (2 * values),
        windows=len(windows),
        frames=count,
        tokenizer={"name": name, "fingerprint": tokenizer.fingerprint},
        dataset={"path": str(dataset.root), "id": dataset.index.id},
        config=config,
        examples=tuple(examples),
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
        found = [found[int(i)] for i in np.linspace(0, len(found) - 1, config.clips).round()]
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
    tokenizer: VideoTokenizer, name: str, data: str | Path, config: TokenizerEvalConfig, out: str | Path
) -> TokenizerEval:
    """What ``worldloom tokenize eval`` does: measure, or find the finished measurement; write it, and record it."""
    out, dataset = Path(out), open_dataset(data)
    decides = [tokenizer.fingerprint, dataset.index.id, dataclasses.asdict(config), code_version()]
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    if (found := _finished(out, key)) is not None:
        return found
    with show_progress("evaluating") as shown:
        result = evaluate(tokenizer, dataset, config, name=name, progress=shown)
    atomic_write(out / "metrics.json", json.dumps({"key": key, **result.to_dict()}, indent=1) + "\n")
    inputs = [f"model:{name}@{tokenizer.fingerprint}", dataset.index.id]
    artifact = Store().put(out / "metrics.json", kind="evaluation", inputs=inputs, config=dataclasses.asdict(config))
    write_report(result, out / "report.html")
    summary = {"id": artifact.id, **{k: v for k, v in result.to_dict().items() if k != "curve"}, "key": key}
    summary |= {"report": str(out / "report.html"), "code_version": code_version()}
    atomic_write(out / "summary.json", json.dumps(summary, indent=1) + "\n")  # last: the evaluation is whole
    return result


def _finished(out: Path, key: str) -> TokenizerEval | None:
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        if summary["key"] != key or metrics.pop("key") != key or not (out / "report.html").is_file():
            return None
        return TokenizerEval.from_dict(metrics)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_report(result: TokenizerEval, path: str | Path) -> Path:
    """A self-contained HTML page."""
    from worldloom.report import Report

    title = f"Reconstruction by {result.tokenizer['name']}"
    report = Report(title, f"{result.dataset['path']} ({result.dataset['id']})")
    add_to_report(report, result)
    return report.save(path)


def add_to_report(report: Report, result: TokenizerEval) -> None:
    """Figures, curve and videos, as blocks of a report."""
    report.facts(
        {
            "PSNR": f"{result.psnr:.2f} dB",
            "SSIM": f"{result.ssim:.3f}",
            "encoded": f"{result.encode_fps:.3g} frames/s",
            "decoded": f"{result.decode_fps:.3g} frames/s",
        }
    )
    report.table(("", "value"), figures(result), f"{result.windows} windows of {result.config.frames} frames")
    curve = {"reconstruction": list(enumerate(result.curve))}
    report.line_chart("PSNR along a window", curve, "frame", "dB")
    if result.examples:
        report.text("Original on the left, reconstruction on the right.")
        report.videos([(caption, side_by_side(pair)) for caption, *pair in result.examples], columns=3)


def figures(result: TokenizerEval) -> list[tuple[str, str]]:
    """Rows of the table."""
    return [
        ("PSNR", f"{result.psnr:.2f} dB"),
        ("PSNR, mean of frames", f"{result.psnr_per_frame:.2f} dB"),
        ("PSNR of first frames", f"{result.psnr_first:.2f} dB"),
        ("PSNR of the worst frame", f"{result.psnr_worst:.2f} dB"),
        ("SSIM", f"{result.ssim:.4f}"),
        ("compression, 8-bit video to float16 latents", f"{result.compression:.1f}x"),
        ("latents, mean and standard deviation", f"{result.latent_mean:.3f}, {result.latent_std:.3f}"),
        ("encoding", f"{result.encode_fps:.3g} frames/s"),
        ("decoding", f"{result.decode_fps:.3g} frames/s"),
    ]
