"""The commands ``worldloom tokenize encode|decode|eval|train``."""

from __future__ import annotations

import re
from pathlib import Path

import click

_tokenizer = click.option(
    "--tokenizer", "name", default="loom-cv-nano", show_default=True, help="Catalog name or checkpoint folder."
)
_device = click.option("--device", default="cpu", show_default=True, help="Where it runs, e.g. cuda.")
_folder = click.Path(file_okay=False)


class Size(click.ParamType):
    """``64`` or ``64x96``: height, or height x width."""

    name = "H[xW]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int] | object:
        """Text to (height, width)."""
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
        if found is None:
            self.fail(f"{value!r} is not a size such as 64 or 64x96", param, ctx)
        return int(found[1]), int(found[2] or found[1])


@click.group()
def tokenize() -> None:
    """Encode, decode, evaluate and train video tokenizers."""


@tokenize.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--out", required=True, type=_folder, help="Folder of the latents.")
@_tokenizer
@click.option("--frames", default=33, show_default=True, help="Frames of a window, 1 + 4k.")
@click.option("--stride", type=int, help="Distance of windows.  [default: the window, no overlap]")
@click.option("--size", type=Size(), default="64", show_default=True, help="Clips are cropped and resized to this.")
@click.option("--batch-size", default=4, show_default=True, help="Windows at a time.")
@_device
def encode(
    data: str,
    out: str,
    name: str,
    frames: int,
    stride: int | None,
    size: tuple[int, int],
    batch_size: int,
    device: str,
) -> None:
    """Encode DATA: a dataset of clips to a dataset of latents, or a video file to one .npy file.

    A finished encoding is found again; other parameters encode anew.
    """
    import json

    from worldloom.artifacts import atomic_write
    from worldloom.loading import check_device
    from worldloom.progress import progress
    from worldloom_tokenizers.checkpoint import load_tokenizer
    from worldloom_tokenizers.encode import encode_dataset
    from worldloom_tokenizers.files import encode_file

    check_device(device)
    tokenizer = load_tokenizer(name, device=device)
    if Path(data).is_file():
        written, shape = encode_file(data, tokenizer, out, name=name, size=size)
        click.echo(f"latents {'x'.join(map(str, shape))} (channels, frames, height, width): {written}")
        return
    with progress("encoding") as shown:
        summary = encode_dataset(
            data, tokenizer, out, name=name, frames=frames, stride=stride, size=size, batch_size=batch_size,
            progress=shown,
        )  # fmt: skip
    counts = {"windows": summary.windows, "clips": summary.clips, "short": summary.short}
    atomic_write(Path(out) / "summary.json", json.dumps({**counts, "tokenizer": name}, indent=1) + "\n")
    short = f", {summary.short} clips too short" if summary.short else ""
    click.echo(f"{summary.windows} windows of {summary.clips} clips{short}: {out}")


@tokenize.command()
@click.argument("latents", type=click.Path(exists=True))
@click.option("--out", required=True, type=_folder, help="Folder of the videos.")
@click.option("--tokenizer", "name", help="Catalog name or folder.  [default: the one recorded with the latents]")
@click.option("--clips", default=16, show_default=True, help="Of a dataset, decode this many; 0 for all.")
@click.option("--fps", type=float, help="Frames per second.  [default: as recorded, else 10]")
@_device
def decode(latents: str, out: str, name: str | None, clips: int, fps: float | None, device: str) -> None:
    """Decode LATENTS, a dataset of latents or a .npy file, to videos."""
    from worldloom.loading import check_device
    from worldloom.progress import progress
    from worldloom_tokenizers.files import decode_dataset, decode_file

    check_device(device)
    if Path(latents).is_file():
        click.echo(decode_file(latents, out, name=name, fps=fps, device=device))
        return
    with progress("decoding") as shown:
        written = decode_dataset(latents, out, name=name, clips=clips, fps=fps, device=device, progress=shown)
    click.echo(f"{len(written)} videos: {out}")


@tokenize.command("eval")
@click.argument("data", type=click.Path(exists=True, file_okay=False))
@click.option("--out", default="out/tokenize-eval", show_default=True, type=_folder, help="Folder.")
@_tokenizer
@click.option("--frames", default=17, show_default=True, help="Frames of a window, 1 + 4k.")
@click.option("--size", type=Size(), default="64", show_default=True, help="Clips are cropped and resized to this.")
@click.option("--clips", default=128, show_default=True, help="Test windows, spread over the dataset; 0 for all.")
@click.option("--batch-size", default=4, show_default=True, help="Windows at a time.")
@_device
def evaluate(
    data: str, out: str, name: str, frames: int, size: tuple[int, int], clips: int, batch_size: int, device: str
) -> None:
    """Reconstruct the clips of DATA and measure: PSNR, SSIM, speed; a report with originals beside reconstructions."""
    from rich.console import Console
    from rich.table import Table

    from worldloom.loading import check_device
    from worldloom_tokenizers.checkpoint import load_tokenizer
    from worldloom_tokenizers.evaluate import TokenizerEvalConfig, figures, run

    check_device(device)
    config = TokenizerEvalConfig(frames, size, clips, batch_size)
    result = run(load_tokenizer(name, device=device), name, data, config, out)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in figures(result):
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)
    click.echo(f"report {Path(out) / 'report.html'}  (figures in {Path(out) / 'metrics.json'})")


@tokenize.command(context_settings={"ignore_unknown_options": True})
@click.option("--data", required=True, help="Dataset of clips.")
@click.option("--out", required=True, help="Folder of the run; running again resumes it.")
@click.option("--model", default="causal-vae/nano", show_default=True, help="Checkpoint or preset to start from.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED, metavar="[FINETUNE OPTIONS]...")
def train(data: str, out: str, model: str, more: tuple[str, ...]) -> None:
    """Train a tokenizer: `worldloom finetune tokenizer`, whose other options it takes too (--set, --config, ...)."""
    from worldloom import registry

    registry.entry("recipes", "tokenizer")  # says what is missing where training is not installed
    finetune: click.Command = registry.load("commands", "finetune")
    words = ["tokenizer", "--data", data, "--out", out, "--model", model, *more]
    finetune.main(words, prog_name="worldloom finetune", standalone_mode=False)
