"""What a command line and its configs come to: decided and checked before torch is imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config.loading import COMMAND_LINE, Config, load_config, parse_overrides
from ldm.config.signatures import UnknownNameError, read_signature
from ldm.config.trainer_args import TrainerSettings, translate_trainer_args
from ldm.config.validation import validate
from ldm.legacy import translate
from ldm.runs.folder import DEFAULT_LOGDIR, Resume, resolve_resume
from ldm.training.cli import DEFAULT_SEED, Options
from ldm.util import ConfigError

logger = logging.getLogger(__name__)

_FLAGS = {"dis_weight": "-dw", "dis_loss_type": "-dt"}


@dataclass
class Plan:
    """Everything decided before torch is imported."""

    options: Options
    config: Config
    settings: TrainerSettings
    seed: int
    resume: Resume | None

    @property
    def name(self) -> str:
        """The run's name: given with -n, else the stem of the first config."""
        if self.resume is not None:
            return str(self.resume.record.get("name") or self.resume.folder.path.name)
        tokens = "" if self.options.token_num is None else f"TK{self.options.token_num}_"
        return tokens + (self.options.name or Path(self.config.files[0]).stem) + self.options.postfix

    @property
    def fingerprint(self) -> str:
        """Changes whenever the run would compute something else."""
        return self.config.fingerprint(self.seed)

    @property
    def trains_on(self) -> Mapping[str, Any]:
        """Arguments of the data module."""
        return self.config.section("data").get("params") or {}


def search_roots(options: Options) -> list[str]:
    """Return the folders where earlier runs are looked for, nearest first."""
    roots = [options.log_root]
    if options.resume:
        roots.append(str(Path(options.resume).absolute().parent))
    return list(dict.fromkeys([*roots, DEFAULT_LOGDIR]))


def make_plan(options: Options) -> Plan:
    """Load and check the config.

    Raises:
        ConfigError: the config or the flags say something that cannot be.
        UserError: a file is missing.
    """
    resume = resolve_resume(options.resume) if options.resume else None
    files = [*(resume.configs if resume else ()), *options.base]
    will_train = options.train or resume is not None
    config = load_config(files, options.overrides, search_roots(options), allow_pending=not will_train)
    _apply_flags(config, options)
    validate(config, check_files=will_train)
    seed = options.seed
    if seed is None:
        seed = int(resume.record.get("seed", DEFAULT_SEED)) if resume else DEFAULT_SEED
    try:
        settings = translate_trainer_args(config.section("lightning").get("trainer") or {})
    except ValueError as error:
        raise ConfigError(f"lightning.trainer: {error}; devices look like 0, or 0,1 or 2") from error
    return Plan(options, config, settings, seed, resume)


def _apply_flags(config: Config, options: Options) -> None:
    """Write -dw, -dt, --token_num, --scale_lr and Trainer flags into the config."""
    content = config.content
    for key in _FLAGS:
        if getattr(options, key) is not None:
            _apply_disentangling_flag(config, key, getattr(options, key))
    if options.token_num is not None:
        _apply_token_num(config, options.token_num)
    if options.trainer:
        given = parse_overrides([f"{name}={value}" for name, value in options.trainer.items()])
        lightning = content.setdefault("lightning", {}) or {}
        content["lightning"] = lightning
        lightning["trainer"] = {**(lightning.get("trainer") or {}), **dict(given)}
        config.origins.update({f"lightning.trainer.{name}": COMMAND_LINE for name in options.trainer})
    if options.scale_lr is not None:
        content["lightning"] = {**config.section("lightning"), "scale_lr": options.scale_lr}


def _accepted(described: Any) -> set[str]:
    """Names of the arguments that the class of a ``{target, params}`` takes, old names translated."""
    if not isinstance(described, Mapping) or not isinstance(described.get("target"), str):
        return set()
    try:
        signature = read_signature(translate(described["target"], described.get("params"))[0])
    except UnknownNameError:  # the check of the whole config will tell
        return set()
    return set(signature.required) if signature else set()


def _set_param(config: Config, key: str, name: str, value: Any) -> None:
    """Write ``<key>.params.<name>`` as from the command line."""
    section = config.content
    for part in key.split("."):
        section = section[part]
    section["params"] = {**(section.get("params") or {}), name: value}
    config.origins[f"{key}.params.{name}"] = COMMAND_LINE


def _apply_disentangling_flag(config: Config, key: str, value: Any) -> None:
    """-dw or -dt, for models that have such a loss; a plain latent diffusion model goes on without, as ever."""
    model = config.section("model")
    target = str(model.get("target", ""))
    if key in _accepted(model):
        _set_param(config, "model", key, value)
    elif target.endswith(".LatentDiffusion"):
        logger.warning("%s has no effect: this model has no disentangling loss", _FLAGS[key])
    else:
        where = f"model.params.{key}, which {target or 'the model'} has not"
        raise ConfigError(f"command line: {_FLAGS[key]} sets {where}")


def _apply_token_num(config: Config, number: int) -> None:
    """--token_num: that many units, in the network and in the encoder of the condition."""
    parts = config.section("model").get("params") or {}
    unet, encoder = parts.get("unet_config"), parts.get("cond_stage_config")
    if number < 1 or "latent_unit" not in _accepted(unet):
        raise ConfigError(
            f"command line: --token_num {number} sets model.params.unet_config.params.latent_unit: it needs a network "
            "with units (openaimodel_enc.UNetModel or openaimodel_shift.UNetModel) and a number of at least 1"
        )
    _set_param(config, "model.params.unet_config", "latent_unit", number)
    if "latent_unit" in _accepted(encoder):
        _set_param(config, "model.params.cond_stage_config", "latent_unit", number)
    elif "latent_dim" in _accepted(encoder):
        sizes = unet.get("params") or {}
        width = sizes.get("context_dim") or sizes.get("repre_emb_channels", 32)
        _set_param(config, "model.params.cond_stage_config", "latent_dim", number * int(width))


def scale_learning_rate(plan: Plan, devices: int) -> tuple[float | None, str]:
    """Return the learning rate and the formula it came from.

    LDM's rule, on unless ``--scale_lr false`` or ``lightning.scale_lr: false``:
    lr = accumulate_grad_batches x devices x batch size x base_learning_rate.
    """
    base = plan.config.section("model").get("base_learning_rate")
    if base is None:
        return None, "set by the model"
    if not plan.config.section("lightning").get("scale_lr", True):
        return float(base), f"{float(base):.3g} (base_learning_rate, not scaled)"
    accumulate = int(plan.settings.arguments.get("accumulate_grad_batches") or 1)
    batch = int(plan.trains_on.get("batch_size") or 1)
    rate = accumulate * devices * batch * float(base)
    text = f"{rate:.3g} = {accumulate} (accumulate) x {devices} (devices) x {batch} (batch size) x {float(base):.3g}"
    return rate, text + " (base_learning_rate); --scale_lr false takes the base as it is"


def print_config(plan: Plan) -> None:
    """Write the resolved config to standard output."""
    sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(plan.config.content)))


def report_config(plan: Plan) -> None:
    """Say that the config is sound and what it would run."""
    model, data = plan.config.section("model"), plan.config.section("data")
    lines = [
        f"OK: {' + '.join(plan.config.files)}",
        f"  name   {plan.name}",
        f"  model  {model['target']}",
        f"  data   {data['target']}",
        f"  seed   {plan.seed}",
    ]
    lines += [f"  not there yet: {text}" for text in plan.config.pending]
    lines.append("add -t to train; --print-config shows every key")
    sys.stdout.write("\n".join(lines) + "\n")
