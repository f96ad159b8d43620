"""Sets of directions, and their files.

A file is ``*.safetensors`` with one tensor per direction, by name, and in its header the kind, the names, the finder,
and the fingerprint and latent shape of the denoiser that the directions belong to. Files of learned tokens of others
(see ``files.py``) contain no fingerprint.

Legend: K directions, D width of a row, N features of the bottleneck.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.diffusion.directions import Edit, Negative, edited_by_conditions, edited_by_shifts, step_weights
from ldm.diffusion.samplers import Denoiser, Sampler
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.files import read_tokens, token_names
from ldm.modules.weights import read_state_dict
from ldm.util import UserError, atomic_write

DIRECTIONS_FILE = "directions.safetensors"  # in the folder of a run
logger = logging.getLogger(__name__)

_HEADER = "directions"  # entry of the header


@dataclass(frozen=True)
class DirectionSet:
    """Directions of one denoiser.

    Attributes:
        values: (K, D) rows, or (K, N) shifts of the bottleneck, float32.
        kind: ``token`` and ``condition`` are row spaces of ``FrozenDenoiser``; ``bottleneck`` are shifts.
        names: K names, such as the tokens ``<t1>``.
        finder: how they were found.
        fingerprint: of the denoiser; None if unknown.
        latent_shape: (C, h, w) of the denoiser; None if unknown.
    """

    values: Tensor
    kind: str
    names: tuple[str, ...]
    finder: str
    fingerprint: str | None = None
    latent_shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of(
        cls, denoiser: FrozenDenoiser, values: Tensor, kind: str, finder: str, names: Sequence[str] = ()
    ) -> DirectionSet:
        """Return directions of a denoiser; without names, rows are tokens, and shifts are numbered."""
        numbered = tuple(f"{finder} {number}" for number in range(1, len(values) + 1))
        given = tuple(names) or (numbered if kind == "bottleneck" else token_names(len(values)))
        values = values.detach().float().cpu().contiguous()
        return cls(values, kind, given, finder, denoiser.fingerprint(), denoiser.latent_shape)

    @classmethod
    def joined(cls, sets: Mapping[str, DirectionSet]) -> DirectionSet:
        """Return the directions of several sets of one denoiser, such as two domains, named ``<key>/<name>``.

        Raises:
            UserError: the sets differ in kind, width or denoiser.
        """
        first = next(iter(sets.values()))
        for key, other in sets.items():
            own, found = ((s.kind, s.values.shape[1], s.latent_shape, s.fingerprint) for s in (first, other))
            if any(None not in pair and pair[0] != pair[1] for pair in zip(own, found)):
                raise UserError(
                    f"directions {key}: expected kind, width, latent shape and fingerprint of the model like "
                    f"{next(iter(sets))}, {own}, got {found}. Combine directions of one model and one kind"
                )
        names = tuple(f"{key}/{name}" for key, each in sets.items() for name in each.names)
        finder = ", ".join(dict.fromkeys(each.finder for each in sets.values()))
        return replace(first, values=torch.cat([each.values for each in sets.values()]), names=names, finder=finder)

    def index_of(self, name: str) -> int:
        """Return the position of a direction by name, or by number from 1.

        Raises:
            UserError: there is no such direction.
        """
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and 1 <= int(name) <= len(self):
            return int(name) - 1
        shown = ", ".join(self.names[:4])
        raise UserError(f"direction {name!r}: expected 1 to {len(self)}, or one of {shown}, .... Correct the name")

    def check(self, denoiser: FrozenDenoiser, where: str = "directions") -> None:
        """Raise a ``UserError`` unless the directions belong to a denoiser."""
        own, rows = (self.kind, self.values.shape[1]), (denoiser.row_space, denoiser.row_width)
        for expected, found, given in (
            ("of kind {} and width {}", None if self.kind == "bottleneck" else own, rows),
            ("for latents of shape ({}, {}, {})", self.latent_shape, tuple(denoiser.latent_shape)),
            ("of the model with fingerprint {}", self.fingerprint and (self.fingerprint,), (denoiser.fingerprint(),)),
        ):
            if found and found != given:
                raise UserError(
                    f"{where}: expected directions {expected.format(*given)}, got those {expected.format(*found)}. Use "
                    "the model that they were found with, or find directions of this one"
                )
        if self.fingerprint is None:
            logger.warning("%s: the file has no fingerprint of its model; use it with the model it was made for", where)

    def edited(
        self,
        denoiser: FrozenDenoiser,
        edits: Sequence[Edit],
        sampler: Sampler,
        count: int,
        cond: Condition | None = None,
        guidance_scale: float = 1.0,
        negative: Negative = None,
    ) -> Denoiser:
        """Return the function for a sampler that predicts the noise in ``count`` samples under edits.

        Args:
            denoiser: the denoiser that the directions belong to.
            edits: the edits, applied together.
            sampler: the sampler that is going to call the function.
            count: B.
            cond, guidance_scale, negative: see ``edited_by_conditions``.
        """
        num_timesteps = denoiser.schedule.num_timesteps
        weights = step_weights(edits, sampler.timesteps(num_timesteps), num_timesteps)
        rows = torch.tensor([edit.direction for edit in edits], dtype=torch.long)[:, None].expand(-1, count)
        return self.edited_by_sample(denoiser, rows, weights, cond, guidance_scale, negative)

    def edited_by_sample(
        self,
        denoiser: FrozenDenoiser,
        rows: Tensor,
        weights: Tensor,
        cond: Condition | None = None,
        guidance_scale: float = 1.0,
        negative: Negative = None,
    ) -> Denoiser:
        """Return :meth:`edited` for directions ``rows`` (E, B) with strengths (E, T) or (E, B, T)."""
        device, null = denoiser.schedule.betas.device, denoiser.null(rows.shape[1])
        values, weights = self.values[rows].to(device), weights.to(device)  # (E, B, D)
        if self.kind == "bottleneck":
            return edited_by_shifts(denoiser.predict_eps, cond, null, values, weights, guidance_scale, negative)
        with torch.no_grad():
            directions = list(map(denoiser.conditions, values))
        return edited_by_conditions(denoiser.predict_eps, cond, null, directions, weights, guidance_scale, negative)

    def named(self) -> dict[str, Tensor]:
        """Return the directions by name, (D,) or (N,) each."""
        return {name: value.clone() for name, value in zip(self.names, self.values)}

    def save(self, path: str | Path) -> None:
        """Write the directions to a file, atomically.

        Args:
            path: ``*.safetensors``, which is also a file of textual inversion, or ``*.bin`` of the reference code for
                directions of kind token, without the header.

        Raises:
            UserError: another suffix, or a ``*.bin`` for another kind.
        """
        path = Path(path)
        if path.suffix != ".safetensors" and (path.suffix, self.kind) != (".bin", "token"):
            raise UserError(
                f"{path}: expected a file *.safetensors, or *.bin for directions of kind token, got directions of kind "
                f"{self.kind}. Correct the suffix"
            )
        record = {key: value for key, value in vars(self).items() if key != "values"}
        with atomic_write(path, "wb") as stream:
            if path.suffix == ".bin":
                torch.save(self.named(), stream)
            else:
                stream.write(save(self.named(), {_HEADER: json.dumps(record)}))

    @classmethod
    def load(cls, path: str | Path, num_tokens: int | None = None, vocabulary: int | None = None) -> DirectionSet:
        """Read directions of this package, or learned tokens in any format of others.

        Args:
            path: a file of :meth:`save`, a checkpoint of ``NoiseCLR``, its run folder, or see ``files.read_tokens``.
            num_tokens: the expected number of directions.
            vocabulary: see ``files.read_tokens``.

        Raises:
            UserError: the path is missing, damaged, or contains no directions, or another number of them.
        """
        path = Path(path).expanduser()
        path = path / DIRECTIONS_FILE if (path / DIRECTIONS_FILE).is_file() else path
        of_run = path.absolute().parent.parent / DIRECTIONS_FILE
        if path.suffix == ".ckpt" and of_run.is_file():
            found = replace(cls.load(of_run), values=read_state_dict(path)["rows"].float())
        elif record := _read_header(path):
            state, (names, shape) = read_state_dict(path), (record.pop("names"), record.pop("latent_shape"))
            values = torch.stack([state[name] for name in names])
            found = cls(values, names=tuple(names), latent_shape=shape and tuple(shape), **record)
        else:
            tokens = read_tokens(path, num_tokens, vocabulary)
            found = cls(torch.stack(list(tokens.values())).float(), "token", tuple(tokens), "tokens")
        if num_tokens not in (None, len(found)):
            raise UserError(
                f"{path}: expected {num_tokens} directions (num_tokens), got {len(found)}. Set num_tokens to "
                f"{len(found)}, or choose the file that contains {num_tokens}"
            )
        return found


def _read_header(path: Path) -> dict[str, Any] | None:
    """Return the header that :meth:`DirectionSet.save` writes; None for other and for damaged files."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(str(path), "pt") as file:
        return json.loads((file.metadata() or {}).get(_HEADER, "null"))
    return None
