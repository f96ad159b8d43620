import dataclasses

import pytest
import torch

from ldm.diffusion.conditions import TensorCondition, UnitCodes, as_condition
from ldm.diffusion.guidance import add_units, classifier_free
from ldm.util import ConfigError, UserError

DROP = torch.tensor([True, False])


def example(kind):
    """A condition of two samples."""
    tokens, image = torch.randn(2, 3, 4), torch.randn(2, 1, 4, 4)
    return {
        "tensor": as_condition(tokens, lambda: torch.full((1, 3, 4), 7.0)),
        "list": as_condition([tokens, tokens + 1]),
        "dict": as_condition({"c_crossattn": [tokens], "c_concat": [image]}),
        "units": UnitCodes(torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, False] * 2 + [True]])),
    }[kind]


def tensors(cond):
    """All tensors of a condition."""
    values = cond.inputs("crossattn").values()
    return [v for entry in values if entry is not None for v in (entry if isinstance(entry, list) else [entry])]


@pytest.mark.parametrize("kind", ["tensor", "list", "dict", "units"])
class TestEveryKind:
    def test_dropping_all_is_null_and_dropping_none_changes_nothing(self, kind):
        cond = example(kind)
        for dropped, expected in (
            (cond.drop(torch.ones(2, dtype=torch.bool)), cond.null()),
            (cond.drop(torch.zeros(2, dtype=torch.bool)), cond),
        ):
            assert type(dropped) is type(cond)
            for a, b in zip(tensors(dropped), tensors(expected), strict=True):
                assert torch.equal(a, b)

    def test_samples_are_dropped_one_by_one(self, kind):
        cond = example(kind)
        for value, own, empty in zip(tensors(cond.drop(DROP)), tensors(cond), tensors(cond.null()), strict=True):
            assert torch.equal(value[0], empty[0])
            assert torch.equal(value[1], own[1])

    def test_first_undoes_joined(self, kind):
        cond = example(kind)
        joined = cond.joined(cond.null())
        assert all(len(value) == 4 for value in tensors(joined))
        for a, b in zip(tensors(joined.first(2)), tensors(cond), strict=True):
            assert torch.equal(a, b)
        assert all(len(value) == 1 for value in tensors(cond.first(1)))

    def test_guidance_is_the_written_out_formula(self, kind):
        cond = example(kind)
        x, t, seen = torch.randn(2, 1, 4, 4), torch.tensor([1, 2]), []

        def predict(x, t, cond):
            seen.append(len(x))
            total = sum(value.float().flatten(1).sum(1) for value in tensors(cond))
            return x * (1 + t.reshape(-1, 1, 1, 1)) + total.reshape(-1, 1, 1, 1)

        without, under = predict(x, t, cond.null()), predict(x, t, cond)
        torch.testing.assert_close(classifier_free(predict, cond, 3.0)(x, t), without + 3.0 * (under - without))
        assert seen[-1] == 4  # one call with twice the batch
        torch.testing.assert_close(classifier_free(predict, cond, 1.0)(x, t), under)
        negative = cond.first(2).drop(DROP)
        away = predict(x, t, negative)
        torch.testing.assert_close(classifier_free(predict, cond, 2.0, negative)(x, t), away + 2.0 * (under - away))


def test_null_of_a_tensor():
    value = torch.randn(2, 3)
    assert torch.equal(TensorCondition(value).null().value, torch.zeros(2, 3))
    assert torch.equal(TensorCondition(value, lambda: torch.ones(1, 3)).null().value, torch.ones(2, 3))
    with pytest.raises(UserError, match="null class"):
        TensorCondition(torch.tensor([1, 2])).null()


def test_a_map_on_the_channels_is_not_dropped():
    cond = example("dict")
    assert torch.equal(cond.null().parts["c_concat"][0].value, cond.parts["c_concat"][0].value)
    alone = as_condition({"c_concat": [torch.randn(2, 1, 4, 4)]})
    assert not alone.null().parts["c_concat"][0].value.any()


def test_gradients_pass_to_what_is_kept():
    value = torch.randn(2, 3, requires_grad=True)
    TensorCondition(value).drop(DROP).value.sum().backward()
    assert torch.equal(value.grad, torch.tensor([[0.0] * 3, [1.0] * 3]))


def test_places_in_the_network():
    value = torch.randn(2, 3)
    assert list(TensorCondition(value).inputs("concat")) == ["c_concat"]
    assert list(TensorCondition(value).inputs("adm")) == ["c_crossattn"]
    assert list(as_condition([value]).inputs("concat")) == ["c_concat"]
    assert list(as_condition([value]).inputs("hybrid")) == ["c_crossattn"]
    assert list(as_condition({"c_crossattn": value, "c_concat": value}).inputs("hybrid")) == ["c_crossattn", "c_concat"]
    assert as_condition(None) is None
    with pytest.raises(ConfigError, match="got str"):
        as_condition("a cat")


def test_guidance_without_a_condition_is_refused():
    with pytest.raises(UserError, match="unconditional"):
        classifier_free(lambda x, t, c: x, None, 2.0)


def test_guidance_of_single_units():
    pred, grads, scale = torch.randn(2, 1, 4, 4), torch.randn(2, 3, 1, 4, 4), torch.full((2, 1, 1, 1), -0.5)
    same = add_units(pred, grads.sum(1), grads, scale, 2.0)
    torch.testing.assert_close(same, add_units(pred, grads.sum(1), grads, scale, torch.full((3,), 2.0)))
    single = add_units(pred, grads.sum(1), grads, scale, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(single, pred + scale * grads[:, 1])


def test_factors_of_units_follow_their_samples():
    weights = torch.rand(2, 3)
    cond = UnitCodes(torch.randn(2, 3, 4), only=torch.tensor([0, 1]), guidance=weights)
    joined = cond.joined(cond.null())
    assert torch.equal(joined.guidance, torch.cat([weights, weights]))
    assert torch.equal(joined.first(2).guidance, weights) and torch.equal(cond.first(1).guidance, weights[:1])
    mixed = UnitCodes(cond.codes, guidance=2.0).joined(UnitCodes(cond.codes, guidance=torch.ones(3)))
    assert torch.equal(mixed.guidance, torch.cat([torch.full((2, 3), 2.0), torch.ones(2, 3)]))
    with pytest.raises(UserError, match="only"):
        cond.joined(UnitCodes(cond.codes))


def test_swapped_units():
    codes = UnitCodes(torch.randn(2, 3, 4), torch.tensor([[False, True, True], [True] * 3]))
    swapped = codes.swapped(0)
    assert torch.equal(swapped.codes[1, 0], codes.codes[0, 0]) and not swapped.mask[1, 0]
    assert torch.equal(swapped.codes[1, 1:], codes.codes[1, 1:])
    assert dataclasses.replace(codes, guidance=2.0).first(1).guidance == 2.0


def test_vectors_stay_beside_a_dropped_text():
    text, level = torch.randn(2, 3, 4), torch.tensor([5, 7])
    cond = as_condition({"c_crossattn": text, "c_adm": level}, lambda: torch.zeros(1, 3, 4))
    for other in (cond.null(), cond.drop(torch.ones(2, dtype=torch.bool))):
        inputs = other.inputs("crossattn-adm")
        assert torch.equal(inputs["c_adm"], level) and not inputs["c_crossattn"][0].any()
    assert cond.joined(cond).first(3).inputs("crossattn-adm")["c_adm"].tolist() == [5, 7, 5]


def test_an_empty_condition_of_another_length_is_named():
    cond = as_condition(torch.randn(2, 3, 4), lambda: torch.zeros(1, 5, 4))
    with pytest.raises(UserError, match=r"shape \(3, 4\), like the others, got \(5, 4\)"):
        cond.null()
