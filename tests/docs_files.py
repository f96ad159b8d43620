"""Files that the command lines of the docs name: data sets in published formats, weights, models of other code."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import legacy_configs
import lmdb
import numpy as np
import scipy.io
import torch
import yaml
from docs_commands import ROOT, data_blocks
from PIL import Image
from safetensors.torch import save_file
from script_modules import load_module

from ldm.data.factors import FactorSpace, factor_space
from ldm.data.factors import space as factors
from ldm.data.factors.shapes3d import write_shapes3d
from ldm.data.world import World3D
from ldm.modules.diffusionmodules.clip_guided import UNet
from ldm.modules.encoders.clip_loading import build_clip
from ldm.util import instantiate_from_config

TWO = {name: 2 for name in ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")}
SIZES = {"mpi3d": (2, 1, 2, 1, 1, 3, 2), "cars3d": (4, 24, 2)}  # fewer values than the published sets
CLIP_WIDTH = 64


def small_spaces(setitem: Callable) -> None:
    """Give published data sets fewer values."""
    for name, sizes in SIZES.items():
        space = factor_space(name)
        setitem(factors._SPACES, name, FactorSpace(space.all_names, sizes, space.latent))


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def pictures(folder: Path, names: list[str], side: int = 64) -> None:
    """Write images of the embedded world."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(0).integers(0, 480_000, len(names))
    for name, image in zip(names, World3D(size=side).images(rows)):
        Image.fromarray(image).save(folder / name)


def write_data(root: Path) -> None:
    """Write the data sets of the configs below ``data``, and images of a user."""
    data = root / "data"
    write_shapes3d(data / "shapes3d" / "3dshapes.h5", TWO)
    for folder in (data / "mpi3d", root / "downloads"):
        folder.mkdir(parents=True)
        np.savez(folder / "mpi3d_toy.npz", images=noise(24, 64, 64, 3))
    (data / "cars").mkdir()
    for car in range(2):
        scipy.io.savemat(data / "cars" / f"car_{car}_mesh.mat", {"im": noise(128, 128, 3, 24, 4)})
    with lmdb.open(str(data / "celeba.lmdb"), map_size=2**24) as environment, environment.begin(write=True) as entries:
        for number, face in enumerate(noise(12, 218, 178, 3)):
            Image.fromarray(face).save(stream := io.BytesIO(), "PNG")
            entries.put(b"None-%07d" % number, stream.getvalue())
        entries.put(b"length", b"12")
    for kind in ("n01", "n02"):
        pictures(data / "tiny-imagenet-200" / "train" / kind / "images", [f"{kind}_{k}.JPEG" for k in range(4)])
    pictures(root / "pictures", [f"{k}.png" for k in range(8)])
    write_photos(root / "photos")


def write_photos(folder: Path) -> None:
    """Write images of all combinations of the words in the table of docs/datasets.md, five times, and their table."""
    (block,) = (text for _, language, text in data_blocks(ROOT / "docs" / "datasets.md") if language == "csv")
    header, *rows = csv.reader(io.StringIO(block))
    words = [list(dict.fromkeys(column)) for column in list(zip(*rows))[1:]]
    lines = [[f"{k}.jpg", *line] for k, line in enumerate([*itertools.product(*words)] * 5)]
    pictures(folder, [line[0] for line in lines])
    with (folder / "table.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *lines])


# Files by the names that the docs give them. A function gets the path, in a folder with ``pictures``. ----------------


def _clip(path: Path) -> None:
    """A CLIP with the words of the published ones."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": CLIP_WIDTH, "vision_cfg": vision, "text_cfg": text}
    path.mkdir()
    torch.manual_seed(0)
    save_file(build_clip(config).state_dict(), path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def _clip_guided_config(path: Path) -> None:
    config = {"img_size": 32, "down_channels": [32, 32, 64], "c_embed_dim": CLIP_WIDTH, "batch_size": 4, "epochs": 1}
    config |= {"dataset_root": "data/tiny-imagenet-200", "clip_csv_path": "clip.csv", "num_workers": 0}
    config |= {"clip_model": str(make(path.parents[1] / "CLIP"))}
    path.write_text(yaml.safe_dump(config))


def _clip_guided_weights(path: Path) -> None:
    torch.manual_seed(0)
    network = UNet(400, 3, 32, (32, 32, 64), 8, CLIP_WIDTH, "package")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    network(torch.randn(2, 3, 32, 32), torch.tensor([1, 5]), torch.randn(2, CLIP_WIDTH)).mean().backward()
    optimizer.step()
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 9}, path)


def _noiseclr_config(path: Path) -> None:
    config = {
        "pretrained_model": str(make(path.with_name("PIPELINE"))),
        "train_data_dir": "pictures",
        "resolution": 16,
        "train_batch_size": 2,
    }
    config |= {"placeholder_token_count": 4, "tokens_per_iter": 2, "num_train_iters": 1, "output_dir": "outputs/tokens"}
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in config.items()))


def _pipeline(path: Path) -> None:
    from stable_diffusion_pipeline import save_pipeline

    save_pipeline(path)


def _inference_config(path: Path) -> None:
    from stable_diffusion_pipeline import compvis_config

    path.write_text(yaml.safe_dump({"model": compvis_config(path.with_name("text_encoder"))}))


def _compvis_weights(path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from stable_diffusion_pipeline import compvis_weights

    pipeline = StableDiffusionPipeline.from_pretrained(make(path.with_name("PIPELINE")))
    torch.save({"state_dict": compvis_weights(pipeline)}, path)


def _class_config(path: Path) -> None:
    model = legacy_configs.model(**legacy_configs.MODELS["class"]["params"])
    model["params"]["cond_stage_config"]["params"]["n_classes"] = 1001
    path.write_text(yaml.safe_dump({"model": model}))


def _disdiff_config(path: Path) -> None:
    content = {"data": legacy_configs.data("ldm.data.world.World3D", size=64, limit=64)}
    content |= {"model": legacy_configs.MODELS["disdiff"], "lightning": legacy_configs.LIGHTNING}
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _old_run(path: Path) -> None:
    """A run folder of Lightning 1.x after two steps."""
    _disdiff_config(make(path.parent / "OLD.yaml"))
    content = yaml.safe_load((path.parent / "OLD.yaml").read_text())
    for folder in ("checkpoints", "configs"):
        (path / folder).mkdir(parents=True)
    (path / "configs" / "2023-01-01T00-00-00-project.yaml").write_text(yaml.safe_dump(content))
    (path / "configs" / "2023-01-01T00-00-00-lightning.yaml").write_text(yaml.safe_dump({"lightning": {}}))
    header = {"epoch": 0, "global_step": 2, "pytorch-lightning_version": "1.4.2", "callbacks": {}}
    state = weights_of(content["model"])
    torch.save(
        {**header, "optimizer_states": [], "lr_schedulers": [], "state_dict": state}, path / "checkpoints/last.ckpt"
    )


def _alexnet(path: Path) -> None:
    from torchvision.models import alexnet

    torch.save({f"features.{name}": value for name, value in alexnet(weights=None).features.state_dict().items()}, path)


def _codes(path: Path) -> None:
    np.save(path, np.random.default_rng(0).normal(size=(480_000, 2)).astype(np.float32))


def _table_of_codes(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    codes = np.random.default_rng(0).normal(size=(48, 3))
    pa.parquet.write_table(pa.table({f"z{k}": codes[:, k] for k in range(3)}), path)


def _factors(path: Path) -> None:
    rows = [["hue", "side"], *([f"hue {k % 4}", str(k % 3)] for k in range(48))]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def _measured_factors(path: Path) -> None:
    rows = np.random.default_rng(0).random(size=(48, 3)).round(3).tolist()
    rows[5][0] = ""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["size", "x", "y"], *rows])


def _labelled_images(path: Path) -> None:
    labels = np.column_stack([np.arange(40) % 2, np.arange(40) // 20])
    np.savez(path, data=noise(40, 3, 32, 32).astype(np.float32) / 255, targ=labels)


def _photo(path: Path) -> None:
    pictures(path.parent, [path.name], side=32)


def _packages(path: Path) -> None:
    emoji = load_module(Path(__file__).parent / "scripts" / "test_dataset_emoji.py")
    entries = [emoji.entry(f"{person} {role}") for role in ("PILOT", "COOK", "JUDGE") for person in ("MAN", "WOMAN")]
    for vendor in ("google", "twitter"):
        emoji.write_archive(path, vendor, entries)


def weights_of(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return random weights of a ``model`` section."""
    torch.manual_seed(0)
    return instantiate_from_config(model).state_dict()


MAKERS: dict[str, Callable[[Path], None]] = {
    "CLIP": _clip,
    "config/default.yaml": _clip_guided_config,
    "model_checkpoint/9.pth": _clip_guided_weights,
    "base_config.py": _noiseclr_config,
    "PIPELINE": _pipeline,
    "v1-inference.yaml": _inference_config,
    "sd-v1-4.ckpt": _compvis_weights,
    "cin256.yaml": _class_config,
    "OLD.yaml": _disdiff_config,
    "OLD_RUN": _old_run,
    "alexnet-owt-7be5be79.pth": _alexnet,
    "weights-inception-2015-12-05-6726825d.pth": Path.touch,  # see ``MeanColour``
    "z.npy": _codes,
    "z.parquet": _table_of_codes,
    "factors.csv": _factors,
    "measured.csv": _measured_factors,
    "samples.npz": lambda path: np.savez(path, noise(8, 64, 64, 3)),
    "test_celeba.npz": _labelled_images,
    "photo.png": _photo,
    "packages": _packages,
}


def make(path: Path) -> Path:
    """Write the file of that name, unless it exists."""
    name = path.name if path.name in MAKERS else f"{path.parent.name}/{path.name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        MAKERS[name](path)
    return path
