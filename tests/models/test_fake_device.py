"""Training and sampling steps on a CUDA device that does not exist: fake tensors have shapes and devices, no values.

A tensor that stays on the CPU raises an error of mixed devices; a step that reads a value on the host (``.item()``,
boolean indexing) raises an error of data-dependent output.
"""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import test_clip_disdiff
import test_clip_guided
import test_ddpm
import test_disdiff
import test_encdiff
import torch
from test_legacy_conditions import BATCH as CONDITIONED_BATCH
from test_legacy_conditions import build as build_conditioned
from test_legacy_conditions import words as words
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.data.world import world_vocabulary
from ldm.diffusion.samplers import DDIMSampler, named_sampler
from ldm.models.clip import AttributeCLIP
from ldm.training.compiling import networks_of

CUDA = torch.device("cuda", 0)
CLIP_GUIDED = {
    "use_ema": True,
    "cond_drop_prob": 0.1,
    "gap": "noise",
    "unet_config": test_clip_guided.unet(c_embed_dim=16),
}
GUIDED_BATCH = {"image": test_clip_guided.batch_of(2)["image"]}  # embedded by the image tower
STEPS = {"ddim": 2, "plms": 2, "dpm_solver": 2, "ddpm": None}


@pytest.fixture(autouse=True)
def no_pinned_memory(monkeypatch):
    """Pinned memory needs a driver."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def fake_mode():
    """A mode that also converts constants, such as an embedder's empty cache."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def clip_stage(tmp_path):
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"width": 32, "heads": 2, "layers": 1}
    AttributeCLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, vocabulary=world_vocabulary().to_dict()).save_folder(
        tmp_path / "clip"
    )
    modules = "ldm.modules.encoders.modules"
    folder = str(tmp_path / "clip")
    return {
        "text_encoder": {"target": f"{modules}.FrozenCLIPTextEmbedder", "params": {"version": folder, "n_repeat": 0}},
        "image_encoder": {"target": f"{modules}.FrozenClipImageEmbedder", "params": {"model": folder}},
    }


def on_fake_cuda(model, mode):
    return on_fake(model, mode, CUDA)


def on_fake(model, mode, device):
    """Replace all parameters and buffers by fake ones on a device."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(lambda value: moved(value.detach(), mode, device))
        for module in model.modules():
            if isinstance(module, pl.LightningModule):
                module._device = device  # Lightning's own record, which its ``to`` would update
        return model
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def moved(value, mode, device=CUDA):
    fake = mode.from_tensor(value)
    with mode:  # outside, torch would look for the device
        return fake.to(device)


def fake_batch(batch, mode):
    return {key: moved(value, mode) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def models(clip_stage):
    """Method -> model and batch."""
    world = ["red floor", "green wall"]
    return {
        "ldm": lambda: (test_ddpm.build(parameterization="v"), test_ddpm.batch(2)),
        "disdiff": lambda: (test_disdiff.build(), test_disdiff.batch(2)),
        "encdiff": lambda: (test_encdiff.build(), test_encdiff.batch(2)),
        "clip_disdiff": lambda: (clip_disdiff(clip_stage), test_clip_disdiff.batch_of([world, ["blue floor", ""]])),
        "clip_guided": lambda: (test_clip_guided.build(**CLIP_GUIDED, cond_stage_config=clip_stage), GUIDED_BATCH),
    }


def clip_disdiff(clip_stage):
    """As at the start of training, the vocabulary is embedded already: tokens are read on the host."""
    model = test_clip_disdiff.build(cond_stage_config=clip_stage, unset_prob=0.2)
    model.cond_stage_model["text_encoder"].vocabulary_embeddings([["red floor", "green wall", "blue floor", ""]])
    return model


METHODS = ["ldm", "disdiff", "encdiff", "clip_disdiff", "clip_guided"]


@pytest.mark.parametrize("method", METHODS)
def test_training_step(method, clip_stage):
    model, batch = models(clip_stage)[method]()
    mode = fake_mode()
    on_fake_cuda(model, mode).train()
    with mode:
        optimizer = model.configure_optimizers()
        assert optimizer.param_groups[0]["fused"] is True
        loss, terms, size = model.shared_step(fake_batch(batch, mode))
        assert loss.device == CUDA and size == 2
        assert all(value.device == CUDA for value in terms.values())
        backward(loss, model)
        torch.nn.utils.clip_grad_norm_(model.trained_parameters(), 1.0)
        optimizer.step()
        model.model_ema(model.model)


class Creations(TorchDispatchMode):
    """Collects operations that return a tensor of the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(x.device.type == "cpu" for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("method", METHODS)
def test_networks_create_no_tensors_on_the_host(method, clip_stage):
    """Such a tensor keeps torch from recording a compiled network as a CUDA graph."""
    model, batch = models(clip_stage)[method]()
    mode, creations = fake_mode(), Creations()
    on_fake_cuda(model, mode).train()
    networks = list(networks_of(model))
    for network in networks:
        network.register_forward_pre_hook(lambda *_: creations.__enter__() and None)
        network.register_forward_hook(lambda *_: creations.__exit__(None, None, None))
    calls = [0]
    networks[0].register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    with mode:
        model.shared_step(fake_batch(batch, mode))
    assert calls[0] and not creations.found


def backward(loss, model):
    """Torch's engine needs a driver for CUDA; without one, every trained parameter is given a gradient."""
    if torch.cuda.is_available():
        loss.backward()
    for parameter in model.trained_parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("method", METHODS)
def test_backward_pass_reads_no_values(method, clip_stage):
    """On fake CPU tensors, which the engine supports everywhere."""
    model, batch = models(clip_stage)[method]()
    mode = fake_mode()
    on_fake(model, mode, torch.device("cpu")).train()
    with mode:
        loss, _, _ = model.shared_step({k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()})
        loss.backward()
        assert all(p.grad is not None for p in model.network_parameters())


@pytest.mark.parametrize(
    ("method", "sampler"), [*(("ldm", name) for name in STEPS), *((name, "ddim") for name in METHODS[1:])]
)
def test_sampling_step(method, sampler, clip_stage):
    model, batch = models(clip_stage)[method]()
    mode = fake_mode()
    on_fake_cuda(model, mode).eval()
    with mode, torch.no_grad():
        x_T = torch.randn(2, *model.latent_shape, device=CUDA)
        chosen = named_sampler(sampler, num_steps=STEPS[sampler])
        with model.ema_scope():
            latent = model.sample(x_T, model.get_condition(fake_batch(batch, mode)), chosen)
        assert model.decode_first_stage(latent).device == CUDA


def test_units_and_texts(clip_stage):
    mode, sampler = fake_mode(), DDIMSampler(2)
    for method in ("disdiff", "encdiff"):
        model, batch = models(clip_stage)[method]()
        on_fake_cuda(model, mode).eval()
        with mode:
            x_T = torch.randn(2, *model.latent_shape, device=CUDA)
            codes = model.encode_representation(fake_batch(batch, mode))
            only = torch.zeros(2, dtype=torch.long, device=CUDA)
            assert model.decode_units(codes, x_T, sampler, only).device == CUDA
    model, _ = models(clip_stage)["clip_disdiff"]()
    on_fake_cuda(model, mode).eval()
    with mode:
        x_T = torch.randn(1, *model.latent_shape, device=CUDA)
        assert model.sample_edit([["red floor", ""]], x_T, sampler, 1.5).device == CUDA


@pytest.mark.parametrize("gap", ["none", "noise", "mean", "noise_mean", "covariance", "bank"])
def test_clip_guided_training_and_texts(gap, clip_stage):
    options = {**CLIP_GUIDED, "gap": gap, "drop_per_element": True}
    model = test_clip_guided.build(**options, cond_stage_config=clip_stage)
    model.cond_stage_model.embed_texts(["red floor", "green wall", ""])  # tokens are read on the host
    if gap not in ("none", "noise"):
        model.fit_gap(torch.randn(8, 16), ["red floor", "green wall"])
    mode = fake_mode()
    on_fake_cuda(model, mode).train()
    with mode:
        batch = {"image": GUIDED_BATCH["image"], "clip_embedding": torch.randn(2, 16)}
        loss, _, _ = model.shared_step(fake_batch(batch, mode))
        cond = model.condition_from_texts(["red floor", ""])
        images, _ = model.eval().sample_w(cond.value, [-1.0, 2.0], sampler=DDIMSampler(2))
        assert loss.device == cond.value.device == images.device == CUDA
        assert model.sample(torch.randn(2, 3, 8, 8, device=CUDA), cond).device == CUDA


@pytest.mark.parametrize("kind", ["class", "super-resolution", "segmentation"])
def test_conditions_with_dropout_and_guidance(kind, words):
    model = build_conditioned(kind, words, cond_drop_prob=0.1)
    mode = fake_mode()
    on_fake_cuda(model, mode).train()
    with mode:
        batch = fake_batch(CONDITIONED_BATCH, mode)
        loss, _, _ = model.shared_step(batch)
        assert loss.device == CUDA
        x_T = torch.randn(2, *model.latent_shape, device=CUDA)
        with torch.no_grad():
            latent = model.sample(x_T, model.get_condition(batch), DDIMSampler(2), guidance_scale=2.0)
        assert latent.device == CUDA


def test_waiting_for_the_device_is_noticed():
    with FakeTensorMode():
        values = torch.zeros(3, device=CUDA)
        with pytest.raises(DataDependentOutputException):
            values.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            values[values > 0]
