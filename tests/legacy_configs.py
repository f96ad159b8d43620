"""Configs as users of the reference repositories have them: old names, old habits, small sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from ldm.data.world import world_vocabulary
from ldm.models.clip import AttributeCLIP

SCHEDULER = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {
        "warm_up_steps": [10],
        "cycle_lengths": [10000000000000],
        "f_start": [1e-6],
        "f_max": [1.0],
        "f_min": [1.0],
    },
}
UNET = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
IDENTITY = {"target": "torch.nn.Identity"}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 3, "n_embed": 32, "monitor": "val/rec_loss", "ddconfig": DDCONFIG, "lossconfig": IDENTITY},
}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 3,
        "monitor": "val/rec_loss",
        "ddconfig": {**DDCONFIG, "double_z": True},
        "lossconfig": IDENTITY,
    },
}
ENCODERS = "ldm.modules.encoders.modules"


def network(kind: str = "openaimodel", **params: Any) -> dict[str, Any]:
    """A ``unet_config`` of one of the families."""
    return {"target": f"ldm.modules.diffusionmodules.{kind}.UNetModel", "params": {**UNET, **params}}


def model(target: str = "ldm.models.diffusion.ddpm.LatentDiffusion", **params: Any) -> dict[str, Any]:
    """The ``model`` section of the families' diffusion configs; ``params`` say what differs from a plain model."""
    common = {
        "linear_start": 0.0015,
        "linear_end": 0.0155,
        "num_timesteps_cond": 1,
        "log_every_t": 500,
        "timesteps": 1000,
        "loss_type": "l1",
        "first_stage_key": "image",
        "cond_stage_key": "image",
        "image_size": 16,
        "channels": 3,
        "cond_stage_trainable": False,
        "concat_mode": False,
        "scale_by_std": True,
        "monitor": "train/epoch_num",
        "scheduler_config": SCHEDULER,
        "unet_config": network(),
        "first_stage_config": VQ,
        "cond_stage_config": "__is_unconditional__",
    }
    return copy.deepcopy({"base_learning_rate": 2e-6, "target": target, "params": {**common, **params}})


DIS = {"cond_stage_trainable": True, "conditioning_key": "adm", "dis_loss_flag": True}
DISDIFF = {
    **DIS,
    "dis_loss_type": "Z",
    "dis_weight": 0.05,
    "unet_config": network(
        "openaimodel_shift",
        repre_emb_channels=4,
        seprate_decoder=True,
        orth_emb=True,
        load_ema_ckpt=True,
        latent_unit=3,
        ckpt_path=None,
    ),
    "cond_stage_config": {"target": f"{ENCODERS}.Encoder4", "params": {"d": 16, "latent_dim": 12}},
}
CLIP = {
    **DIS,
    "cond_stage_key": "text",
    "dis_loss_type": "Z",
    "dis_weight": 0.05,
    "unet_config": network(
        "openaimodel_shift",
        repre_emb_channels=32,
        seprate_decoder=True,
        orth_emb=True,
        load_ema_ckpt=True,
        latent_unit=3,
        ckpt_path=None,
    ),
    "cond_stage_config": {
        "text_encoder": {
            "target": f"{ENCODERS}.FrozenCLIPTextEmbedder",
            "params": {"version": "CLIP", "device": "cuda", "max_length": 77, "n_repeat": 2, "normalize": True},
        },
        "image_encoder": {
            "target": f"{ENCODERS}.FrozenClipImageEmbedder",
            "params": {"model": "CLIP", "jit": False, "device": "cuda", "antialias": False},
        },
    },
}
TOKENS = {"context_dim": 5, "latent_unit": 4}
ENCDIFF = {
    "cond_stage_trainable": True,
    "conditioning_key": "crossattn",
    "eval_name": "shapes3d",
    "monitor": "train/loss_simple",
    "lambda_mcl": 0.01,
    "mcl_tau": 0.1,
    "mcl_type": "denoise_sm",
    "use_mcl": False,
    "unet_config": network("openaimodel_enc", use_spatial_transformer=True, **TOKENS),
    "first_stage_config": {**VQ, "params": {**VQ["params"], "use_disentangled_concat": True, "disentangled_dim": 4}},
    "cond_stage_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel_enc.Encoder4",
        "params": {"d": 16, **TOKENS},
    },
}
CROSS = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 8}

MODELS: dict[str, dict[str, Any]] = {
    "ldm": model(),
    "ldm kl": model(first_stage_config=KL),
    "disdiff": model(**DISDIFF),
    "disdiff kl": model(
        "ldm.models.diffusion.ddpm_kl.LatentDiffusion",
        **{
            **DISDIFF,
            "first_stage_config": KL,
            "kl_loss_flag": True,
            "kl_weight": 5e-4,
            "cond_stage_config": {"target": f"{ENCODERS}.Encoder4_vae", "params": {"d": 16, "latent_dim": 12}},
        },
    ),
    "clip-disdiff": model(**CLIP),
    "encdiff": model("ldm.models.diffusion.ddpm_enc.LatentDiffusion", **ENCDIFF),
    "class": model(
        unet_config=network(**CROSS),
        cond_stage_key="class_label",
        conditioning_key="crossattn",
        cond_stage_trainable=True,
        cond_stage_config={
            "target": f"{ENCODERS}.ClassEmbedder",
            "params": {"embed_dim": 8, "n_classes": 6, "key": "class_label"},
        },
    ),
    "text": model(
        unet_config=network(**CROSS),
        cond_stage_key="caption",
        conditioning_key="crossattn",
        use_ema=False,
        cond_stage_trainable=True,
        scale_by_std=False,
        scale_factor=0.18215,
        cond_stage_config={"target": f"{ENCODERS}.BERTEmbedder", "params": {"n_embed": 8, "n_layer": 1}},
    ),
    "super-resolution": model(
        unet_config=network(in_channels=6, num_heads=-1, num_head_channels=16, resblock_updown=False),
        cond_stage_key="LR_image",
        concat_mode=True,
        cond_stage_config=IDENTITY,
    ),
    "inpainting": model(
        unet_config=network(in_channels=6),
        cond_stage_key="masked_image",
        concat_mode=True,
        cond_stage_config="__is_first_stage__",
        first_stage_config={
            **VQ,
            "params": {
                **VQ["params"],
                "ddconfig": {**DDCONFIG, "attn_type": "none"},
                "lossconfig": {"target": "ldm.modules.losses.contperceptual.DummyLoss"},
            },
        },
    ),
    "vq": {
        "base_learning_rate": 4.5e-6,
        "target": "ldm.models.autoencoder.VQModel",
        "params": {
            **VQ["params"],
            "monitor": "train/epoch_num",
            "colorize_nlabels": None,
            "lossconfig": {
                "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
                "params": {
                    "disc_conditional": False,
                    "disc_in_channels": 3,
                    "disc_start": 0,
                    "disc_weight": 0.75,
                    "codebook_weight": 1.0,
                },
            },
        },
    },
    "kl": {
        "base_learning_rate": 4.5e-6,
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            **KL["params"],
            "lossconfig": {
                "target": "ldm.modules.losses.LPIPSWithDiscriminator",
                "params": {"disc_start": 50001, "kl_weight": 1e-6, "disc_weight": 0.5},
            },
        },
    },
}


def save_clip(folder: Path, image_size: int = 64) -> Path:
    """An untrained CLIP, 64 wide, that knows the words of the embedded world."""
    torch.manual_seed(0)
    vision = {"image_size": image_size, "patch_size": image_size // 4, "width": 32, "layers": 1, "head_width": 16}
    AttributeCLIP(
        embed_dim=64,
        vision_cfg=vision,
        text_cfg={"width": 32, "heads": 2, "layers": 1},
        vocabulary=world_vocabulary().to_dict(),
    ).save_folder(folder)
    return folder


def with_clip(config: dict[str, Any], folder: str | Path, width: int | None = None) -> dict[str, Any]:
    """A ``model`` section with a CLIP that is on this machine."""
    config = copy.deepcopy(config)
    stage = config["params"].get("cond_stage_config")
    if isinstance(stage, dict) and "text_encoder" in stage:
        stage["text_encoder"]["params"]["version"] = stage["image_encoder"]["params"]["model"] = str(folder)
        if width is not None:
            config["params"]["unet_config"]["params"]["repre_emb_channels"] = width
    return config


def data(train: str = "ldm.data.dis.CustomDatasetTrain", **params: Any) -> dict[str, Any]:
    """The ``data`` section: the same images for training and testing, as the references' configs have it."""
    images = {"target": train, "params": params} if params else {"target": train}
    return {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "wrap": True, "num_workers": 0, "train": images, "test": copy.deepcopy(images)},
    }


LIGHTNING = {
    "callbacks": {
        "image_logger": {
            "target": "main.ImageLogger",
            "params": {
                "batch_frequency": 1000,
                "max_images": 8,
                "increase_log_steps": False,
                "log_images_kwargs": {
                    "inpaint": False,
                    "plot_diffusion_rows": False,
                    "plot_progressive_rows": False,
                    "plot_swapped_concepts": True,
                    "plot_decoded_xstart": True,
                },
            },
        }
    },
    "trainer": {"benchmark": True},
}
