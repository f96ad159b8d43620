"""Contracts between models and the code that trains, scores, edits and draws them.

A model implements a contract by having its members; there is no base class to inherit from. :func:`require` raises an
error that names the missing members.

Dimensions: B batch, U units, D width of a unit's code (absent where units are scalars), C h w the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ldm.diffusion.conditions import UnitCodes
from ldm.diffusion.samplers import Sampler
from ldm.util import UserError


@runtime_checkable
class HasRepresentation(Protocol):
    """A model whose representation of images is written after training and scored."""

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the units of a batch's images, (B, U) or (B, U, D)."""
        ...


@runtime_checkable
class Samplable(Protocol):
    """A diffusion model that turns noise into images."""

    latent_shape: tuple[int, int, int]
    num_timesteps: int

    def sample(self, x_T: Tensor, cond: Any = None, sampler: Sampler | None = None, **options: Any) -> Tensor:
        """Return a latent (B, C, h, w) for noise (B, C, h, w)."""
        ...

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in about [-1, 1] of latents (B, C, h, w)."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """A model that samples images of several sizes."""

    first_stage_key: str  # entry of a batch with the images

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the latent of images; raise a ``UserError`` for sizes that do not fit."""
        ...


@runtime_checkable
class HasAverage(Protocol):
    """A model with a moving average of its weights."""

    def ema_scope(self) -> Any:
        """Return a context manager within which the averaged weights replace the trained ones."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A model whose representation depends on the data set, such as on its vocabulary."""

    def prepare_representation(self, dataset: Any) -> None:
        """Compute what ``encode_representation`` needs of the data set."""
        ...


@runtime_checkable
class ScoredOn(Protocol):
    """A model that names the factors it is scored on (``eval_name``)."""

    eval_space: Any  # FactorSpace, or None for the data set's


@runtime_checkable
class Reconstructor(Protocol):
    """An autoencoder."""

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the reconstruction of images (B, 3, H, W), and the bottleneck's input to its loss."""
        ...


@runtime_checkable
class FirstStage(Protocol):
    """A first stage of latent diffusion: images to latents and back."""

    def encode(self, x: Tensor) -> Any:
        """Return the latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1], or their distribution."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Return images of latents."""
        ...


@runtime_checkable
class HasDirections(Protocol):
    """A model with directions of a frozen denoiser (NoiseCLR)."""

    denoiser: Any  # FrozenDenoiser
    directions: Any  # DirectionSet
    first_stage_key: str  # entry of a batch with the images


@runtime_checkable
class HasUnits(Protocol):
    """A model with units that are read from images and turned back into images (DisDiff, EncDiff)."""

    latent_unit: int
    latent_shape: tuple[int, int, int]
    unit_names: list[str] | None

    def encode_units(self, images: Tensor) -> Tensor:
        """Return the codes (B, U) or (B, U, D) of images (B, 3, H, W) in [-1, 1]."""
        ...

    def decode_units(
        self, codes: Tensor, x_T: Tensor, sampler: Sampler | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of codes and noise (B, C, h, w).

        ``only`` (B,) int64 uses one unit alone in each sample; ``None`` uses all.
        """
        ...


@runtime_checkable
class Editable(Protocol):
    """A model that samples from one text per unit (CLIP-DisDiff)."""

    latent_unit: int
    latent_shape: tuple[int, int, int]

    def sample_edit(
        self,
        texts: Sequence[Sequence[str]],
        x_T: Tensor,
        sampler: Sampler | None = None,
        guidance_scale: float = 1.0,
        only: Tensor | None = None,
    ) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of U strings per sample and noise (B, C, h, w)."""
        ...


@runtime_checkable
class ScoresSamples(Protocol):
    """A callback that scores samples after the test pass, and needs no representation of the test data."""

    scores_samples: bool


@runtime_checkable
class ChecksRun(Protocol):
    """A callback that checks before training whether it can do its part."""

    def check_run(self, data: Any, model: Any) -> None:
        """Raise a ``UserError`` or ``ConfigError`` if not; ``data`` is the ``DataModuleFromConfig`` of the run."""
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """A text encoder."""

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return the tokens (B, S) of texts; raise a ``UserError`` for words that are not in a closed vocabulary."""
        ...


@runtime_checkable
class ChecksData(Protocol):
    """A model that is trained on attributes of data."""

    def check_data(self, data: Any) -> None:
        """Raise a ``UserError`` if a data set, or that of a loader, has other attributes or words than the model."""
        ...


@runtime_checkable
class HasAttributes(Protocol):
    """A data set with attributes (see the methods of ``ldm.data.dataset.ImageDataset``)."""

    rows: Any  # (n,) int64, the row of each position
    vocabulary: Any  # AttributeVocabulary
    holdout: float  # share of the combinations that the training split does not contain
    images: Callable[[Any], Any]  # rows (n,) -> (n, H, W, 3) uint8
    attribute_values: Callable[[Any], Any]  # rows (n,) -> values (n, U) int64
    rows_of: Callable[..., Any]  # (split, limit) -> rows (n,)
    is_unseen: Callable[[Any], Any]  # values (n, U) -> (n,) bool, whether the combination was held out


@runtime_checkable
class SampledFromTexts(Protocol):
    """A diffusion model that is sampled from one text per image."""

    latent_shape: tuple[int, int, int]

    def condition_from_texts(self, texts: Sequence[str]) -> Any:
        """Return the condition of B texts."""
        ...

    def sample(self, x_T: Tensor, cond: Any = None, sampler: Sampler | None = None, **options: Any) -> Tensor: ...

    def decode_first_stage(self, z: Tensor) -> Tensor: ...


@runtime_checkable
class HasJointSpace(Protocol):
    """A model conditioned on vectors of a joint space of images and texts (CLIP-guided DDPM)."""

    embeds_images: bool  # whether it has the network that maps images there

    def joint_embeddings(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return vectors (N, D) of images (N, 3, H, W) in [-1, 1] and (M, D) of texts."""
        ...

    def condition_from_images(self, images: Tensor) -> Any:
        """Return the condition of images (N, 3, H, W) in [-1, 1]."""
        ...


@runtime_checkable
class GuidedByTexts(Protocol):
    """A model that samples texts under several strengths of the guidance (CLIP-guided DDPM)."""

    def sample_w(self, conditions: Sequence[str], strengths: Sequence[float], *options: Any) -> Any:
        """Return images (W N, 3, H, W) of N texts under W strengths, strength first, and states of time steps."""
        ...


@runtime_checkable
class ConditionStage(Protocol):
    """A condition stage that takes texts: models with it are sampled from texts and guided."""

    takes_texts: bool

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the condition (B, S, D) or (B, D) of B texts."""
        ...

    def unconditional(self, count: int) -> Tensor:
        """Return the condition of ``count`` samples for the empty text."""
        ...


@runtime_checkable
class ClassStage(Protocol):
    """A condition stage that takes class numbers."""

    takes_classes: bool
    num_classes: int
    null_class: int  # the class that stands for no class

    def encode_classes(self, labels: Tensor) -> Tensor:
        """Return the condition (B, S, D) or (B, D) of labels (B,) int64."""
        ...

    def unconditional(self, count: int) -> Tensor:
        """Return the condition of ``count`` samples without a class."""
        ...


@runtime_checkable
class LabelStage(Protocol):
    """A condition stage that reads class labels from a batch and checks them."""

    def labels_of(self, batch: Any, key: str | None = None) -> Tensor:
        """Return the labels (B,) int64 in an entry of a batch; raise a ``UserError`` for invalid ones."""
        ...


@runtime_checkable
class UnitMethod(Protocol):
    """Members that a subclass of ``UnitDiffusion`` implements."""

    def dis_loss(self, x_t: Tensor, t: Tensor, out: Any, cond: UnitCodes, unit: Tensor | None = None) -> Tensor:
        """Return the disentangling loss of each sample, weight included, (b,) with b = min(B, dis_batch_size).

        Args:
            x_t: (B, C, h, w) noisy latent.
            t: (B,) time steps.
            out: ``ShiftOutput`` at x_t: base prediction and sub-gradients.
            cond: codes of the units.
            unit: (B,) the unit whose sub-gradient the loss isolates; drawn if ``None``.
        """
        ...

    def encode_representation(self, batch: Mapping[str, Any]) -> Tensor: ...

    def unit_captions(self, batch: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """Return captions for pictures: of each unit of the first sample, and of each sample (or an empty list)."""
        ...


@runtime_checkable
class ShiftNetwork(Protocol):
    """A denoiser with one sub-gradient per unit (``openaimodel_shift.UNetModel``)."""

    latent_unit: int
    repre_emb_channels: int
    is_separate: bool
    init_shift_from_base: bool

    @property
    def base_scale(self) -> Tensor | None:
        """Scale of the latents the base model was trained on, if its checkpoint had one."""
        ...

    def base_prediction(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Return the prediction of the frozen network alone."""
        ...

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Return what the optimizer trains."""
        ...

    def copy_base_to_shift(self) -> None:
        """Start the sub-gradient decoder from the frozen decoder's weights."""
        ...


@runtime_checkable
class TokenEncoder(Protocol):
    """EncDiff's encoder: images -> scalars -> one token per scalar (``openaimodel_enc.Encoder4``)."""

    latent_unit: int
    context_dim: int

    def encoding(self, x: Tensor) -> Tensor:
        """Return the scalars (B, U) of images (B, 3, H, W)."""
        ...

    def warp(self, codes: Tensor) -> Tensor:
        """Return the tokens (B, U * D) of scalars (B, U)."""
        ...


@runtime_checkable
class TokenNetwork(Protocol):
    """A U-Net that attends to U tokens (``openaimodel_enc.UNetModel``)."""

    latent_unit: int


@runtime_checkable
class ImageEncoder(Protocol):
    """DisDiff's encoder: images (B, 3, H, W) -> codes (B, ``latent_dim``)."""

    latent_dim: int

    def mean_code(self, x: Tensor) -> Tensor:
        """Return the codes of images; their means if the encoder draws them."""
        ...


@runtime_checkable
class VariationalEncoder(Protocol):
    """An image encoder that draws its codes (``Encoder4_vae``)."""

    def kl_loss(self, num_units: int) -> Tensor:
        """Return the divergence of the last batch's codes from a standard normal distribution, ()."""
        ...


def missing_members(candidate: object, contract: type) -> list[str]:
    """Return the names of a contract's members that an object lacks, sorted."""
    members = {*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))}
    return sorted(name for name in members if not hasattr(candidate, name))


def require(candidate: object, contract: type, purpose: str, error: type[Exception] = UserError) -> None:
    """Raise an error that names the members an object lacks.

    Args:
        candidate: the model or module.
        contract: one of the protocols of this module.
        purpose: what the contract is needed for; begins the message.
        error: type of the error; constructors raise ``ConfigError``.
    """
    missing = missing_members(candidate, contract)
    if missing:
        expected = (contract.__doc__ or contract.__name__).partition("\n")[0].rstrip(".").replace("``", "")
        kind = type(candidate)
        raise error(
            f"{purpose}: expected {expected[0].lower()}{expected[1:]}, got {kind.__module__}.{kind.__name__}, which "
            f"lacks {', '.join(missing)}. See ldm.models.contracts.{contract.__name__}"
        )
