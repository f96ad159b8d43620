"""Computation of the CLIP image embeddings of data sets, which continues after an interruption at any time.

Each finished batch is a file in a hidden folder beside the output, until the output is complete. If all images can be
read, a continued computation has the batches of an uninterrupted one, and gives the same bytes.

Legend: B batch, D width of an embedding.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.data.dataset import ImageDataset
from ldm.data.formats.clip_embeddings import EmbeddingTable, check_suffix, read_original, read_table, write_table
from ldm.data.rows import explained_writing
from ldm.modules.encoders.clip_loading import find_clip, import_open_clip, load_clip
from ldm.modules.weights import weights_fingerprint
from ldm.util import UserError

_SIMILAR = 0.99  # least cosine of two embeddings of an image by one CLIP, one of them in half precision


@dataclass
class ImageEncoder:
    """Image tower of a CLIP with its own preprocessing."""

    name: str  # name or folder of the CLIP
    fingerprint: str  # see ``weights_fingerprint``
    model: nn.Module  # the CLIP in evaluation mode
    width: int  # D
    preprocess: Callable[[Image.Image], Tensor]  # PIL image -> input of the model, (3, H, W) float32

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> np.ndarray:
        """Map preprocessed images (B, 3, H, W) to embeddings (B, D) float32, not normalized."""
        return self.model.encode_image(images.to(self.model.logit_scale.device)).float().cpu().numpy()


def load_image_encoder(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> ImageEncoder:
    """Load a CLIP by name or folder, see ``find_clip``, with the preprocessing of its images in open_clip."""
    source = find_clip(name, weights)
    model, transforms = load_clip(source), import_open_clip().transform
    stated = {**source.preprocess_cfg, "size": model.visual.image_size}
    settings = transforms.PreprocessCfg(**transforms.merge_preprocess_dict(transforms.PreprocessCfg(), stated))
    preprocess = transforms.image_transform_v2(settings, is_train=False)
    width = source.model_cfg["embed_dim"]
    return ImageEncoder(name, weights_fingerprint(model), model.to(device), width, preprocess)


def _read(
    images: Sequence[tuple[ImageDataset, int]], preprocess: Callable[[Image.Image], Tensor]
) -> tuple[dict[str, str], dict[str, str], Tensor | None]:
    """Read (data set, row) pairs: hashes and error messages by name, preprocessed images (B, 3, H, W) or None."""
    hashes, failed, inputs = {}, {}, []
    for dataset, row in images:
        known, picture = read_original(dataset, row)
        (failed if picture is None else hashes)[dataset.row_name(row)] = known
        if picture is not None:
            inputs.append(preprocess(picture))
    return hashes, failed, torch.stack(inputs) if inputs else None  # each tensor of a worker takes a file descriptor


def _images_by_path(datasets: Sequence[ImageDataset]) -> dict[str, tuple[ImageDataset, int]]:
    """Return (data set, row) of each image by absolute name; raise a ``UserError`` if a name has two images."""
    images: dict[str, tuple[ImageDataset, int]] = {}
    for dataset in datasets:
        for row in np.unique(dataset.rows).tolist():
            other, same = images.setdefault(os.path.abspath(dataset.row_name(row)), (dataset, row))
            is_one_set = type(other) is type(dataset) and other.path == dataset.path
            if not is_one_set and read_original(other, same)[0] != read_original(dataset, row)[0]:
                first, second = (each.path or type(each).__name__ for each in (other, dataset))
                raise UserError(
                    f"data sets: expected one image per name, got two of {dataset.row_name(row)} (in {first} and "
                    f"{second}). Use one --output per data set."
                )
    return images


def compute_embeddings(
    datasets: Sequence[ImageDataset],
    encoder: ImageEncoder,
    output: Path,
    batch_size: int = 64,
    num_workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Write the embeddings of all images of data sets, and keep those that an earlier call has computed.

    Args:
        datasets: each image is embedded once; names must be unique (``ImageDataset.row_name``).
        encoder: see ``load_image_encoder``.
        output: .csv, .safetensors or .h5; a file of the same CLIP is completed.
        batch_size, num_workers: of the loader.
        on_progress: called with the number of images done and of all images.

    Returns:
        The content of the file, new images after those of an earlier call, and an error message for each image without.

    Raises:
        UserError: the file belongs to another CLIP or is in use, or no image can be read, or two have one name.
    """
    check_suffix(output)
    images = _images_by_path(datasets)
    with explained_writing(output, 0):
        try:
            lock = FileLock(output.with_name(f".{output.name}.lock")).acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{output}: another process computes this file. Wait until it ends, then rerun.") from error
    with lock:
        parts = output.with_name(f".{output.name}.parts")
        files = [path for path in (output, *sorted(parts.glob("*.safetensors"))) if path.exists()]
        tables = [table for path in files if (table := read_table(path, is_partial=True)).names]
        for table in tables:
            _require_same_clip(table, images, encoder)
        finished = {os.path.abspath(name) for table in tables for name in table.names}
        missing = [image for name, image in images.items() if name not in finished]
        record = {"clip": encoder.name, "fingerprint": encoder.fingerprint}
        read = partial(_read, preprocess=encoder.preprocess)
        done, failed = len(images) - len(missing), {}
        on_progress(done, len(images))
        for hashes, messages, inputs in DataLoader(missing, batch_size, num_workers=num_workers, collate_fn=read):
            failed |= messages
            if inputs is not None:
                part = EmbeddingTable(parts / f"{time.time_ns()}.safetensors", [*hashes], encoder(inputs))
                part.record = {**record, "hashes": hashes}
                write_table(part)
                tables.append(part)
            done += len(hashes) + len(messages)
            on_progress(done, len(images))
        if not tables:
            raise UserError(f"{output}: expected images that can be read, got none. {next(iter(failed.values()))}")
        values = {name: value for table in tables for name, value in zip(table.names, table.values)}
        hashes = {name: known for table in tables for name, known in table.record.get("hashes", {}).items()}
        table = EmbeddingTable(output, [*values], np.stack([*values.values()]), {**record, "hashes": hashes})
        write_table(table)
        shutil.rmtree(parts, ignore_errors=True)
    return table, failed


def _require_same_clip(
    table: EmbeddingTable, images: Mapping[str, tuple[ImageDataset, int]], encoder: ImageEncoder
) -> None:
    """Raise a ``UserError`` unless a file has embeddings of a CLIP; without a record, one image is compared."""
    table.require_clip(encoder.name, encoder.fingerprint, encoder.width)
    if "fingerprint" in table.record:
        return
    rows = zip(map(os.path.abspath, table.names), table.values)
    pairs = ((read_original(*images[name])[1], old) for name, old in rows if name in images)
    picture, old = next((pair for pair in pairs if pair[0] is not None), (None, None))
    new = None if picture is None else encoder(encoder.preprocess(picture)[None])[0]
    if new is None or new @ old < _SIMILAR * np.linalg.norm(new) * np.linalg.norm(old):
        raise UserError(
            f"{table.path}: expected embeddings of these images by the CLIP {encoder.name}, got others. Choose the "
            "CLIP of the file, or another --output."
        )
