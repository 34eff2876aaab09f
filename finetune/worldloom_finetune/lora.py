"""LoRA through peft: inject adapters, name what is trained, save and load in peft's layout.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. B starts at zero, so a fresh adapter changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from worldloom.errors import WorldloomError, missing_extra
from worldloom.weights import write_weights
from worldloom_finetune.config import LoraConfig

WEIGHTS = "adapter_model.safetensors"
_SETTINGS = "_worldloom_lora"
_PREFIX = "base_model.model."  # what peft writes before every key of an adapter file


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """Full names of the linear layers of attention and MLPs inside the repeated blocks; of all where there are none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linears if "blocks." in name and _in_attention_or_mlp(name)]
    return tuple(chosen or linears)


def _in_attention_or_mlp(name: str) -> bool:
    return any(part == "mlp" or part.endswith("attn") for part in name.split("."))


def inject(model: nn.Module, config: LoraConfig, trained_whole: Sequence[str] = ()) -> None:
    """Put adapters into `model` in place and freeze everything else.

    Args:
        model: the base model.
        config: rank above 0.
        trained_whole: names of modules that are trained and saved whole (peft's ``modules_to_save``), e.g. an action
            embedding that had to change its size.

    Raises:
        WorldloomError: peft is missing, or no layer matches the targets.
    """
    try:
        import peft
    except ImportError as error:
        raise missing_extra("peft", "finetune") from error
    targets = config.targets or linear_names(model)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # pyright: ignore[reportArgumentType]  (a float scale is fine)
        lora_dropout=config.dropout,
        target_modules=_endings(targets, trained_whole, model),
        modules_to_save=list(trained_whole) or None,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)
    model.__dict__[_SETTINGS] = settings


def _endings(targets: Sequence[str], trained_whole: Sequence[str], model: nn.Module) -> list[str]:
    """Full names of the linear layers that `targets` mean, without those inside a module that is trained whole."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        inside = any(name == whole or name.startswith(f"{whole}.") for whole in trained_whole)
        if not inside and any(name == t or name.endswith(f".{t}") for t in targets):
            found.append(name)
    if not found:
        raise WorldloomError(
            "no linear layer matches lora.targets",
            got=list(targets),
            do=f"use endings such as {sorted({n.rpartition('.')[2] for n in linear_names(model)})}",
        )
    return found


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as peft lays them out.

    `worldloom_model_zoo.load_model` reads them back, and so does ``peft.PeftModel.from_pretrained``.
    """
    import peft

    settings = model.__dict__[_SETTINGS]
    tensors = peft.get_peft_model_state_dict(model, adapter_name="default")
    write_weights({_PREFIX + name: tensor for name, tensor in tensors.items()}, folder, WEIGHTS)
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    record = json.loads(file.read_text())
    record["target_modules"] = sorted(
        record["target_modules"]
    )  # peft writes a set in no order; equal runs, equal bytes
    file.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count(model: nn.Module) -> tuple[int, int]:
    """(trained, all) numbers of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, on in sizes if on), sum(n for n, _ in sizes)
