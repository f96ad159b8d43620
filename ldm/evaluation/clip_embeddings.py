"""Computation of the CLIP image embeddings of data sets, which continues after an interruption at any time.

Finished batches are appended to a hidden file beside the output, which replaces the output at the end. The batches do
not depend on what is finished, so a continued computation gives the same bytes as an uninterrupted one.

Legend: B batch, D width of an embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.data.dataset import ImageDataset
from ldm.data.formats.clip_embeddings import (
    EmbeddingTable,
    Journal,
    check_suffix,
    content_hash,
    match_paths,
    read_table,
    write_table,
)
from ldm.data.formats.picture_files import decode_picture
from ldm.modules.encoders.clip_loading import clip_fingerprint, find_clip, import_open_clip, load_clip
from ldm.util import UserError

_SIMILAR = 0.99  # least cosine of two embeddings of an image by one CLIP, one of them in half precision


@dataclass
class ImageEncoder:
    """Image tower of a CLIP with its own preprocessing."""

    name: str  # name or folder of the CLIP
    fingerprint: str  # see ``clip_fingerprint``
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
    return ImageEncoder(name, clip_fingerprint(model), model.to(device), width, preprocess)


class _Originals(Dataset):
    """Preprocessed images of (data set, row) pairs: (hash, (3, H, W)), or an error message."""

    def __init__(self, images: Sequence[tuple[ImageDataset, int]], preprocess: Callable) -> None:
        self._images, self._preprocess = images, preprocess

    def __getitem__(self, position: int) -> tuple[int, Tensor] | str:
        dataset, row = self._images[position]
        name = dataset.row_names(np.array([row]))[0]
        try:
            original = dataset.original(row)
            picture = decode_picture(original, name) if isinstance(original, bytes) else Image.fromarray(original)
            return content_hash(original), self._preprocess(picture)
        except Exception as error:  # readers of images raise many kinds of errors for damaged files
            return str(error) if isinstance(error, UserError) else f"{name}: {error!r}"


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
        datasets: each image is embedded once; images of the same name are regarded as equal.
        encoder: see ``load_image_encoder``.
        output: .csv, .safetensors or .h5; a file of the same CLIP is completed.
        batch_size, num_workers: of the loader.
        on_progress: called with the number of images done and of all images.

    Returns:
        The content of the file, in the order of the data sets, and an error message for each image without embedding.

    Raises:
        UserError: the file belongs to another CLIP or is used by another process, or no image can be read.
    """
    check_suffix(output)
    images = {
        name: (dataset, row)
        for dataset in datasets
        for rows in [np.unique(dataset.rows)]
        for name, row in zip(dataset.row_names(rows), rows.tolist())
    }
    names, originals = list(images), _Originals(list(images.values()), encoder.preprocess)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output):
        finished = Journal(output.with_name(f".{output.name}.partial"))
        finished.rows, skipped = _earlier(output, names, originals, encoder)
        finished.read({"clip": encoder.name, "fingerprint": encoder.fingerprint})
        loader = partial(DataLoader, originals, num_workers=num_workers, collate_fn=list)
        failed = _embed_missing(names, finished, encoder, loader, batch_size, on_progress)
        known = [name for name in names if name in finished.rows]
        known += [name for name in finished.rows if name not in images]  # of other folders, or removed since
        if not known:
            raise UserError(f"{output}: expected images that can be read, got none. {next(iter(failed.values()))}")
        hashes = np.array([finished.rows[name][0] for name in known], dtype=np.uint64)
        values = np.stack([finished.rows[name][1] for name in known])
        skipped = [*failed, *(name for name in skipped if name not in images and name not in finished.rows)]
        record = {"clip": encoder.name, "fingerprint": encoder.fingerprint, "skipped": skipped}
        table = EmbeddingTable(output, known, values, hashes, record)
        write_table(table)
        finished.path.unlink()
    return table, failed


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Refuse a second process that writes the same file."""
    try:
        with FileLock(output.with_name(f".{output.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"{output}: another process computes this file. Wait until it ends, then rerun.") from error


def _embed_missing(
    names: Sequence[str],
    finished: Journal,
    encoder: ImageEncoder,
    loader: Callable[..., DataLoader],
    batch_size: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, str]:
    """Add the embeddings of the images that are not finished; return an error message for each that failed."""
    failed: dict[str, str] = {}
    batches = [range(start, min(start + batch_size, len(names))) for start in range(0, len(names), batch_size)]
    batches = [batch for batch in batches if any(names[position] not in finished.rows for position in batch)]
    done = len(names) - sum(map(len, batches))
    on_progress(done, len(names))
    for batch, items in zip(batches, loader(batch_sampler=batches)):
        found = {names[position]: item for position, item in zip(batch, items)}
        failed |= {name: item for name, item in found.items() if isinstance(item, str)}
        found = {name: item for name, item in found.items() if name not in failed}
        if found:
            values = encoder(torch.stack([image for _, image in found.values()]))
            new = [position for position, name in enumerate(found) if name not in finished.rows]
            hashes = [number for number, _ in found.values()]
            finished.add([list(found)[k] for k in new], [hashes[k] for k in new], values[new])
        done += len(batch)
        on_progress(done, len(names))
    return failed


def _earlier(
    output: Path, names: Sequence[str], originals: _Originals, encoder: ImageEncoder
) -> tuple[dict[str, tuple[int, np.ndarray]], list[str]]:
    """Return an earlier output, which may be incomplete: hash and embedding by name, and the skipped images."""
    if not output.exists() or not output.stat().st_size:
        return {}, []
    table = read_table(output, is_partial=True)
    if not table.names:
        return {}, []
    table.require_clip(encoder.name, encoder.fingerprint, encoder.width)
    rows = match_paths(table.names, names, None, str(output))
    known = np.flatnonzero(rows >= 0)
    today = dict(zip(rows[known].tolist(), (names[position] for position in known)))
    if not table.record and len(known) and not isinstance(item := originals[int(known[0])], str):
        new, old = encoder(item[1][None])[0], table.values[rows[known[0]]]
        if new @ old < _SIMILAR * np.linalg.norm(new) * np.linalg.norm(old):
            raise UserError(
                f"{output}: expected embeddings of the CLIP {encoder.name}, got others: that of {names[known[0]]} "
                "differs. Choose the CLIP of the file, or another --output."
            )
    entries = zip(table.hashes.tolist(), table.values)
    by_name = {today.get(row, name): entry for row, (name, entry) in enumerate(zip(table.names, entries))}
    return by_name, table.record.get("skipped", [])
