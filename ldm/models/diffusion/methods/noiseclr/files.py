"""Files of learned tokens: of NoiseCLR's reference code, of textual inversion, and pipelines of diffusers.

Legend: K tokens, D width of their embeddings, V size of the vocabulary without them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.methods.noiseclr.pipeline import import_diffusers, require_new_tokens
from ldm.modules.weights import read_state_dict
from ldm.util import UserError

CLIP_VOCABULARY = 49408
_PIPELINE = "model_index.json"  # a file that every pipeline of diffusers has
_TABLE = "embeddings.token_embedding.weight"  # end of the key of the token embeddings in a text encoder
# Files in output folders of the reference code and in its checkpoint-N.
_IN_FOLDERS = ("learned_embeds.bin", "learned_embeds.safetensors", "model.safetensors", "pytorch_model.bin")


def read_tokens(path: Path, num_tokens: int | None = None, vocabulary: int | None = None) -> dict[str, Tensor]:
    """Read learned tokens in any format of others.

    Args:
        path: ``learned_embeds.bin`` or ``.safetensors`` (token -> vector); a checkpoint of accelerate
            (``pytorch_model.bin``, ``model.safetensors``), which is a text encoder with K rows added to its table of
            token embeddings; or a folder with one of these or with a pipeline whose tokenizer has K added tokens.
        num_tokens: the expected K, for text encoders with an unusual vocabulary; the caller checks it.
        vocabulary: V, for checkpoints of accelerate; by default that of CLIP, or for a smaller table its size
            without ``num_tokens``.

    Returns:
        K tokens in natural order (``<t2>`` before ``<t10>``) -> vectors (D,).

    Raises:
        UserError: it has none of these formats, or is damaged.
    """
    if (path / _PIPELINE).is_file():
        return _of_pipeline(path)
    if path.is_dir():
        files = [path / name for name in _IN_FOLDERS if (path / name).is_file()]
        if not files:
            expected = ", ".join(("directions.safetensors", _PIPELINE, *_IN_FOLDERS))
            raise UserError(f"{path}: expected a folder with one of {expected}, got none. Correct the path")
        return read_tokens(files[0], num_tokens, vocabulary)
    state = read_state_dict(path)
    table = next((value for key, value in state.items() if key.endswith(_TABLE)), None)
    return _of_vectors(path, state) if table is None else _of_table(path, table, num_tokens, vocabulary)


def _of_vectors(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes = {tuple(value.shape) for value in state.values()}
    widths = {value.shape[-1] for value in state.values() if value.ndim == 1 or value.shape[:-1] == (1,)}
    if len(widths) != 1 or any(len(shape) not in (1, 2) or shape[:-1] not in ((), (1,)) for shape in shapes):
        shown = ", ".join(map(str, sorted(shapes)[:4]))
        raise UserError(
            f"{path}: expected one vector of the same width per token, or a text encoder (with {_TABLE}), got "
            f"{len(state)} tensors of shapes {shown}, such as {next(iter(state))}. Choose a file of learned tokens"
        )
    return {name: state[name].flatten() for name in sorted(state, key=_natural)}


def _of_table(path: Path, table: Tensor, num_tokens: int | None, vocabulary: int | None) -> dict[str, Tensor]:
    without = vocabulary or CLIP_VOCABULARY
    if num_tokens is not None and vocabulary is None and len(table) <= CLIP_VOCABULARY:
        without = len(table) - num_tokens
    if not 0 < without < len(table):
        raise UserError(
            f"{path}: expected a table of more token embeddings than in a text encoder without learned tokens "
            f"({without}), got {len(table)}. Choose a checkpoint of a training of tokens, and correct num_tokens"
        )
    return dict(zip(token_names(len(table) - without), table[without:]))


def _of_pipeline(folder: Path) -> dict[str, Tensor]:
    try:
        tokenizer = import_diffusers(folder)[1].from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder}: expected a pipeline with a CLIP tokenizer, got none ({reason}). Copy it again"
        ) from error
    added = {name: row for name, row in tokenizer.get_added_vocab().items() if name not in tokenizer.all_special_tokens}
    if not added:
        raise UserError(
            f"{folder}: expected a pipeline with learned tokens in its tokenizer, got none. Choose a pipeline that was "
            "saved after training"
        )
    files = [*folder.glob("text_encoder/model*.safetensors"), *folder.glob("text_encoder/pytorch_model*.bin")]
    state = read_state_dict(files[0] if files else folder / "text_encoder" / "model.safetensors")
    table = next((value for key, value in state.items() if key.endswith(_TABLE)), torch.empty(0, 0))
    if max(added.values()) >= len(table):
        raise UserError(
            f"{folder}: expected at least {max(added.values()) + 1} token embeddings in the text encoder, as in the "
            f"tokenizer, got {len(table)}. Save the pipeline again"
        )
    return {name: table[added[name]] for name in sorted(added, key=_natural)}


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def token_names(count: int) -> tuple[str, ...]:
    """Return the placeholder tokens of the reference code: ``<t1>``, ``<t2>``, ..."""
    return tuple(f"<t{number}>" for number in range(1, count + 1))


def save_pipeline(folder: Path, tokens: Mapping[str, Tensor], pipeline: Any) -> None:
    """Write a pipeline of diffusers with learned tokens, which are words of its prompts.

    The folder is written under another name first, so that a failure leaves an earlier pipeline as it was.

    Args:
        folder: a new or empty folder, or that of a pipeline and nothing else, which is replaced.
        tokens: token -> vector (D,).
        pipeline: the pipeline without the tokens, see ``load_pipeline``; they are added to it.

    Raises:
        UserError: the folder contains other files, the pipeline has one of the tokens, or D is another.
    """
    _require_replaceable(folder)
    tokenizer, encoder, source = pipeline.tokenizer, pipeline.text_encoder, pipeline.config.get("_name_or_path")
    require_new_tokens(tokenizer, list(tokens), source)
    width, found = encoder.get_input_embeddings().embedding_dim, {len(value) for value in tokens.values()}
    if found != {width}:
        raise UserError(
            f"{source}: expected vectors of width {width}, that of its text encoder, got "
            f"{', '.join(map(str, sorted(found)))}. Choose the pipeline that the tokens were trained with"
        )
    tokenizer.add_tokens(list(tokens))
    encoder.resize_token_embeddings(max(len(tokenizer), encoder.get_input_embeddings().num_embeddings))
    with torch.no_grad():
        values = torch.stack(list(tokens.values())).to(encoder.dtype)
        encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(tokens))] = values
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        pipeline.save_pretrained(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            old.rename(folder)
            raise


def _require_replaceable(folder: Path) -> None:
    index = folder / _PIPELINE
    parts = {_PIPELINE, *json.loads(index.read_text())} if index.is_file() else set()
    others = [path.name for path in folder.iterdir() if path.name not in parts] if folder.is_dir() else []
    if others or folder.is_file():
        raise UserError(
            f"{folder}: expected a new or empty folder, or a pipeline to be replaced, got "
            f"{', '.join(sorted(others)[:4]) or 'a file'}. Choose another folder"
        )
