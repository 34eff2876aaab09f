"""The commands ``worldloom tokenize list|encode|decode|eval|train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from worldloom.errors import WorldloomError
from worldloom_tokenizers.evaluate_actions import actions_group
from worldloom_tokenizers.options import Size

_tokenizer = click.option(
    "--tokenizer", "name", default="loom-cv-nano", show_default=True, help="Catalog name or checkpoint folder."
)
_device = click.option("--device", default="cpu", show_default=True, help="Where it runs, e.g. cuda.")
_folder = click.Path(file_okay=False)
_positive = click.IntRange(min=1)


@click.group()
def tokenize() -> None:
    """Encode, decode, evaluate and train video tokenizers."""


def _load(name: str, device: str) -> Any:
    """A video tokenizer on a device that is there."""
    from worldloom.loading import check_device
    from worldloom.protocols import VideoTokenizer
    from worldloom_tokenizers.checkpoint import load_tokenizer

    check_device(device)
    tokenizer = load_tokenizer(name, device=device)
    if not isinstance(tokenizer, VideoTokenizer):
        raise WorldloomError(
            "this tokenizer does not encode video and decode it again",
            got=name,
            do="worldloom tokenize list shows the continuous and discrete ones, which do",
        )
    return tokenizer


@tokenize.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(as_json: bool) -> None:
    """The tokenizers that are installed: kind, ratio, channels or codebook, size, and whether their files are whole."""
    import dataclasses
    import json

    from worldloom_tokenizers.listing import listed, print_table

    problems: list[str] = []
    found = listed(problems)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(tokenizer) for tokenizer in found], indent=1))
    else:
        print_table(found)
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)


@tokenize.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--out", required=True, type=_folder, help="Folder of the latents.")
@_tokenizer
@click.option("--frames", type=_positive, default=33, show_default=True, help="Frames of a window, 1 + 4k.")
@click.option("--stride", type=_positive, help="Distance of windows.  [default: the window, no overlap]")
@click.option("--size", type=Size(), default="64", show_default=True, help="Clips are cropped and resized to this.")
@click.option("--batch-size", type=_positive, default=4, show_default=True, help="Windows at a time.")
@click.option("--text-encoder", help="Encode the clips' captions too, e.g. with minilm.")
@click.option("--pad", is_flag=True, help="Of a video file, encode the last frames too where they do not fill a group.")
@_device
def encode(
    data: str,
    out: str,
    name: str,
    frames: int,
    stride: int | None,
    size: tuple[int, int],
    batch_size: int,
    text_encoder: str | None,
    pad: bool,
    device: str,
) -> None:
    """Encode DATA: a dataset of clips to a dataset of latents, or a video file to one .npy file.

    A discrete tokenizer's codes are written beside its latents. A finished encoding is found again; other parameters
    encode anew. --frames, --stride and --batch-size are those of a dataset: a file is encoded whole.
    """
    import json

    from worldloom.artifacts import atomic_write
    from worldloom.progress import progress
    from worldloom_tokenizers.encode import encode_dataset
    from worldloom_tokenizers.files import encode_file
    from worldloom_tokenizers.text import load_text_encoder

    if pad and not Path(data).is_file():
        raise WorldloomError(
            "--pad is for a video file: the windows of a dataset are whole",
            got=data,
            do="leave it out; a smaller --frames or --stride leaves out less",
        )
    tokenizer = _load(name, device)
    if Path(data).is_file():
        done = encode_file(data, tokenizer, out, name=name, size=size, pad=pad)
        shape = "x".join(map(str, done.shape))
        click.echo(f"latents {shape} (channels, frames, height, width) of {done.frames} frames: {done.path}")
        if done.left_out:
            click.echo(f"the last {_frames(done.left_out)} left out: they fill no group (--pad encodes them)")
        if done.padded:
            click.echo(f"the last frame was repeated {done.padded} times to fill its group; decode cuts that off")
        return
    with progress("encoding") as shown:
        summary = encode_dataset(
            data, tokenizer, out, name=name, frames=frames, stride=stride, size=size, batch_size=batch_size,
            text_encoder=load_text_encoder(text_encoder, device=device) if text_encoder else None, progress=shown,
        )  # fmt: skip
    counts = {"windows": summary.windows, "clips": summary.clips, "short": summary.short, "left_out": summary.left_out}
    atomic_write(Path(out) / "summary.json", json.dumps({**counts, "tokenizer": name}, indent=1) + "\n")
    short = f", {summary.short} clips too short" if summary.short else ""
    click.echo(f"{summary.windows} windows of {summary.clips} clips{short}: {out}")
    if summary.left_out:
        click.echo(f"{_frames(summary.left_out)} left out: they lie in no window of {frames}")


def _frames(count: int) -> str:
    """``1 frame is``, ``3 frames are``."""
    return "frame is" if count == 1 else f"{count} frames are"


@tokenize.command()
@click.argument("latents", type=click.Path(exists=True))
@click.option("--out", required=True, type=_folder, help="Folder of the videos.")
@click.option("--tokenizer", "name", help="Catalog name or folder.  [default: the one recorded with the latents]")
@click.option(
    "--clips", type=click.IntRange(min=0), default=16, show_default=True,
    help="Of a dataset, decode this many; 0 for all.",
)  # fmt: skip
@click.option(
    "--fps", type=click.FloatRange(0, min_open=True), help="Frames per second.  [default: as recorded, else 10]"
)
@_device
def decode(latents: str, out: str, name: str | None, clips: int, fps: float | None, device: str) -> None:
    """Decode LATENTS, a dataset of latents or a .npy file of latents or codes, to videos."""
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
@click.option(
    "--tokenizer", "names", multiple=True, default=("loom-cv-nano",), show_default=True,
    help="Catalog name or checkpoint folder; give it several times to compare.",
)  # fmt: skip
@click.option("--frames", type=_positive, default=17, show_default=True, help="Frames of a window, 1 + 4k.")
@click.option("--size", type=Size(), default="64", show_default=True, help="Clips are cropped and resized to this.")
@click.option(
    "--clips", type=click.IntRange(min=0), default=128, show_default=True,
    help="Test windows, spread over the dataset; 0 for all.",
)  # fmt: skip
@click.option("--batch-size", type=_positive, default=4, show_default=True, help="Windows at a time.")
@_device
def evaluate(
    data: str,
    out: str,
    names: tuple[str, ...],
    frames: int,
    size: tuple[int, int],
    clips: int,
    batch_size: int,
    device: str,
) -> None:
    """Reconstruct the clips of DATA and measure quality, size, speed and memory.

    A report shows originals beside reconstructions. With several tokenizers there is a column for each, and the report
    shows the same clips through all of them.
    """
    from rich.console import Console
    from rich.table import Table

    from worldloom_tokenizers.evaluate import TokenizerEvalConfig, run
    from worldloom_tokenizers.evaluate_report import figures, labels

    if len(set(names)) < len(names):
        raise WorldloomError("a tokenizer is compared with others, not with itself", got=", ".join(names))
    config = TokenizerEvalConfig(frames, size, clips, batch_size)
    results = run({name: _load(name, device) for name in names}, data, config, out)
    table = Table(box=None, pad_edge=False, show_header=len(results) > 1, header_style="dim")
    table.add_column()
    for label in labels(results):
        table.add_column(label, justify="right", overflow="fold")
    for row in figures(results):
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


tokenize.add_command(actions_group)


@tokenize.command("import")
@click.argument("source", type=click.Path(exists=True))
@click.option("--variant", required=True, help="Which published tokenizer it is, e.g. cosmos-cv8x8x8 or wan2.1.")
@click.option("--out", required=True, type=_folder, help="Folder of the tokenizer.")
def import_(source: str, variant: str, out: str) -> None:
    """Make a tokenizer folder of SOURCE, the published weights of Cosmos-Tokenizer or of a Wan autoencoder.

    SOURCE is a safetensors file, or a folder with one, in the native or the diffusers layout. Pickled files and
    TorchScript archives are converted first: worldloom models convert.
    """
    from worldloom_tokenizers.released import import_released

    model = import_released(source, variant, out)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{variant}, {parameters / 1e6:.1f} M parameters: {out}")


@tokenize.command("export")
@click.argument("tokenizer")
@click.option(
    "--layout", type=click.Choice(["native", "diffusers"]), required=True, help="Whose names the weights get."
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The safetensors file.")
def export(tokenizer: str, layout: str, out: str) -> None:
    """Write the weights of TOKENIZER, a folder of a published kind, as others publish them."""
    from worldloom_tokenizers.checkpoint import load_tokenizer
    from worldloom_tokenizers.released import export_released

    click.echo(export_released(load_tokenizer(tokenizer), out, layout))  # pyright: ignore[reportArgumentType]
