"""Pickled checkpoints to safetensors: the same bits, nothing run, nothing half written."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldloom.artifacts import file_digest
from worldloom.cli import main
from worldloom.convert import convert_checkpoint
from worldloom.errors import WorldloomError
from worldloom.unpickling import choose
from worldloom.weights import read_weights


def _landlock() -> bool:
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(444, None, 0, 1) >= 1


def _tensors() -> dict[str, Tensor]:
    """Every dtype that checkpoints have, views, transposes, shared memory, an empty tensor and a scalar."""
    long = torch.arange(24.0)
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        "bfloat16": torch.randn(3, 5).to(torch.bfloat16),
        "float16": torch.randn(7).to(torch.float16),
        "float64": torch.randn(2, 2, dtype=torch.float64),
        "odd": odd,
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "whole": long,
        "tied": long,
        "view": long[3:9],
        "transposed": long.view(4, 6).T,
        "expanded": torch.ones(1).expand(4, 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": nn.Parameter(torch.randn(2)),
    }


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert _bits(tensor) == _bits(right[name]), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_the_tensors_are_the_same_bits(tmp_path: Path, zipped: bool) -> None:
    source, out = tmp_path / "a.pth", tmp_path / "new" / "a.safetensors"
    tensors = _tensors()
    content = {"model": tensors, "epoch": 3, "lr": 1e-3, "name": "run", "args": {"widths": [1, 2], "none": None}}
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    done = convert_checkpoint(source, out)
    assert done.made
    assert done.tensors == len(tensors)
    assert set(done.left_out) == {"/epoch", "/lr", "/name", "/args/none", "/args/widths/0", "/args/widths/1"}
    _same(load_file(out), tensors)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "a.pth", "source_sha256": file_digest(source), "key": ""}
    assert [path.name for path in out.parent.iterdir()] == ["a.safetensors"]

    # Again: nothing to do. Another source, another key: not this conversion.
    before = out.stat()
    again = convert_checkpoint(source, out)
    assert not again.made
    assert again.tensors == len(tensors)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(WorldloomError, match="is not this conversion"):
        convert_checkpoint(source, out, key="model")
    torch.save({"a": torch.ones(1)}, source)
    with pytest.raises(WorldloomError, match="is not this conversion"):
        convert_checkpoint(source, out)
    assert out.stat().st_mtime_ns == before.st_mtime_ns


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer("scale", torch.randn(4).to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    model = _Tiny()
    torch.jit.script(model).save(tmp_path / "decoder.jit")
    done = convert_checkpoint(tmp_path / "decoder.jit", tmp_path / "decoder.safetensors")
    assert done.tensors == len(model.state_dict()) == 8
    _same(load_file(done.path), dict(model.state_dict()))


# -- what a pickle may not do ------------------------------------------------------------------------------------------


class _Calls:
    """Pickles as a call of any function: what makes unpickling dangerous."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    marker, source, out = tmp_path / "marker", tmp_path / "a.pt", tmp_path / "out" / "a.safetensors"
    torch.save({"w": torch.ones(2), "x": _Calls(os.system, f"touch {marker}")}, source)
    with pytest.raises(WorldloomError, match="needs code") as caught:
        convert_checkpoint(source, out)
    assert f"{os.system.__module__}.system" in str(caught.value)
    assert not marker.exists()
    assert list(out.parent.iterdir()) == []


def test_a_pickle_reaches_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        torch.save(_Calls(socket.create_connection, server.getsockname()), tmp_path / "a.ckpt")
        with pytest.raises(WorldloomError, match=r"needs code[^$]*socket\.create_connection"):
            convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
        with pytest.raises(TimeoutError):
            server.accept()


_ATTEMPTS = {
    "socket": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)",
    "system": "import os; assert os.system('touch {outside}') == 0",
    "subprocess": "import subprocess; subprocess.run(['touch', {outside!r}], check=True)",
    "execv": "import os; os.execv('/usr/bin/touch', ['touch', {outside!r}])",
    "write": "open({outside!r}, 'w').write('x')",
    "append": "open({existing!r}, 'a').write('x')",
    "truncate": "import os; os.truncate({existing!r}, 0)",
    "relative": "import os; os.open('outside', os.O_WRONLY | os.O_CREAT, dir_fd=os.open('..', os.O_RDONLY))",
    "climb": "open({inside!r} + '/../outside', 'w')",
    "remove": "import os; os.remove({existing!r})",
    "move": "import os; os.rename({existing!r}, {inside!r} + '/x')",
    "link": "import os; os.symlink({existing!r}, {inside!r} + '/x')",
    "native": "import ctypes; assert ctypes.CDLL(None).open(b'{outside}', 65, 0o600) >= 0",
}
"""Each raises an exception where it is refused."""


def _refusals(tmp_path: Path, confine: str) -> dict[str, str]:
    """Confine a process to ``tmp_path/inside`` and have it try everything: the exceptions' names, "" for success."""
    outside, existing, inside = (tmp_path / name for name in ("outside", "existing", "inside"))
    inside.mkdir()
    existing.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"outside": str(outside), "existing": str(existing), "inside": str(inside)}
        attempts = {key: code.format(**names, port=server.getsockname()[1]) for key, code in _ATTEMPTS.items()}
        script = (
            "import json, worldloom.confinement as confinement\n"
            f"attempts, found = {attempts!r}, {{}}\n"
            f"confinement.{confine}({str(inside)!r})\n"
            f"open({str(inside / 'y')!r}, 'w').write('allowed')\n"
            "for name, code in attempts.items():\n"
            "    try:\n        exec(code)\n        found[name] = ''\n"
            "    except Exception as error:\n        found[name] = type(error).__name__\n"
            "print(json.dumps(found))"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=inside, capture_output=True, text=True, timeout=60, check=False)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert done.returncode == 0, done.stderr
    assert not outside.exists()
    assert existing.read_text() == "kept"
    assert {path.name: path.read_text() for path in inside.iterdir()} == {"y": "allowed"}
    return json.loads(done.stdout)


def test_the_interpreter_refuses(tmp_path: Path) -> None:
    assert _refusals(tmp_path, "confine_interpreter") == dict.fromkeys(_ATTEMPTS, "Refused")


@pytest.mark.skipif(not _landlock(), reason="this kernel has no Landlock")
def test_the_kernel_refuses_on_its_own(tmp_path: Path) -> None:
    found = _refusals(tmp_path, "confine_kernel")
    assert found.pop("socket") in ("OSError", "PermissionError")
    assert [found.pop(name) for name in ("system", "native")] == ["AssertionError"] * 2
    # A move between two folders that the rules tell apart is EXDEV, "cross-device".
    assert found.pop("move") in ("OSError", "PermissionError")
    assert found == dict.fromkeys(found, "PermissionError")


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set on Linux")
def test_a_file_that_unfolds_to_more_memory_than_its_size_explains(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**11)}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    with pytest.raises(WorldloomError, match="far more memory"):
        convert_checkpoint(tmp_path / "bomb.pt", tmp_path / "bomb.safetensors")


def test_a_time_limit(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(WorldloomError, match="took longer than"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors", seconds=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# -- files that are no checkpoints -------------------------------------------------------------------------------------


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    def fails(name: str, data: bytes | None, match: str, out: str = "a.safetensors") -> None:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(WorldloomError, match=match):
            convert_checkpoint(tmp_path / name, tmp_path / out)

    fails("a.onnx", b"x", "not the name of a pickled checkpoint")
    fails("a.pt", b"\x80\x02", r"the output is a \.safetensors file", out="a.pt")
    fails("absent.pt", None, "there is no such file")
    fails("pointer.bin", b"version https://git-lfs.github.com/spec/v1\n", "not a PyTorch checkpoint[^$]*Git LFS")
    fails("empty.pt", b"", "not a PyTorch checkpoint")
    (tmp_path / "a.pt").write_bytes(b"\x80\x02")
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    fails("a.pt", None, "is not this conversion")
    (tmp_path / "a.safetensors").write_bytes(b"something else")
    fails("a.pt", None, "is not this conversion")
    assert (tmp_path / "a.safetensors").read_bytes() == b"something else"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_file_that_was_cut_short(tmp_path: Path, zipped: bool) -> None:
    torch.save({"w": torch.randn(1000)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with open(tmp_path / "a.pt", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(WorldloomError, match="damaged, cut short"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


# -- which tensors -----------------------------------------------------------------------------------------------------

_NAMES = st.text("abc.", min_size=1, max_size=4)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
)


@given(
    st.sets(_NAMES, min_size=1), st.lists(st.tuples(_NAMES, st.dictionaries(_NAMES, _PLAIN, max_size=3)), max_size=4)
)
def test_the_one_level_of_tensors_is_found(names: set[str], wraps: list[tuple[str, dict[str, Any]]]) -> None:
    tensors = {name: torch.zeros(()) for name in names}
    content: dict[str, Any] = dict(tensors)
    path = ""
    for name, beside in wraps:
        content = {**beside, name: content}
        path = f"/{name}{path}"
    level, found, left_out = choose(content, "")
    assert level == (path or "/")
    assert found.keys() == names
    assert all(found[name] is tensors[name] for name in names)
    assert not {f"{path}/{name}" for name in names} & set(left_out)
    again = choose(content, path)
    assert (again[0], again[1].keys()) == (level, names)


def test_several_levels_of_tensors() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    content = {"state_dict": {"w": one}, "ema": {"w": two, "decay": 0.9}, "optimizer": [{"m": one}], "odd": {1, 2}}
    with pytest.raises(WorldloomError, match=r"several levels[^$]*state_dict, ema, optimizer/0[^$]*--key"):
        choose(content, "")
    assert choose(content, "ema") == ("/ema", {"w": two}, ["/ema/decay"])
    assert choose(content, "optimizer") == ("/optimizer/0", {"m": one}, [])
    with pytest.raises(WorldloomError, match=r"no such level[^$]*state_dict"):
        choose(content, "state")
    assert choose((one, two), "") == ("/", {"0": one, "1": two}, [])  # how Cosmos-Tokenizer gives mean and std
    # A chosen level passes by what is nested in it.
    assert choose({"w": one, "inner": {"w": two}}, "/") == ("/", {"w": one}, ["/inner"])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.zeros(1), "no named tensors"),
        ({"a": {"b": 1}}, "no named tensors"),
        ({1: torch.zeros(1), "1": torch.zeros(1)}, "two tensors differ in the type of their name only"),
        ({"w": torch.zeros(1), "odd": {1}}, r"neither a tensor nor a plain value[^$]*/odd: builtins\.set"),
    ],
)
def test_contents_that_cannot_be_converted(content: Any, match: str) -> None:
    with pytest.raises(WorldloomError, match=match):
        choose(content, "")


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(WorldloomError, match=r"dense tensors only[^$]*w: torch\.sparse_coo"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_that_a_refused_checkpoint_names(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    torch.save({"state_dict": {"w": torch.full((2,), 7.0)}, "step": 5}, folder / "last.ckpt")
    with pytest.raises(WorldloomError, match="pickled checkpoints are not read") as caught:
        read_weights(folder)
    program, *arguments = shlex.split(caught.value.do)
    assert program == "worldloom"
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "/step" in done.output
    assert "1 tensors" in done.output
    assert read_weights(folder)["w"].tolist() == [7.0, 7.0]
    again = CliRunner().invoke(main, arguments)
    assert "converted before" in again.output
    wrong = CliRunner().invoke(main, [*arguments, "--key", "ema"])
    assert wrong.exit_code == 2
    assert "is not this conversion" in wrong.output


def test_a_killed_conversion_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    source, out = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"w": torch.randn(4_000_000)}, source)
    command = [sys.executable, "-m", "worldloom", "models", "convert", str(source), "--out", str(out)]
    for wait in (0.0, 0.3, 0.6):
        running = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".a.safetensors.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not out.exists() or len(load_file(out)["w"]) == 4_000_000
        out.unlink(missing_ok=True)
        for left in tmp_path.glob(".a.safetensors.*"):
            left.rename(tmp_path / f"seen-{left.name}")
    time.sleep(1)
    if sys.platform == "linux":  # the reading process ends with the one that started it
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
        assert not [command for command in commands if str(source).encode() in command]
    assert convert_checkpoint(source, out).made


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False
