"""`worldloom generate`, run as a user runs it: files, sidecar, lineage, reuse, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner, Result

from worldloom import generation, media
from worldloom.artifacts import Store, file_digest
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.lineage import sources, walk
from worldloom.loading import load_model
from worldloom.schema import GenerationRequest

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
    ],
)
def test_mistakes_end_with_what_to_do(
    model: Path, image: Path, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    done = run("generate", model, *(word.format(image=image) for word in words), "--out", tmp_path / "out")
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
