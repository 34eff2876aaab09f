"""Published predict checkpoints become folders and go back, bit by bit; what does not fit is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from text_folders import save_t5

from worldloom import config as configs
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.weights import read_weights
from worldloom_model_zoo.predict import released
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig
from worldloom_model_zoo.predict.keys import renaming
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.recipes import RECIPES, Recipe, recipe
from worldloom_model_zoo.predict.released import export_released, import_released, load_released, read_released

BASE = PredictConfig(
    latent_channels=4,
    width=32,
    blocks=2,
    heads=2,
    adaln_rank=8,
    rope_ratios=(1.0, 3.0, 3.0),
    timestep_scale=1.0,
    condition_mask=True,
    padding_mask=True,
    context_dim=16,
    attention="full",
)
POST = "cosmos-predict2.5-2b-post-trained"
CONFIGS = {
    "video": BASE,
    "image": replace(BASE, condition_mask=False),
    "projected": replace(BASE, text_dim=24),
    "positions": replace(BASE, learned_positions=(8, 4, 4), base_fps=24.0),
    "chunk": replace(BASE, action_dim=3, action_layout="cosmos-chunk", action_hidden=12),
    "frame": replace(BASE, action_dim=3, action_layout="cosmos-frame", action_hidden=12),
    "views": replace(BASE, views=3, view_dim=2),
}


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released checkpoints of our own size besides the real ones."""
    for name, config in CONFIGS.items():
        monkeypatch.setitem(RECIPES, f"tiny-{name}", Recipe(f"tiny-{name}", lambda config=config: config, "loom/tiny"))


def random_weights(config: PredictConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: torch.randn(value.shape).bfloat16() for key, value in PredictTransformer(config).state_dict().items()}


def publish(config: PredictConfig, path: Path, prefix: str = "net.") -> dict[str, torch.Tensor]:
    """A native file as published: a prefix, and the tables and counters that no network uses."""
    weights = random_weights(config)
    names = renaming(weights, "native")
    tensors = {prefix + names[key]: value for key, value in weights.items()}
    extra = ("pos_embedder.seq", "pos_embedder.dim_spatial_range", "accum_iteration", "blocks.0.self_attn._extra_state")
    tensors |= {f"{prefix}{name}": torch.arange(3) for name in extra}
    save_file(tensors, path)
    return weights


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_native_weights_go_in_and_out_bit_by_bit(name: str, tmp_path: Path) -> None:
    weights = publish(CONFIGS[name], tmp_path / "x.safetensors")
    made = import_released(tmp_path / "x.safetensors", tmp_path / "ours", f"tiny-{name}")
    assert same(read_weights(tmp_path / "ours"), weights)
    assert made.startswith(f"tiny-{name}, ")
    settings = configs.load(PredictCheckpoint, tmp_path / "ours" / "config.toml")
    assert settings.model == CONFIGS[name]
    out = export_released(tmp_path / "ours", tmp_path / "back.safetensors", "native")
    back, there = load_file(out), load_file(tmp_path / "x.safetensors")
    assert same(back, {key: there[key] for key in back})
    dropped = {key for key in there if "pos_embedder.seq" in key or "range" in key or "accum" in key or "extra" in key}
    assert there.keys() - back.keys() == {key for key in dropped if "extra_pos_embedder" not in key}


@pytest.mark.parametrize("name", ["video", "image", "projected", "positions"])
def test_diffusers_reads_what_is_exported_and_its_folder_comes_back(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    weights = publish(CONFIGS[name], tmp_path / "x.safetensors")
    import_released(tmp_path / "x.safetensors", tmp_path / "ours", f"tiny-{name}")
    folder = export_released(tmp_path / "ours", tmp_path / "theirs", "diffusers")
    model = diffusers.CosmosTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for source in (folder, tmp_path / "sharded"):
        again = read_released(source)  # config.json tells the network
        assert again.config == CONFIGS[name]
        assert again.layout == "diffusers"
        if source == folder:
            assert same(dict(again.weights), weights)
        else:  # diffusers keeps learned positions in float32
            assert all(torch.equal(again.weights[key].float(), value.float()) for key, value in weights.items())


@pytest.mark.parametrize("prefix", ["net.", "net_ema.", ""])
def test_a_native_prefix_may_be_one_of_three(prefix: str, tmp_path: Path) -> None:
    weights = publish(BASE, tmp_path / "x.safetensors", prefix)
    assert same(dict(read_released(tmp_path / "x.safetensors", "tiny-video").weights), weights)


def test_the_network_is_read_off_its_shapes(tmp_path: Path) -> None:
    for name in ("video", "image", "projected", "positions", "views"):
        publish(CONFIGS[name], tmp_path / "x.safetensors")
        assert read_released(tmp_path / "x.safetensors").config == CONFIGS[name]
    publish(replace(BASE, blocks=3), tmp_path / "x.safetensors")
    with pytest.raises(WorldloomError, match="no released network has weights of these shapes") as caught:
        read_released(tmp_path / "x.safetensors")
    assert "blocks 3" in str(caught.value)


def test_every_real_network_is_told_by_its_shapes() -> None:
    """On meta tensors: what is released, and nothing else, has these shapes."""
    for row in {row.network(): row for row in RECIPES.values()}.values():
        config = row.network()
        with torch.device("meta"):
            own = PredictTransformer(config).state_dict()
        layout = "diffusers" if row.name.startswith("cosmos1") else "native"
        weights = {name: own[key] for key, name in renaming(own, layout).items()}
        if config.action_dim:
            with pytest.raises(WorldloomError, match="cannot be read off its weights"):
                released._config(weights, layout, None, {}, Path("x"), 0)
            found = released._config(weights, layout, row, {}, Path("x"), 0)
        else:
            found = released._config(weights, layout, None, {}, Path("x"), 0)
        assert found == config, row.name


def test_released_actions_may_be_per_frame_or_of_another_size(tmp_path: Path) -> None:
    publish(CONFIGS["frame"], tmp_path / "x.safetensors")
    assert read_released(tmp_path / "x.safetensors", "tiny-chunk").config.action_layout == "cosmos-frame"
    other = replace(CONFIGS["chunk"], action_dim=5, action_hidden=20)
    publish(other, tmp_path / "y.safetensors")
    assert read_released(tmp_path / "y.safetensors", "tiny-chunk", action_dim=5).config == other
    with pytest.raises(WorldloomError, match="other actions"):
        read_released(tmp_path / "y.safetensors", "tiny-chunk")
    with pytest.raises(WorldloomError, match="other actions"):
        read_released(tmp_path / "y.safetensors", "tiny-video")


def test_how_it_is_sampled_comes_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RECIPES["cosmos-predict2.5-2b-post-trained"]
    monkeypatch.setitem(RECIPES, real.name, replace(real, network=lambda: BASE))
    file = tmp_path / "81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.safetensors"
    publish(BASE, file)
    text = import_released(file, tmp_path / "ours")  # its name tells which it is
    assert "worldloom tokenize import" in text
    settings = configs.load(PredictCheckpoint, tmp_path / "ours" / "config.toml")
    assert (settings.width, settings.height, settings.fps) == (1280, 704, 16.0)
    assert settings.sampler == replace(real.sampler, chunk_frames=93, overlap_frames=5)
    assert settings.sampler.method == "unipc"
    assert (settings.sampler.guidance_scale, settings.sampler.guidance_convention) == (7.0, "conditional")
    assert settings.tokenizer.name == "wan2.1"
    assert (settings.text.name, settings.text.tokens) == ("cosmos-reason1-7b", 512)
    assert "nvidia/Cosmos-Predict2.5-2B" in (tmp_path / "ours" / "README.md").read_text()
    with pytest.raises(WorldloomError, match="already exists"):
        import_released(file, tmp_path / "ours")


def test_a_recipe_that_is_not_told_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(BASE, tmp_path / "x.safetensors")
    monkeypatch.setitem(RECIPES, "tiny-other", Recipe("tiny-other", lambda: BASE, "loom/other"))
    with pytest.raises(WorldloomError, match="sampled differently") as caught:
        import_released(tmp_path / "x.safetensors", tmp_path / "ours")
    assert "tiny-video, tiny-other" in str(caught.value)
    monkeypatch.setitem(RECIPES, "tiny-other", Recipe("tiny-other", lambda: BASE, "loom/other", sampler=None, note="n"))
    with pytest.raises(WorldloomError, match="cannot be sampled here"):
        import_released(tmp_path / "x.safetensors", tmp_path / "ours", "tiny-other")
    assert not (tmp_path / "ours").exists()


def test_weights_of_another_variant_are_refused(tmp_path: Path) -> None:
    publish(BASE, tmp_path / "x.safetensors")
    for variant, field in (
        ("tiny-image", "condition_mask True, not False"),
        ("tiny-projected", "text_dim 0, not 24"),
        ("cosmos-predict2-2b-video2world", "width 32, not 2048"),
    ):
        with pytest.raises(WorldloomError, match="another variant") as caught:
            read_released(tmp_path / "x.safetensors", variant)
        assert field in str(caught.value)
    with pytest.raises(WorldloomError, match="no released predict checkpoint"):
        read_released(tmp_path / "x.safetensors", "cosmos-predict9")


def change(path: Path, **keys: str) -> None:
    weights = load_file(path)
    for old, new in keys.items():
        weights[new] = weights.pop(old.replace("__", "."))
    save_file(weights, path)


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    publish(BASE, file)
    change(file, net__blocks__1__mlp__layer2__weight="net.blocks.1.mlp.layer3.weight")
    with pytest.raises(WorldloomError) as caught:
        read_released(file, "tiny-video")
    assert "missing ['blocks.1.mlp.layer2.weight'], unmatched ['blocks.1.mlp.layer3.weight']" in str(caught.value)
    publish(BASE, file)
    change(file, net__t_embedding_norm__weight="extra.weight")
    with pytest.raises(WorldloomError, match="unmatched weights beside the network"):
        read_released(file, "tiny-video")
    publish(BASE, file)
    change(file, net__blocks__0__self_attn__q_norm__weight="net.gone")
    with pytest.raises(WorldloomError, match="every predict network has is missing"):
        read_released(file)


def test_other_networks_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    publish(BASE, file)
    weights = load_file(file)
    save_file(weights | {"net.control_blocks.0.before_proj.weight": torch.zeros(2)}, file)
    with pytest.raises(WorldloomError, match="transfer family"):
        read_released(file)
    save_file(weights | {"net_ema.x_embedder.proj.1.weight": torch.zeros(2)}, file)
    with pytest.raises(WorldloomError, match="several networks"):
        read_released(file)
    save_file({"net.blocks.block0.blocks.0.block.attn.to_q.0.weight": torch.zeros(2)}, file)
    with pytest.raises(WorldloomError, match="none of the layouts") as caught:
        read_released(file)
    assert "Cosmos 1 is read in the diffusers layout only" in str(caught.value)
    save_file({"decoder.conv1.weight": torch.zeros(2)}, file)
    with pytest.raises(WorldloomError, match="none of the layouts"):
        read_released(file)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    publish(BASE, file)
    data = file.read_bytes()
    for length in (0, 7, 200, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(WorldloomError, match="cannot be read"):
            read_released(file, "tiny-video")
    publish(BASE, file)
    weights = load_file(file)
    weights["net.t_embedding_norm.weight"][3] = float("nan")
    save_file(weights, file)
    with pytest.raises(WorldloomError, match="not finite") as caught:
        read_released(file, "tiny-video")
    assert "t_embedding_norm.weight" in str(caught.value)


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({}, file)
    for source in (file, tmp_path):
        with pytest.raises(WorldloomError, match="pickled checkpoints are not read") as caught:
            read_released(source)
        assert f"worldloom models convert {file} --out {tmp_path / 'model.safetensors'}" in str(caught.value)


def shards(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    publish(BASE, tmp_path / "x.safetensors")
    weights = load_file(tmp_path / "x.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    places = {key: f"m-0000{index % 3}.safetensors" for index, key in enumerate(sorted(weights))}
    for shard in set(places.values()):
        save_file({key: weights[key] for key in weights if places[key] == shard}, folder / shard)
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder, places


def test_native_shards_are_read_by_their_index(tmp_path: Path) -> None:
    folder, places = shards(tmp_path)
    whole = read_released(tmp_path / "x.safetensors", "tiny-video")
    for source in (folder, folder / "m.safetensors.index.json"):
        assert same(dict(read_released(source, "tiny-video").weights), dict(whole.weights))

    index = folder / "m.safetensors.index.json"
    (folder / "m-00001.safetensors").rename(folder / "away")
    with pytest.raises(WorldloomError, match="a shard of the checkpoint is missing"):
        read_released(folder, "tiny-video")
    (folder / "away").rename(folder / "m-00001.safetensors")
    moved = next(key for key, place in places.items() if place == "m-00001.safetensors")
    index.write_text(json.dumps({"weight_map": places | {moved: "m-00002.safetensors"}}))
    with pytest.raises(WorldloomError, match="do not agree"):
        read_released(folder, "tiny-video")
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(WorldloomError, match="outside its folder"):
        read_released(folder, "tiny-video")
    index.write_text("[")
    with pytest.raises(WorldloomError, match="index of shards cannot be read"):
        read_released(folder, "tiny-video")


def test_places_without_one_checkpoint_say_so(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        publish(BASE, tmp_path / name)
    with pytest.raises(WorldloomError, match="several checkpoints"):
        read_released(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorldloomError, match="no checkpoint here"):
        read_released(tmp_path / "empty")
    with pytest.raises(WorldloomError, match="no such file"):
        read_released(tmp_path / "none")
    publish(BASE, tmp_path / "model-720p-16fps-natten.safetensors")
    with pytest.raises(WorldloomError, match="sparse attention"):
        read_released(tmp_path / "model-720p-16fps-natten.safetensors", "tiny-video")


def test_a_network_of_ours_that_is_more_is_not_exported(tmp_path: Path) -> None:
    publish(BASE, tmp_path / "x.safetensors")
    import_released(tmp_path / "x.safetensors", tmp_path / "ours", "tiny-video")
    settings = configs.load(PredictCheckpoint, tmp_path / "ours" / "config.toml")
    for change, named in (
        ({"previous_frame": True}, "previous_frame"),
        ({"attention": "causal", "window": 4}, "window"),
        ({"action_dim": 2}, "action_layout"),
        ({"timestep_scale": 1000.0}, "timestep_scale"),
    ):
        configs.save(replace(settings, model=replace(BASE, **change)), tmp_path / "ours" / "config.toml")
        with pytest.raises(WorldloomError, match="cannot hold this network") as caught:
            export_released(tmp_path / "ours", tmp_path / "out.safetensors", "native")
        assert named in str(caught.value)
    configs.save(replace(settings, model=CONFIGS["views"]), tmp_path / "ours" / "config.toml")
    with pytest.raises(WorldloomError, match="diffusers layout cannot hold") as caught:
        export_released(tmp_path / "ours", tmp_path / "out", "diffusers")
    assert "views" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_loaded_network_gives_what_the_folder_gives(tmp_path: Path) -> None:
    weights = publish(BASE, tmp_path / "x.safetensors")
    model = load_released(tmp_path / "x.safetensors", "tiny-video")
    assert not model.training
    assert same(model.state_dict(), weights)
    x, level = torch.randn(1, 4, 2, 4, 4).bfloat16(), torch.rand(1, 2)
    with torch.no_grad():
        assert model(x, level).isfinite().all()


def test_every_recipe_is_whole() -> None:
    for name, row in RECIPES.items():
        if name.startswith("tiny"):
            continue
        assert recipe(name) is row
        width, height = row.size
        assert width % 16 == height % 16 == 0
        assert (row.frames - 1) % 4 == 0
        assert row.repository.startswith("nvidia/Cosmos-")
        assert row.sampler is not None or row.note
        if row.sampler is not None:
            assert row.sampler.guidance_convention == "conditional"
        assert row.sampler is None or row.sampler.condition_level == row.condition_level
    assert RECIPES["cosmos-predict2-14b-video2world"].network().rope_ratios == (20 / 24, 2.0, 2.0)


def test_the_commands(tmp_path: Path) -> None:
    run = CliRunner().invoke
    publish(BASE, tmp_path / "x.safetensors")
    done = run(main, ["models", "import", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert "tiny-video" in done.output
    out = tmp_path / "theirs"
    done = run(main, ["models", "export", str(tmp_path / "ours"), "--layout", "diffusers", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads((out / "config.json").read_text())["_class_name"] == "CosmosTransformer3DModel"
    for words, said in (
        (["import", str(tmp_path / "x.safetensors"), "--family", "predicts", "--out", "x"], "did you mean predict"),
        (["export", str(tmp_path), "--layout", "native", "--out", "x.safetensors"], "not a checkpoint folder"),
        (["export", str(tmp_path / "ours"), "--layout", "native", "--out", "x"], "one safetensors file"),
        (["export", "loom-world-nano", "--layout", "native", "--out", "x.safetensors"], "cannot hold this network"),
    ):
        failed = run(main, ["models", *words])
        assert failed.exit_code != 0
        assert said in failed.output + str(failed.exception)


@pytest.mark.parametrize("name", ["video", "positions", "chunk", "frame"])
def test_an_imported_checkpoint_generates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: published weights, a tokenizer, a start; what is given is kept by the sampler."""
    tokenizer = tiny_models.tokenizer_folder(tmp_path / "tokenizer")
    channels = tiny_models.VAE.latent_channels
    config = replace(CONFIGS[name], latent_channels=channels)
    row = Recipe("tiny", lambda: config, "loom/tiny", sampler=replace(RECIPES[POST].sampler, steps=3), frames=13)
    monkeypatch.setitem(RECIPES, "tiny", row)
    publish(config, tmp_path / "x.safetensors")
    import_released(tmp_path / "x.safetensors", tmp_path / "ours", "tiny", tokenizer=tokenizer)
    model = load_model(tmp_path / "ours")
    start = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    actions = torch.rand(1, 12, 3) if config.action_dim else None
    video = model.generate_video(start, actions, 13, seed=1)
    assert video.shape == (1, 3, 13, 32, 32)
    assert video.isfinite().all()
    if actions is not None:
        assert (model.generate_video(start, actions + 1, 13, seed=1) - video).abs().max() > 1e-4


def test_a_text_encoder_in_a_folder_lets_an_imported_checkpoint_read_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIGS["video"], latent_channels=tiny_models.VAE.latent_channels)
    save_t5(tmp_path / "t5", dim=config.context_dim)
    save_t5(tmp_path / "wide", dim=config.context_dim + 8)
    tokenizer = tiny_models.tokenizer_folder(tmp_path / "tokenizer")
    sampler = replace(RECIPES[POST].sampler, steps=2, negative_prompt="no motion")
    row = Recipe("tiny", lambda: config, "loom/tiny", sampler=sampler, frames=13, text_tokens=12)
    monkeypatch.setitem(RECIPES, "tiny", row)
    publish(config, tmp_path / "x.safetensors")
    with pytest.raises(WorldloomError, match="another size than the network reads"):
        import_released(tmp_path / "x.safetensors", tmp_path / "ours", "tiny", tokenizer, tmp_path / "wide")
    words = ["import", str(tmp_path / "x.safetensors"), "--variant", "tiny", "--tokenizer", str(tokenizer)]
    words += ["--text-encoder", str(tmp_path / "t5"), "--out", str(tmp_path / "ours")]
    done = CliRunner().invoke(main, ["models", *words])
    assert done.exit_code == 0, done.output
    assert "text encoder" not in done.output
    model = load_model(tmp_path / "ours")
    start = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    made = [
        model.generate_video(start, None, 13, text=[prompt], seed=1)
        for prompt in ("a robot arm", "a robot arm", "the red block stops")
    ]
    assert torch.equal(made[0], made[1])
    assert (made[0] - made[2]).abs().max() > 1e-4
    save_t5(tmp_path / "t5", dim=config.context_dim)  # another one in its place
    with pytest.raises(WorldloomError, match="trained with another text encoder"):
        load_model(tmp_path / "ours").generate_video(start, None, 13, text=["a robot arm"], seed=1)
