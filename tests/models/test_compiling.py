"""Compilation of networks: one graph each, equal results, and no compilation for other batches."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import test_ddpm
import torch
from stand_ins import PLAIN_UNET, TINY_UNET, vq_config
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

import main as front_door
from ldm.data.world import world_vocabulary
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.models.clip import AttributeCLIP
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.judge import AttributeJudge
from ldm.modules.diffusionmodules import clip_guided, openaimodel, openaimodel_enc, openaimodel_shift
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator
from ldm.training.callbacks.step_seed import StepSeed
from ldm.training.compiling import CompileNetworks, blocks_of, networks_of
from ldm.util import UserError

SMALL = {**PLAIN_UNET, "channel_mult": [1], "attention_resolutions": [1]}
SHIFT = {**SMALL, "latent_unit": 3, "repre_emb_channels": 4, "seprate_decoder": True, "orth_emb": True}
TOKENS = {**SMALL, "latent_unit": 3, "use_spatial_transformer": True, "context_dim": 5}
DDCONFIG = {"z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1]}
DDCONFIG |= {"num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}
LOSS = {"disc_start": 0, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1}
X, T, IMAGES = (torch.rand(2, 4, 8, 8), torch.tensor([3, 17]), torch.rand(2, 3, 16, 16))


def vision(**sizes):
    text = {"width": 32, "heads": 2, "layers": 1}
    sizes = {"image_size": 32, "width": 32, **sizes}
    return AttributeCLIP(world_vocabulary().to_dict(), embed_dim=16, vision_cfg=sizes, text_cfg=text).clip.visual


NETWORKS = {
    "U-Net": lambda: (openaimodel.UNetModel(**SMALL), X, T),
    "U-Net with checkpointing": lambda: (openaimodel.UNetModel(**SMALL, use_checkpoint=True), X, T),
    "shift U-Net": lambda: (openaimodel_shift.UNetModel(**SHIFT), X, T, torch.rand(2, 3, 4)),
    "shift U-Net in chunks": lambda: (openaimodel_shift.UNetModel(**SHIFT, unit_chunk=2), X, T, torch.rand(2, 3, 4)),
    "EncDiff U-Net": lambda: (openaimodel_enc.UNetModel(**TOKENS), X, T, torch.rand(2, 15)),
    "CLIP-guided U-Net": lambda: (guided(), torch.rand(2, 3, 8, 8), T, torch.rand(2, 16)),
    "VQ encoder": lambda: (vq().encoder, IMAGES),
    "VQ decoder": lambda: (vq().decoder, torch.rand(2, 4, 8, 8)),
    "KL encoder": lambda: (kl().encoder, IMAGES),
    "discriminator": lambda: (VQLPIPSWithDiscriminator(**LOSS).discriminator, IMAGES),
    "judge": lambda: (AttributeJudge(space="shapes3d", image_size=16, channels=8, hidden=16).network, IMAGES),
    "image encoder": lambda: (openaimodel_enc.Encoder4(d=8, context_dim=5, latent_unit=3, image_size=16), IMAGES),
    "CLIP, transformer": lambda: (vision(patch_size=8, layers=2, head_width=16), torch.rand(2, 3, 32, 32)),
    "CLIP, ResNet": lambda: (vision(width=8, layers=[1, 1, 1, 1]), torch.rand(2, 3, 32, 32)),
}


def guided():
    return clip_guided.UNet(T=20, img_ch=3, img_size=8, down_chs=(32, 32, 32), c_embed_dim=16)


def vq():
    return VQModel(ddconfig={**DDCONFIG, "double_z": False}, lossconfig=identity(), n_embed=8, embed_dim=4)


def kl():
    return AutoencoderKL(ddconfig={**DDCONFIG, "double_z": True}, lossconfig=identity(), embed_dim=4)


def identity():
    return {"target": "torch.nn.Identity"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def outputs(result):
    return [value for value in torch.utils._pytree.tree_leaves(result) if value.is_floating_point()]


def passes(network, *inputs):
    """Outputs and gradients of a pass."""
    torch.manual_seed(0)
    network.zero_grad()
    found = outputs(network(*inputs))
    sum(value.square().sum() for value in found if value.requires_grad).backward()
    return found, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


SLOW = (
    "CLIP, ResNet",
    "shift U-Net in chunks",
    "EncDiff U-Net",
    "U-Net",
    "shift U-Net",
    "KL encoder",
    "VQ decoder",
    "CLIP-guided U-Net",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS]
)
def test_every_network_is_one_graph(name):
    network, *inputs = NETWORKS[name]()
    network.compile(backend="eager", fullgraph=True, dynamic=False)  # raises where the graph breaks
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs)
        network(*inputs)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "aot_eager") for name in NETWORKS), *((name, "inductor") for name in ("U-Net", "VQ encoder", "judge"))],
)
def test_compiled_networks_equal_others(name, backend):
    torch.manual_seed(0)
    network, *inputs = NETWORKS[name]()
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():  # layers that start at zero would hide what is behind them
            nn.init.normal_(weight, std=0.1)
    other = copy.deepcopy(network)
    network.compile(backend=backend, fullgraph=True, dynamic=False)
    found, gradients = passes(network, *inputs)
    expected, expected_gradients = passes(other, *inputs)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if backend == "aot_eager" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found, expected, **tolerance)
    for key, value in expected_gradients.items():
        size = 1 + value.abs().max()
        torch.testing.assert_close(gradients[key] / size, value / size, **tolerance)


def train(callbacks, steps=6, count=7, **options):
    """Train on batches of 2, 2, 2 and 1 images, with validation; return the weights and the losses."""
    torch.manual_seed(0)
    model = LatentDiffusion(
        first_stage_config=vq_config(),
        cond_stage_config="__is_unconditional__",
        unet_config={"target": test_ddpm.UNET["target"], "params": SMALL},
        **{"image_size": 8, "channels": 4, "timesteps": 20, "monitor": None},
    )
    losses = Losses()
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=steps, callbacks=[StepSeed(0), *callbacks, losses], **settings, **options)
    loader = DataLoader(test_ddpm.images(count), batch_size=2)
    trainer.fit(model, loader, DataLoader(test_ddpm.images(3), batch_size=3))
    return model, losses.values


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, result, *_):
        self.values.append((result["loss"] if isinstance(result, dict) else result).item())


@pytest.mark.parametrize("is_regional", [False, True])
def test_training_compiles_whole_batches_only_and_keeps_names_and_losses(is_regional):
    plain, losses = train([])
    model, compiled_losses = train([CompileNetworks(is_regional, backend="eager")])
    assert losses == compiled_losses and list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    graphs, networks = counters["stats"]["unique_graphs"], list(networks_of(model))
    blocks = [block for network in networks for block in blocks_of(network)]
    assert networks[:2] == [model.model.diffusion_model, model.first_stage_model.encoder]
    # The decoder is not called in training; equal blocks share a graph.
    assert 2 < graphs < len(blocks) if is_regional else graphs == 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_losses_of_compiled_training_equal_others():
    _, losses = train([])
    for is_regional in (False, True):
        _, compiled = train([CompileNetworks(is_regional)])
        assert compiled == pytest.approx(losses, rel=1e-3)
        torch._dynamo.reset()


def test_blocks_are_the_outermost_of_each_kind():
    network = openaimodel_enc.UNetModel(**TOKENS)
    assert {type(block).__name__ for block in blocks_of(network)} == {"ResBlock", "BasicTransformerBlock"}
    plain = openaimodel.UNetModel(**TINY_UNET)
    assert {type(block).__name__ for block in blocks_of(plain)} == {"ResBlock", "AttentionBlock"}
    assert len(list(blocks_of(vision(patch_size=8, layers=2, head_width=16)))) == 2
    assert not list(blocks_of(guided()))


def adversarial():
    loss = {"target": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": LOSS}
    return VQModel(ddconfig={**DDCONFIG, "double_z": False}, lossconfig=loss, n_embed=8, embed_dim=4)


def test_networks_of_models():
    autoencoder = adversarial()
    decoder = autoencoder.decoder
    assert list(networks_of(autoencoder)) == [autoencoder.encoder, decoder.mid, *decoder.up]
    judge = AttributeJudge(space="shapes3d", image_size=16, channels=8, hidden=16)
    assert list(networks_of(judge)) == [judge.network]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_losses_are_balanced_at_the_last_layer_of_a_compiled_autoencoder(backend):
    def losses(callbacks):
        torch.manual_seed(0)
        model, found = adversarial(), Losses()
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = pl.Trainer(max_steps=3, callbacks=[StepSeed(0), *callbacks, found], **settings)
        trainer.fit(model, DataLoader(test_ddpm.images(6, size=16), batch_size=2))
        return found.values

    assert losses([CompileNetworks(backend=backend)]) == pytest.approx(losses([]), rel=1e-3)


@pytest.mark.parametrize("error", [None, UserError("stop")])
def test_the_default_of_torch_is_restored_after_training_and_after_an_error(error):
    class Stop(pl.Callback):
        def on_train_start(self, *_):
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(UserError):
        train([CompileNetworks(backend="eager"), Stop()], steps=1, limit_train_batches=0 if error is None else 1)
    assert torch._dynamo.eval_frame._stance.stance == "default"


QUICKSTART = ["configs/quickstart/world.yaml", "configs/quickstart/vq.yaml"]


@pytest.mark.parametrize("value", ["compile=true", "compile=false", "compile=regional", "compile_mode=reduce-overhead"])
def test_values_of_a_config(value):
    assert front_door.main(["-b", *QUICKSTART, f"lightning.{value}"]) == 0


@pytest.mark.parametrize("value", ["compile=blocks", "compile=3", "compile_mode=fast", "compiled=true"])
def test_other_values_are_refused_with_their_key(value, capsys):
    assert front_door.main(["-b", *QUICKSTART, f"lightning.{value}"]) == 1
    assert f"lightning.{value.split('=')[0]}" in capsys.readouterr().err


def test_cuda_graphs_are_refused_with_accumulation(capsys):
    words = ["lightning.compile=true", "lightning.trainer.accumulate_grad_batches=2"]
    assert front_door.main(["-b", *QUICKSTART, *words]) == 0
    assert front_door.main(["-b", *QUICKSTART, *words, "lightning.compile_mode=reduce-overhead"]) == 1
    assert "lightning.compile_mode: expected default with accumulate_grad_batches=2" in capsys.readouterr().err
