"""Package of CLIP-DisDiff. Ranges are wide here; constraints.txt pins the set that is tested."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.4",
    "torchvision>=0.19",  # open_clip's transforms, VGG16 of LPIPS; must match torch's build
    "pytorch-lightning>=2.6.4",  # loops, DDP, checkpoints; 2.6.2 and 2.6.3 were withdrawn as compromised
    "omegaconf>=2.3",  # the YAML configs of the LDM family
    "open_clip_torch>=2.30",  # CLIP
    "einops>=0.7",
    "h5py>=3.10",  # 3dshapes.h5
    "numpy>=1.26",
    "scipy>=1.11",
    "scikit-learn>=1.4",  # logistic regressions, PCA
    "numba>=0.60",  # DCI's boosted trees, compiled
    "taming-transformers>=0.0.1",  # PatchGAN discriminator
    "requests>=2.28",  # imported by taming-transformers, which does not declare it
    "torchmetrics>=1.4",  # carries LPIPS' linear weights
    "safetensors>=0.4",  # weights without pickle
    "tensorboard>=2.15",  # default logger
    "matplotlib>=3.8",  # heat maps
    "pillow>=10",  # pictures with captions
    "rich>=13",  # progress bars and tables
]
EXTRAS_REQUIRE = {
    "lmdb": ["lmdb>=1.4"],  # image + text LMDB data sets
    "wandb": ["wandb>=0.17"],  # the Weights & Biases logger
    "cluster": ["dask>=2024.8", "distributed>=2024.8"],  # run_para_metrics.py --scheduler
    "parquet": ["pyarrow>=15"],  # latents in .parquet files
    "fid": ["torch-fidelity>=0.3"],  # FID and KID
    "bert": ["transformers>=4.40"],  # the tokenizer of LDM's BERTEmbedder
    "dev": ["pytest>=8", "ruff>=0.6"],
}

setup(
    name="clip-disdiff",
    version="0.1.0",
    description="Disentangling diffusion models: one sub-gradient per factor, steered by text through CLIP",
    license="MIT",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm.scoring": ["published.json"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
