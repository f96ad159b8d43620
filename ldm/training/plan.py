"""The plan of a run: config, Trainer settings and seed, validated before torch is imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.config.loading import COMMAND_LINE, Config, load_config, parse_overrides
from ldm.config.signatures import find_signature
from ldm.config.trainer_args import TrainerSettings, translate_trainer_args
from ldm.config.validation import validate
from ldm.legacy import translate
from ldm.runs.find import Resume, resolve_resume
from ldm.runs.folder import DEFAULT_LOGDIR
from ldm.training.cli import DEFAULT_SEED, Options
from ldm.util import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """Settings of a run that do not need torch."""

    options: Options
    config: Config
    settings: TrainerSettings
    seed: int
    resume: Resume | None

    @property
    def name(self) -> str:
        """Name of the run: the one given with -n, else the stem of the first config."""
        if self.resume is not None:
            return str(self.resume.record.get("name") or self.resume.folder.path.name)
        tokens = "" if self.options.token_num is None else f"TK{self.options.token_num}_"
        return tokens + (self.options.name or Path(self.config.files[0]).stem) + self.options.postfix

    @property
    def fingerprint(self) -> str:
        """Digits that change with every setting that affects the results."""
        return self.config.fingerprint(self.seed)

    @property
    def data_params(self) -> Mapping[str, Any]:
        """Arguments of the data module."""
        return self.config.section("data").get("params") or {}


def make_plan(options: Options) -> Plan:
    """Load and validate the config.

    Raises:
        ConfigError: the config or the flags are invalid.
        UserError: a file is missing.
    """
    if options.train and options.base and Path(options.resume).suffix == ".pth":
        start = {"resume_from_checkpoint": options.resume}  # a file without a run folder: continued in a new one
        options = replace(options, resume="", trainer={**options.trainer, **start})
    resume = resolve_resume(options.resume) if options.resume else None
    files = [*(resume.configs if resume else ()), *options.base]
    will_train = options.train or resume is not None
    beside = [str(Path(options.resume).absolute().parent)] if resume else []
    roots = list(dict.fromkeys([options.log_root, *beside, DEFAULT_LOGDIR]))
    config = load_config(files, options.overrides, roots, allow_pending=not will_train, kind="config")
    _apply_flags(config, options)
    # A model alone can be validated: configs for inference have no data.
    sections = ("model", "data") if will_train or "data" in config.content else ("model",)
    validate(config, check_files=will_train, sections=sections)
    if resume is None:
        _choose_precision(config)
    earlier = resume.record if resume else {}
    seed = int(earlier.get("seed", DEFAULT_SEED)) if options.seed is None else options.seed
    lightning = config.section("lightning")
    beside_trainer = {name: lightning[name] for name in ("find_unused_parameters",) if name in lightning}
    settings = translate_trainer_args(beside_trainer | (lightning.get("trainer") or {}))
    _check_precision(config, str(settings.arguments.get("precision", "")))
    return Plan(options, config, settings, seed, resume)


def _choose_precision(config: Config) -> None:
    """Set the default precision of a new run, ``auto`` for models of this package; a resumed run keeps its own."""
    lightning = config.section("lightning")
    trainer = lightning.get("trainer") or {}
    if _is_own(config) and isinstance(trainer, Mapping) and trainer.get("precision") is None:
        config.content["lightning"] = {**lightning, "trainer": {**trainer, "precision": "auto"}}


def _is_own(config: Config) -> bool:
    """Return whether the model is one of this package."""
    return translate(str(config.section("model").get("target")))[0].startswith("ldm.")


def _check_precision(config: Config, precision: str) -> None:
    """Refuse a type of number for all weights: the models of this package convert images and schedules to float32."""
    if _is_own(config) and precision.endswith(("-true", "engine")) and precision != "32-true":
        raise config.error(
            "lightning.trainer.precision",
            f"expected auto, 32-true, bf16-mixed or 16-mixed for models of this package, got {precision}. Use "
            f"{'32-true' if precision.startswith('64') else 'bf16-mixed'}",
        )


def _apply_flags(config: Config, options: Options) -> None:
    """Write -dw, -dt, --token_num, --scale_lr and Trainer flags into the config."""
    _apply_disentangling_flag(config, "-dw", "dis_weight", options.dis_weight)
    _apply_disentangling_flag(config, "-dt", "dis_loss_type", options.dis_loss_type)
    if options.token_num is not None:
        _apply_token_num(config, options.token_num)
    lightning = dict(config.section("lightning"))
    if options.trainer:
        given = parse_overrides([f"{name}={value}" for name, value in options.trainer.items()])
        lightning["trainer"] = {**(lightning.get("trainer") or {}), **dict(given)}
        config.origins.update({f"lightning.trainer.{name}": COMMAND_LINE for name in options.trainer})
    if options.scale_lr is not None:
        lightning["scale_lr"] = options.scale_lr
    if lightning:
        config.content["lightning"] = lightning


def _accepted(described: Any) -> set[str]:
    """Return the arguments that the class of a ``{target, params}`` accepts."""
    if not isinstance(described, Mapping) or not isinstance(described.get("target"), str):
        return set()
    signature = find_signature(translate(described["target"], described.get("params"))[0])
    return set(signature.required) if signature else set()


def _set_param(config: Config, key: str, name: str, value: Any) -> None:
    """Set ``<key>.params.<name>`` from the command line."""
    section = config.content
    for part in key.split("."):
        section = section[part]
    section["params"] = {**(section.get("params") or {}), name: value}
    config.origins[f"{key}.params.{name}"] = COMMAND_LINE


def _apply_disentangling_flag(config: Config, flag: str, key: str, value: Any) -> None:
    """Apply -dw or -dt; they are ignored with a warning for a plain latent diffusion model."""
    if value is None:
        return
    model = config.section("model")
    target = str(model.get("target", ""))
    if key in _accepted(model):
        _set_param(config, "model", key, value)
    elif target.endswith(".LatentDiffusion"):
        logger.warning("%s is ignored: this model has no disentangling loss", flag)
    else:
        raise ConfigError(f"command line: {flag} sets model.params.{key}, which {target} does not accept. Omit {flag}")


def _apply_token_num(config: Config, number: int) -> None:
    """Apply --token_num: set the number of units of the network and of the encoder of the condition."""
    parts = config.section("model").get("params") or {}
    unet, encoder = parts.get("unet_config"), parts.get("cond_stage_config")
    if number < 1 or "latent_unit" not in _accepted(unet):
        raise ConfigError(
            f"command line: --token_num {number} sets model.params.unet_config.params.latent_unit: expected a number "
            "of at least 1 and a network with units (openaimodel_enc.UNetModel or openaimodel_shift.UNetModel)"
        )
    _set_param(config, "model.params.unet_config", "latent_unit", number)
    if "latent_unit" in _accepted(encoder):
        _set_param(config, "model.params.cond_stage_config", "latent_unit", number)
    elif "latent_dim" in _accepted(encoder):
        sizes = unet.get("params") or {}
        width = sizes.get("context_dim") or sizes.get("repre_emb_channels", 32)
        _set_param(config, "model.params.cond_stage_config", "latent_dim", number * int(width))


def scale_learning_rate(plan: Plan, devices: int) -> tuple[float | None, str]:
    """Return the learning rate and its formula.

    The rule of LDM, unless ``--scale_lr false`` or ``lightning.scale_lr: false``:
    lr = accumulate_grad_batches x devices x batch size x base_learning_rate.
    """
    base = plan.config.section("model").get("base_learning_rate")
    if base is None:
        return None, "set by the model"
    if not plan.config.section("lightning").get("scale_lr", True):
        return float(base), f"{float(base):.3g} (base_learning_rate, not scaled)"
    accumulate = int(plan.settings.arguments.get("accumulate_grad_batches") or 1)
    batch = int(plan.data_params.get("batch_size") or 1)
    rate = accumulate * devices * batch * float(base)
    return rate, (
        f"{rate:.3g} = {accumulate} (accumulate) x {devices} (devices) x {batch} (batch size) x {float(base):.3g} "
        "(base_learning_rate); --scale_lr false disables the scaling"
    )


def print_config(plan: Plan) -> None:
    """Write the resolved config to standard output."""
    sys.stdout.write(OmegaConf.to_yaml(OmegaConf.create(plan.config.content)))


def report_config(plan: Plan) -> None:
    """Report that the config is valid, with the main settings of the run."""
    lines = [
        f"OK: {' + '.join(plan.config.files)}",
        f"  name   {plan.name}",
        f"  model  {plan.config.section('model')['target']}",
        f"  data   {plan.config.section('data').get('target', 'none: training and testing need a `data` section')}",
        f"  seed   {plan.seed}",
        *(f"  missing: {text}" for text in plan.config.pending),
        "pass -t to train, --print-config to print all keys",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
