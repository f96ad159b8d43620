"""Edits of a model whose condition is a vector (CLIP-guided DDPM), by every sampler."""

import pytest
import torch
from clip_guided_models import SIZE, T, build, towers_of
from legacy_configs import save_clip

from ldm.diffusion.samplers import DDIMSampler, DDPMSampler, DPMSolverSampler, PLMSSampler
from ldm.evaluation.directions.edit import Editor
from ldm.models.diffusion.methods.noiseclr.denoiser import ModelDenoiser
from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.util import UserError


@pytest.fixture(scope="module", params=["token", "condition"])
def denoiser(request, tmp_path_factory):
    towers = towers_of(save_clip(tmp_path_factory.mktemp("clip") / "clip"))
    return ModelDenoiser(build(cond_stage_config=towers), request.param)


def directions_of(denoiser):
    torch.manual_seed(0)
    return DirectionSet.of(denoiser, denoiser.initial_rows(3), denoiser.row_space, "random")


@pytest.mark.parametrize("sampler", [None, DDPMSampler(), PLMSSampler(5), DPMSolverSampler(5), DDIMSampler(5, 1.0)])
def test_every_sampler(denoiser, sampler):
    calls = []
    editor = Editor(denoiser, directions_of(denoiser), sampler, lambda: calls.append(1))
    start = editor.generated(editor.noise(2, seed=3), ["a red cube", "a cube"], 3.0, "blue")
    original, edited = editor.images(start), editor.images(start, [editor.edit("<t1>", 50.0), editor.edit("2", 1.0)])
    assert original.shape == (2, 3, SIZE, SIZE) and not torch.equal(original, edited)
    assert len(calls) == 2 * editor.sampler.num_evaluations(T)
    state = torch.get_rng_state()
    assert torch.equal(editor.images(start), original) and torch.equal(torch.get_rng_state(), state)
    alone = editor.images(editor.generated(editor.noise(2, seed=3), ["a red cube"], 1.0))
    assert not torch.equal(alone, original)


def test_real_images_and_their_texts(denoiser):
    editor = Editor(denoiser, directions_of(denoiser))
    assert editor.sampler.num_steps == T and editor.image_size == (SIZE, SIZE)
    real = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = (editor.images(editor.inverted(real)) - real).square().mean()
    coarse = Editor(denoiser, directions_of(denoiser), DDIMSampler(2))
    assert plain < 0.05 and plain < (coarse.images(coarse.inverted(real)) - real).square().mean()
    learned = editor.inverted(real, ["a red cube"], use_null_text=True)
    assert learned.guidance_scale == 7.5 and learned.negative.values.shape == (T - 1, 2, 64)  # LDM visits 1 to T - 1
    for options in ({"use_null_text": True}, {"texts": ["a"], "use_null_text": True, "guidance_scale": 1.0}):
        with pytest.raises(UserError, match="expected texts that describe the images, and a guidance scale"):
            editor.inverted(real, **options)
