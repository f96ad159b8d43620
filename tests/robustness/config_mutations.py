"""Seeded mutations of configs, each with the reason if the result is a valid config.

The reasons are rules on the kind of mutation, the key and the new value; they do not use what the package accepts.
"""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[Any, ...]

# Keys without which a section describes nothing.
REQUIRED = frozenset(
    """target batch_size unet_config ddconfig lossconfig denoiser_config embed_dim n_embed
    in_channels out_channels model_channels num_res_blocks attention_resolutions ch out_ch z_channels resolution
    disc_start vocabulary warm_up_steps f_min f_max f_start cycle_lengths""".split()
)
# Kind of mutation -> (pattern of the whole dotted key, reason why the mutated config is valid).
REASONS = {
    "zero": [
        (r".*(weight|factor|dropout|decay|prob|share|holdout|eta|threshold)", "0 removes a term or disables a rule"),
        (r".*\.(disc_start|seed|min_timestep|num_workers|temperature|patience)", "counts from 0"),
        (r".*\.(limit_(val|test|predict)_batches|num_sanity_val_steps|every_n_(train_steps|epochs))", "0 is off"),
        (r".*\.(guidance\w*|strengths?|logvar_init|noise_bias|code_scale|strength)", "0 changes nothing"),
        (r".*\.(linear_start|betas)", "no noise at the first step; no momentum"),
        (r".*scheduler_config\.params\..*", "schedules have their own checks"),
    ],
    "negate": [
        (r".*\.(guidance\w*|strengths?|logvar_init|noise_bias|code_scale)", "the opposite direction"),
        (r".*scheduler_config\.params\..*", "schedules have their own checks"),
    ],
    "huge": [
        (r".*\.(every_\w+|batch_frequency|log_\w*every_\w+|max_(steps|epochs)|disc_start|patience)", "never"),
        (r"data\..*\.limit", "all images"),
        (r"lightning\.trainer\.\w*val\w*", "longer than an epoch: compared when the data are loaded"),
        (r".*scheduler_config\.params\..*", "schedules have their own checks"),
    ],
    "nan": [(r".*scheduler_config\.params\..*", "schedules have their own checks")],
    "null": [
        (r"lightning(\.(trainer|callbacks(\.\w+)?|modelcheckpoint|logger))?", "null keeps the defaults or removes"),
        (r"data\.params\.(validation|test|predict)", "no such data"),
        (r".*\.(scheduler_config|sampler|log_images_kwargs|log_config|ordered|keep|augment|gap|templates)", "optional"),
        (r".*\.(text_cfg|vision_cfg|text_encoder|image_encoder|cond_stage_config|vocabulary_config)", "optional"),
        (r".*\.params", "the defaults of all parameters, where none is required"),
    ],
    "number to list": [
        (r".*\.(image_size|resolution|num_res_blocks|guidance_scale)", "one entry for each axis or level")
    ],
    "rename": [
        (r"lightning\.callbacks\.\w+", "names of callbacks are free"),
        (r".*\.(templates|keep|ordered|bins|several|kwargs)\..*", "names of the data's attributes"),
    ],
    "delete": [
        (r"lightning\.callbacks\.(image_logger|learning_rate_logger|cuda_callback)\.target", "a callback of every run"),
        (r".*\.(context_dim|vocabulary|resolution)", "derived"),
    ],
    "unknown run": [(r".*", "reported as missing: earlier stages may be trained later")],
}


@dataclass(frozen=True)
class Mutation:
    """A mutated config: the kind of mutation, the dotted key, a word expected in the message, the reason if valid."""

    kind: str
    key: str
    word: str
    content: dict[str, Any]
    reason: str | None

    def __str__(self) -> str:
        return f"{self.kind} at {self.key} ({self.word})"


def leaves(content: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of every entry of nested mappings; lists are values, except lists of mappings."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    for name, value in items:
        yield (*path, name), value
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            yield from leaves(value, (*path, name))


def at(content: Any, path: Path) -> Any:
    """Return the value at a path."""
    for name in path:
        content = content[name]
    return content


def misspell(word: str, rng: random.Random) -> str:
    """Return a word with one letter doubled, left out, or exchanged with its neighbour; never the same word."""
    place = rng.randrange(len(word))
    slips = [word[:place] + word[place] + word[place:], word[:place] + word[place + 1 :]]
    slips.append(word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :])
    return rng.choice([slip for slip in slips if slip and slip != word])


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(value: Any) -> bool:
    return is_number(value) or (isinstance(value, list) and bool(value) and all(map(is_number, value)))


def change(value: Any, function: Any) -> Any:
    """Apply a function to a number, or to the first number of a list."""
    return [function(value[0]), *value[1:]] if isinstance(value, list) else function(value)


def first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


NEW_VALUES = {  # kind -> (whether it applies to a value, the new value)
    "negate": (lambda v: numbers(v) and first(v) > 0, lambda v, r: change(v, lambda n: -n)),
    "zero": (lambda v: numbers(v) and first(v) != 0, lambda v, r: change(v, lambda n: 0)),
    "huge": (lambda v: numbers(v) and abs(first(v)) > 1e-3, lambda v, r: change(v, lambda n: n * 10**9)),
    "nan": (numbers, lambda v, r: change(v, lambda n: math.nan)),
    "number to text": (is_number, lambda v, r: r.choice(["abc", "1O", "many"])),
    "number to list": (is_number, lambda v, r: [v, v]),
    "number to mapping": (is_number, lambda v, r: {"value": v}),
    "bool to number": (lambda v: isinstance(v, bool), lambda v, r: r.choice([3, -1, 0.5])),
    "bool to text": (lambda v: isinstance(v, bool), lambda v, r: "maybe"),
    "text to number": (lambda v: isinstance(v, str), lambda v, r: 7),
    "text to list": (lambda v: isinstance(v, str), lambda v, r: [[v]]),
    "null": (lambda v: isinstance(v, Mapping), lambda v, r: None),
    "section to text": (lambda v: isinstance(v, Mapping) and bool(v), lambda v, r: "section"),
    "section to list": (lambda v: isinstance(v, Mapping) and bool(v), lambda v, r: [v]),
}
MOVES = ("rename", "delete", "misspell target", "misspell sibling", "duplicate section", "move up", "unknown run")


def reason_for(kind: str, key: str, old: Any, new: Any) -> str | None:
    """Return why a mutated config is valid, None if it must be refused."""
    found = next((reason for pattern, reason in REASONS.get(kind, ()) if re.fullmatch(pattern, key)), None)
    number = first(new)
    if kind == "huge" and found is None and re.fullmatch(r".*(weight|factor|scale|bias|strength\w*)", key):
        return "a large weight" if number <= 1e6 else None
    if kind == "huge" and key.endswith("seed"):
        return "another seed" if number < 2**32 else None
    if kind == "negate" and first(old) == 1 and key.endswith(("save_top_k", "max_steps", "max_epochs", "limit")):
        return "-1 means all"
    if kind == "text to number" and key.endswith(".version"):
        return None
    return found


def mutate(content: dict[str, Any], rng: random.Random) -> Mutation | None:
    """Return one mutation of a config; None if the drawn kind does not apply to it."""
    kind = rng.choice([*NEW_VALUES, *MOVES])
    content = copy.deepcopy(content)
    entries = list(leaves(content))
    if kind in NEW_VALUES:
        applies, renew = NEW_VALUES[kind]
        chosen = [(path, value) for path, value in entries if applies(value) and path[-1] not in ("fingerprint",)]
        if not chosen:
            return None
        path, old = rng.choice(chosen)
        at(content, path[:-1])[path[-1]] = new = renew(old, rng)
        key = ".".join(map(str, path))
        return Mutation(kind, key, str(path[-1]), content, reason_for(kind, key, old, new))
    return _move(kind, content, entries, rng)


def _move(kind: str, content: dict[str, Any], entries: list[tuple[Path, Any]], rng: random.Random) -> Mutation | None:
    chosen = [path for path, value in entries if isinstance(path[-1], str) and _applies(kind, path, value)]
    if not chosen:
        return None
    path = rng.choice(chosen)
    above, name = at(content, path[:-1]), path[-1]
    key, word = ".".join(map(str, path)), name
    if kind in ("rename", "misspell sibling"):
        word = misspell(name, rng)
        if word in above:
            return None
        above[word] = above.pop(name)
        word = word if kind == "rename" else name
        if kind == "rename" and name in ("target", "params"):
            kind = "misspell sibling"
    elif kind == "delete":
        del above[name]
    elif kind == "misspell target":
        module, _, last = above[name].rpartition(".")
        above[name] = word = f"{module}.{misspell(last, rng)}"
    elif kind == "unknown run":
        above[name] = "${last_ckpt:no_such_run}"
    else:
        place = at(content, path[:-2])
        if name in place:
            return None
        place[name] = copy.deepcopy(above[name]) if kind == "duplicate section" else above.pop(name)
    return Mutation(kind, key, word, content, reason_for(kind, key, None, None))


def _applies(kind: str, path: Path, value: Any) -> bool:
    name = path[-1]
    if kind == "misspell target":
        return name == "target"
    if kind == "misspell sibling":
        return name in ("target", "params")
    if kind == "unknown run":
        return name == "ckpt_path"
    if kind == "delete":
        return name in REQUIRED and path[:2] != ("data", "fingerprint")
    if kind == "duplicate section":
        return isinstance(value, Mapping) and len(path) > 2
    return len(path) > (1 if kind == "move up" else 0) and len(name) > 1
