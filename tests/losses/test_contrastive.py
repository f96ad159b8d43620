"""The contrastive loss with all true pairs."""

import math

import torch
import torch.nn.functional as F

from ldm.losses.contrastive import caption_matches, multi_positive_loss


def test_matches_need_only_the_named_attributes():
    labels = torch.tensor([[0, 1], [0, 2], [3, 1]])
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    matches, contradictions = caption_matches(labels, labels, mask)
    assert matches.tolist() == [[True, False, True], [True, True, False], [False, False, True]]
    assert torch.equal(contradictions, ~matches)


def test_unknown_attributes_neither_match_nor_contradict():
    images = torch.tensor([[0, 1], [-1, 1], [-1, 2], [-1, -1]])
    captions, mask = torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.tensor([[True, True], [True, False], [False, False]])
    matches, contradictions = caption_matches(images, captions, mask)
    assert matches.tolist() == [[True, True, False], [False] * 3, [False] * 3, [False] * 3]
    assert contradictions.tolist() == [[False] * 3, [False] * 3, [True, False, False], [False] * 3]


def test_pairs_that_are_neither_do_not_change_the_loss():
    torch.manual_seed(0)
    logits, matches = torch.randn(4, 4), torch.eye(4, dtype=torch.bool)
    contradictions = ~matches
    contradictions[0, 1] = contradictions[2, 3] = False
    changed = logits.clone()
    changed[0, 1], changed[2, 3] = 50.0, -50.0
    first, second = (multi_positive_loss(each, matches, contradictions) for each in (logits, changed))
    assert torch.equal(first, second) and first != multi_positive_loss(logits, matches)


def test_every_image_fits_its_own_caption():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (20, 4))
    mask = torch.rand(5, 4) < 0.5
    mask[:, 0] = True
    matches, _ = caption_matches(labels, labels[:5], mask)
    assert matches[:5].diagonal().all()


def test_loss_is_clips_when_pairs_are_unique():
    torch.manual_seed(0)
    logits = torch.randn(6, 6)
    target = torch.arange(6)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert torch.allclose(multi_positive_loss(logits, torch.eye(6, dtype=torch.bool)), expected)


def test_true_pairs_do_not_compete():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    matches = torch.tensor([[True, True, False]])
    per_pair = [math.log(1 + math.exp(0.5 - z)) for z in (2.0, -1.0)]
    columns = 0.0  # a column of one image has no false pair
    assert math.isclose(multi_positive_loss(logits, matches).item(), (sum(per_pair) / 2 + columns) / 2, rel_tol=1e-6)


def test_no_false_pair_means_no_loss():
    logits = torch.randn(2, 2, requires_grad=True)
    loss = multi_positive_loss(logits, torch.ones(2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.isfinite().all()


def test_rows_without_a_true_pair_are_left_out():
    logits = torch.randn(3, 2, requires_grad=True)
    matches = torch.tensor([[True, False], [False, True], [False, False]])
    loss = multi_positive_loss(logits, matches)
    row = F.cross_entropy(logits[:2], torch.tensor([0, 1]))
    column = F.cross_entropy(logits.T, torch.tensor([0, 1]))
    assert torch.allclose(loss, (row + column) / 2)
    loss.backward()
    assert logits.grad.isfinite().all()
