"""Our quantizer against taming's and diffusers', with the same codebook and the same input."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vq_model import VectorQuantizer as Diffusers
from taming.modules.vqvae.quantize import VectorQuantizer as Taming

from ldm.modules.quantize import VectorQuantizer2

CODES, WIDTH, BETA = 32, 4, 0.25


def run(quantize, codes, z, weight):
    """Quantized output, loss and indices, and the gradients of both to input and codebook."""
    with torch.no_grad():
        quantize.embedding.weight.copy_(codes)
    z = z.clone().requires_grad_()
    quantized, loss, (_, _, indices) = quantize(z)
    gradients = torch.autograd.grad((quantized * weight).sum() + 3 * loss, (z, quantize.embedding.weight))
    return quantized, loss, indices.flatten(), *gradients


@pytest.mark.parametrize(("oracle", "legacy"), [(Taming, True), (Diffusers, True), (Diffusers, False)])
def test_equal_outputs_losses_indices_and_gradients(oracle, legacy):
    torch.manual_seed(0)
    codes, z, weight = torch.randn(CODES, WIDTH), torch.randn(2, WIDTH, 8, 6), torch.randn(2, WIDTH, 8, 6)
    theirs = Taming(CODES, WIDTH, BETA) if oracle is Taming else Diffusers(CODES, WIDTH, BETA, legacy=legacy)
    ours = VectorQuantizer2(CODES, WIDTH, BETA, legacy=legacy)
    found, expected = run(ours, codes, z, weight), run(theirs, codes, z, weight)
    assert found[2].unique().numel() > CODES // 2
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine, other)
    assert set(ours.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("unknown", ["extra", 5])
def test_equal_remapped_indices(tmp_path, unknown):
    torch.manual_seed(1)
    np.save(tmp_path / "used.npy", np.arange(0, CODES, 2))
    options = {"remap": str(tmp_path / "used.npy"), "unknown_index": unknown, "sane_index_shape": True}
    ours, theirs = VectorQuantizer2(CODES, WIDTH, BETA, **options), Diffusers(CODES, WIDTH, BETA, **options)
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(3, WIDTH, 5, 5) / CODES
    indices = ours(z)[2][2]
    assert torch.equal(indices, theirs(z)[2][2])
    shape = (3, 5, 5, WIDTH)
    flat = indices.flatten(1).clamp(max=len(ours.used) - 1)
    entries = ours.get_codebook_entry(flat, shape)
    assert torch.equal(entries, theirs.get_codebook_entry(flat, shape))
