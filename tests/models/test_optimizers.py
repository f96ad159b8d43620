"""Fused optimizers: clipped gradients in every precision, and states of other implementations."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import test_ddpm
import torch
from torch import nn

from ldm.models.optimizers import fused

ADAM = {torch.optim.Adam: {"betas": (0.5, 0.9)}, torch.optim.AdamW: {"weight_decay": 0.1}}


class Norms(pl.Callback):
    """Records the norm of the gradients at every step of the optimizer."""

    def on_train_start(self, trainer, pl_module):
        self.norms, (optimizer,) = [], trainer.optimizers
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: self.norms.append(total_norm(parameters)))


def total_norm(parameters):
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_with_a_fused_optimizer_in_every_precision(precision):
    norms = Norms()
    trainer = test_ddpm.train(test_ddpm.build(), precision=precision, gradient_clip_val=0.01, callbacks=[norms])
    assert trainer.optimizers[0].param_groups[0]["fused"] is True
    assert norms.norms[1:] == pytest.approx([0.01] * 2, rel=1e-3)  # each step is recorded before its own gradients


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_in_bf16_equals_that_in_float32(algorithm):
    def clipped(precision):
        trainer = pl.Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
        weight = nn.Parameter(torch.zeros(4))
        weight.grad = torch.tensor([3.0, -4.0, 0.5, 0.0])
        optimizer = fused(torch.optim.AdamW, [weight], lr=0.1)
        kind = pl.utilities.GradClipAlgorithmType(algorithm)
        trainer.precision_plugin.clip_gradients(optimizer, 1.0, kind)
        return weight.grad

    assert torch.equal(clipped("bf16-mixed"), clipped("32-true"))
    assert clipped("bf16-mixed").abs().max() <= 1


def steps(optimizer, weight, count):
    for step in range(count):
        weight.grad = torch.sin(torch.arange(6.0) + step)
        optimizer.step()


@pytest.mark.parametrize("kind", ADAM)
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}])
def test_states_of_other_implementations_are_continued_with_the_fused_kernel(kind, implementation):
    weight = nn.Parameter(torch.ones(6))
    earlier = kind([weight], lr=0.1, **ADAM[kind], **implementation)
    steps(earlier, weight, 3)
    resumed_weight = nn.Parameter(weight.detach().clone())
    resumed = fused(kind, [resumed_weight], lr=0.5, **ADAM[kind])
    resumed.load_state_dict(copy.deepcopy(earlier.state_dict()))
    assert resumed.param_groups[0]["fused"] is True and not resumed.param_groups[0]["foreach"]
    assert resumed.param_groups[0]["lr"] == 0.1
    steps(earlier, weight, 2)
    steps(resumed, resumed_weight, 2)
    torch.testing.assert_close(resumed_weight, weight)


def test_groups_keep_their_options():
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = fused(torch.optim.AdamW, [{"params": [first], "weight_decay": 0.0}, {"params": [second]}], lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_parameters_of_devices_without_a_kernel_are_updated_by_the_default():
    optimizer = fused(torch.optim.AdamW, [nn.Parameter(torch.ones(2, device="meta"))], lr=0.1)
    assert optimizer.param_groups[0]["fused"] is None


def test_a_scaler_unscales_gradients_once():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = fused(torch.optim.Adam, [weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((weight * torch.tensor([1.0, -2.0])).sum()).backward()
    scaler.unscale_(optimizer)
    assert torch.equal(weight.grad, torch.tensor([1.0, -2.0]))
    scaler.step(optimizer)
    assert torch.equal(weight.grad, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, 0.1]))
