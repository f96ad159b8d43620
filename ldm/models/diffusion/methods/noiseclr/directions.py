"""Sets of directions, and their files.

A file is ``*.safetensors`` with the tensor ``values`` and, in its header, the kind, the names, the finder, and the
fingerprint and latent shape of the denoiser that the directions belong to. Files of learned tokens (``*.bin``, as the
reference code and textual inversion write them) contain no fingerprint.

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
from ldm.util import UserError, atomic_write

KINDS = ("token", "condition", "bottleneck")
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

    def save(self, path: str | Path) -> None:
        """Write the directions to a ``.safetensors`` file, atomically."""
        record = {key: value for key, value in vars(self).items() if key != "values"}
        with atomic_write(Path(path), "wb") as stream:
            stream.write(save({"values": self.values}, {_HEADER: json.dumps(record)}))

    @classmethod
    def load(cls, path: str | Path) -> DirectionSet:
        """Read a file written by :meth:`save`.

        Raises:
            UserError: the file is missing, damaged, or contains no directions.
        """
        try:
            with safe_open(str(path), "pt") as file:
                record = json.loads((file.metadata() or {})[_HEADER])
                values = file.get_tensor("values")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{path}: expected a .safetensors file of directions, got none ({type(error).__name__}: {error}). "
                "Correct the path, or write one with scripts/load_and_save_model.py"
            ) from error
        shape = record["latent_shape"]
        names = tuple(record["names"])
        return cls(values, record["kind"], names, record["finder"], record["fingerprint"], shape and tuple(shape))


def token_names(count: int) -> tuple[str, ...]:
    """Return the placeholder tokens of the reference code: ``<t1>``, ``<t2>``, ..."""
    return tuple(f"<t{number}>" for number in range(1, count + 1))
