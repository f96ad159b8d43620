"""Which factor space a representation file belongs to: its own word, its run's config, or the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.data.factors import FactorSpace, factor_space
from ldm.scoring.files import LatentFile
from ldm.util import ConfigError, UserError

# what a data set's class is called, in ours or a reference's configs -> its factor space
_TARGET_WORDS = {
    "shapes3d": "shapes3d",
    "world": "shapes3d",
    "mpi3d": "mpi3d",
    "cars3d": "cars3d",
    "dsprites": "dsprites",
    "smallnorb": "smallnorb",
}
WORLD = "world3d"  # our twin of Shapes3D: the same factors, but other images, so scores are not compared as equals
PART = "_part"  # of a data set, a few values of some factors: scores of it are not those of the whole
_NO_VARIANT = ("path", "test", "split", "text", "phrasing", "repeat", "do_augment", "seed")  # leave the images alone


def space_of(latents: LatentFile, named: str | None = None) -> FactorSpace:
    """The factor space of a file, checked against the file's number of images.

    Args:
        latents: head of the file.
        named: name of a well-known factor space the user asks for (``-d``).

    Raises:
        UserError: no source names a space, sources disagree, or the number of images is another.
        ConfigError: ``named`` is unknown.
    """
    configured = _space_in_config(latents.run_dir)
    if named and configured and named != configured:
        raise UserError(
            f"{latents.path}: -d says {named}, but the config of this run says {configured}; leave -d away, or "
            "score the runs of each data set by themselves"
        )
    if latents.space is not None:  # says all there is to say, parts of a well-known space included
        space = _own(latents, named)
    else:
        space = _agreed(latents, named or configured, "-d" if named else "its run's config")
    if latents.shape[0] != space.size:
        raise UserError(
            f"{latents.path} holds {latents.shape[0]} images, but its factors make {_found(space)}."
            + _length_hint(latents.shape[0], space.size)
        )
    return space


def _own(latents: LatentFile, named: str | None) -> FactorSpace:
    """The space that the file itself describes; what the user asks for must have the same factors."""
    space = latents.space
    if named and factor_space(named).all_names != space.all_names:
        raise UserError(
            f"{latents.path} was encoded from a data set with the factors {', '.join(space.all_names)}, but -d says "
            f"{named}, which has {', '.join(factor_space(named).all_names)}; leave -d away"
        )
    return space


def _agreed(latents: LatentFile, name: str | None, source: str) -> FactorSpace:
    """The space both the file's own factor sizes and the name stand for."""
    if latents.factor_sizes is None:
        if name is None:
            raise UserError(
                f"{latents.path} does not say which factors its images have, and neither does a config of its run "
                "(configs/*-project.yaml); name the data set with -d, e.g. -d shapes3d"
            )
        return factor_space(name)
    if name is not None:
        space = factor_space(name)
        if latents.factor_sizes != space.factors_num_values:
            raise UserError(
                f"{latents.path} was encoded from factors of sizes {latents.factor_sizes}, but {source} says {name}, "
                f"whose sizes are {space.factors_num_values}; encode it again from the right data set"
                + (", or leave -d away" if source == "-d" else "")
            )
        return space
    names = latents.factor_names or tuple(f"factor {number}" for number in range(len(latents.factor_sizes)))
    try:
        return FactorSpace(names, latents.factor_sizes)
    except ConfigError as err:
        raise UserError(f"{latents.path}: {err}; encode that checkpoint again") from err


def _found(space: FactorSpace) -> str:
    sizes = " x ".join(str(size) for size in space.all_sizes)
    return f"{space.size} ({sizes}: {', '.join(space.all_names)})"


def _length_hint(found: int, expected: int) -> str:
    if found > expected and found % expected == 0:
        return (
            f" That is every image {found // expected} times: encode the test set without repeats "
            "(data.params.test.params.test: true)."
        )
    return (
        " Encode the whole data set in order, each image once (no limit, split or shuffling in data.params.test); for "
        "fewer images keep some values of the factors: data.params.test.params.keep.shape=2."
    )


def saved_configs(run_dir: Path) -> Iterator[object]:
    """Contents of ``configs/*-project.yaml``, that of the newest start first.

    Raises:
        UserError: a file is no YAML.
    """
    for path in sorted((run_dir / "configs").glob("*-project.yaml"), reverse=True):
        try:
            yield yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as err:
            raise UserError(f"{path} is no YAML file ({' '.join(str(err).split())}); restore or delete it") from err


def _space_in_config(run_dir: Path) -> str | None:
    """Name of the factor space of the data set that a run's saved config encodes, if it is a known one."""
    for config in saved_configs(run_dir):
        name = _space_of_target(str(dataset_config(config).get("target", "")))
        if name:
            return name
    return None


def _space_of_target(target: str) -> str | None:
    words = (name for word, name in _TARGET_WORDS.items() if word in target.lower())
    return next(words, None)


def dataset_config(config: object) -> dict[str, Any]:
    """``data.params.test`` of a config, or another split where there is no test set; empty where there is none."""
    node = config
    for key in ("data", "params"):
        node = node.get(key) if isinstance(node, dict) else None
    splits = node if isinstance(node, dict) else {}
    for split in ("test", "validation", "train"):
        dataset = splits.get(split)
        if isinstance(dataset, dict) and dataset.get("target"):
            return dataset
    return {}


def describe_dataset(run_dir: Path, space: FactorSpace, named: str | None = None) -> dict[str, Any]:
    """What is written beside scores about the data set they are of.

    Args:
        run_dir: a run; its saved config says class and options.
        space: the factors.
        named: ``-d``.

    Returns:
        ``name`` ("shapes3d", "mpi3d_toy", "world3d", ..., or None where nothing says it), ``variant`` (options that
        change the images) and ``factors`` (name -> number of values).
    """
    dataset = next((found for config in saved_configs(run_dir) if (found := dataset_config(config))), {})
    target = str(dataset.get("target", ""))
    options = dataset.get("params") if isinstance(dataset.get("params"), Mapping) else {}
    name = _space_of_target(target) or named
    if "world" in target.lower():
        name = WORLD
    elif name == "mpi3d" and target:
        name = f"mpi3d_{options.get('variant', 'toy')}"  # the references know the toy set alone
    if name and options.get("keep"):
        name += PART
    return {
        "name": name,
        "variant": {key: value for key, value in options.items() if key not in _NO_VARIANT},
        "factors": dict(zip(space.factor_names, space.factors_num_values)),
    }
