import torch
import torch.nn.functional as F

from ldm.losses.disentangling import (
    clip_logits_aligned,
    clip_logits_reference,
    clip_logits_sampled,
    disdiff_logits,
    disentangling_loss,
)

B, U, D = 5, 4, 8


def text_codes():
    return F.normalize(torch.randn(B, U, D), dim=-1)


def test_loss_is_the_weighted_sum_of_both_cross_entropies():
    variant, invariant = torch.randn(B, U), torch.randn(B, U)
    unit, weight = torch.randint(0, U, (B,)), torch.rand(B)
    both = F.cross_entropy(variant, unit, reduction="none") + F.cross_entropy(invariant, unit, reduction="none")
    torch.testing.assert_close(disentangling_loss(variant, invariant, unit, weight), weight * both)


def test_a_perfect_edit_is_told_apart_by_the_aligned_logits():
    """Unit s moves the image onto its text, the others do nothing: s has the largest logit in both questions."""
    text, before, unit = text_codes(), torch.randn(B, D), torch.randint(0, U, (B,))
    rows = torch.arange(B)
    after = before.unsqueeze(1).repeat(1, U, 1)
    after[rows, unit] = text[rows, unit] * 3.0
    for logits in clip_logits_aligned(before, after, text):
        assert (logits.argmax(1) == unit).all()


def test_the_reference_prefers_what_is_far_from_its_text():
    """The defect that is kept for parity: the perfect edit has the smallest variant logit."""
    text, before, unit = text_codes(), torch.randn(B, D) * 5, torch.randint(0, U, (B,))
    rows = torch.arange(B)
    after = before.unsqueeze(1).repeat(1, U, 1)
    after[rows, unit] = text[rows, unit]
    variant, _ = clip_logits_reference(before, after, text)
    assert (variant.argmin(1) == unit).all()


def test_aligned_logits_ignore_the_length_of_image_features():
    text, before, after = text_codes(), torch.randn(B, D), torch.randn(B, U, D)
    for plain, scaled in zip(
        clip_logits_aligned(before, after, text), clip_logits_aligned(before * 7, after * 3, text)
    ):
        torch.testing.assert_close(plain, scaled)


def test_sampled_logits_see_one_edit():
    basis = torch.eye(D)[:U].expand(B, U, D)
    before, unit = torch.eye(D)[-1].expand(B, D), torch.randint(0, U, (B,))
    after = F.normalize(before + 0.5 * basis[torch.arange(B), unit], dim=-1)
    for logits in clip_logits_sampled(before, after, basis):
        assert (logits.argmax(1) == unit).all()


def test_no_change_has_zero_gradient_and_no_nan():
    before = torch.randn(B, U, D)
    after = before.clone().requires_grad_(True)
    variant, invariant = disdiff_logits(before, after, torch.randn(B, U, D))
    disentangling_loss(variant, invariant, torch.zeros(B, dtype=torch.long), torch.ones(B)).sum().backward()
    assert torch.isfinite(after.grad).all()
