"""Batch files: four formats, defaults, paths, modes, sizes, and mistakes that name what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from worldloom.errors import WorldloomError
from worldloom.guardrails import GuardrailConfig
from worldloom.schema import GenerationRequest
from worldloom.specs import SIZES, Batch, SampleSpec, fields, guardrail_config, read_batch


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("start.png", "clip.mp4", "actions.json"):
        write(tmp_path / name, "x")
    return tmp_path


SAMPLES = [{"name": "one", "vision_path": "start.png", "seed": 3}, {"prompt": "a dog", "num_frames": 9}]


def as_json(tmp_path: Path) -> Path:
    return write(tmp_path / "spec.json", {"defaults": {"num_steps": 4, "fps": 12}, "samples": SAMPLES})


def as_jsonl(tmp_path: Path) -> Path:
    lines = [{"defaults": {"num_steps": 4, "fps": 12}}, *SAMPLES]
    return write(tmp_path / "spec.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")


def as_yaml(tmp_path: Path) -> Path:
    return write(
        tmp_path / "spec.yaml",
        "defaults: {num_steps: 4, fps: 12}\nsamples:\n- {name: one, vision_path: start.png, seed: 3}\n"
        "- {prompt: a dog, num_frames: 9}\n",
    )


def as_toml(tmp_path: Path) -> Path:
    return write(
        tmp_path / "spec.toml",
        '[defaults]\nnum_steps = 4\nfps = 12\n[[samples]]\nname = "one"\nvision_path = "start.png"\nseed = 3\n'
        '[[samples]]\nprompt = "a dog"\nnum_frames = 9\n',
    )


@pytest.mark.parametrize("form", [as_json, as_jsonl, as_yaml, as_toml])
def test_every_format_says_the_same(files: Path, form: Any) -> None:
    first, second = read_batch(form(files)).samples
    assert (first.name, first.seed, first.num_steps, first.fps) == ("one", 3, 4, 12)
    assert first.vision_path == files / "start.png"
    assert (second.name, second.prompt, second.num_frames, second.num_steps) == ("spec_1", "a dog", 9, 4)
    assert second.vision_path is None


def test_one_sample_is_named_by_its_file(files: Path) -> None:
    (only,) = read_batch(
        write(files / "robot.json", {"prompt": "a robot", "enable_sound": False, "shift": None})
    ).samples
    assert only.name == "robot"
    (line,) = read_batch(write(files / "lines.jsonl", '{"prompt": "a robot"}')).samples
    assert line.name == "lines_0"


def test_paths_are_relative_to_the_file_that_names_them(files: Path) -> None:
    write(files / "common" / "base.json", {"vision_path": "there.png", "num_steps": 7, "guidance": 2})
    write(files / "words.txt", "  a long prompt\n")
    spec = {"defaults_file": "common/base.json", "guidance": 3, "prompt_path": "words.txt"}
    (sample,) = read_batch(write(files / "spec.json", spec)).samples
    assert sample.vision_path == files / "common" / "there.png"
    assert (sample.num_steps, sample.guidance, sample.prompt) == (7, 3, "a long prompt")


@pytest.mark.parametrize(
    ("sample", "mode"),
    [
        ({"prompt": "a dog"}, "text2video"),
        ({"vision_path": "start.png"}, "image2video"),
        ({"vision_path": "clip.mp4"}, "video2video"),
        ({"vision_path": "start.png", "action_path": "actions.json"}, "forward_dynamics"),
        ({"vision_path": "clip.mp4", "action_path": "actions.json"}, "forward_dynamics"),
        ({"vision_path": "clip.mp4", "model_mode": "inverse_dynamics"}, "inverse_dynamics"),
        ({"vision_path": "start.png", "model_mode": "policy", "prompt": "push"}, "policy"),
    ],
)
def test_the_mode_is_found_out_and_becomes_a_request(files: Path, sample: dict[str, Any], mode: str) -> None:
    (spec,) = read_batch(write(files / "spec.json", sample)).samples
    assert spec.mode == mode
    request = spec.request("tiny")
    assert request.prompt == sample.get("prompt", "")
    vision = sample.get("vision_path", "")
    assert request.image == (str(files / vision) if vision.endswith("png") else None)
    assert request.video == (str(files / vision) if vision.endswith("mp4") else None)
    assert request.actions == (str(files / "actions.json") if "action_path" in sample else None)
    assert spec.horizon == (16 if mode == "policy" else None)


def test_every_field_reaches_the_request_or_has_a_meaning_of_its_own(files: Path) -> None:
    whole = {
        "name": "all", "model_mode": "forward_dynamics", "prompt": "p", "negative_prompt": "n",
        "vision_path": "start.png", "action_path": "actions.json", "resolution": 256, "aspect_ratio": "9,16",
        "num_frames": 13, "fps": 24, "seed": 5, "guidance": 6.0, "shift": 5.0, "num_steps": 35,
    }  # fmt: skip
    (spec,) = read_batch(write(files / "spec.json", whole)).samples
    assert spec.request("m") == GenerationRequest(
        "m", "p", str(files / "start.png"), None, str(files / "actions.json"), 13, 5, 35, 6.0, 24.0, "n", 5.0, 320, 192
    )
    rest = {"condition_video_keep", "action_chunk_size", "raw_action_dim"}
    assert set(SampleSpec.model_fields) == set(whole) | rest
    assert {name for name, _ in fields()} == set(SampleSpec.model_fields)
    assert all(text for _, text in fields())


def test_the_effective_arguments_are_a_batch_file_again(files: Path) -> None:
    given = {"vision_path": "start.png", "seed": 2, "prompt": "a dog"}
    (spec,) = read_batch(write(files / "spec.json", given)).samples
    asked = spec.request("m")
    completed = GenerationRequest(
        "m", "a dog", asked.image, frames=9, seed=2, steps=4, guidance_scale=1.5, fps=10, negative_prompt="n",
        shift=2.0, height=32, width=48,
    )  # fmt: skip
    (again,) = read_batch(write(files / "out" / "args.json", spec.effective(completed))).samples
    assert again.request("m") == completed
    assert again.effective(completed) == spec.effective(completed)


@pytest.mark.parametrize(
    ("resolution", "ratio", "height", "width"),
    [
        ("256", None, 192, 320), ("256", "1,1", 256, 256), ("480", "3,4", 736, 544), ("480", "4,3", 544, 736),
        ("720", "16,9", 720, 1280), ("720", "9,16", 1280, 720), ("64x48", None, 48, 64), (None, None, None, None),
    ],
)  # fmt: skip
def test_a_resolution_is_cosmos_3s_or_pixels(
    files: Path, resolution: str | None, ratio: str | None, height: int | None, width: int | None
) -> None:
    sample = {"prompt": "a dog", "resolution": resolution, "aspect_ratio": ratio}
    (spec,) = read_batch(write(files / "spec.json", sample)).samples
    request = spec.request("m")
    assert (request.height, request.width) == (height, width)
    assert all(w >= h for sizes in SIZES.values() for w, h in sizes.values())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"prompt": "a", "num_step": 3}, "did you mean num_steps"),
        ({"prompt": "a", "negative_promt": "b"}, "did you mean negative_prompt"),
        ({"prompt": "a", "xyzzy": 3}, "known fields: name"),
        ({"prompt": "a", "enable_sound": True}, "not offered here"),
        ({"prompt": "a", "edge": {"weight": 1}}, "not offered here"),
        ({"prompt": "a", "model_mode": "text2image"}, "this mode is not offered"),
        ({"prompt": "a", "model_mode": "text2vide"}, "model_mode in"),
        ({"prompt": "a", "num_frames": 0}, "num_frames in"),
        ({"prompt": "a", "num_frames": "many"}, "num_frames in"),
        ({"prompt": "a", "seed": -1}, "seed in"),
        ({"prompt": "a", "fps": 0}, "fps in"),
        ({"prompt": "a", "condition_video_keep": "first"}, "condition_video_keep"),
        ({"prompt": "a", "aspect_ratio": "2,1"}, "aspect_ratio in"),
        ({"prompt": "a", "aspect_ratio": "1,1"}, "needs a resolution"),
        ({"prompt": "a", "resolution": "1080p"}, "no such resolution"),
        ({"prompt": "a", "resolution": "64x64", "aspect_ratio": "1,1"}, "aspect ratio already"),
        ({"prompt": "a", "name": "../up"}, "name is a folder's"),
        ({"prompt": "a", "name": "a/b"}, "name is a folder's"),
        ({"prompt": "a", "name": ".."}, "name is a folder's"),
        ({"prompt": "a", "name": ""}, "name is a folder's"),
        ({"vision_path": "https://example.org/a.png"}, "file of this machine"),
        ([{"prompt": "a", "name": "same"}, {"prompt": "b", "name": "Same"}], "same name"),
        ({"samples": [], "defaults": {}}, "holds no sample"),
        ([], "holds no sample"),
        ({"samples": {}}, "samples is a list"),
        ({"samples": [{"prompt": "a"}], "default": {}}, "unknown section 'default'"),
        ([3], "an object with named fields"),
        ("3", "an object with named fields"),
        ("{", "is not JSON"),
        ({"prompt_path": "nowhere.txt"}, "no such batch file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(files: Path, content: Any, what: str) -> None:
    with pytest.raises(WorldloomError) as caught:
        read_batch(write(files / "spec.json", content))
    assert what in str(caught.value)


def test_a_mistake_says_where_it_stands(files: Path) -> None:
    lines = '{"prompt": "a"}\n\n{"prompt": "b", "sed": 1}\n'
    with pytest.raises(WorldloomError, match=r"(?s)line 3 of .*did you mean seed") as caught:
        read_batch(write(files / "spec.jsonl", lines))
    assert "unknown field 'sed'" in caught.value.what
    with pytest.raises(WorldloomError, match="line 1 of"):
        read_batch(write(files / "spec.jsonl", "{,}\n"))
    with pytest.raises(WorldloomError, match=r"sample 1 of"):
        read_batch(write(files / "spec.json", [{"prompt": "a"}, {"sed": 1}]))


@pytest.mark.parametrize(
    ("name", "text", "what"), [("s.yaml", "a: [", "not YAML"), ("s.toml", "a =", "not valid TOML")]
)
def test_a_damaged_file_is_an_error(tmp_path: Path, name: str, text: str, what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        read_batch(write(tmp_path / name, text))


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    harm = "!!python/object/apply:os.system ['touch harmed']\n"
    with pytest.raises(WorldloomError, match="not YAML"):
        read_batch(write(tmp_path / "s.yaml", harm))


def test_other_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match=r"\.json, \.jsonl, \.yaml or \.toml"):
        read_batch(write(tmp_path / "s.csv", "a,b"))
    for name in ("a.json", "a.jsonl", "a.yaml", "a.toml"):
        with pytest.raises(WorldloomError, match="no such"):
            read_batch(tmp_path / name)


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        ({"model_mode": "text2video"}, "needs a prompt"),
        ({"prompt": "a", "model_mode": "image2video"}, "vision_path to an image"),
        ({"vision_path": "clip.mp4", "model_mode": "image2video"}, "vision_path to an image"),
        ({"vision_path": "start.png", "model_mode": "video2video"}, "vision_path to a video"),
        ({"vision_path": "start.png", "model_mode": "inverse_dynamics"}, "vision_path to a video"),
        ({"prompt": "a", "model_mode": "policy"}, "image or a video"),
        ({"vision_path": "start.png", "model_mode": "forward_dynamics"}, "needs action_path"),
        ({"action_path": "actions.json"}, "vision_path to an image or a video"),
        ({"vision_path": "start.png", "action_path": "actions.json", "model_mode": "image2video"}, "takes no actions"),
        ({"prompt": "a", "vision_path": "start.png", "model_mode": "text2video"}, "takes no image"),
        ({"vision_path": "nowhere.png"}, "no such file"),
        ({"vision_path": "start.png", "action_path": "nowhere.json"}, "no such file"),
    ],
)
def test_a_mode_without_what_it_needs_is_told_for_that_sample(files: Path, sample: dict[str, Any], what: str) -> None:
    (spec,) = read_batch(write(files / "spec.json", sample)).samples
    with pytest.raises(WorldloomError) as caught:
        spec.request("m")
    assert what in str(caught.value)


def test_the_guardrails_section_and_the_command_line(files: Path) -> None:
    text = "guardrails: {mode: off, blocklist: words.txt, nudity_threshold: 0.7}\nsamples: [{prompt: a}]\n"
    batch = read_batch(write(files / "spec.yaml", text))
    assert isinstance(batch, Batch)
    config = guardrail_config(batch.guardrails, files)  # YAML reads off as false
    assert config == GuardrailConfig("off", files / "words.txt", nudity_threshold=0.7)
    assert guardrail_config(batch.guardrails, files, mode="require", blocklist=None).mode == "require"
    assert guardrail_config(None, files, skip=("faces",)) == GuardrailConfig(skip=("faces",))
    with pytest.raises(WorldloomError, match="did you mean blocklist"):
        guardrail_config({"blocklst": "x"}, files)
