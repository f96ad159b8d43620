"""Shipped configs: the hyperparameters are those of the reference code."""

import functools
from pathlib import Path

import pytest

from ldm.config.loading import load_config

ROOT = Path(__file__).parents[1]
FAMILY = [(data, stage) for data in ("cars3d", "shapes3d", "mpi3d", "celeba") for stage in ("vq", "kl")]

# The references' hyperparameters, by dotted key of the merged config.
AUTOENCODER = {
    "model.base_learning_rate": 4.5e-6,
    "data.params.batch_size": 128,
    "lightning.trainer.accumulate_grad_batches": 2,
    "model.params.ddconfig.resolution": 64,
    "model.params.ddconfig.ch": 32,
    "model.params.ddconfig.ch_mult": [1, 2, 4],
    "model.params.ddconfig.num_res_blocks": 2,
    "model.params.ddconfig.attn_resolutions": [],
    "model.params.lossconfig.params.perceptual_weight": 1.0,
    "lightning.callbacks.image_logger.params.batch_frequency": 1000,
    "lightning.callbacks.image_logger.params.max_images": 8,
}
AUTOENCODER_OF = {
    "vq": {
        "model.target": "ldm.models.autoencoder.VQModel",
        "model.params.embed_dim": 3,
        "model.params.n_embed": 2048,
        "model.params.ddconfig.z_channels": 3,
        "model.params.ddconfig.double_z": False,
        "model.params.lossconfig.params.disc_start": 0,
        "model.params.lossconfig.params.disc_weight": 0.75,
        "model.params.lossconfig.params.codebook_weight": 1.0,
        "lightning.callbacks.image_logger.params.increase_log_steps": True,
    },
    "kl": {
        "model.target": "ldm.models.autoencoder.AutoencoderKL",
        "model.params.embed_dim": 4,
        "model.params.ddconfig.z_channels": 4,
        "model.params.ddconfig.double_z": True,
        "model.params.lossconfig.params.disc_start": 50001,
        "model.params.lossconfig.params.disc_weight": 0.5,
        "model.params.lossconfig.params.kl_weight": 1e-6,
        "lightning.callbacks.image_logger.params.increase_log_steps": False,
    },
}
DIFFUSION = {
    "model.base_learning_rate": 2e-6,
    "data.params.batch_size": 128,
    "model.params.linear_start": 0.0015,
    "model.params.linear_end": 0.0155,
    "model.params.timesteps": 1000,
    "model.params.loss_type": "l1",
    "model.params.log_every_t": 200,
    "model.params.image_size": 16,
    "model.params.scale_by_std": True,
    "model.params.scheduler_config.params.warm_up_steps": [10000],
    "model.params.scheduler_config.params.f_start": [1e-6],
    "model.params.scheduler_config.params.f_max": [1.0],
    "model.params.unet_config.params.model_channels": 64,
    "model.params.unet_config.params.channel_mult": [1, 2, 4, 4],
    "model.params.unet_config.params.num_res_blocks": 2,
    "model.params.unet_config.params.attention_resolutions": [1, 2, 4],
    "model.params.unet_config.params.num_heads": 8,
    "model.params.unet_config.params.use_scale_shift_norm": True,
    "model.params.unet_config.params.resblock_updown": True,
    "lightning.callbacks.image_logger.params.increase_log_steps": False,
    "lightning.callbacks.image_logger.params.log_images_kwargs.inpaint": False,
}
UNCONDITIONAL = {
    "model.target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "model.params.monitor": "val/loss_simple_ema",
    "model.params.cond_stage_config": "__is_unconditional__",
    "lightning.callbacks.image_logger.params.batch_frequency": 1000,
    "lightning.callbacks.image_logger.params.max_images": 8,
}
DISENTANGLING = {
    "model.target": "ldm.models.diffusion.methods.disdiff.model.DisDiff",
    "model.params.monitor": "train/epoch_num",
    "model.params.dis_loss_flag": True,
    "model.params.unet_config.params.latent_unit": 6,
    "model.params.unet_config.params.repre_emb_channels": 32,
    "model.params.unet_config.params.orth_emb": True,
    "model.params.unet_config.params.seprate_decoder": True,
    "model.params.unet_config.params.load_ema_ckpt": True,
    "model.params.cond_stage_config.target": "ldm.modules.encoders.modules.Encoder4",
    "model.params.cond_stage_config.params": {"d": 128, "latent_dim": 192},
    "model.params.conditioning_key": "adm",
    "data.params.test.params.split": "test",
    "lightning.callbacks.image_logger.params.batch_frequency": 10000,
    "lightning.callbacks.image_logger.params.max_images": 16,
    "lightning.callbacks.image_logger.params.log_images_kwargs.plot_swapped_concepts": True,
}
ENCDIFF = {
    "model.target": "ldm.models.diffusion.methods.encdiff.model.EncDiff",
    "model.params.monitor": "train/loss_simple",
    "model.params.channels": 3,
    "model.params.cond_stage_trainable": True,
    "model.params.conditioning_key": "crossattn",
    "model.params.cond_stage_config.params": {"d": 128, "context_dim": 16, "latent_unit": 20},
    "model.params.unet_config.params.latent_unit": 20,
    "model.params.unet_config.params.context_dim": 16,
    "model.params.unet_config.params.use_spatial_transformer": True,
    "data.params.test.params.split": "test",
    "lightning.callbacks.image_logger.params.batch_frequency": 10000,
    "lightning.callbacks.image_logger.params.max_images": 8,
}
CLIP_GUIDED = {
    "model.target": "ldm.models.diffusion.methods.clip_guided.model.CLIPGuidedDDPM",
    "model.base_learning_rate": 1e-4,
    "lightning.scale_lr": False,
    "model.params.timesteps": 400,
    "model.params.beta_schedule": "sqrt_linear",
    "model.params.linear_start": 1e-4,
    "model.params.linear_end": 0.02,
    "model.params.loss_type": "l2",
    "model.params.cond_drop_prob": 0.1,
    "model.params.use_ema": False,
    "model.params.sampler.params": {"variance": "previous"},
    "model.params.unet_config.params": {"T": 400, "img_ch": 3, "img_size": 32, "down_chs": [256, 256, 512]}
    | {"t_embed_dim": 8, "c_embed_dim": 512},
    "model.params.cond_stage_config.text_encoder.params.version": "ViT-B/32",
    "data.params.batch_size": 16,
    "data.params.train.params.data.params.do_augment": True,
    "data.params.train.params.data.params.fit": "random_crop",
    "lightning.trainer.max_epochs": 10,
    "lightning.modelcheckpoint.params": {"every_n_epochs": 5, "save_top_k": -1},
}
CHANNELS = {"vq": 3, "kl": 4}
WITH_PREDICTED_STARTS = {("cars3d", "vq"), ("mpi3d", "vq"), ("celeba", "vq"), ("shapes3d", "kl")}


def check_keys(file, expected):
    """The config says all that is expected, key by key."""
    content = load_config([ROOT / "configs" / f"{file}.yaml"], roots=["nowhere"], allow_pending=True).content
    found = {key: functools.reduce(lambda part, name: part[name], key.split("."), content) for key in expected}
    assert found == expected


@pytest.mark.parametrize(("data", "stage"), FAMILY)
def test_hyperparameters_are_the_references(data, stage):
    monitor = "val/rec_loss" if data == "shapes3d" else "train/epoch_num"
    check_keys(
        f"autoencoder/{data}_{stage}_4_16", AUTOENCODER | AUTOENCODER_OF[stage] | {"model.params.monitor": monitor}
    )
    channels = {f"model.params.unet_config.params.{name}": CHANNELS[stage] for name in ("in_channels", "out_channels")}
    first_stage = AUTOENCODER_OF[stage]["model.target"] + ("Interface" if stage == "vq" else "")
    latents = {
        "model.params.channels": CHANNELS[stage],
        "model.params.first_stage_config.target": first_stage,
        "model.params.first_stage_config.params.embed_dim": CHANNELS[stage],
        "model.params.first_stage_config.params.ckpt_path": f"<last_ckpt autoencoder/{data}_{stage}_4_16>",
        **channels,
    }
    check_keys(f"latent-diffusion/{data}-{stage}-4-16", DIFFUSION | UNCONDITIONAL | latents)
    weight = 1.0 if stage == "kl" else 0.01 if data == "mpi3d" else 0.05
    own = {
        "model.params.dis_loss_type": "IM" if stage == "kl" else "Z",
        "model.params.dis_weight": weight,
        "model.params.unet_config.params.ckpt_path": f"<last_ckpt latent-diffusion/{data}-{stage}-4-16>",
        "lightning.callbacks.image_logger.params.log_images_kwargs.plot_decoded_xstart": (data, stage)
        in WITH_PREDICTED_STARTS,
    }
    check_keys(f"latent-diffusion/{data}-{stage}-4-16-dis", DIFFUSION | DISENTANGLING | latents | own)


@pytest.mark.parametrize(("data", "epochs"), [("shapes3d", 10), ("mpi3d", 10), ("cars3d", 15)])
def test_hyperparameters_of_encdiff_are_the_references(data, epochs):
    own = {
        "model.params.eval_name": data,
        "model.params.first_stage_config.params.ckpt_path": f"<last_ckpt autoencoder/{data}_vq_4_16>",
        "lightning.trainer.max_epochs": epochs,
    }
    check_keys(f"encdiff/{data}_encdiff", DIFFUSION | ENCDIFF | own)


def test_hyperparameters_of_clip_guided_are_the_references():
    check_keys("text-to-image/tiny_imagenet", CLIP_GUIDED)
