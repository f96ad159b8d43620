"""Sets of directions, and their files.

A file is ``*.safetensors`` with one tensor per direction, by name, and in its header the kind, the names, the finder,
and the fingerprint and latent shape of the denoiser that the directions belong to. Files of learned tokens of others
(see ``files.py``) contain no fingerprint.

Legend: K directions, D width of a row, N features of the bottleneck.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.diffusion.conditions import Condition
from ldm.diffusion.directions import Edit, Negative, edited_by_conditions, edited_by_shifts, step_weights
from ldm.diffusion.samplers import Denoiser, Sampler
from ldm.models.diffusion.methods.noiseclr.denoiser import FrozenDenoiser
from ldm.models.diffusion.methods.noiseclr.files import read_tokens, token_names, write_tokens
from ldm.modules.weights import read_state_dict
from ldm.util import UserError, atomic_write

KINDS = ("token", "condition", "bottleneck")
DIRECTIONS_FILE = "directions.safetensors"  # in the folder of a run
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
        """Return directions of a denoiser; without names, they are named as tokens."""
        given = tuple(names) or token_names(len(values))
        values = values.detach().float().cpu().contiguous()
        return cls(values, kind, given, finder, denoiser.fingerprint(), tuple(denoiser.latent_shape))

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
        if self.kind in ("token", "condition") and (self.kind, self.values.shape[1]) != (
            denoiser.row_space,
            denoiser.row_width,
        ):
            raise UserError(
                f"{where}: expected directions of kind {denoiser.row_space} and width {denoiser.row_width}, got "
                f"{self.kind} and {self.values.shape[1]}. Use directions of this model, or set row_space"
            )
        if self.latent_shape not in (None, tuple(denoiser.latent_shape)):
            raise UserError(
                f"{where}: expected directions for latents of shape {tuple(denoiser.latent_shape)}, got "
                f"{self.latent_shape}. Use directions that were found with this model"
            )
        if self.fingerprint not in (None, denoiser.fingerprint()):
            raise UserError(
                f"{where}: expected directions of the model with fingerprint {denoiser.fingerprint()}, got those of "
                f"{self.fingerprint}. Use the model that they were found with, or find directions of this one"
            )

    def edited(
        self,
        denoiser: FrozenDenoiser,
        edits: Sequence[Edit],
        sampler: Sampler,
        count: int,
        cond: Condition | None = None,
        guidance_scale: float = 1.0,
        negative: Negative = None,
        weights: Tensor | None = None,
    ) -> Denoiser:
        """Return the function for a sampler that predicts the noise in ``count`` samples under edits.

        Args:
            denoiser: the denoiser that the directions belong to.
            edits: the edits, applied together.
            sampler: the sampler that is going to call the function.
            count: B.
            cond, guidance_scale, negative: see ``edited_by_conditions``.
            weights: (E, B, T) strengths that differ between samples, in place of those of the edits.
        """
        device = denoiser.schedule.betas.device
        num_timesteps = denoiser.schedule.num_timesteps
        if weights is None:
            weights = step_weights(edits, sampler.timesteps(num_timesteps), num_timesteps)
        weights, null = weights.to(device), denoiser.null(count)
        values = self.values[[edit.direction for edit in edits]].to(device)
        options = {"guidance_scale": guidance_scale, "negative": negative}
        if self.kind == "bottleneck":
            return edited_by_shifts(denoiser.predict_eps, cond, null, values, weights, **options)
        with torch.no_grad():
            directions = [denoiser.conditions(row[None].expand(count, -1)) for row in values]
        return edited_by_conditions(denoiser.predict_eps, cond, null, directions, weights, **options)

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
        if path.suffix == ".bin" and self.kind == "token":
            write_tokens(path, self.named())
        elif path.suffix == ".safetensors":
            record = {key: value for key, value in vars(self).items() if key != "values"}
            with atomic_write(path, "wb") as stream:
                stream.write(save(self.named(), {_HEADER: json.dumps(record)}))
        else:
            raise UserError(
                f"{path}: expected a file *.safetensors, or *.bin for directions of kind token, got directions of kind "
                f"{self.kind}. Correct the suffix"
            )

    @classmethod
    def load(cls, path: str | Path, num_tokens: int | None = None, vocabulary: int | None = None) -> DirectionSet:
        """Read directions of this package, or learned tokens in any format of others.

        Args:
            path: a file written by :meth:`save`, a checkpoint of ``NoiseCLR``, the folder of its run, or see
                ``files.read_tokens``.
            num_tokens: the expected number of directions.
            vocabulary: see ``files.read_tokens``.

        Raises:
            UserError: the path is missing, damaged, or contains no directions, or another number of them.
        """
        path = Path(path).expanduser()
        found = cls._of_this_package(path)
        if found is None:
            tokens = read_tokens(path, num_tokens, vocabulary)
            return cls(torch.stack(list(tokens.values())).float(), "token", tuple(tokens), "tokens")
        if num_tokens not in (None, len(found)):
            raise UserError(
                f"{path}: expected {num_tokens} directions (num_tokens), got {len(found)}. Correct num_tokens"
            )
        return found

    @classmethod
    def _of_this_package(cls, path: Path) -> DirectionSet | None:
        """Return the directions of a file, a run folder or a checkpoint; None for formats of others."""
        if (path / DIRECTIONS_FILE).is_file():
            return cls._of_this_package(path / DIRECTIONS_FILE)
        if path.suffix == ".ckpt" and path.parents[1].joinpath(DIRECTIONS_FILE).is_file():
            newest = cls.load(path.parents[1])
            return replace(newest, values=read_state_dict(path)["rows"].float())
        if path.suffix != ".safetensors" or not path.is_file():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                header = (file.metadata() or {}).get(_HEADER)
                record = None if header is None else json.loads(header)
                values = [file.get_tensor(name) for name in record["names"]] if record else []
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path}: expected a .safetensors file of directions, got a damaged one ({error}). Copy it again"
            ) from error
        if record is None:
            return None
        shape, names = record["latent_shape"], tuple(record["names"])
        options = record["kind"], names, record["finder"], record["fingerprint"], shape and tuple(shape)
        return cls(torch.stack(values), *options)
