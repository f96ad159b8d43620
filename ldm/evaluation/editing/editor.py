"""Adapter of models to edits of texts, and the check that an edit score can be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.data.collate import collate
from ldm.data.options import require_choice
from ldm.data.traits import unwrap, vocabulary_of
from ldm.data.vocabulary import AttributeVocabulary
from ldm.diffusion.samplers import Sampler
from ldm.evaluation.editing.measure import Editor
from ldm.models.contracts import Editable, HasAttributes, SampledFromTexts, missing_members, require
from ldm.models.judge import AttributeJudge
from ldm.util import ConfigError, UserError


def build_editor(model: nn.Module, vocabulary: AttributeVocabulary, sampler: Sampler, guidance_scale: float) -> Editor:
    """Return a function that samples images of U texts each.

    A model that is sampled from one text gets the U texts as a caption, and classifier-free guidance.
    """

    def from_captions(texts: list[list[str]], x_T: Tensor) -> Tensor:
        cond = model.condition_from_texts([vocabulary.caption(strings) for strings in texts])
        return model.decode_first_stage(model.sample(x_T, cond, sampler, guidance_scale=guidance_scale))

    def from_units(texts: list[list[str]], x_T: Tensor) -> Tensor:
        return model.sample_edit(texts, x_T, sampler, guidance_scale)

    return from_captions if missing_members(model, Editable) else from_units


def check_needs(dataset: object, model: nn.Module, judge: AttributeJudge, ordered: Mapping[str, Sequence[str]]) -> None:
    """Check that the edit score of a model can be computed.

    Args:
        dataset: the test data set.
        model: the model.
        judge: the judge.
        ordered: attribute -> its words in their order.

    Raises:
        UserError: the data set has no words or too few images, the judge is one of other attributes or of images of
            another size, or the model does not take one text per attribute.
        ConfigError: ``ordered`` contains other attributes or words than those of the data set.
    """
    vocabulary = judged_vocabulary(dataset, judge, "edit score")
    unwrap(dataset).rows_of("validation")  # raises if there are too few images
    known = dict(zip(vocabulary.factor_names, vocabulary.words))
    for attribute, order in ordered.items():
        require_choice("EditScore.ordered", attribute, known)
        if sorted(order) != sorted(known[attribute]):
            raise ConfigError(
                f"EditScore.ordered.{attribute}: expected the words {', '.join(known[attribute])} in their order, got "
                f"{', '.join(map(str, order))}."
            )
    _check_model(model, vocabulary, type(unwrap(dataset)).__name__)


def judged_vocabulary(dataset: Any, judge: AttributeJudge, score: str) -> AttributeVocabulary:
    """Return the words of a test data set whose attributes a judge predicts.

    Raises:
        UserError: the data set has no words, or the judge is one of other attributes or image sizes; the message begins
            with ``score``.
    """
    vocabulary, name = vocabulary_of(dataset), type(unwrap(dataset)).__name__
    if vocabulary is None:
        raise UserError(
            f"{score}: expected a test data set with a vocabulary, got {name}. Set data.params.test to a data set with "
            "words, or remove the callback of the score from lightning.callbacks"
        )
    require(unwrap(dataset), HasAttributes, score)
    check_judge(judge, vocabulary, f"{score}: expected a judge of the attributes of the test data set {name}")
    judge.get_input(collate([dataset[0]]))  # raises if the sizes differ
    return vocabulary


def check_judge(judge: AttributeJudge, vocabulary: AttributeVocabulary, expectation: str) -> None:
    """Raise a ``UserError``, which begins with ``expectation``, if a judge has other attributes, values or words."""
    sizes = [len(of_value) for of_value in vocabulary.value_to_word]
    own, expected = _attributes(judge.names, judge.sizes), _attributes(vocabulary.factor_names, sizes)
    words = vocabulary.words if judge.vocabulary is None else judge.vocabulary.words
    if own == expected and words != vocabulary.words:
        own, expected = f"the words {words}", f"the words {vocabulary.words}"
    if own != expected:
        raise UserError(
            f"{expectation}, {expected}; got {own}. Train a judge on this data set (configs/quickstart/judge.yaml)"
        )


def _attributes(names: Sequence[str], sizes: Sequence[int]) -> str:
    return ", ".join(f"{name} ({size} values)" for name, size in zip(names, sizes))


def _check_model(model: nn.Module, vocabulary: AttributeVocabulary, name: str) -> None:
    if not missing_members(model, Editable):
        if model.latent_unit != vocabulary.num_units:
            raise UserError(
                f"edit score: expected one unit per attribute, got latent_unit {model.latent_unit} and "
                f"{vocabulary.num_units} attributes of the test data set {name}. Make them match"
            )
    elif missing_members(model, SampledFromTexts):
        require(model, Editable, "edit score")
    else:
        phrases = [vocabulary.phrases(k, 0)[0] for k in range(vocabulary.num_units)]
        model.condition_from_texts([vocabulary.caption(phrases)])  # raises without an encoder of such texts
