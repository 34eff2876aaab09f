"""`worldloom generate`, run as a user runs it: files, sidecar, lineage, reuse, mistakes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result
from faces import face

from worldloom import generation, media
from worldloom.artifacts import Store, file_digest
from worldloom.batch import run_batch
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.guardrails import Blocked, GuardrailConfig, Guardrails
from worldloom.lineage import sources, walk
from worldloom.loading import load_model
from worldloom.prompts import LocalUpsampler
from worldloom.schema import GenerationRequest
from worldloom.specs import read_batch

pytestmark = pytest.mark.usefixtures("worldloom_home")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.mktemp("models"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    media.write_image(tmp_path / "start.png", tiny_models.moving_square(1, 3)[0])
    return tmp_path / "start.png"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def only(folder: Path, suffix: str) -> Path:
    (found,) = (p for p in folder.iterdir() if p.suffix == suffix and p.name != "summary.json")
    return found


def test_a_video_is_made_with_everything_to_make_it_again(model: Path, image: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "actions.npy", np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0, 1, 2, 2]])
    out = tmp_path / "out"
    done = run("generate", model, "--image", image, "--actions", tmp_path / "actions.npy", "--seed", 5, "--out", out)
    assert done.exit_code == 0, done.output
    video = only(out, ".mp4")
    info = media.probe(video, count=True)
    assert (info.codec, info.pix_fmt, info.width, info.height, info.frames) == ("h264", "yuv420p", 32, 32, 9)
    assert info.fps == pytest.approx(10.0)
    assert only(out, ".gif").read_bytes().startswith(b"GIF8")
    assert media.read_image(only(out, ".png")).shape[0] == 32
    sidecar = json.loads(only(out, ".json").read_text())
    assert sidecar["request"]["seed"] == sidecar["seed"] == 5
    assert sidecar["request"]["steps"] == 2  # the model's own, written out
    assert sidecar["model"]["digest"] == file_digest(model / "model.safetensors")
    assert sidecar["tokenizer"]["fingerprint"] == load_model(model).tokenizer.fingerprint
    assert sidecar["files"][video.name] == file_digest(video)
    assert set(sidecar["versions"]) == {"worldloom", "torch", "python"}
    assert sidecar["id"] in done.output
    assert str(video) in done.output
    assert f"worldloom lineage {sidecar['id']}" in done.output
    assert json.loads((out / "summary.json").read_text())["id"] == sidecar["id"]

    leaves = {leaf.label for leaf in sources(walk(Store(), sidecar["id"]))}
    assert {str(image), str(tmp_path / "actions.npy"), "tiny-world"} <= leaves
    assert not Store().verify(sidecar["id"])
    assert run("lineage", video).exit_code == 0


def test_a_finished_sample_is_found_and_another_request_is_another_sample(
    model: Path, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("generate", model, "--image", image, "--frames", 5, "--out", out)
    first = run(*words)
    video = only(out, ".mp4")
    before = (video.stat().st_mtime_ns, video.read_bytes())
    again = run(*words, "--steps", 2)  # 2 is the model's default: the same sample
    assert "found finished" in again.output
    assert "found finished" not in first.output
    assert (video.stat().st_mtime_ns, video.read_bytes()) == before
    assert first.stdout.splitlines()[1:] == again.stdout.splitlines()[1:]
    for change in (("--seed", 1), ("--steps", 1), ("--fps", 5)):
        assert "made in" in run(*words, *change).output
    assert len(list(out.glob("*.mp4"))) == 4
    assert len(Store().find("sample")) == 4


@pytest.mark.parametrize("damage", ["video", "sidecar", "record"])
def test_a_damaged_sample_is_made_again_to_the_same_bits(
    model: Path, image: Path, tmp_path: Path, damage: str, worldloom_home: Path
) -> None:
    out = tmp_path / "out"
    words = ("generate", model, "--image", image, "--frames", 5, "--out", out)
    run(*words)
    video, sidecar = only(out, ".mp4"), only(out, ".json")
    data, facts = video.read_bytes(), json.loads(sidecar.read_text())
    if damage == "video":
        video.write_bytes(data[:100])
    elif damage == "sidecar":
        sidecar.write_text("{")
    else:
        for record in (worldloom_home / "store" / "records").iterdir():
            record.unlink()
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert ("found finished" in again.output) == (damage == "record")
    assert video.read_bytes() == data
    assert json.loads(sidecar.read_text())["id"] == facts["id"]
    assert Store().get(facts["id"]).digest == file_digest(video)


def test_changed_bytes_of_an_input_are_another_sample(model: Path, image: Path, tmp_path: Path) -> None:
    words = ("generate", model, "--image", image, "--frames", 5, "--out", tmp_path / "out")
    run(*words)
    media.write_image(image, tiny_models.moving_square(1, 8)[0])
    assert "made in" in run(*words).output


def test_a_model_made_here_is_named_by_its_artifact(model: Path, image: Path, tmp_path: Path) -> None:
    artifact = Store().put(model, kind="model", name="tiny", inputs=["dataset-0123456789abcdef"])
    done = run("generate", artifact.id, "--image", image, "--frames", 5, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    sample = Store().get(json.loads(only(tmp_path / "out", ".json").read_text())["id"])
    assert sample.inputs[0] == artifact.id
    assert walk(Store(), sample.id).inputs[0].inputs[0].id == "dataset-0123456789abcdef"


def test_work_that_is_stopped_leaves_nothing(model: Path, image: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        generation.make_sample(load_model(model), GenerationRequest("tiny", image=str(image)), out, progress=stop)
    assert not out.exists()
    assert not Store().find()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "a start is needed"),
        (("--image", "{image}", "--prompt", "a dog"), "takes no text"),
        (("--image", "{image}", "--frames", "6"), "1 + 4k"),
        (("--image", "{image}", "--device", "cuda:77"), "no such device"),
        (("--image", "nowhere.png"), "does not exist"),
        (("--image", "{image}", "--size", "64x64"), "not trained at this size"),
        (("--image", "{image}", "--size", "64"), "WIDTHxHEIGHT"),
        (("--image", "{image}", "--negative-prompt", "fog"), "takes no text"),
        (("--image", "{image}", "--actions", "{narrow}"), "another size"),
        (("--image", "{image}", "--upsample-model", "m"), "needs the endpoint"),
        (("--image", "{image}", "--upsample", "http://127.0.0.1:9/v1"), "which model"),
        (("--image", "{image}", "--upsample", "{model}"), "does not answer in words"),
        (("--image", "{image}", "--skip-guard", "nsfw"), "no such guard"),
        (("--image", "{image}", "--guardrails", "maybe"), "maybe"),
    ],
)
def test_mistakes_end_with_what_to_do(
    model: Path, image: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    narrow = tmp_path / "narrow.json"
    narrow.write_text("[[0, 1], [1, 0], [0, 0], [1, 1]]")
    filled = [word.format(image=image, narrow=narrow, model=model) for word in words]
    done = run("generate", model, *filled, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert what in done.output + done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_an_error(image: Path) -> None:
    done = run("generate", "loom-wrld-nano", "--image", image)
    assert done.exit_code == 2
    assert "loom-world-nano" in done.stderr


def test_what_cannot_generate_is_refused() -> None:
    class Captioner:
        def answer(self, video: object, question: str) -> str:
            return ""

    with pytest.raises(WorldloomError, match="does not generate videos") as caught:
        generation.require_generates(Captioner(), "captioner")
    assert "answers" in str(caught.value)


# -- guards and prompts ----------------------------------------------------------------------------------------------


def checks(sidecar: Path) -> dict[str, dict[str, Any]]:
    return {item["guard"]: item for item in json.loads(sidecar.read_text())["guardrails"]["checks"]}


def test_the_sidecar_names_every_guard_and_switching_them_off_makes_another_sample(
    model: Path, image: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("generate", model, "--image", image, "--frames", 5, "--out", out)
    assert run(*words).exit_code == 0
    found = checks(only(out, ".json"))
    assert list(found) == ["blocklist", "classifier", "nudity", "faces"]
    assert found["blocklist"]["detail"] == "there is no text"
    off = run(*words, "--guardrails", "off")
    assert "made in" in off.output  # what was not checked is not what was checked
    off_sidecar = Path(json.loads((out / "summary.json").read_text())["sidecar"])
    assert {item["detail"] for item in checks(off_sidecar).values()} == {"switched off by the caller"}


@pytest.mark.skipif(importlib.util.find_spec("nudenet") is None, reason="needs the package nudenet")
def test_a_face_in_the_given_frame_is_blurred_in_the_video(model: Path, tmp_path: Path) -> None:
    media.write_image(tmp_path / "face.png", face(tiny_models.SIZE))
    words = ("generate", model, "--image", tmp_path / "face.png", "--frames", 5)
    done = run(*words, "--out", tmp_path / "on")
    assert done.exit_code == 0, done.output
    assert "guard faces: changed, blurred 1 face" in done.stderr
    assert checks(only(tmp_path / "on", ".json"))["faces"]["outcome"] == "changed"
    kept = run(*words, "--skip-guard", "faces", "--out", tmp_path / "off")
    assert kept.exit_code == 0, kept.output
    sharp, blurred = (media.read_frames(only(tmp_path / name, ".mp4"))[0] for name in ("off", "on"))
    eyes = (slice(8, 16), slice(8, 24))

    def detail(frame: np.ndarray) -> float:
        return float((np.diff(frame[eyes].astype(float), axis=1) ** 2).mean())

    assert detail(blurred) < 0.2 * detail(sharp)


def test_a_required_guard_that_is_missing_stops_everything(
    model: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "nudenet" else real(name, *more)
    )
    words = ("generate", model, "--image", image, "--frames", 5, "--out", tmp_path / "out")
    done = run(*words, "--guardrails", "require")
    assert done.exit_code == 2
    assert "nudity: nudenet is not installed; pip install 'worldloom[guardrails]'" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "guard nudity: skipped, nudenet is not installed" in done.stderr


class Painter:
    """The smallest model that takes text: every frame has the colour of the prompt's digest."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, frames=request.frames or 4, fps=request.fps or 8.0)

    def generate(self, request: GenerationRequest, progress: Any = None) -> torch.Tensor:
        self.seen.append(request.prompt)
        colour = list(hashlib.sha256(request.prompt.encode()).digest()[:3])
        assert request.frames is not None
        return (torch.tensor(colour) / 127.5 - 1)[None, :, None, None, None].expand(1, 3, request.frames, 32, 32)

    def provenance(self) -> dict[str, Any]:
        return {"model": {"name": "painter", "path": "", "digest": "0" * 64, "kind": "painter"}}


class Writer:
    """Answers with a longer prompt, and counts how often it is asked."""

    def __init__(self, answer: str = "A long description of a dog.") -> None:
        self.text, self.asked = answer, 0

    def answer(self, video: torch.Tensor, question: str) -> str:
        self.asked += 1
        return self.text


def without_classifier() -> Guardrails:
    return Guardrails(GuardrailConfig(skip=("classifier",)))


def test_both_prompts_are_recorded_and_the_model_gets_the_long_one(tmp_path: Path) -> None:
    painter, writer = Painter(), Writer()
    upsampler = LocalUpsampler(writer, "writer")

    def make(prompt: str = "a dog", **options: Any) -> generation.Outcome:
        return generation.make_sample(
            painter, GenerationRequest("painter", prompt), tmp_path, guardrails=without_classifier(), **options
        )

    outcome = make(upsampler=upsampler)
    assert painter.seen == ["A long description of a dog."]
    facts = json.loads(Path(outcome.sample.sidecar).read_text())
    assert facts["upsampling"]["original"] == "a dog"
    assert facts["upsampling"]["upsampled"] == facts["request"]["prompt"] == "A long description of a dog."
    assert facts["upsampling"]["model"] == "writer"
    assert [item["outcome"] for item in facts["guardrails"]["checks"] if item["guard"] == "blocklist"] == ["passed"] * 2
    assert Store().get(outcome.sample.id).config["prompt"] == "A long description of a dog."

    again = make(upsampler=upsampler)  # asked the same: found, and the writer is not asked again
    assert again.reused
    assert again.sample == outcome.sample
    assert writer.asked == 1
    assert not make().reused  # the prompt as it is, is another sample
    assert not make(upsampler=LocalUpsampler(writer, "another")).reused
    assert "upsampling" not in json.loads(Path(make(prompt="", upsampler=upsampler).sample.sidecar).read_text())


def test_a_rewritten_prompt_is_checked_too_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(Blocked, match="naked"):
        generation.make_sample(
            Painter(), GenerationRequest("painter", "a dog"), tmp_path / "out",
            guardrails=without_classifier(), upsampler=LocalUpsampler(Writer("A naked man with a dog."), "writer"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert not Store().find()


# -- batch files -----------------------------------------------------------------------------------------------------


def batch(folder: Path, samples: list[dict[str, Any]], **more: Any) -> Path:
    (folder / "spec.json").write_text(json.dumps({"samples": samples, **more}))
    return folder / "spec.json"


def outputs(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sample_outputs.json").read_text())


def test_a_batch_makes_a_folder_a_sample_and_goes_on_past_those_that_fail(
    model: Path, image: Path, tmp_path: Path
) -> None:
    media.write_video(tmp_path / "clip.mp4", tiny_models.moving_square(9, 1), 10.0)
    (tmp_path / "left.json").write_text(json.dumps(["left"] * 8))
    (tmp_path / "narrow.json").write_text("[[0, 1]]")
    (tmp_path / "broken.png").write_text("no image")
    spec = batch(
        tmp_path,
        [
            {"name": "still", "vision_path": "start.png", "num_frames": 5},
            {"name": "clip", "vision_path": "clip.mp4", "num_frames": 13, "seed": 7},
            {"name": "steered", "vision_path": "start.png", "action_path": "left.json"},
            {"name": "narrow", "vision_path": "start.png", "action_path": "narrow.json"},
            {"name": "large", "vision_path": "start.png", "resolution": "256"},
            {"name": "written", "prompt": "a dog"},
            {"name": "gone", "vision_path": "gone.png"},
            {"name": "broken", "vision_path": "broken.png"},
            {"name": "odd", "vision_path": "start.png", "num_frames": 6},
            {"name": "acting", "vision_path": "start.png", "model_mode": "policy"},
            {"name": "dim", "vision_path": "start.png", "num_frames": 5, "raw_action_dim": 7},
            {"name": "last", "vision_path": "start.png", "num_frames": 5, "seed": 1},
        ],
        defaults={"num_steps": 1},
    )
    out = tmp_path / "out"
    done = run("generate", model, "--spec", spec, "--out", out)
    assert done.exit_code == 1
    assert "4 of 12 samples" in done.stdout
    assert "samples 12/12" in done.stderr
    wrong = {
        "narrow": "another size",
        "large": "not trained at this size",
        "written": "takes no text",
        "gone": "no such file",
        "broken": "not an image",
        "odd": "1 + 4k",
        "acting": "does not choose actions",
        "dim": "raw_action_dim",
    }
    for name, what in wrong.items():
        record = outputs(out / name)
        assert (record["status"], record["args"]["name"], record["outputs"]) == ("error", name, [])
        assert what in record["message"]
        assert not (out / name / "vision.mp4").exists()
        assert f"failed  {name}: " in done.stderr
    for name, frames in (("still", 5), ("clip", 13), ("steered", 9), ("last", 5)):
        record = outputs(out / name)
        assert (record["status"], record["frames"], record["request"]["steps"]) == ("success", frames, 1)
        assert record["outputs"] == [{"content": {}, "files": ["vision.mp4"]}]
        assert record["args"] == json.loads((out / name / "sample_args.json").read_text())
        assert media.probe(out / name / "vision.mp4", count=True).frames == frames
        assert sorted(p.name for p in (out / name).iterdir()) == [
            "sample_args.json",
            "sample_outputs.json",
            "vision.mp4",
        ]
        assert run("lineage", record["id"]).exit_code == 0
        assert run("lineage", out / name / "vision.mp4").exit_code == 0
    assert outputs(out / "clip")["args"]["model_mode"] == "video2video"
    assert outputs(out / "steered")["args"]["model_mode"] == "forward_dynamics"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["succeeded"], summary["failed"], summary["reused"]) == (4, 8, 0)
    assert [item["name"] for item in summary["samples"]][:2] == ["still", "clip"]
    assert {str(tmp_path / "clip.mp4"), "tiny-world"} <= {
        leaf.label for leaf in sources(walk(Store(), outputs(out / "clip")["id"]))
    }


def test_a_second_run_makes_only_what_changed(model: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    samples: list[dict[str, Any]] = [
        {"name": name, "vision_path": "start.png", "num_frames": 5, "num_steps": 1, "seed": seed}
        for seed, name in enumerate("abcd")
    ]
    words = ("generate", model, "--spec", batch(tmp_path, samples), "--out", out)
    assert run(*words).exit_code == 0

    def state() -> dict[str, tuple[int, str]]:
        videos = {name: out / name / "vision.mp4" for name in "abcd"}
        return {name: (path.stat().st_mtime_ns, file_digest(path)) for name, path in videos.items()}

    before = state()
    again = run(*words)
    assert again.stdout.count("found finished") == 4
    assert state() == before

    samples[1]["num_frames"] = 9  # another argument
    (out / "c" / "vision.mp4").write_bytes(b"torn")  # damage
    (out / "d" / "sample_outputs.json").unlink()  # as if it had been killed before the end
    batch(tmp_path, samples)
    done = run(*words)
    assert done.exit_code == 0, done.output
    after = state()
    assert after["a"] == before["a"]
    assert after["b"][1] != before["b"][1]
    assert outputs(out / "b")["args"]["num_frames"] == 9
    assert [after[name][1] for name in "cd"] == [before[name][1] for name in "cd"]  # the same bits again
    assert done.stdout.count("found finished") == 1

    other = tiny_models.world(tmp_path / "other", seed=5)
    moved = run("generate", other, *words[2:])
    assert moved.stdout.count("made in") == 4  # another model makes them all again
    samples[0]["num_frames"] = 6
    batch(tmp_path, samples)
    assert run(*words).exit_code == 1
    assert not (out / "a" / "vision.mp4").exists()  # what failed does not show another request's video


def test_the_effective_arguments_make_the_same_bits_in_another_folder(model: Path, image: Path, tmp_path: Path) -> None:
    spec = batch(tmp_path, [{"name": "a", "vision_path": "start.png", "num_frames": 9, "seed": 11}])
    assert run("generate", model, "--spec", spec, "--out", tmp_path / "one").exit_code == 0
    args = tmp_path / "one" / "a" / "sample_args.json"
    assert json.loads(args.read_text())["num_steps"] == 2  # the model's own, written out
    done = run("generate", model, "--spec", args, "--out", tmp_path / "two")
    assert done.exit_code == 0, done.output
    one, two = (tmp_path / name / "a" / "vision.mp4" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    alone = run("generate", model, "--image", image, "--frames", 9, "--seed", 11, "--out", tmp_path / "three")
    assert alone.exit_code == 0, alone.output
    assert only(tmp_path / "three", ".mp4").read_bytes() == one.read_bytes()  # and so does the plain command


def test_a_batch_files_mistake_ends_before_anything_is_made(model: Path, image: Path, tmp_path: Path) -> None:
    spec = batch(tmp_path, [{"vision_path": "start.png"}, {"vision_path": "start.png", "num_frame": 5}])
    done = run("generate", model, "--spec", spec, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "did you mean num_frames?" in done.stderr
    done = run("generate", model, "--spec", batch(tmp_path, [{"vision_path": "start.png"}]), "--seed", 3)
    assert done.exit_code == 2
    assert "--seed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_batchs_guards_are_the_files_and_the_command_lines(model: Path, image: Path, tmp_path: Path) -> None:
    sample = {"name": "a", "vision_path": "start.png", "num_frames": 5, "num_steps": 1}
    spec = batch(tmp_path, [sample], guardrails={"mode": "off"})
    words = ("generate", model, "--spec", spec, "--out", tmp_path / "out")
    assert run(*words).exit_code == 0
    assert outputs(tmp_path / "out" / "a")["guardrails"]["mode"] == "off"
    assert "made in" in run(*words, "--guardrails", "on").stdout
    assert outputs(tmp_path / "out" / "a")["guardrails"]["mode"] == "on"


def test_an_unforeseen_failure_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    class Breaks(Painter):
        def generate(self, request: GenerationRequest, progress: Any = None) -> torch.Tensor:
            if "dog" in request.prompt:
                raise RuntimeError("out of memory")
            return super().generate(request, progress)

    samples = read_batch(batch(tmp_path, [{"name": "dog", "prompt": "a dog"}, {"name": "cat", "prompt": "a cat"}]))
    results = run_batch(Breaks(), samples.samples, tmp_path / "out", name="painter", guardrails=without_classifier())
    assert [result.status for result in results] == ["error", "success"]
    record = outputs(tmp_path / "out" / "dog")
    assert record["message"] == "RuntimeError: out of memory"
    assert "Traceback" in record["stack_trace"]


def test_a_refused_prompt_is_recorded_with_the_guard_that_refused(tmp_path: Path) -> None:
    samples = read_batch(batch(tmp_path, [{"name": "bad", "prompt": "a naked man"}])).samples
    (result,) = run_batch(Painter(), samples, tmp_path / "out", name="painter", guardrails=without_classifier())
    assert "refused by a guard" in result.error
    record = outputs(tmp_path / "out" / "bad")
    assert [(item["guard"], item["outcome"]) for item in record["guardrails"]["checks"]] == [("blocklist", "blocked")]
    assert sorted(p.name for p in (tmp_path / "out" / "bad").iterdir()) == ["sample_args.json", "sample_outputs.json"]


# -- actions ---------------------------------------------------------------------------------------------------------


class Actor(Painter):
    """Actions that say what it was given: mean brightness for inverse dynamics, the step's number for a policy."""

    action_dim = 2

    def infer_actions(self, video: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
        means = video.mean(dim=(1, 3, 4))
        return torch.stack([means[:, 1:] - means[:, :-1], torch.full_like(means[:, 1:], float(seed))], dim=-1)

    def act(
        self, start: torch.Tensor, prompt: str, horizon: int, *, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        actions = torch.stack([torch.arange(horizon), torch.full((horizon,), len(prompt))], dim=-1)[None].float()
        return actions, torch.cat([start, start[:, :, -1:].expand(-1, -1, horizon, -1, -1)], dim=2)


def test_inverse_dynamics_and_a_policy_give_actions(image: Path, tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(5, dtype=np.uint8) * 40, 32 * 32 * 3).reshape(5, 32, 32, 3)
    media.write_video(tmp_path / "ramp.mp4", ramp, 10.0)
    spec = batch(
        tmp_path,
        [
            {"name": "inverse", "vision_path": "ramp.mp4", "model_mode": "inverse_dynamics", "seed": 6},
            {
                "name": "policy",
                "vision_path": "start.png",
                "model_mode": "policy",
                "prompt": "push",
                "action_chunk_size": 4,
            },
            {"name": "wrong", "vision_path": "start.png", "model_mode": "policy", "raw_action_dim": 3},
        ],
    )
    samples, out = read_batch(spec).samples, tmp_path / "out"

    def make() -> list[Any]:
        return run_batch(Actor(), samples, out, name="actor", guardrails=without_classifier())

    results = make()
    assert [result.status for result in results] == ["success", "success", "error"]
    assert "raw_action_dim" in results[2].error
    found = np.load(out / "inverse" / "actions.npy")
    assert found.shape == (4, 2)
    assert found[:, 0] == pytest.approx([40 / 127.5] * 4, abs=0.03)
    assert (found[:, 1] == 6).all()
    record = outputs(out / "inverse")
    assert record["outputs"][0]["files"] == ["actions.npy", "actions.json"]
    assert record["outputs"][0]["content"]["action"] == json.loads((out / "inverse" / "actions.json").read_text())
    assert np.asarray(record["outputs"][0]["content"]["action"], np.float32) == pytest.approx(found)
    assert {item["guard"]: item.get("detail") for item in record["guardrails"]["checks"]}[
        "faces"
    ] == "there is no video"
    assert not (out / "inverse" / "vision.mp4").exists()

    chosen = outputs(out / "policy")
    assert chosen["outputs"][0]["files"] == ["vision.mp4", "actions.npy", "actions.json"]
    assert chosen["outputs"][0]["content"]["action"] == [[i, 4] for i in range(4)]
    assert chosen["frames"] == 5
    assert chosen["args"]["action_chunk_size"] == 4
    assert [leaf.label for leaf in sources(walk(Store(), chosen["id"])) if leaf.kind == "file"] == [str(image)]
    assert [result.reused for result in make()] == [True, True, False]


def test_a_model_without_actions_says_what_it_can_do(image: Path, tmp_path: Path) -> None:
    samples = read_batch(batch(tmp_path, [{"name": "a", "vision_path": "start.png", "model_mode": "policy"}])).samples
    (result,) = run_batch(Painter(), samples, tmp_path / "out", name="painter", guardrails=without_classifier())
    assert "does not choose actions" in result.error
    assert "it does this: generates" in result.error
