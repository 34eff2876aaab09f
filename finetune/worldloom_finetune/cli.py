"""The command ``worldloom finetune``."""

from __future__ import annotations

import click


@click.command()
@click.argument("recipe")
@click.option("--data", help="Dataset: clips (encoded first) or latents; several, separated by commas.")
@click.option("--model", help="Checkpoint name or folder, or a preset such as predict/nano to train from scratch.")
@click.option("--out", help="Folder of the run; running again with the same folder resumes it.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="TOML file over the recipe's defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting, e.g. lora.rank=8.")
@click.option("--devices", type=int, help="Processes: GPUs, or CPU processes.")
@click.option(
    "--strategy", type=click.Choice(["auto", "ddp", "deepspeed"]), help="How several processes share the work."
)
@click.option("--zero", type=click.IntRange(0, 3), help="DeepSpeed's ZeRO stage.")
@click.option("--tokenizer", default="", help="Tokenizer for clips that are not encoded yet.")
@click.option("--name", default="", help="Name in the model registry (default: the folder's).")
@click.option("--help-config", is_flag=True, help="List every setting of the recipe and its default.")
def finetune(
    recipe: str,
    data: str | None,
    model: str | None,
    out: str | None,
    config: str | None,
    overrides: tuple[str, ...],
    devices: int | None,
    strategy: str | None,
    zero: int | None,
    tokenizer: str,
    name: str,
    help_config: bool,
) -> None:
    """Train or fine-tune by a RECIPE ("world", "tokenizer", ...): whole, or by LoRA with --set lora.rank=8."""
    from worldloom_finetune import train

    given = {"trainer.devices": devices, "trainer.strategy": strategy, "trainer.zero_stage": zero}
    flags = tuple(f"{key}={value}" for key, value in given.items() if value is not None)
    settings = train.load_config(recipe, config, (*overrides, *flags))
    if help_config:
        _print_settings(settings)
        return
    missing = [option for option, value in (("--data", data), ("--model", model), ("--out", out)) if not value]
    if missing or data is None or model is None or out is None:
        raise click.UsageError(f"missing {', '.join(missing)}")
    request = train.Request(recipe, data, model, out, name=name, tokenizer=tokenizer)
    summary = train.run(request, settings)
    rate = f"{summary['steps_per_second']:.3g} steps/s" if summary["steps_per_second"] else ""
    figures = "  ".join(f"{key} {value:.4g}" for key, value in summary["figures"].items())
    click.echo(f"{summary['steps']} steps  {rate}  {figures}")
    click.echo(f"model {summary['model']}  ({summary['artifact']}; summary in {out}/summary.json)")


def _print_settings(settings: object) -> None:
    from worldloom import config as configs

    effective = configs.to_dict(settings)
    for key, kind, _, sentence in configs.describe(type(settings)):
        value: object = effective
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        click.echo(f"{key} = {value}  ({kind})\n    {sentence}")
