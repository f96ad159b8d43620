"""Tables of names and options of the reference repositories, read by ``ldm.legacy.translation`` only.

The repositories are latent-diffusion, taming-transformers, DisDiff, CLIP-DisDiff and EncDiff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_PL = "pytorch_lightning"
_CALLBACKS = "ldm.training.callbacks"
_LOSSES = "ldm.modules.losses"
_TAMING = "taming.modules.losses"
_OLD_LOSSES = (_TAMING, f"{_TAMING}.vqperceptual", _LOSSES)
_DDPM = "ldm.models.diffusion.ddpm"
_VQ_LOSS = f"{_LOSSES}.vqperceptual.VQLPIPSWithDiscriminator"
_DUMMY_LOSS = f"{_LOSSES}.contperceptual.DummyLoss"
_CSV_LOGGER = "ldm.training.loggers.MetricsCSVLogger"

# Classes of the references' main.py and of EncDiff's main_val.py.
_MAIN = {
    "DataModuleFromConfig": "ldm.data.module.DataModuleFromConfig",
    "WrappedDataset": "ldm.data.module.WrappedDataset",
    "ImageLogger": f"{_CALLBACKS}.image_logger.ImageLogger",
    "SetupCallback": f"{_CALLBACKS}.setup.SetupCallback",
    "CUDACallback": f"{_CALLBACKS}.cuda.CUDACallback",
    "LearningRateMonitor": f"{_PL}.callbacks.LearningRateMonitor",
}

# Modules of the references that contain only the names above; any other name in them is misspelt.
OLD_MODULES = ("main", "main_val")

# The diffusion models; a LatentDiffusion is one of them, depending on its params.
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
EDIT_SCORE = "ldm.evaluation.editing.callback.EditScore"
DATA_MODULE = _MAIN["DataModuleFromConfig"]
IMAGE_LIST = "ldm.data.formats.image_list.ImageList"

# Old dotted path -> today's dotted path.
ALIASES: dict[str, str] = {
    **{f"{module}.{name}": today for module in OLD_MODULES for name, today in _MAIN.items()},
    **{old: today for old, today in OLD_LATENT_DIFFUSIONS.items() if old != today},
    **{f"{old}.VQLPIPSWithDiscriminator": _VQ_LOSS for old in _OLD_LOSSES},
    **{f"{old}.DummyLoss": _DUMMY_LOSS for old in (*_OLD_LOSSES, f"{_LOSSES}.vqperceptual")},
    f"{_LOSSES}.LPIPSWithDiscriminator": f"{_LOSSES}.contperceptual.LPIPSWithDiscriminator",
    f"{_TAMING}.lpips.LPIPS": "ldm.modules.lpips.LPIPS",
    "ldm.modules.discriminator.NLayerDiscriminator": "taming.modules.discriminator.model.NLayerDiscriminator",
    "taming.modules.vqvae.quantize.VectorQuantizer2": "ldm.modules.quantize.VectorQuantizer2",
    "taming.modules.vqvae.quantize.GumbelQuantize": "ldm.modules.quantize.GumbelQuantize",
    "taming.models.vqgan.VQModel": "ldm.models.autoencoder.VQModel",
    "taming.models.vqgan.GumbelVQ": "ldm.models.autoencoder.GumbelVQ",
    "taming.data.base.ImagePaths": IMAGE_LIST,
    "taming.data.custom.CustomTrain": IMAGE_LIST,
    "taming.data.custom.CustomTest": IMAGE_LIST,
    "ldm.tools.Record": f"{_CALLBACKS}.record.Record",
    f"{_PL}.loggers.TestTubeLogger": _CSV_LOGGER,
    f"{_PL}.loggers.test_tube.TestTubeLogger": _CSV_LOGGER,
}

# Prefix -> prefix. Lightning is distributed under two import names; the others are of earlier versions of this package.
_FACTORS = ("cars3d", "dsprites", "mpi3d", "shapes3d", "smallnorb")
_FORMATS = ("celeba", "folder", "h5_text", "lmdb_sets", "lmdb_text")
_METHODS = ("disdiff", "clip_disdiff", "encdiff")
PREFIXES: dict[str, str] = {
    "lightning.pytorch.": f"{_PL}.",
    "taming.lr_scheduler.": "ldm.lr_scheduler.",
    **{f"ldm.data.{name}.": f"ldm.data.factors.{name}." for name in _FACTORS},
    **{f"ldm.data.{name}.": f"ldm.data.formats.{name}." for name in _FORMATS},
    **{f"ldm.models.diffusion.{name}.": f"ldm.models.diffusion.methods.{name}.model." for name in _METHODS},
    "ldm.models.diffusion.pixel_diffusion.": "ldm.models.diffusion.base.",
    "ldm.models.diffusion.latent_diffusion.": "ldm.models.diffusion.latent.",
    "ldm.models.diffusion.unit_diffusion.": "ldm.models.diffusion.units.",
    "ldm.evaluation.edit.": "ldm.evaluation.editing.callback.",
    "ldm.models.clip.WorldCLIP": "ldm.models.clip.AttributeCLIP",
    "ldm.models.judge.FactorJudge": "ldm.models.judge.AttributeJudge",
    "ldm.data.vocabulary.world_vocabulary": "ldm.data.world.world_vocabulary",
    "ldm.modules.diffusionmodules.upscaling.": "ldm.models.diffusion.finetune.",
    "ldm.modules.midas.api.MiDaSInference": "torch.nn.Identity",  # not built, see LatentDepth2ImageDiffusion
}


@dataclass(frozen=True)
class OldDataset:
    """A data set of the references.

    Attributes:
        today: the class that reads the same files.
        params: defaults of the old class; a config can override them.
        meaningless: options without effect, because items are uint8 and models normalize them.
    """

    today: str
    params: Mapping[str, Any] = field(default_factory=dict)
    meaningless: tuple[str, ...] = ("as_tensor", "do_normalize", "do_transform", "do_augment", "original_resolution")


# LMDB keys contain the resolution, and images may be mirrored: these options have an effect there.
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
    """Return an LMDB of 256-pixel images, resized."""
    sizes = {"image_size": image_size, "original_resolution": 256}
    return OldDataset(f"ldm.data.formats.lmdb_sets.{today}", {**sizes, **params}, _LMDB)


def _folder(split: str | None = None) -> OldDataset:
    """Return a folder of images of any shape, stretched to squares."""
    return OldDataset("ldm.data.formats.folder.ImageFolder", {"image_size": 64, "fit": "stretch", "split": split})


_IN_DIS = {
    **dict.fromkeys(("Shapes3D", "Shapes3DTrain"), _SHAPES3D),
    **dict.fromkeys(("MPI3D", "MPI3DTrain"), _MPI3D),
    **dict.fromkeys(("Cars3D", "Cars3DTrain"), _CARS3D),
    "CelebAlmdb": OldDataset(_CELEBA, {"original_resolution": 128, "crop_d2c": False}, _LMDB),
    "Celebarain": _FACES,
    **dict.fromkeys(("Mercarilmdb", "Mercaritrain", "CustomDatasetTrain"), _IMAGES),
    **dict.fromkeys(("Mercarilmdb_clip", "Mercaritrain_clip", "CustomDatasetTrainCLIP"), _TEXT_IMAGES),
    "Bedroom_lmdb": _large("LSUN", 128, category="bedroom"),
    "BedroomTrain": _large("LSUN", 64, category="bedroom"),
    "Horse_lmdb": _large("LSUN", 128, category="horse"),
    "HorseTrain": _large("LSUN", 64, category="horse"),
    "FFHQlmdb": _large("FFHQ", 256),
    "FFHQTrain": _large("FFHQ", 64),
    **dict.fromkeys(("AFHQTrain", "FlowerTrain"), _folder()),
    **dict.fromkeys(("AFHQVal", "FlowerVal"), _folder("validation")),
}
OLD_DATASETS = {f"ldm.data.{module}.{name}": data for module in ("dis", "disdata") for name, data in _IN_DIS.items()}
CARS3D_NAMES = frozenset(name for name, data in OLD_DATASETS.items() if data is _CARS3D)
CARS3D_REPEAT = 10  # repetitions of every image in the references' training set
ALIASES |= {name: data.today for name, data in OLD_DATASETS.items()}

# Data sets that are not included: prefix of the name -> advice.
NOT_SHIPPED_CLASS = "ldm.data.not_shipped.NotShipped"
_FOLDER = "a folder of images, optionally with a table of labels or texts: ldm.data.formats.folder.ImageFolder"
_FFHQ = f"an LMDB of FFHQ: ldm.data.formats.lmdb_sets.FFHQ; or {_FOLDER}"
_PARTS = "Clevr AFHQ Flower LSUNchurch LSUNChurch Shapes3D_SD Shapes3DTrainSD MPI3D_SD MPI3DTrainSD".split()
NOT_SHIPPED = {
    "ldm.data.lsun.": f"an LMDB of the images: ldm.data.formats.lmdb_sets.LSUN; or {_FOLDER}",
    **dict.fromkeys(("ldm.data.faceshq.", "taming.data.faceshq."), _FFHQ),
    **{f"ldm.data.{name}.": _FOLDER for name in ("imagenet", "openimages", "landscapes", "previews")},
    "taming.data.": _FOLDER,
    **{f"ldm.data.{module}.{name}": _FOLDER for module in ("dis", "disdata") for name in _PARTS},
}

# Classes of taming-transformers that cannot be built here: name or prefix of it -> reason and advice.
_STAGE_TWO = "transformers over codes are not supported. Train a LatentDiffusion on the same first stage"
_VQ_GAN = "Use taming.models.vqgan.VQModel"
REFUSED = {
    **dict.fromkeys(("taming.models.cond_transformer.", "taming.modules.transformer."), _STAGE_TWO),
    **dict.fromkeys(("taming.models.dummy_cond_stage.", "taming.modules.misc.coord."), _STAGE_TWO),
    "taming.models.vqgan.VQSegmentationModel": f"autoencoders of label maps are not supported. {_VQ_GAN} for images",
    "taming.models.vqgan.VQNoDiscModel": f"it is not supported. {_VQ_GAN} with lossconfig.params.disc_weight: 0",
    "taming.models.vqgan.EMAVQ": f"codebooks updated by averages are not supported. {_VQ_GAN}",
    "taming.modules.vqvae.quantize.EMAVectorQuantizer": f"it is not supported. {_VQ_GAN}",
    "taming.modules.losses.segmentation.": "losses of label maps are not supported. Use VQLPIPSWithDiscriminator",
}
# The contrastive loss of a fork of EncDiff is switched on by both params.
CONTRASTIVE = ("use_mcl", "lambda_mcl")

# Params that are dropped without a warning, because they make no difference.
SELF_EVIDENT = frozenset(("as_tensor", "do_normalize", "do_transform", "original_resolution", "cond_stage_trainable"))

# Params without effect. None, False and 0 are dropped silently, other values with a warning.
_MCL = ("use_mcl", "lambda_mcl", "mcl_tau", "mcl_proj_dim", "mcl_sigma", "mcl_neg_mode", "mcl_type")
_NETWORK = ("use_positional_encodings", "make_it_fit")  # with the second, other shapes are an error on loading
_DIFFUSION = (*_NETWORK, *_MCL)
_DIS = ("dis_loss_flag", "dis_loss_type", "dis_weight", "detach_flag", "train_enc_flag")
_KL = ("kl_loss_flag", "kl_weight")
_CONDITIONED = ("LatentFinetune", "LatentInpaint", "LatentDepth2Image", "LatentUpscale", "LatentUpscaleFinetune")
# The number of kept dimensions follows from the file; depth is computed before training.
_CONDITIONED_OPTIONS = ("keep_finetune_dims", "depth_stage_config", "c_concat_log_start", "c_concat_log_end")
_AUTOENCODER = ("colorize_nlabels", "batch_resize_range")
AUTOENCODERS = tuple(f"ldm.models.autoencoder.{name}" for name in ("VQModel", "VQModelInterface", "GumbelVQ"))
AUTOENCODERS += ("ldm.models.autoencoder.AutoencoderKL",)
MEANINGLESS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(AUTOENCODERS, _AUTOENCODER),
    DATA_MODULE: ("num_val_workers",),
    _MAIN["ImageLogger"]: ("enable_autocast", "log_all_val"),
    f"{_DDPM}.DDPM": _NETWORK,
    **{f"{_DDPM}.{name}Diffusion": (*_NETWORK, *_CONDITIONED_OPTIONS) for name in _CONDITIONED},
    LATENT_DIFFUSION: (*_DIFFUSION, *_DIS, *_KL, "eval_name"),
    DISDIFF: (*_DIFFUSION, "eval_name"),
    CLIP_DISDIFF: (*_DIFFUSION, *_KL, "train_enc_flag", "cond_stage_trainable", "eval_name"),
    ENCDIFF: (*_DIFFUSION, *_DIS),
    _CSV_LOGGER: ("debug", "create_git_tag", "log_graph", "prefix"),
}

LIST_KEYS = ("training_images_list_file", "test_images_list_file", "list_file")  # params with a list of files

# Renamed params: target -> {old: today}.
RENAMED_PARAMS: dict[str, dict[str, str]] = {
    f"{_PL}.callbacks.ModelCheckpoint": {"period": "every_n_epochs", "every_n_val_epochs": "every_n_epochs"},
    IMAGE_LIST: dict.fromkeys(LIST_KEYS[:2], LIST_KEYS[2]),
    **dict.fromkeys(
        ("ldm.data.world.World3D", "ldm.data.world.dataset.World3D", "ldm.data.factors.shapes3d.Shapes3D"),
        {"unseen_share": "holdout"},
    ),
}

# Keys of ddconfig that change LDM's network if they are set.
REFUSED_NETWORKS = {
    "use_linear_attn": "Linear attention is not supported",
    "give_pre_end": "A decoder without its last layers is not supported",
}
# Names of attn_type that compute the same attention with the same weights.
ATTENTION_TYPES = {"vanilla-xformers": "vanilla"}

# Defaults of the reference's class that differ from those of today's class.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    DISDIFF: {"dis_loss_flag": False, "dis_loss_type": "IM", "dis_weight": 1.0, "cond_stage_trainable": False},
    CLIP_DISDIFF: {"dis_loss_flag": False, "dis_loss_type": "IM", "dis_weight": 1.0},
    ENCDIFF: {"cond_stage_trainable": False},
}

# Defaults of earlier names of classes.
EARLIER_DEFAULTS: dict[str, dict[str, Any]] = {
    "ldm.models.clip.WorldCLIP": {"vocabulary": {"target": "ldm.data.world.world_vocabulary"}},
    "ldm.models.judge.FactorJudge": {"space": "shapes3d"},
}

# Width of CLIP embeddings, by OpenAI's model names.
_WIDTHS = {512: "ViT-B/32 ViT-B/16 RN101", 640: "RN50x4", 768: "ViT-L/14 ViT-L/14@336px RN50x16", 1024: "RN50 RN50x64"}
CLIP_WIDTHS = {name: width for width, names in _WIDTHS.items() for name in names.split()}
