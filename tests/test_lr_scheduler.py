import pytest
import torch

from ldm.lr_scheduler import (
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
    with_schedule,
)
from ldm.util import ConfigError


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
