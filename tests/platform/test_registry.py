from __future__ import annotations

import sys

import pytest

from worldloom import WorldloomError, registry


def test_a_third_party_adds_a_stage_without_being_imported(install) -> None:
    install(
        "acme_a",
        {"worldloom.stages": {"acme": "acme_a.catalog:STAGES"}},
        {
            "acme_a/__init__.py": "",
            "acme_a/catalog.py": """
                STAGES = {
                    "acme-blur": "acme_a.blur:make.inner",
                    "acme-sharp": {"target": "acme_a.blur:make", "summary": "Sharpens.", "cost": 3},
                }
            """,
            "acme_a/blur.py": "class make:\n    inner = 'loaded'\n",
        },
    )
    assert {"acme-blur", "acme-sharp"} <= set(registry.names("stages"))
    entry = registry.entry("stages", "acme-sharp")
    assert (entry.summary, entry.meta, entry.catalog) == ("Sharpens.", {"cost": 3}, "acme_a.catalog:STAGES")
    assert "acme_a.blur" not in sys.modules
    assert registry.load("stages", "acme-blur") == "loaded"


def test_an_unknown_name_names_the_nearest(install) -> None:
    install(
        "acme_b",
        {"worldloom.recipes": {"acme": "acme_b_catalog:RECIPES"}},
        {"acme_b_catalog.py": "RECIPES = {'acme-world-lora': 'x:y'}"},
    )
    with pytest.raises(WorldloomError, match="did you mean acme-world-lora"):
        registry.entry("recipes", "acme-wrold-lora")


def test_an_unknown_group_names_the_groups() -> None:
    with pytest.raises(WorldloomError, match="no such registry group") as error:
        registry.names("stage")
    assert "stages" in error.value.do


def test_a_broken_catalog_is_named_and_hides_no_other(install) -> None:
    install(
        "acme_c",
        {"worldloom.commands": {"bad": "acme_c_bad:COMMANDS", "good": "acme_c_good:COMMANDS"}},
        {"acme_c_bad.py": "import acme_missing_part", "acme_c_good.py": "COMMANDS = {'acme-hello': 'x:y'}"},
    )
    group = registry.group("commands")
    assert {"doctor", "acme-hello"} <= set(group.entries)
    [problem] = [problem for problem in group.problems if "acme_c_bad" in problem]
    assert "acme_missing_part" in problem
    with pytest.raises(WorldloomError) as error:
        registry.entry("commands", "acme-bye")
    assert "acme_c_bad:COMMANDS failed to import" in error.value.do


@pytest.mark.parametrize("line", ["'no-colon'", "{'summary': 'no target'}", "7"])
def test_a_malformed_line_is_a_problem_of_its_catalog(install, line: str) -> None:
    install(
        "acme_d", {"worldloom.stages": {"d": "acme_d_catalog:S"}}, {"acme_d_catalog.py": f"S = {{'thing': {line}}}"}
    )
    sys.modules.pop("acme_d_catalog", None)
    problems = [problem for problem in registry.group("stages").problems if "acme_d_catalog" in problem]
    assert len(problems) == 1
    assert "thing" not in registry.group("stages").entries


def test_two_catalogs_that_define_one_name_are_both_named(install) -> None:
    for name in ("acme_e", "acme_f"):
        install(
            name, {"worldloom.families": {name: f"{name}_catalog:F"}}, {f"{name}_catalog.py": "F = {'twice': 'x:y'}"}
        )
    with pytest.raises(WorldloomError, match="two catalogs define families 'twice'") as error:
        registry.entry("families", "twice")
    assert "acme_e_catalog:F and acme_f_catalog:F" in str(error.value.got)
    with pytest.raises(WorldloomError, match="twice"):
        registry.names("families")


@pytest.mark.parametrize("target", ["acme_nowhere:thing", "json:no_such_thing"])
def test_a_target_that_does_not_exist_names_its_catalog(install, target: str) -> None:
    install(
        "acme_g", {"worldloom.recipes": {"g": "acme_g_catalog:R"}}, {"acme_g_catalog.py": f"R = {{'g': {target!r}}}"}
    )
    sys.modules.pop("acme_g_catalog", None)
    with pytest.raises(WorldloomError) as error:
        registry.load("recipes", "g")
    assert "acme_g_catalog:R" in str(error.value)


def test_an_entry_finds_its_files_beside_its_catalog(install) -> None:
    root = install(
        "acme_h",
        {"worldloom.models": {"h": "acme_h.catalog:MODELS"}},
        {
            "acme_h/__init__.py": "",
            "acme_h/catalog.py": "MODELS = {'h': {'target': 'x:y', 'path': 'weights/h'}, 'i': 'x:y'}",
        },
    )
    assert registry.entry("models", "h").folder == root / "acme_h" / "weights" / "h"
    assert registry.entry("models", "i").folder is None
