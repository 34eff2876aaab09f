"""The figures of tokenizers as a table and as an HTML page, one tokenizer or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from worldloom.compare import MS_SSIM_WEIGHTS, error_map, side_by_side
from worldloom.report import Report
from worldloom_tokenizers.evaluate import TokenizerEval

_GAIN = 4  # of the error map


def write_report(results: Sequence[TokenizerEval], path: str | Path) -> Path:
    """A self-contained page; returns its path."""
    names = labels(results)
    report = Report(f"Reconstruction by {_listed(names)}", f"{results[0].dataset['path']} ({results[0].dataset['id']})")
    add_to_report(report, results)
    return report.save(path)


def add_to_report(report: Report, results: Sequence[TokenizerEval]) -> None:
    """Figures, curves and videos of the same windows, as blocks of a report."""
    names, first = labels(results), results[0]
    if len(results) == 1:
        report.facts(
            {
                "PSNR": f"{first.psnr:.2f} dB",
                "SSIM": f"{first.ssim:.3f}",
                "bits per pixel": f"{first.bits_per_pixel:.3g}",
                "encoded frames/s": f"{first.encode_fps:.3g}",
                "decoded frames/s": f"{first.decode_fps:.3g}",
            }
        )
    caption = f"{first.windows} windows of {first.config.frames} frames, {first.config.batch_size} at a time"
    report.table(("", *(names if len(results) > 1 else ["value"])), figures(results), caption)
    curves = {name: list(enumerate(result.curve)) for name, result in zip(names, results, strict=True)}
    report.line_chart("PSNR along a window", curves, "frame", "dB")
    coverage = {
        name if len(result.code_counts) == 1 else f"{name}, codebook {number}": _coverage(counts)
        for name, result in zip(names, results, strict=True)
        for number, counts in enumerate(result.code_counts, start=1)
    }
    if coverage:
        report.line_chart("What share of all codes the most used ones make up", coverage, "most used codes", "% of use")
    if not first.examples:
        return
    if len(results) == 1:
        report.text(f"Original, reconstruction, and their difference times {_GAIN}.")
        videos = [
            (f"{e.label}: {e.psnr:.1f} dB", side_by_side((e.truth, e.made, error_map(e.made, e.truth, _GAIN))))
            for e in first.examples
        ]
    else:
        report.text(f"From left to right: original, {_listed(names)}.")
        videos = [
            (
                f"{row[0].label}: {', '.join(f'{e.psnr:.1f}' for e in row)} dB",
                side_by_side((row[0].truth, *(e.made for e in row))),
            )
            for row in zip(*(result.examples for result in results), strict=True)
        ]
    report.videos(videos, columns=2)


def figures(results: Sequence[TokenizerEval]) -> list[tuple[str, ...]]:
    """Rows of the table: what it is, then its value for each tokenizer; rows that no tokenizer has are left out."""
    cells: list[tuple[str, Callable[[TokenizerEval], str | None]]] = [
        ("PSNR", lambda r: f"{r.psnr:.2f} dB"),
        ("PSNR, mean of frames", lambda r: f"{r.psnr_per_frame:.2f} dB"),
        ("PSNR of first frames", lambda r: f"{r.psnr_first:.2f} dB"),
        ("PSNR of the worst frame", lambda r: f"{r.psnr_worst:.2f} dB"),
        ("SSIM", lambda r: f"{r.ssim:.4f}"),
        (f"MS-SSIM, {_scales(results[0])} scales", lambda r: f"{r.ms_ssim:.4f}"),
        ("flicker, 0 is none", lambda r: None if r.flicker is None else f"{r.flicker:.2f} levels"),
        ("bits per pixel", lambda r: f"{r.bits_per_pixel:.4g}"),
        ("compression of 8-bit video", lambda r: f"{r.compression:.1f}x"),
        ("codes", lambda r: None if r.codes is None else _codebooks(r)),
        ("codes used", lambda r: None if r.codes is None else _range([100 * u for u in r.codes.usage], " %")),
        ("perplexity of the codes", lambda r: None if r.codes is None else _range(r.codes.perplexity, "")),
        ("latents, mean and standard deviation", lambda r: f"{_signed(r.latent_mean)}, {r.latent_std:.3f}"),
        ("encoding", lambda r: f"{r.encode_fps:.3g} frames/s"),
        ("decoding", lambda r: f"{r.decode_fps:.3g} frames/s"),
        ("peak memory of encoding", lambda r: _size(r.encode_peak_bytes)),
        ("peak memory of decoding", lambda r: _size(r.decode_peak_bytes)),
    ]
    rows = [(label, [cell(result) for result in results]) for label, cell in cells]
    return [(label, *(value or "–" for value in values)) for label, values in rows if any(values)]


def labels(results: Sequence[TokenizerEval]) -> list[str]:
    """A short name for each tokenizer: that of its folder, or the whole path where two folders share one."""
    names = [str(result.tokenizer["name"]) for result in results]
    short = [Path(name).name for name in names]
    return [name if short.count(last) > 1 else last for name, last in zip(names, short, strict=True)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _scales(result: TokenizerEval) -> str:
    found, most = result.ms_ssim_scales, len(MS_SSIM_WEIGHTS)
    return f"{most}" if found == (most,) else f"{' or '.join(map(str, found))} of {most}"


def _codebooks(result: TokenizerEval) -> str:
    assert result.codes is not None
    count = len(result.codes.usage)
    return f"{result.codes.size}" if count == 1 else f"{count} codebooks of {result.codes.size}"


def _range(values: Sequence[float], unit: str) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _signed(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _size(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:.3g} MiB"


def _coverage(counts: np.ndarray) -> list[tuple[float, float]]:
    """(how many of the most used codes, their share of all uses in per cent)."""
    share = np.cumsum(counts) / counts.sum() * 100
    return [(0.0, 0.0), *((float(n), float(s)) for n, s in enumerate(share, start=1))]
