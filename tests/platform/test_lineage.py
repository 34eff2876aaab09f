from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from worldloom import WorldloomError, lineage
from worldloom.artifacts import Artifact, Store, file_digest
from worldloom.cli import main

SHIPPED = "model:loom-cv-nano@" + "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def chain(store: Store, tmp_path: Path) -> dict[str, Artifact]:
    """sample -> model -> (dataset, shipped tokenizer), latents -> dataset -> two source files."""

    def make(name: str, kind: str, inputs: list[str], seed: int | None = None) -> Artifact:
        path = tmp_path / name
        path.write_text(name)
        return store.put(path, kind=kind, name=name, inputs=inputs, seed=seed, config={"of": name})

    files = []
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text(f"video {name}")
        files.append(f"file:{file_digest(tmp_path / name)}:{tmp_path / name}")
    dataset = make("episodes", "dataset", files)
    latents = make("latents", "latents", [dataset.id, SHIPPED])
    model = make("world", "model", [latents.id, dataset.id, SHIPPED], seed=1)
    sample = make("out.mp4", "sample", [model.id], seed=7)
    return {"dataset": dataset, "latents": latents, "model": model, "sample": sample}


def rendered(node: lineage.Node, everything: bool = False) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=300, markup=False).print(lineage.render(node, everything))
    return buffer.getvalue()


def test_from_a_sample_to_its_source_videos(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    node = lineage.walk(store, chain["sample"].id[:12])
    assert (node.id, node.kind, node.digest) == (chain["sample"].id, "sample", chain["sample"].digest)
    [model] = node.inputs
    assert [item.kind for item in model.inputs] == ["latents", "dataset", "shipped"]
    latents, dataset, tokenizer = model.inputs
    assert latents.inputs[0] is dataset  # read once, shared
    assert (tokenizer.label, tokenizer.digest) == ("loom-cv-nano", "b" * 64)
    leaves = lineage.sources(node)
    assert [leaf.label for leaf in leaves] == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), "loom-cv-nano"]
    assert leaves[0].digest == file_digest(tmp_path / "a.mp4")


def test_the_tree_shows_every_id_once_with_its_inputs(store: Store, chain: dict[str, Artifact]) -> None:
    text = rendered(lineage.walk(store, chain["sample"].id))
    assert text.splitlines()[0].startswith(f"sample  {chain['sample'].id}  out.mp4  seed 7  worldloom ")
    for artifact in chain.values():
        assert artifact.id in text
    assert text.count("a.mp4") == 1
    assert text.count("(shown above)") == 1


def test_the_dictionary_is_json_and_complete(store: Store, chain: dict[str, Artifact]) -> None:
    plain = json.loads(json.dumps(lineage.to_dict(lineage.walk(store, chain["sample"].id))))
    model = plain["inputs"][0]
    assert (plain["seed"], model["config"], model["kind"]) == (7, {"of": "world"}, "model")
    assert model["inputs"][0]["inputs"][0]["inputs"][0]["kind"] == "file"
    assert "inputs" not in model["inputs"][2]


def test_a_record_that_is_not_here_is_a_leaf(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "store" / "records" / f"{chain['dataset'].id}.json").unlink()
    node = lineage.walk(store, chain["sample"].id)
    missing = [leaf for leaf in lineage.sources(node) if leaf.kind == "missing"]
    assert [leaf.id for leaf in missing] == [chain["dataset"].id]
    assert f"missing  {chain['dataset'].id}  not in this store" in rendered(node)


def test_an_input_is_a_whole_id(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    made = store.put(tmp_path / "x", kind="report", inputs=[chain["model"].id[:-2], "model"])
    assert [item.kind for item in lineage.walk(store, made.id).inputs] == ["missing", "missing"]


def test_a_damaged_record_is_an_error_and_not_a_gap(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "store" / "records" / f"{chain['dataset'].id}.json").write_text("{")
    with pytest.raises(WorldloomError, match="is damaged"):
        lineage.walk(store, chain["sample"].id)


def test_a_record_that_depends_on_itself_is_refused(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    record = tmp_path / "store" / "records" / f"{chain['dataset'].id}.json"
    fields = json.loads(record.read_text())
    fields["inputs"] = [chain["model"].id]
    record.write_text(json.dumps(fields))
    with pytest.raises(WorldloomError, match="depends on itself"):
        lineage.walk(store, chain["sample"].id)


def test_many_sources_are_cut_unless_asked_for(store: Store, tmp_path: Path) -> None:
    (tmp_path / "big").write_text("x")
    inputs = [f"file:{i:064x}:v/{i:04}.mp4" for i in range(300)]
    made = store.put(tmp_path / "big", kind="dataset", inputs=inputs)
    node = lineage.walk(store, made.id)
    short, full = rendered(node), rendered(node, everything=True)
    assert short.count(".mp4") == 12
    assert "and 288 more source files" in short
    assert full.count(".mp4") == 300


def test_names_are_shown_as_they_are(store: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    made = store.put(tmp_path / "x", kind="dataset", name="[red]x[/red]", inputs=[f"file:{'0' * 64}:[/]:a.mp4"])
    text = rendered(lineage.walk(store, made.id))
    assert "[red]x[/red]" in text
    assert "[/]:a.mp4" in text


def _run(*arguments: str):
    return CliRunner().invoke(main, ["lineage", *arguments])


def test_the_command(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    at = ["--store", store.root]
    by_id = _run(chain["sample"].id[:14], *at)
    by_file = _run(str(tmp_path / "out.mp4"), *at)
    assert by_id.exit_code == by_file.exit_code == 0
    assert by_id.output == by_file.output
    assert str(tmp_path / "a.mp4") in by_id.output
    assert json.loads(_run(chain["sample"].id, "--json", *at).output)["id"] == chain["sample"].id
    assert _run("sample-ffff", *at).exit_code == 2
    listed = _run(*at).output
    assert all(artifact.id in listed for artifact in chain.values())
    assert {item["id"] for item in json.loads(_run("--json", *at).output)} == {item.id for item in chain.values()}
    assert "is empty" in _run("--store", str(tmp_path / "none")).output


def test_a_file_that_was_changed_has_no_lineage(store: Store, chain: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_text("edited")
    done = _run(str(tmp_path / "out.mp4"), "--store", store.root)
    assert done.exit_code == 2
    assert "has these bytes" in done.stderr


def test_verify_notices_a_change_anywhere_in_the_chain(
    store: Store, chain: dict[str, Artifact], tmp_path: Path
) -> None:
    at = [chain["sample"].id, "--verify", "--store", store.root]
    clean = _run(*at)
    assert (clean.exit_code, clean.output.splitlines()[-1]) == (0, "every file that is recorded here is unchanged")
    (tmp_path / "latents").write_text("tampered")
    (tmp_path / "b.mp4").write_text("tampered")
    (tmp_path / "a.mp4").unlink()  # moved away: no statement about it
    done = _run(*at)
    assert done.exit_code == 1
    assert sorted(done.stderr.splitlines()) == [
        f"changed: {chain['latents'].id} latents",
        f"changed: source {tmp_path / 'b.mp4'}",
    ]
    assert len(json.loads(_run(*at, "--json").stdout)["changed"]) == 2
