"""What the reference repositories call things, and what the same things are called here: tables alone.

The repositories are latent-diffusion, taming-transformers, DisDiff, CLIP-DisDiff and EncDiff.
``ldm.legacy.translation`` reads these tables; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.legacy.moved import MOVED

_PL = "pytorch_lightning"
_CALLBACKS = "ldm.training.callbacks"
_LOSSES = "ldm.modules.losses"
_DDPM = "ldm.models.diffusion.ddpm"
_VQ_LOSS = f"{_LOSSES}.vqperceptual.VQLPIPSWithDiscriminator"
_KL_LOSS = f"{_LOSSES}.contperceptual.LPIPSWithDiscriminator"
_DUMMY_LOSS = f"{_LOSSES}.contperceptual.DummyLoss"
_CSV_LOGGER = "ldm.training.loggers.MetricsCSVLogger"

# What lived in the references' main.py (and EncDiff's main_val.py).
_MAIN = {
    "DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "WrappedDataset": "ldm.data.module.WrappedDataset",
    "ImageLogger": f"{_CALLBACKS}.image_logger.ImageLogger",
    "SetupCallback": f"{_CALLBACKS}.setup.SetupCallback",
    "CUDACallback": f"{_CALLBACKS}.cuda.CUDACallback",
    "LearningRateMonitor": f"{_PL}.callbacks.LearningRateMonitor",
}

# Modules of the references that hold nothing but the names above; any other name in them is a slip.
OLD_MODULES = ("main", "main_val")

# The diffusion models; which of them a LatentDiffusion is, its params tell.
LATENT_DIFFUSION = f"{_DDPM}.LatentDiffusion"
DISDIFF = "ldm.models.diffusion.methods.disdiff.model.DisDiff"
CLIP_DISDIFF = "ldm.models.diffusion.methods.clip_disdiff.model.CLIPDisDiff"
ENCDIFF = "ldm.models.diffusion.methods.encdiff.model.EncDiff"
OLD_LATENT_DIFFUSIONS = {
    LATENT_DIFFUSION: LATENT_DIFFUSION,
    f"{_DDPM}.Layout2ImgDiffusion": LATENT_DIFFUSION,
    "ldm.models.diffusion.ddpm_kl.LatentDiffusion": DISDIFF,
    "ldm.models.diffusion.ddpm_enc.LatentDiffusion": ENCDIFF,
}
SHIFT_UNET = "ldm.modules.diffusionmodules.openaimodel_shift.UNetModel"
TOKEN_UNET = "ldm.modules.diffusionmodules.openaimodel_enc.UNetModel"
CLIP_TEXT = "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder"
DATA_MODULE = _MAIN["DataModuleFromConfig"]

# Old dotted path -> today's dotted path.
ALIASES: dict[str, str] = {
    **{f"{module}.{name}": today for module in OLD_MODULES for name, today in _MAIN.items()},
    **{old: today for old, today in OLD_LATENT_DIFFUSIONS.items() if old != today},
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": _VQ_LOSS,
    "taming.modules.losses.VQLPIPSWithDiscriminator": _VQ_LOSS,
    "taming.modules.losses.vqperceptual.DummyLoss": _DUMMY_LOSS,
    "taming.modules.losses.DummyLoss": _DUMMY_LOSS,
    "taming.modules.losses.lpips.LPIPS": "ldm.modules.lpips.LPIPS",
    "taming.modules.discriminator.model.NLayerDiscriminator": "ldm.modules.discriminator.NLayerDiscriminator",
    "taming.modules.vqvae.quantize.VectorQuantizer2": "ldm.modules.quantize.VectorQuantizer2",
    "taming.models.vqgan.VQModel": "ldm.models.autoencoder.VQModel",
    f"{_LOSSES}.VQLPIPSWithDiscriminator": _VQ_LOSS,
    f"{_LOSSES}.LPIPSWithDiscriminator": _KL_LOSS,
    f"{_LOSSES}.DummyLoss": _DUMMY_LOSS,
    f"{_LOSSES}.vqperceptual.DummyLoss": _DUMMY_LOSS,
    "ldm.tools.Record": f"{_CALLBACKS}.record.Record",
    f"{_PL}.loggers.TestTubeLogger": _CSV_LOGGER,
    f"{_PL}.loggers.test_tube.TestTubeLogger": _CSV_LOGGER,
}

# Whole packages that moved: prefix -> prefix. The Lightning distribution has two import names for one code.
PREFIXES: dict[str, str] = {"lightning.pytorch.": f"{_PL}.", **MOVED}


@dataclass(frozen=True)
class OldDataset:
    """A data set of the references.

    Attributes:
        today: the class that reads the same files.
        params: what the old name stood for; a config may say otherwise.
        meaningless: options that have no meaning here, because items are uint8 and models normalise them.
    """

    today: str
    params: Mapping[str, Any] = field(default_factory=dict)
    meaningless: tuple[str, ...] = ("as_tensor", "do_normalize", "do_transform", "do_augment", "original_resolution")


# LMDB keys carry the resolution, and their pictures may be mirrored: there both do mean something.
_LMDB = ("as_tensor", "do_normalize", "do_transform")
_SHAPES3D = OldDataset("ldm.data.factors.shapes3d.Shapes3D")
_MPI3D = OldDataset("ldm.data.factors.mpi3d.MPI3D", {"variant": "toy"})
_CARS3D = OldDataset("ldm.data.factors.cars3d.Cars3D")
_CELEBA = "ldm.data.formats.celeba.CelebA"
_FACES = OldDataset(_CELEBA, {"image_size": 64, "original_resolution": None, "crop_d2c": True}, _LMDB)
_SMALL = {"image_size": 64, "original_resolution": 128, "crop_d2c": False}
_IMAGES = OldDataset("ldm.data.formats.lmdb_text.LMDBImages", _SMALL, _LMDB)
_TEXT_IMAGES = OldDataset("ldm.data.formats.lmdb_text.LMDBTextImages", _SMALL, _LMDB)


def _large(today: str, image_size: int, **params: str) -> OldDataset:
    """An LMDB of 256-pixel pictures, resized."""
    sizes = {"image_size": image_size, "original_resolution": 256}
    return OldDataset(f"ldm.data.formats.lmdb_sets.{today}", {**sizes, **params}, _LMDB)


def _folder(split: str | None = None) -> OldDataset:
    """A folder of pictures of any shape, made square."""
    return OldDataset("ldm.data.formats.folder.ImageFolder", {"image_size": 64, "fit": "stretch", "split": split})


_IN_DIS = {
    "Shapes3D": _SHAPES3D,
    "Shapes3DTrain": _SHAPES3D,
    "MPI3D": _MPI3D,
    "MPI3DTrain": _MPI3D,
    "Cars3D": _CARS3D,
    "Cars3DTrain": _CARS3D,
    "CelebAlmdb": OldDataset(_CELEBA, {"original_resolution": 128, "crop_d2c": False}, _LMDB),
    "Celebarain": _FACES,
    "Mercarilmdb": _IMAGES,
    "Mercaritrain": _IMAGES,
    "CustomDatasetTrain": _IMAGES,
    "Mercarilmdb_clip": _TEXT_IMAGES,
    "Mercaritrain_clip": _TEXT_IMAGES,
    "CustomDatasetTrainCLIP": _TEXT_IMAGES,
    "Bedroom_lmdb": _large("LSUN", 128, category="bedroom"),
    "BedroomTrain": _large("LSUN", 64, category="bedroom"),
    "Horse_lmdb": _large("LSUN", 128, category="horse"),
    "HorseTrain": _large("LSUN", 64, category="horse"),
    "FFHQlmdb": _large("FFHQ", 256),
    "FFHQTrain": _large("FFHQ", 64),
    "AFHQTrain": _folder(),
    "AFHQVal": _folder("validation"),
    "FlowerTrain": _folder(),
    "FlowerVal": _folder("validation"),
}
OLD_DATASETS = {f"ldm.data.{module}.{name}": data for module in ("dis", "disdata") for name, data in _IN_DIS.items()}
CARS3D_NAMES = frozenset(name for name, data in OLD_DATASETS.items() if data is _CARS3D)
CARS3D_REPEAT = 10  # the references' training set holds every image so many times
ALIASES |= {name: data.today for name, data in OLD_DATASETS.items()}

# Data sets that no repository here ships: prefix of the name -> what reads such images today.
NOT_SHIPPED_CLASS = "ldm.data.not_shipped.NotShipped"
_FOLDER = "a folder of images, with a table of labels or texts if you have one: ldm.data.formats.folder.ImageFolder"
NOT_SHIPPED = {
    "ldm.data.imagenet.": _FOLDER,
    "ldm.data.lsun.": f"an LMDB of the pictures: ldm.data.formats.lmdb_sets.LSUN; or {_FOLDER}",
    "ldm.data.openimages.": _FOLDER,
    "ldm.data.faceshq.": f"an LMDB of FFHQ: ldm.data.formats.lmdb_sets.FFHQ; or {_FOLDER}",
    "taming.data.": f"an LMDB of FFHQ: ldm.data.formats.lmdb_sets.FFHQ; or {_FOLDER}",
    "ldm.data.landscapes.": _FOLDER,
    "ldm.data.previews.": _FOLDER,
    **{
        f"ldm.data.{module}.{name}": _FOLDER
        for module in ("dis", "disdata")
        for name in (
            "Clevr",
            "AFHQ",
            "Flower",
            "LSUNchurch",
            "LSUNChurch",
            "Shapes3D_SD",
            "Shapes3DTrainSD",
            "MPI3D_SD",
            "MPI3DTrainSD",
        )
    },
}

# Params that are dropped without a word whatever they say, because nothing differs.
SELF_EVIDENT = frozenset(("as_tensor", "do_normalize", "do_transform", "original_resolution", "cond_stage_trainable"))

# Params that mean nothing here. None, False and 0 are dropped in silence, anything else with a word.
_FORK = ("use_disentangled_concat", "disentangled_dim")
_MCL = ("use_mcl", "lambda_mcl", "mcl_tau", "mcl_proj_dim", "mcl_sigma", "mcl_neg_mode", "mcl_type")
_AUTOENCODER = ("colorize_nlabels", "batch_resize_range", *_FORK)
MEANINGLESS: dict[str, tuple[str, ...]] = {
    "ldm.models.autoencoder.VQModel": _AUTOENCODER,
    "ldm.models.autoencoder.VQModelInterface": _AUTOENCODER,
    "ldm.models.autoencoder.AutoencoderKL": _AUTOENCODER,
    f"{_DDPM}.DDPM": ("use_positional_encodings",),
    LATENT_DIFFUSION: (
        "use_positional_encodings",
        "dis_loss_flag",
        "dis_loss_type",
        "dis_weight",
        "detach_flag",
        "train_enc_flag",
        "kl_loss_flag",
        "kl_weight",
        *_MCL,
        "eval_name",
    ),
    DISDIFF: ("use_positional_encodings", *_MCL, "eval_name"),
    CLIP_DISDIFF: (
        "use_positional_encodings",
        "train_enc_flag",
        "kl_loss_flag",
        "kl_weight",
        "cond_stage_trainable",
        *_MCL,
        "eval_name",
    ),
    ENCDIFF: (
        "use_positional_encodings",
        "dis_loss_flag",
        "dis_loss_type",
        "dis_weight",
        "detach_flag",
        "train_enc_flag",
        *_MCL,
    ),
    _CSV_LOGGER: ("debug", "create_git_tag", "log_graph", "prefix"),
}

# Params that got another name: target -> {old: today}.
RENAMED_PARAMS: dict[str, dict[str, str]] = {
    f"{_PL}.callbacks.ModelCheckpoint": {"period": "every_n_epochs", "every_n_val_epochs": "every_n_epochs"}
}

# Defaults of the reference's class where today's class has others.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    DISDIFF: {"dis_loss_flag": False, "dis_loss_type": "IM", "dis_weight": 1.0, "cond_stage_trainable": False},
    CLIP_DISDIFF: {"dis_loss_flag": False, "dis_loss_type": "IM", "dis_weight": 1.0},
    ENCDIFF: {"cond_stage_trainable": False},
}

# Width of a CLIP's embedding, by OpenAI's name of it.
CLIP_WIDTHS = {
    "ViT-L/14": 768,
    "ViT-L/14@336px": 768,
    "ViT-B/32": 512,
    "ViT-B/16": 512,
    "RN50": 1024,
    "RN101": 512,
    "RN50x4": 640,
    "RN50x16": 768,
    "RN50x64": 1024,
}
