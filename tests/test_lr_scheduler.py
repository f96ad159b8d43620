import json
import random
import re
from pathlib import Path

import pytest
import torch

from ldm.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
    with_schedule,
)
from ldm.util import ConfigError, instantiate_from_config
from main import main

QUICKSTART = [str(Path(__file__).parents[1] / f"configs/quickstart/{name}.yaml") for name in ("world", "vq")]


def test_ldm_default_warms_up_then_stays():
    factor = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [10000000000000])
    assert factor(0) == pytest.approx(1e-6)
    assert factor(5000) == pytest.approx(0.5, abs=1e-4)
    assert factor(10_000) == factor(2_000_000) == pytest.approx(1.0)


def test_linear_decay_over_the_cycle():
    factor = LambdaLinearScheduler([10], [0.1], [1.0], [0.0], [100])
    assert factor(50) == pytest.approx(0.55)
    assert factor(100) == factor(500) == pytest.approx(0.1)


def test_cosines_start_and_end_where_told():
    once = LambdaWarmUpCosineScheduler(10, 0.1, 1.0, 0.0, 110)
    cycles = LambdaWarmUpCosineScheduler2([10, 10], [0.1, 0.1], [1.0, 0.5], [0.0, 0.0], [110, 110])
    assert once(5) == cycles(5) == pytest.approx(0.5)
    assert once(60) == cycles(60) == pytest.approx(0.55)
    assert once(110) == cycles(110) == pytest.approx(0.1)
    assert cycles(120) == pytest.approx(0.5)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match="one length"):
        LambdaLinearScheduler([10], [1.0, 1.0], [1.0], [0.0], [100])


def test_the_state_of_an_earlier_checkpoint_is_continued():
    """LambdaLR stores the attributes of its functions; these are the ones in checkpoints of earlier versions."""
    cosine = {"warm_up_steps": 2, "max_decay_steps": 6, "lr_start": 0.1, "lr_min": 0.0, "lr_max": 1.0}
    cycles = {"warm_up_steps": [2], "f_min": [0.0], "f_max": [1.0], "f_start": [0.1], "cycle_lengths": [6]}
    for kind, state in (
        (LambdaWarmUpCosineScheduler, cosine),
        (LambdaLinearScheduler, cycles),
        (LambdaWarmUpCosineScheduler2, cycles),
    ):
        extra = {"verbosity_interval": 0} | ({"cycle_ends": [6]} if "cycle_lengths" in state else {})
        assert vars(kind(**state)) == state | extra


def test_each_optimizer_has_its_own_schedule():
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in (0.1, 0.2)]
    assert with_schedule(optimizers[:1], None) is optimizers[0]
    assert with_schedule(optimizers, None) == (optimizers, [])
    params = {"warm_up_steps": 4, "lr_min": 0.0, "lr_max": 1.0, "lr_start": 0.5, "max_decay_steps": 8}
    config = {"target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler", "params": params}
    scheduled, schedules = with_schedule(optimizers, config)
    assert scheduled == optimizers and [schedule["interval"] for schedule in schedules] == ["step", "step"]
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.05, 0.1]


def _random_cycles(rng: random.Random) -> dict[str, list[float]]:
    cycles = rng.randint(1, 3)
    steps = [lambda: rng.randint(0, 12), lambda: rng.uniform(0, 12), lambda: 0, lambda: 5]
    return {
        "cycle_lengths": [rng.choice([rng.randint(1, 12), rng.uniform(0.1, 12), 5]) for _ in range(cycles)],
        "warm_up_steps": [rng.choice(steps)() for _ in range(cycles)],
        **{
            name: [rng.choice([0.0, 1.0, rng.random()]) for _ in range(cycles)]
            for name in ("f_min", "f_max", "f_start")
        },
    }


@pytest.mark.parametrize("seed", range(40))
def test_factors_are_finite_and_within_their_limits(seed: int) -> None:
    rng = random.Random(seed)
    cycles = _random_cycles(rng)
    first = {name: values[0] for name, values in cycles.items()}
    once = {"warm_up_steps": first["warm_up_steps"], "max_decay_steps": first["cycle_lengths"]}
    once |= {f"lr_{name}": first[f"f_{name}"] for name in ("min", "max", "start")}
    limits = [value for name in ("f_min", "f_max", "f_start") for value in cycles[name]]
    for factor in (
        LambdaLinearScheduler(**cycles),
        LambdaWarmUpCosineScheduler2(**cycles),
        LambdaWarmUpCosineScheduler(**once),
    ):
        values = [factor(step) for step in range(60)]
        assert all(min(limits) - 1e-9 <= value <= max(limits) + 1e-9 for value in values)


@pytest.mark.parametrize("warm_up", [100, 100.0, 150, 0])
def test_a_warm_up_as_long_as_the_schedule_or_longer(warm_up: float) -> None:
    once = LambdaWarmUpCosineScheduler(warm_up, 0.1, 1.0, 0.2, 100)
    cycles = LambdaWarmUpCosineScheduler2([warm_up], [0.1], [1.0], [0.2], [100])
    linear = LambdaLinearScheduler([warm_up], [0.1], [1.0], [0.2], [100])
    for factor in (once, cycles, linear):
        assert factor(0) == pytest.approx(0.2 if warm_up else 1.0)
        assert all(0.1 <= factor(step) <= 1.0 for step in range(300))
    if warm_up == 100:
        assert once(100) == cycles(100) == cycles(300) == 1.0
        assert once(101) == once(300) == pytest.approx(0.1)
    if warm_up == 150:
        assert once(150) == 1.0 and once(151) == pytest.approx(0.1)


def test_a_cycle_without_end() -> None:
    endless = [float("inf")]
    for kind in (LambdaLinearScheduler, LambdaWarmUpCosineScheduler2):
        factor = kind([10], [0.0], [1.0], [0.0], endless)
        assert [factor(step) for step in (0, 5, 10, 10**8)] == pytest.approx([0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"cycle_lengths": [0]}, "cycle_lengths: expected a list, each entry a number above 0, got [0]"),
        ({"cycle_lengths": [-1]}, "cycle_lengths: expected a list, each entry a number above 0, got [-1]"),
        ({"cycle_lengths": []}, "cycle_lengths: expected lists of one length"),
        ({"cycle_lengths": ["ten"]}, "cycle_lengths: expected a"),
        ({"warm_up_steps": [-2]}, "warm_up_steps: expected a list, each entry a number of at least 0, got [-2]"),
        ({"f_max": [float("nan")]}, "f_max: expected a"),
        ({"f_min": [-0.1]}, "f_min: expected a list, each entry a number from 0 to 1000000, got [-0.1]"),
        ({"f_start": [1.0, 1.0]}, "f_start: expected lists of one length"),
    ],
)
def test_impossible_cycles_are_refused_by_the_check(changed: dict, expected: str, tmp_path: Path, capsys) -> None:
    params = {"warm_up_steps": [2], "f_min": [0.0], "f_max": [1.0], "f_start": [0.1], "cycle_lengths": [6], **changed}
    for kind in (LambdaLinearScheduler, LambdaWarmUpCosineScheduler2):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            instantiate_from_config({"target": f"ldm.lr_scheduler.{kind.__name__}", "params": params}, "callable")
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
    path = tmp_path / "schedule.yaml"
    model, _, _ = Path(QUICKSTART[1]).read_text().partition("    scheduler_config:")
    path.with_name("model.yaml").write_text(model)
    path.write_text(json.dumps({"model": {"params": {"scheduler_config": schedule}}}).replace("NaN", ".nan"))
    assert main(["-b", QUICKSTART[0], str(path.with_name("model.yaml")), str(path)]) == 1
    message = capsys.readouterr().err
    assert f"{path}: model.params.scheduler_config.params.{expected}" in message


@pytest.mark.parametrize("name", ["max_decay_steps", "warm_up_steps", "lr_max"])
def test_impossible_decays_are_refused_by_the_check(name: str, capsys) -> None:
    override = f"model.params.scheduler_config.params.{name}=-1"
    assert main(["-b", *QUICKSTART, override]) == 1
    assert f"command line: model.params.scheduler_config.params.{name}: expected a number" in capsys.readouterr().err
