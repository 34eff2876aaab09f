"""Single videos of any length to latents in a file and back: padding, codes, records, and memory that does not grow."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from worldloom import media
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom_tokenizers import checkpoint, load_tokenizer
from worldloom_tokenizers.causal_vae import CausalVAE
from worldloom_tokenizers.files import _Chunks, decode_file, encode_file

pytestmark = pytest.mark.usefixtures("worldloom_home")

FSQ = dataclasses.replace(tiny_models.VAE, levels=(5, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tokenizer_folder(tmp_path_factory.mktemp("models") / "tiny-tokenizer")


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two codebooks of 15 codes."""
    path = tmp_path_factory.mktemp("models") / "tiny-discrete"
    checkpoint.save(tiny_models.tokenizer(3, FSQ), path, "# tiny\n")
    return path


def film(path: Path, frames: int, seed: int = 2) -> np.ndarray:
    pixels = tiny_models.moving_square(frames, seed)
    media.write_video(path, pixels, 12.0, lossless=True)
    return pixels


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["tokenize", *(str(word) for word in words)])


def decoded(path: Path) -> int:
    return media.probe(path, count=True).frames


@given(length=st.integers(0, 90), ratio=st.sampled_from([1, 2, 4, 8]), pad=st.booleans())
def test_chunks_hold_every_frame_once_and_say_what_they_do_not(length: int, ratio: int, pad: bool) -> None:
    frames = [np.full((1, 1, 3), number, np.uint8) for number in range(length)]
    chunks = _Chunks(frames, ratio, "cpu", pad)
    lengths, values = [], []
    for chunk in chunks:
        lengths.append(chunk.shape[2])
        values += media.to_frames(chunk)[0, :, 0, 0, 0].tolist()
    assert all((n - (number == 0)) % ratio == 0 for number, n in enumerate(lengths))
    assert values[: chunks.frames] == list(range(chunks.frames))
    assert values[chunks.frames :] == [length - 1] * chunks.padded
    assert chunks.frames + chunks.left_out == length
    assert max(chunks.padded, chunks.left_out) < ratio
    assert not (chunks.left_out if pad else chunks.padded)


@pytest.mark.parametrize("length", [1, 2, 5, 33, 36, 75])
def test_a_padded_video_keeps_its_length(folder: Path, tmp_path: Path, length: int) -> None:
    pixels = film(tmp_path / "film.mp4", length)
    out = tmp_path / "l"
    done = run("encode", tmp_path / "film.mp4", "--out", out, "--tokenizer", folder, "--size", 32, "--pad")
    assert done.exit_code == 0, done.output
    missing = -(length - 1) % 4
    facts = json.loads((out / "film.json").read_text())
    assert (facts["frames"], facts["padded"], facts["left_out"]) == (length, missing, 0)
    assert ("repeated" in done.output) == (missing > 0)
    with torch.no_grad():
        expected = load_tokenizer(folder).encode(media.to_tensor(pixels), pad=True)[0].numpy()
    np.testing.assert_allclose(np.load(out / "film.npy"), expected, atol=0.01)
    assert run("decode", out / "film.npy", "--out", tmp_path / "v").exit_code == 0
    assert decoded(tmp_path / "v" / "film.mp4") == length


def test_frames_that_are_left_out_are_told(folder: Path, tmp_path: Path) -> None:
    film(tmp_path / "film.mp4", 36)
    out = tmp_path / "l"
    done = run("encode", tmp_path / "film.mp4", "--out", out, "--tokenizer", folder, "--size", 32)
    assert done.exit_code == 0, done.output
    assert "of 33 frames" in done.output
    assert "the last 3 frames are left out" in done.output
    facts = json.loads((out / "film.json").read_text())
    assert (facts["frames"], facts["padded"], facts["left_out"]) == (33, 0, 3)
    film(tmp_path / "whole.mp4", 33)
    done = run("encode", tmp_path / "whole.mp4", "--out", out, "--tokenizer", folder, "--size", 32)
    assert "left out" not in done.output


def test_codes_are_written_beside_latents_and_either_decodes(discrete: Path, tmp_path: Path) -> None:
    pixels = film(tmp_path / "film.mp4", 41)
    out = tmp_path / "l"
    done = run("encode", tmp_path / "film.mp4", "--out", out, "--tokenizer", discrete, "--size", 32)
    assert done.exit_code == 0, done.output
    tokenizer = load_tokenizer(discrete)
    codes = np.load(out / "film.codes.npy")
    assert (codes.dtype, codes.shape) == (np.int32, (2, 11, 4, 4))
    with torch.no_grad():
        latents = tokenizer.encode(media.to_tensor(pixels))
        assert np.array_equal(codes, tokenizer.to_indices(latents)[0])
        expected = media.to_frames(tokenizer.decode(tokenizer.from_indices(torch.from_numpy(codes)[None].long())))[0]
    assert len(np.unique(codes)) > 3
    assert run("decode", out / "film.codes.npy", "--out", tmp_path / "codes").exit_code == 0
    assert (tmp_path / "codes" / "film.mp4").read_bytes() == media.write_video(None, expected, 12.0)
    assert run("decode", out / "film.npy", "--out", tmp_path / "latents").exit_code == 0
    shown = [media.read_frames(tmp_path / way / "film.mp4").astype(int) for way in ("codes", "latents")]
    assert np.abs(shown[0] - shown[1]).mean() < 2  # float16 latents


def test_a_continuous_tokenizer_writes_no_codes(folder: Path, tmp_path: Path) -> None:
    film(tmp_path / "film.mp4", 5)
    encode_file(tmp_path / "film.mp4", load_tokenizer(folder), tmp_path / "l", name=str(folder), size=(32, 32))
    assert sorted(p.name for p in (tmp_path / "l").iterdir()) == ["film.json", "film.npy"]


def test_a_tokenizers_folder_is_found_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "film.mp4", 5)
    monkeypatch.chdir(folder.parent)
    done = run("encode", tmp_path / "film.mp4", "--out", tmp_path / "l", "--tokenizer", folder.name, "--size", 32)
    assert done.exit_code == 0, done.output
    monkeypatch.chdir(tmp_path)
    assert run("decode", tmp_path / "l" / "film.npy", "--out", tmp_path / "v").exit_code == 0


@pytest.fixture
def latents(folder: Path, tmp_path: Path) -> Path:
    """Those of 9 frames."""
    film(tmp_path / "film.mp4", 9)
    encode_file(tmp_path / "film.mp4", load_tokenizer(folder), tmp_path / "l", name=str(folder), size=(32, 32))
    return tmp_path / "l" / "film.npy"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_write_no_video(latents: Path, tmp_path: Path, value: float) -> None:
    array = np.load(latents)
    array[0, 2, 1, 1] = value
    np.save(latents, array)
    done = run("decode", latents, "--out", tmp_path / "v")
    assert done.exit_code == 2
    assert "not finite" in done.stderr
    assert "film, latent frames 0 to 2" in done.stderr
    assert not list(tmp_path.glob("v/*"))


def test_latents_of_another_tokenizer_are_refused(latents: Path, tmp_path: Path) -> None:
    other = tiny_models.tokenizer_folder(tmp_path / "other", seed=5)
    done = run("decode", latents, "--out", tmp_path / "v", "--tokenizer", other)
    assert done.exit_code == 2
    assert "another tokenizer" in done.stderr


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((4, 3, 4), np.float16), "latents are floats"),
        (np.zeros((4, 3, 4, 4), bool), "latents are floats"),
        (np.zeros((5, 3, 4, 4), np.float16), r"latents are \(b, 4, t, h, w\)"),
        (np.zeros((2, 3, 4, 4), np.int32), "the tokenizer is continuous"),
        (np.array([{}, {}], object), "not a file of latents"),
    ],
)
def test_arrays_that_are_no_latents_of_it_are_refused(
    folder: Path, tmp_path: Path, array: np.ndarray, what: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(WorldloomError, match=what) as raised:
        decode_file(tmp_path / "a.npy", tmp_path / "v", name=str(folder))
    assert "unsafe" not in str(raised.value)


def test_codes_outside_the_codebook_are_refused(discrete: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((2, 1, 4, 4), 15))
    with pytest.raises(WorldloomError, match="0 to 14"):
        decode_file(tmp_path / "a.npy", tmp_path / "v", name=str(discrete))


def test_a_record_of_other_latents_is_refused(latents: Path, tmp_path: Path) -> None:
    np.save(latents, np.load(latents)[:, :2])
    with pytest.raises(WorldloomError, match="is not theirs"):
        decode_file(latents, tmp_path / "v")
    latents.with_suffix(".json").unlink()
    with pytest.raises(WorldloomError, match="nothing says which tokenizer"):
        decode_file(latents, tmp_path / "v")


_MEASURE = """
import sys
from pathlib import Path
import numpy as np, torch
from worldloom import media
from worldloom.memory import peak_memory
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.files import decode_file, encode_file

folder, root = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
tokenizer = load_tokenizer(folder)
ramp = np.linspace(0, 200, 128).astype(np.uint8)[None, :, None]

def film(frames):
    for number in range(frames):
        yield np.broadcast_to(ramp + np.uint8(number % 50), (128, 128, 3)).copy()

for length in (9, 97, 193):  # the first time loads what is loaded on first use
    media.write_video(root / "film.mp4", film(length), 10.0)
    with peak_memory() as encoding:
        encode_file(root / "film.mp4", tokenizer, root, name=folder, size=(128, 128))
    with peak_memory() as decoding:
        decode_file(root / "film.npy", root / "out")
    print(encoding.bytes, decoding.bytes)
"""


def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path: Path) -> None:
    light = dataclasses.replace(tiny_models.VAE, encoder_blocks=(0, 0, 1), decoder_blocks=(0, 0, 1))
    folder = tmp_path / "light"
    checkpoint.save(tiny_models.tokenizer(0, light), folder, "# light\n")
    # What is freed goes back at once, so that the figures are those of the code and not of the allocator's habits.
    plain = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    words = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=plain)
    _, short, long = (line.split() for line in done.stdout.splitlines())
    if "None" in short:
        pytest.skip("nothing measures memory here")
    added = 96 * 128 * 128 * 3  # bytes of the longer film's further frames at 8 bits; as floats four times as much
    for before, after in zip(short, long, strict=True):
        assert int(before) > added
        assert int(after) - int(before) < 0.75 * added


def test_a_long_tokenizer_stream_is_that_of_the_library(folder: Path, tmp_path: Path) -> None:
    pixels = film(tmp_path / "film.mp4", 101)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, CausalVAE)
    done = encode_file(tmp_path / "film.mp4", tokenizer, tmp_path / "l", name=str(folder), size=(32, 32))
    assert (done.shape, done.frames, done.left_out) == ((4, 26, 4, 4), 101, 0)
    with torch.no_grad():
        whole = tokenizer.encode(media.to_tensor(pixels))[0].numpy()
    np.testing.assert_allclose(np.load(done.path), whole, atol=0.01)
