"""The formats of NVIDIA's Cosmos: cosmos-curate's folders and shards, Cosmos 3's JSONL, Cosmos-Predict2.5's folders.

Names and meanings of fields are those of https://github.com/nvidia-cosmos/cosmos-curate (``docs/curator/reference/
VIDEO_PIPELINES.md``; ``clip.extract_metadata``; ``write_shard_summary``) and, for the JSONL, of the rows that
cosmos-framework's ``curator_to_sft_jsonl`` makes of them. ``end_frame`` is the last frame of a window, itself included.

What cosmos-curate keeps as pickles (embeddings, T5 vectors) is not written. Its motion and aesthetic scores are written
where a stage measured them in its units (``motion_vectors``, and ``quality`` with ``measure = "aesthetic"``).
"""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_write
from worldloom.schema import Clip
from worldloom.shards import Dataset
from worldloom_curation.export import ExportOptions, Progress, write_if_new
from worldloom_curation.formats.bins import COSMOS_RESOLUTIONS, sort_clips, tars

_TARS_PER_PART = 10
_WINDOW = 256  # frames that one caption is for; what is left over is a window of its own if it is half of that
_SCORES = ("motion_score", "aesthetic_score")
_TRAINABLE = (61, 61.0)  # cosmos-framework's loader: fewest frames of a window, most seconds of a clip


def span_uuid(clip: Clip) -> str:
    """The UUID that stands for a clip id."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"worldloom:{clip.id}"))


def windows(frames: int) -> list[tuple[int, int]]:
    """First and last frame of each caption window of a clip."""
    starts = list(range(0, frames, _WINDOW))
    if len(starts) > 1 and frames - starts[-1] < _WINDOW // 2:
        starts.pop()
    ends = [*(start - 1 for start in starts[1:]), frames - 1]
    return list(zip(starts, ends, strict=True))


def meta(clip: Clip, location: str, size: int, model: str) -> dict[str, Any]:
    """The metadata of a clip, with cosmos-curate's names.

    Args:
        location: where the video is.
        size: bytes of the video.
        model: a caption is called ``<model>_caption``.
    """
    rate = clip.fps * clip.step
    caption = {f"{model}_caption": clip.caption} if clip.caption else {}
    height, width = clip.metadata.get("source_size") or (None, None)
    return {
        "span_uuid": span_uuid(clip),
        "source_video": clip.source,
        "duration_span": [clip.start / rate, clip.end / rate],
        "width_source": width,
        "height_source": height,
        "framerate_source": rate,
        "clip_location": location,
        "width": clip.width,
        "height": clip.height,
        "framerate": clip.fps,
        "num_frames": clip.frames,
        "video_codec": "h264",
        "num_bytes": size,
        "windows": [{"start_frame": start, "end_frame": end, **caption} for start, end in windows(clip.frames)],
        **{name: clip.metadata[name] for name in _SCORES if name in clip.metadata},
        "filtered_windows": [],
        "valid": True,
        "has_caption": bool(clip.caption),
        "worldloom_clip_id": clip.id,
    }


def write_curated(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """``clips/UUID.mp4``, ``metas/v0/UUID.json``, ``v0/all_window_captions.json`` and ``summary.json``."""
    captions: dict[str, dict[str, str]] = {}
    done = 0
    for clip, video in _videos(dataset):
        name = span_uuid(clip)
        location = folder / "clips" / f"{name}.mp4"
        write_if_new(location, video)
        content = meta(clip, str(location.absolute()), len(video), options.caption_model)
        write_if_new(folder / "metas" / "v0" / f"{name}.json", _dump(content))
        captions[name] = {f"{w['start_frame']}_{w['end_frame']}": clip.caption for w in content["windows"]}
        done += 1
        progress(done, len(dataset), name)
    atomic_write(folder / "v0" / "all_window_captions.json", _dump(captions))
    counts = {"clips": done, "captioned": sum(bool(any(texts.values())) for texts in captions.values())}
    atomic_write(folder / "summary.json", _dump({"num_clips": done, "num_clips_with_caption": counts["captioned"]}))
    return counts


def write_shards(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """``v0/resolution_*/aspect_ratio_*/duration_*/{video,metas}/part_NNNNNN/NNNNNN.tar`` and ``wdinfo.json``."""
    counts: dict[str, int] = {}
    listed: list[str] = []
    written = done = 0
    for place, numbers in sort_clips(dataset, COSMOS_RESOLUTIONS).items():
        root = folder / "v0" / place.path
        names: list[str] = []
        bin_count = 0
        sizes = [dataset.sizes(number)["mp4"] for number in numbers]
        for index, (start, end) in enumerate(tars(sizes, options.clips_per_tar, options.tar_mb << 20)):
            part, tar = divmod(index, _TARS_PER_PART)
            name = f"part_{part:06d}/{tar:06d}.tar"
            bin_count += _pair_of_tars(dataset, root, name, numbers[start:end], options.caption_model)
            names.append(name)
            done += end - start
            progress(done, len(dataset), f"{place.path}/{name}")
        info = {
            "data_keys": ["video", "metas"],
            "chunk_size": _TARS_PER_PART,
            "data_list": names,
            "root": str(root.absolute()),
            "total_key_count": bin_count,
        }
        atomic_write(root / "wdinfo.json", _dump(info))
        listed.append(str((root / "wdinfo.json").absolute()))
        counts[place.path] = bin_count
        written += bin_count
    atomic_write(folder / "v0" / "wdinfo_list.csv", "".join(f"{line}\n" for line in listed))
    return {"clips": written, "bins": counts}


def write_jsonl(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """``videos/ID.mp4`` and ``cosmos3_sft.jsonl``, a row for every clip."""
    rows: list[str] = []
    captioned = trainable = 0
    for clip, video in _videos(dataset):
        write_if_new(folder / "videos" / f"{clip.id}.mp4", video)
        seconds = clip.frames / clip.fps
        row = {
            "uuid": span_uuid(clip),
            "duration": seconds,
            "width": clip.width,
            "height": clip.height,
            "nb_frames": clip.frames,
            "framerate": clip.fps,
            "vision_path": f"videos/{clip.id}.mp4",
            "t2w_windows": [
                {"start_frame": start, "end_frame": end, "temporal_interval": 1, "caption": clip.caption}
                for start, end in windows(clip.frames)
            ],
        }
        rows.append(json.dumps(row, sort_keys=True))
        captioned += bool(clip.caption)
        trainable += bool(clip.caption) and clip.frames >= _TRAINABLE[0] and seconds <= _TRAINABLE[1]
        progress(len(rows), len(dataset), clip.id)
    atomic_write(folder / "cosmos3_sft.jsonl", "".join(f"{row}\n" for row in rows))
    return {"clips": len(rows), "captioned": captioned, "long enough and captioned": trainable}


def write_prompts(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """``videos/ID.mp4`` and, with its caption, ``metas/ID.txt``, for every clip."""
    done = captioned = 0
    for clip, video in _videos(dataset):
        write_if_new(folder / "videos" / f"{clip.id}.mp4", video)
        write_if_new(folder / "metas" / f"{clip.id}.txt", clip.caption.encode())
        done += 1
        captioned += bool(clip.caption)
        progress(done, len(dataset), clip.id)
    return {"clips": done, "captioned": captioned}


def _videos(dataset: Dataset) -> Iterator[tuple[Clip, bytes]]:
    for sample in dataset:
        assert sample.video is not None, "a dataset of clips"
        yield sample.clip, sample.video


def _pair_of_tars(dataset: Dataset, root: Path, name: str, numbers: Sequence[int], model: str) -> int:
    """The tars of the videos and of the metadata of some clips, unless both are there; returns how many they hold."""
    keys = dataset.keys()
    names = [span_uuid(dataset.clip(keys[number])) for number in numbers]
    video, metas = root / "video" / name, root / "metas" / name
    if _members(video) == [f"{key}.mp4" for key in names] and _members(metas) == [f"{key}.json" for key in names]:
        return len(names)
    videos: dict[str, bytes] = {}
    texts: dict[str, bytes] = {}
    for number, key in zip(numbers, names, strict=True):
        sample = dataset.load(number)
        assert sample.video is not None, "a dataset of clips"
        videos[f"{key}.mp4"] = sample.video
        texts[f"{key}.json"] = _dump(meta(sample.clip, f"{video.absolute()}/{key}.mp4", len(sample.video), model))
    atomic_write(video, _tar(videos))
    atomic_write(metas, _tar(texts))
    return len(videos)


def _tar(members: Mapping[str, bytes]) -> bytes:
    """A tar with no time, owner or group in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _members(path: Path) -> list[str]:
    try:
        with tarfile.open(path, "r:") as tar:
            return tar.getnames()
    except (OSError, tarfile.TarError):
        return []


def _dump(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
