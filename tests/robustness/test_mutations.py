"""Mutated configs: each is refused with one line that contains the key, or is valid for a stated reason."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from config_mutations import Mutation, mutate
from omegaconf import OmegaConf

from ldm.training.cli import Options
from ldm.training.plan import make_plan
from ldm.training.recipe import load_recipe
from ldm.util import ConfigError, UserError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart"
ALONE = ("autoencoder", "latent-diffusion", "encdiff", "text-to-image", "directions")
FEW = ("clip", "clip_disdiff", "shapes3d_kl_4_16")
MOST_SECONDS = 20  # of the processor, for one check


def contents() -> dict[str, dict[str, Any]]:
    """Return the resolved contents of the shipped configs that can be trained, by name."""
    options = {
        path.stem: Options(base=(str(path),))
        for folder in ALONE
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml"))
    }
    for recipe in sorted(QUICKSTART.glob("recipe*.yaml")):
        for stage in load_recipe(Options(recipe=str(recipe))).stages:
            options[stage.name] = Options(
                base=tuple(str(ROOT / file) for file in stage.base), overrides=stage.overrides
            )
    return {name: make_plan(found).config.content for name, found in options.items()}


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    """The contents of the shipped configs."""
    return contents()


def outcome(mutation: Mutation, file: Path) -> tuple[str, str]:
    """Return the class of the check's answer, and the answer."""
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(mutation.content)))
    started = time.process_time()
    try:
        plan = make_plan(Options(base=(str(file),)))
    except (ConfigError, UserError) as error:
        message = str(error)
        is_good = "\n" not in message and mutation.word in message and file.name in message
        answer = ("refused" if is_good else "unclear"), message
    except Exception as error:
        answer = "traceback", repr(error)
    else:
        missing = mutation.kind == "unknown run" and not any("no_such_run" in text for text in plan.config.pending)
        answer = ("valid" if mutation.reason and not missing else "accepted"), mutation.reason or ""
    return ("hang", "") if time.process_time() - started > MOST_SECONDS else answer


def campaign(contents: dict[str, dict[str, Any]], seed: int, count: int, folder: Path) -> dict[str, list[str]]:
    """Check ``count`` mutated configs; return descriptions by class of outcome."""
    rng, found = random.Random(seed), {}
    while sum(map(len, found.values())) < count:
        name = rng.choice(sorted(contents))
        mutation = mutate(contents[name], rng)
        if mutation is not None:
            kind, answer = outcome(mutation, folder / "mutated.yaml")
            found.setdefault(kind, []).append(f"{name}: {mutation}: {answer}")
    return found


def test_every_mutation_is_refused_or_valid_for_a_reason(configs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = campaign({name: configs[name] for name in FEW}, 0, 40, tmp_path)
    assert not set(found) & {"traceback", "hang"} and len(found.get("accepted", ())) <= 1, found
    assert len(found["refused"]) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_campaign(configs: dict[str, dict[str, Any]], tmp_path: Path, seed: int) -> None:
    found = campaign(configs, seed, 200, tmp_path)
    counts = Counter({kind: len(texts) for kind, texts in found.items()})
    assert not counts["traceback"] and not counts["hang"] and counts["accepted"] <= 3, found
    assert counts["unclear"] <= 3 and counts["refused"] > 100, found
