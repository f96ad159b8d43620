"""What a command line and its configs come to: decided and checked before torch is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.legacy import resolve_target
from ldm.training.cli import DEFAULT_LOGDIR, DEFAULT_SEED, Options
from ldm.training.config import COMMAND_LINE, Config, load_config, parse_overrides
from ldm.training.run_folder import Resume, resolve_resume
from ldm.training.trainer_args import TrainerSettings, translate_trainer_args
from ldm.training.validation import validate
from ldm.util import ConfigError

# Model families whose params have dis_weight and dis_loss_type.
_DISENTANGLING = ("LatentDiffusion", "DisDiff")


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
        return (self.options.name or Path(self.config.files[0]).stem) + self.options.postfix

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
    """Write -dw, -dt, --scale_lr and Trainer flags into the config."""
    content = config.content
    target = str(config.section("model").get("target", ""))
    for key, flag in (("dis_weight", "-dw"), ("dis_loss_type", "-dt")):
        value = getattr(options, key)
        if value is None:
            continue
        if not any(family in resolve_target(target) for family in _DISENTANGLING):
            raise ConfigError(f"command line: {flag} sets model.params.{key}, which {target or 'the model'} has not")
        params = content["model"].setdefault("params", {}) or {}
        content["model"]["params"] = {**params, key: value}
        config.origins[f"model.params.{key}"] = COMMAND_LINE
    if options.trainer:
        given = parse_overrides([f"{name}={value}" for name, value in options.trainer.items()])
        lightning = content.setdefault("lightning", {}) or {}
        content["lightning"] = lightning
        lightning["trainer"] = {**(lightning.get("trainer") or {}), **dict(given)}
        config.origins.update({f"lightning.trainer.{name}": COMMAND_LINE for name in options.trainer})
    if options.scale_lr is not None:
        content["lightning"] = {**config.section("lightning"), "scale_lr": options.scale_lr}


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
