"""Action tokenizers: the round-trip bound, ids in range, spaces map exactly, what is refused, what is saved."""

from __future__ import annotations

import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldloom.errors import WorldloomError
from worldloom.protocols import ActionTokenizer
from worldloom_curation.simulators import encode_action, sample_action
from worldloom_tokenizers.actions import ActionCodec

finite = st.floats(-1e4, 1e4, width=32)


def table(columns: int) -> st.SearchStrategy[Tensor]:
    """Float32 actions ``(m, columns)``."""
    rows = st.integers(2, 30)
    return rows.flatmap(lambda m: hnp.arrays(np.float32, (m, columns), elements=finite)).map(torch.from_numpy)


def check_round_trip(codec: ActionCodec, actions: Tensor) -> None:
    tokens = codec.encode(actions)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (*actions.shape[:-1], codec.tokens)
    assert (tokens >= 0).all()
    assert (tokens < torch.tensor(codec.sizes)).all()
    again = codec.decode(tokens)
    assert again.dtype == torch.float32
    rounding = (2.0**-24 * again.abs().double()).clamp_min(2.0**-150)  # least numbers are 2**-149 apart
    assert ((again.double() - actions.double()).abs() <= codec.error_bound() * (1 + 1e-9) + rounding).all()
    assert torch.equal(codec.encode(again, clip=True), codec.encode(codec.decode(tokens), clip=True))


@given(actions=table(3), bins=st.integers(2, 300), spacing=st.sampled_from(["uniform", "quantile"]))
@example(actions=torch.tensor([[3.8844e-39, 0.0, 0.0], [0.0, 0.0, 0.0]]), bins=2, spacing="uniform")
def test_bins_bring_numbers_back_within_half_a_bin(actions: Tensor, bins: int, spacing: str) -> None:
    codec = ActionCodec.binned(actions, bins, spacing)  # pyright: ignore[reportArgumentType]
    assert codec.tokens == 3
    assert codec.vocab_size == bins
    check_round_trip(codec, actions)
    if spacing == "uniform":
        width = (actions.double().amax(0) - actions.double().amin(0)) / bins
        torch.testing.assert_close(codec.error_bound(), width / 2, rtol=1e-9, atol=1e-9)


@given(actions=table(4), levels=st.lists(st.integers(3, 40), min_size=1, max_size=2))
def test_fsq_brings_numbers_back_within_half_a_step(actions: Tensor, levels: list[int]) -> None:
    codec = ActionCodec.fsq(actions, levels)
    assert codec.tokens == 4 // len(levels)
    assert codec.vocab_size == math.prod(levels)
    check_round_trip(codec, actions)
    reach = actions.double().amax(0) - actions.double().amin(0)
    steps = torch.tensor(levels * (4 // len(levels))).double() - 1
    torch.testing.assert_close(codec.error_bound(), reach / steps / 2, rtol=1e-9, atol=1e-9)


@given(actions=table(2), half=st.integers(1, 100))
def test_linear_scaling_keeps_zero(actions: Tensor, half: int) -> None:
    codec = ActionCodec.fsq(actions, (2 * half + 1,), scaling="linear")
    check_round_trip(codec, actions)
    zero = torch.zeros(1, 2)
    assert torch.equal(codec.decode(codec.encode(zero)), zero)


def test_batches_of_sequences_are_rows_of_sequences() -> None:
    actions = torch.rand(3, 5, 4)
    for codec in (ActionCodec.binned(actions), ActionCodec.fsq(actions, (5, 5))):
        tokens = codec.encode(actions)
        assert tokens.shape == (3, 5, codec.tokens)
        assert torch.equal(tokens[1], codec.encode(actions[1]))
        assert torch.equal(codec.decode(tokens)[1], codec.decode(tokens[1]))
        check_round_trip(codec, actions)


def test_uniform_bins_are_those_of_numpy() -> None:
    actions = torch.rand(500, 2, dtype=torch.float64) * 7 - 3
    codec = ActionCodec.binned(actions, 16)
    for column in range(2):
        values = actions[:, column].numpy()
        edges = np.linspace(values.min(), values.max(), 17)
        expected = (np.digitize(values, edges) - 1).clip(0, 15)
        assert np.array_equal(codec.encode(actions)[:, column].numpy(), expected)


def test_quantile_bins_hold_equal_counts() -> None:
    actions = torch.randn(4000, 1).exp()
    counts = torch.bincount(ActionCodec.binned(actions, 8, "quantile").encode(actions)[:, 0])
    assert (counts - 500).abs().max() <= 2


def test_several_columns_share_an_fsq_token_first_column_fastest() -> None:
    ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    codec = ActionCodec.fsq(ends, (3, 5))
    assert codec.encode(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.25], [1.0, 1.0]])).flatten().tolist() == [
        0,
        1,
        3,
        14,
    ]
    assert torch.equal(codec.decode(torch.tensor([[14], [0]])), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


def test_a_column_that_never_moved_comes_back_as_it_is() -> None:
    actions = torch.tensor([[0.3, 1.0], [0.3, -1.0]])
    for codec in (ActionCodec.binned(actions), ActionCodec.binned(actions, 4, "quantile"), ActionCodec.fsq(actions)):
        assert torch.equal(codec.decode(codec.encode(actions))[:, 0], actions[:, 0])


SPACES = {
    "discrete": spaces.Discrete(5, start=-2),
    "multi-discrete": spaces.MultiDiscrete([3, 4], start=[1, -1]),
    "multi-discrete of two axes": spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])),
    "multi-binary": spaces.MultiBinary([2, 3]),
    "tuple": spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))),
    "dict": spaces.Dict(
        {"z": spaces.Discrete(2), "a": spaces.Tuple((spaces.Discrete(4), spaces.MultiDiscrete([2, 7])))}
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_discrete_spaces_map_exactly(name: str) -> None:
    space, rng = SPACES[name], np.random.default_rng(0)
    vectors = torch.from_numpy(np.stack([encode_action(space, sample_action(space, rng)) for _ in range(300)]))
    codec = ActionCodec.from_space(space)
    assert isinstance(codec, ActionTokenizer)
    tokens = codec.encode(vectors)
    assert torch.equal(codec.decode(tokens), vectors)
    assert (codec.error_bound() == 0).all()
    assert len(torch.unique(tokens, dim=0)) == len(torch.unique(vectors, dim=0))
    assert tokens.amax(0).tolist() == [size - 1 for size in codec.sizes]


@pytest.mark.parametrize("kind", ["binned", "fsq"])
def test_a_mixed_space_keeps_its_order(kind: str) -> None:
    arm = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
    space = spaces.Dict({"grip": spaces.Discrete(2), "arm": arm})
    codec = ActionCodec.from_space(space, kind=kind, bins=100, levels=(101,))  # pyright: ignore[reportArgumentType]
    assert [part.columns for part in codec.parts] == [2, 2]  # keys are sorted: arm, grip
    rng = np.random.default_rng(0)
    vectors = torch.from_numpy(np.stack([encode_action(space, sample_action(space, rng)) for _ in range(200)]))
    check_round_trip(codec, vectors)
    assert torch.equal(codec.decode(codec.encode(vectors))[:, 2:], vectors[:, 2:])
    torch.testing.assert_close(codec.error_bound(), torch.tensor([0.01, 0.05, 0, 0]).double())


def test_an_unbounded_box_takes_its_range_from_actions() -> None:
    space = spaces.Tuple((spaces.Discrete(2), spaces.Box(-np.inf, np.inf, (2,))))
    with pytest.raises(WorldloomError, match="no bounds"):
        ActionCodec.from_space(space)
    actions = torch.tensor([[1.0, 0.0, -4.0, 0.5], [0.0, 1.0, 4.0, 0.0]])
    codec = ActionCodec.from_space(space, bins=8, actions=actions)
    assert codec.error_bound().tolist() == [0, 0, 0.5, 0.03125]
    with pytest.raises(WorldloomError, match="have 4 columns"):
        ActionCodec.from_space(space, actions=actions[:, :3])


def test_a_space_without_a_fixed_size_is_refused() -> None:
    with pytest.raises(WorldloomError, match="no fixed size"):
        ActionCodec.from_space(spaces.Sequence(spaces.Discrete(2)))


def test_what_ships_with_gymnasium_has_a_tokenizer() -> None:
    space = gymnasium.make("CartPole-v1").action_space
    assert ActionCodec.from_space(space).sizes == (2,)


def test_values_outside_the_range_are_refused_or_clipped_and_counted() -> None:
    codec = ActionCodec.binned(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 10)
    wild = torch.tensor([[0.5, 2.0], [0.5, -1.0], [0.5, 0.5], [0.5, 1.0]])
    with pytest.raises(WorldloomError, match="column 1 goes from 0 to 1") as caught:
        codec.encode(wild)
    assert "-1 to 2, 2 of 4" in str(caught.value)
    assert codec.encode(wild, clip=True)[:, 1].tolist() == [9, 0, 5, 9]
    assert codec.outside(wild).tolist() == [0, 0.5]


def test_the_range_can_leave_outliers_out() -> None:
    actions = torch.cat([torch.linspace(0, 1, 101)[:, None], torch.tensor([[500.0]])])
    codec = ActionCodec.binned(actions, 10, quantiles=(0.0, 0.98))
    assert codec.error_bound().item() < 0.06
    assert codec.outside(actions).item() == pytest.approx(2 / 102, abs=0.011)


@pytest.mark.parametrize(
    ("actions", "what"),
    [
        (torch.full((3, 2), math.nan), "not finite"),
        (torch.full((3, 2), math.inf), "not finite"),
        (torch.zeros(3, 3), r"actions are \(b, T, 2\)"),
        (torch.zeros(2), r"actions are \(b, T, 2\)"),
        (torch.zeros(1, 1, 3, 2), r"actions are \(b, T, 2\)"),
    ],
)
def test_actions_that_are_none_are_refused(actions: Tensor, what: str) -> None:
    codec = ActionCodec.binned(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(WorldloomError, match=what):
        codec.encode(actions)
    with pytest.raises(WorldloomError, match=what):
        codec.outside(actions)


@pytest.mark.parametrize(
    ("space", "vector"),
    [
        (spaces.Discrete(3), [0.0, 0.0, 0.0]),
        (spaces.Discrete(3), [1.0, 1.0, 0.0]),
        (spaces.Discrete(3), [0.5, 0.5, 0.0]),
        (spaces.MultiDiscrete([3]), [3.0]),
        (spaces.MultiDiscrete([3]), [0.5]),
        (spaces.MultiBinary(1), [-1.0]),
    ],
)
def test_what_is_no_choice_is_refused(space: spaces.Space, vector: list[float]) -> None:
    with pytest.raises(WorldloomError, match="discrete action"):
        ActionCodec.from_space(space).encode(torch.tensor([vector]))


def test_tokens_that_are_none_are_refused() -> None:
    codec = ActionCodec.from_space(spaces.MultiDiscrete([3, 4]))
    with pytest.raises(WorldloomError, match="token 0 are 0 to 2"):
        codec.decode(torch.tensor([[3, 0]]))
    with pytest.raises(WorldloomError, match="token 1 are 0 to 3"):
        codec.decode(torch.tensor([[0, -1]]))
    with pytest.raises(WorldloomError, match="tokens are integers"):
        codec.decode(torch.tensor([[0.0, 1.0]]))
    with pytest.raises(WorldloomError, match="tokens are integers"):
        codec.decode(torch.tensor([[0]]))


def test_impossible_tokenizers_are_refused() -> None:
    some = torch.rand(9, 3)
    for make, what in (
        (lambda: ActionCodec.binned(some, 1), "at least two bins"),
        (lambda: ActionCodec.fsq(some, (4, 4)), "as many columns as there are levels"),
        (lambda: ActionCodec.fsq(some, (1,)), "levels per channel"),
        (lambda: ActionCodec.fsq(some, (4,), scaling="linear"), "odd levels"),
        (lambda: ActionCodec.binned(some, quantiles=(0.9, 0.1)), "quantiles"),
        (lambda: ActionCodec.binned(some[:0]), "is fitted to actions"),
        (lambda: ActionCodec.fsq(some * math.nan), "not finite"),
        (lambda: ActionCodec.choice(0), "at least one choice"),
        (lambda: ActionCodec.from_space(spaces.Tuple(())), "at least one column"),
    ):
        with pytest.raises(WorldloomError, match=what):
            make()


def codecs() -> dict[str, ActionCodec]:
    some = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    mixed = spaces.Tuple((spaces.Discrete(3), spaces.MultiDiscrete([2, 5]), spaces.Box(-1, 1, (2,))))
    return {
        "uniform": ActionCodec.binned(some),
        "quantile": ActionCodec.binned(some, spacing="quantile"),
        "fsq": ActionCodec.fsq(some, (7, 9)),
        "mixed": ActionCodec.from_space(mixed, kind="fsq"),
    }


@pytest.mark.parametrize("name", codecs())
def test_saved_is_loaded(name: str, tmp_path: Path) -> None:
    codec = codecs()[name]
    codec.save(tmp_path / "codec")
    again = ActionCodec.load(tmp_path / "codec")
    assert again.parts == codec.parts
    assert again.fingerprint == codec.fingerprint
    tokens = torch.stack([torch.randint(size, (20,)) for size in codec.sizes], dim=1)
    assert torch.equal(again.decode(tokens), codec.decode(tokens))
    assert sorted(file.name for file in (tmp_path / "codec").iterdir()) == ["config.toml", "model.safetensors"]


def test_fingerprints_tell_tokenizers_apart() -> None:
    moved = ActionCodec.binned(torch.rand(50, 2) * 2)
    prints = {codec.fingerprint for codec in (*codecs().values(), moved)}
    assert len(prints) == 5
    assert codecs()["fsq"].fingerprint == codecs()["fsq"].fingerprint


def test_statistics_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    codecs()["uniform"].save(tmp_path / "codec")
    file = tmp_path / "codec" / "model.safetensors"
    tensors = load_file(file)
    save_file({"parts.0": tensors["parts.0"][:, :-1].clone()}, file)
    with pytest.raises(WorldloomError, match="of another tokenizer"):
        ActionCodec.load(tmp_path / "codec")
