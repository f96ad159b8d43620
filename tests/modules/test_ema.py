"""The moving average: its rate, its keys, the parameters it averages, and its context."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from ldm.util import ConfigError


def make_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    return model


def test_keys_lose_their_dots_and_frozen_weights_are_left_out():
    state = LitEma(make_model()).state_dict()
    assert set(state) == {"decay", "num_updates", "0weight", "1weight", "1bias"}
    assert state["num_updates"].dtype == torch.int
    assert state["decay"].dtype == torch.float32


def test_rate_warms_up():
    model = make_model()
    ema = LitEma(model)
    expected = model[1].weight.detach().clone()
    for update in range(1, 4):
        with torch.no_grad():
            model[1].weight.add_(1.0)
        ema(model)
        rate = (1 + update) / (10 + update)
        expected -= (1 - rate) * (expected - model[1].weight.detach())
        torch.testing.assert_close(ema.get_buffer("1weight"), expected)
    assert ema.num_updates.item() == 3


def test_fixed_rate():
    model = make_model()
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    before = model[1].bias.detach().clone()
    with torch.no_grad():
        model[1].bias.add_(2.0)
    ema(model)
    torch.testing.assert_close(ema.get_buffer("1bias"), before + 1)
    assert ema.num_updates.item() == -1


def test_weights_are_restored_after_the_context_and_after_an_error():
    model = make_model()
    ema = LitEma(model)
    average = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(KeyError), ema.applied_to(model):
        with ema.applied_to(model):
            assert torch.equal(model[0].weight, average)
        assert torch.equal(model[0].weight, average)
        raise KeyError
    assert torch.equal(model[0].weight, average + 1)
    assert model[0].weight.requires_grad


def test_extra_parts_are_averaged_with_the_network():
    model, encoder, tokens = make_model(), nn.Sequential(nn.Linear(2, 2)), nn.Parameter(torch.zeros(3))
    encoder[0].bias.requires_grad_(False)
    ema = LitEma(model, 0.5, use_num_updates=False)
    ema.add("encoder", encoder)
    ema.add("tokens", tokens)
    assert set(ema.state_dict()) == {*LitEma(model).state_dict(), "encoder0weight", "tokens"}
    assert not list(ema.parameters()) and not list(ema.children())
    start, trained = encoder[0].weight.detach().clone(), (model[0].weight, encoder[0].weight, tokens)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(2.0)
    ema(model)
    torch.testing.assert_close(ema.get_buffer("encoder0weight"), start + 1)
    assert (ema.get_buffer("tokens") == 1).all()
    with ema.applied_to(model):
        assert (tokens == 1).all() and torch.equal(encoder[0].weight, ema.get_buffer("encoder0weight"))
    assert (tokens == 2).all() and torch.equal(encoder[0].weight, start + 2)
    ema.restart(model)
    assert (ema.get_buffer("tokens") == 2).all()


def test_bad_decay():
    with pytest.raises(ConfigError, match="1.5"):
        LitEma(make_model(), decay=1.5)


def test_replaced_tensors_and_added_parts_are_found_again():
    """Names are found once per network; a move to a device or loading replaces tensors."""
    model = make_model()
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    ema(model)
    model[1].bias = nn.Parameter(torch.full((1,), 2.0))
    ema._buffers["1bias"] = torch.zeros(1)
    ema(model)
    assert ema.get_buffer("1bias").item() == 1.0
    extra = nn.Parameter(torch.zeros(3))
    ema.add("extra", extra)
    with torch.no_grad():
        extra.add_(4.0)
    ema(model)
    assert ema.get_buffer("extra").tolist() == [2.0] * 3
    double = model.double(), ema.double()
    double[1](double[0])
    assert ema.get_buffer("1bias").item() == 1.75 and ema.get_buffer("1bias").dtype == torch.float64


def test_another_network_and_copies_are_averaged_as_their_own():
    model = make_model()
    ema = LitEma(model, decay=0.5, use_num_updates=False)
    ema(model)
    others = copy.deepcopy(nn.ModuleList([model, ema]))
    for network, average in (others, (make_model(), ema)):
        before = average.get_buffer("1bias").clone()
        with torch.no_grad():
            network[1].bias.fill_(5.0)
        average(network)
        torch.testing.assert_close(average.get_buffer("1bias"), (before + 5) / 2)
    assert model[1].bias.item() != 5.0
