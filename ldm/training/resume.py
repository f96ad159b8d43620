"""Settings that a resumed run changes: those of optimizers, schedules and the moving average apply to its state."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import LambdaLR

from ldm.lr_scheduler import FACTORS
from ldm.runs.checkpoint_io import read_checkpoint
from ldm.training.plan import Plan
from ldm.util import UserError

logger = logging.getLogger(__name__)

_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")  # of an optimizer: the results are equal
_ADVICE = "Undo the change, or start a run from its weights: python main.py --base CONFIG -t model.params.ckpt_path="
_DEFAULT = "the default"
_UNLISTED = ("model.base_learning_rate", "lightning.callbacks", "lightning.logger", "lightning.modelcheckpoint")
_UNLISTED += ("lightning.trainer.max_steps", "lightning.trainer.max_epochs")
# Arguments of a model that change the meaning of its weights.
_MEANING = ("parameterization", "timesteps", "linear_start", "linear_end", "cosine_s", "beta_schedule", "given_betas")
_MEANING = tuple(f"model.params.{name}" for name in (*_MEANING, "conditioning_key", "first_stage_config"))


class ChangedSettings(Callback):
    """Applies settings that were changed since the checkpoint of a resumed run, and logs them.

    Lightning restores the settings of optimizers and schedules together with their state. A setting is changed if it
    differs from the one that the earlier part of the run started with; others keep the value of the checkpoint.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._settings: list[list[dict[str, Any]]] = []
        self._earlier: list[list[dict[str, Any]]] | None = None
        self._checkpoint: dict[str, Any] = {}
        self._decays: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that the optimizers started with."""
        return {"optimizers": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the settings of the earlier part of the run."""
        self._earlier = state_dict["optimizers"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the decays of moving averages, which are buffers, before a checkpoint is loaded."""
        self._decays = {name: x.item() for name, x in pl_module.named_buffers() if name.endswith("model_ema.decay")}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report changes; keep the checkpoint, whose optimizer states are restored after ``on_fit_start``."""
        _report_changes(checkpoint, self._plan, type(pl_module), str(trainer.ckpt_path))
        if trainer.training:
            _report_end(checkpoint, self._plan, {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs})
        self._checkpoint = checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the settings in the loaded states, which Lightning restores after this hook."""
        self._settings = [[_settings(group) for group in each.param_groups] for each in trainer.optimizers]
        changes: dict[str, None] = {}
        saved = [state["param_groups"] for state in self._checkpoint.get("optimizer_states", ())]
        earlier = self._earlier or [[_settings(group) for group in groups] for groups in saved]
        for index, (optimizer, before_of, groups) in enumerate(zip(trainer.optimizers, earlier, saved)):
            for own, before, group in zip(optimizer.param_groups, before_of, groups):
                for name, value in _change(own, before, group):
                    changes[f"{name} of optimizer {index}: {before[name]!r} is now {value!r}"] = None
        for each, state in zip(trainer.lr_scheduler_configs, self._checkpoint.get("lr_schedulers", ())):
            if "base_lrs" in state:
                state["base_lrs"] = list(each.scheduler.base_lrs)
            if isinstance(each.scheduler, LambdaLR) and "lr_lambdas" in state:
                pairs = list(zip(each.scheduler.lr_lambdas, state["lr_lambdas"]))
                if any(old and {**vars(factor), **old} != {**old, **vars(factor)} for factor, old in pairs):
                    changes["the schedule of the learning rate"] = None
                state["lr_lambdas"] = [None if isinstance(factor, FACTORS) else old for factor, old in pairs]
        if changes:
            logger.info("changed since the checkpoint, applied from here on: %s", "; ".join(changes))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rates of the schedules at this step; warn if they stay 0."""
        has_schedule = bool(self._checkpoint.get("lr_schedulers"))
        for each in trainer.lr_scheduler_configs:
            schedule = each.scheduler
            if not isinstance(schedule, LambdaLR) or not all(isinstance(f, FACTORS) for f in schedule.lr_lambdas):
                continue
            if self._checkpoint and not has_schedule:
                schedule.last_epoch = trainer.global_step if each.interval == "step" else trainer.current_epoch
            rates = [
                [base * f(schedule.last_epoch + n) for base, f in zip(schedule.base_lrs, schedule.lr_lambdas)]
                for n in (0, 1)
            ]
            schedule._last_lr = rates[0]
            for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, rates[0]):
                group.update(initial_lr=base, lr=rate)
            if not any(map(any, rates)):
                logger.warning(
                    "the learning rate is 0 from step %d on: the schedule has ended. Set a longer one "
                    "(model.params.scheduler_config.params)",
                    schedule.last_epoch,
                )
        for name, value in pl_module.named_buffers():
            if self._checkpoint and name in self._decays and value != self._decays[name]:
                value.fill_(self._decays[name])
                logger.info("changed since the checkpoint, applied from here on: %s is now %.6g", name, value)
        self._checkpoint = {}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group, with the learning rate before its schedule is applied."""
    plain = {name: x for name, x in group.items() if x is None or isinstance(x, (bool, int, float, str, tuple))}
    rate = group.get("initial_lr", group.get("lr"))
    return {name: x for name, x in {**plain, "lr": rate}.items() if name not in (*_IMPLEMENTATION, "initial_lr")}


def _change(own: Mapping[str, Any], before: Mapping[str, Any], group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Change the settings of a saved group to those of the config, if they differ from before; yield the changes."""
    is_scheduled, was_scheduled = "initial_lr" in own, "initial_lr" in group
    for name, value in _settings(own).items():
        if before.get(name, value) != value:
            yield name, value
            scale = value / before[name] if name == "lr" and is_scheduled and was_scheduled and before[name] else None
            group[name] = value if scale is None else group[name] * scale
    if is_scheduled:
        group["initial_lr"] = own["initial_lr"]
    elif was_scheduled:
        group["lr"] = own["lr"]
        del group["initial_lr"]


def explain_misfit(error: Exception, path: str, config: Any) -> UserError:
    """Return one line for weights of a checkpoint that do not fit the model.

    Args:
        error: raised by torch.
        path: the checkpoint.
        config: the ``model`` section of the run.
    """
    first, *rest = str(error).splitlines()
    earlier = read_checkpoint(path).get("run", {}).get("config", {}).get("model")
    found_changes = _differences(earlier, config, "model")
    changes = [f"{key}: expected {old}, got {new}" for key, old, new in found_changes if ".scheduler_config" not in key]
    shown = f" Changed since it was written: {'; '.join(changes[:4])}." if earlier and changes else ""
    found = rest[0].strip() if rest else first
    found = found if len(found) < 160 else f"{found[:160]}..."
    return UserError(f"{path}: expected the weights of this model, got others ({found}).{shown} {_ADVICE}{path}")


def _report_changes(checkpoint: Mapping[str, Any], plan: Plan, model: type, path: str) -> None:
    """Log what differs from the config of a checkpoint; raise ``UserError`` for another parameterization."""
    record = checkpoint.get("run") or {}
    now, listed, severe = {**plan.config.content, "seed": plan.seed}, [], []
    arguments = [inspect.signature(kind.__init__).parameters for kind in reversed(model.__mro__)]
    defaults = {f"model.params.{name}": each.default for part in arguments for name, each in part.items()}
    for key, *sides in _differences({**record.get("config", now), "seed": record.get("seed", plan.seed)}, now):
        old, new = (defaults.get(key, side) if side == _DEFAULT else side for side in sides)
        if old != new:
            (severe if key.startswith(_MEANING) else listed).append(f"{key}: {old!s:.80} is now {new!s:.80}")
    if severe:
        text = f"changed since the checkpoint, whose weights were trained with the other value: {'; '.join(severe)}"
        if any(line.startswith("model.params.parameterization:") for line in severe):
            raise UserError(f"{text}. {_ADVICE}{path}")
        logger.warning("%s", text)
    if listed:
        more = f"; and {len(listed) - 8} more" if listed[8:] else ""
        logger.info("changed since the checkpoint: %s%s", "; ".join(listed[:8]), more)


def _report_end(checkpoint: Mapping[str, Any], plan: Plan, limits: Mapping[str, int | None]) -> None:
    """Log that the last step or epoch is reached; raise ``UserError`` if a limit of an unfinished run was changed."""
    earlier = (checkpoint.get("run") or {}).get("config", {}).get("lightning") or {}
    before, now = (side.get("trainer") or {} for side in (earlier, plan.config.section("lightning")))
    is_kept = all(before.get(name) == now.get(name) for name in limits)
    for (name, limit), unit in zip(limits.items(), ("step", "epoch")):
        reached = checkpoint["global_step" if unit == "step" else unit]
        if limit not in (None, -1) and reached >= limit:
            text = f"already at {unit} {reached} of {limit}: nothing to train; raise lightning.trainer.{name}"
            if not is_kept and (plan.resume is None or plan.resume.record.get("status") != "finished"):
                raise UserError(text)
            logger.info("%s", text)


def _differences(earlier: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield key and values where configs differ, except moved files and settings without effect on the results."""
    if earlier == now or key in _UNLISTED or key.endswith(".num_workers"):
        return
    are_sections = all(side is None or isinstance(side, Mapping) for side in (earlier, now))
    if are_sections and not (None in (earlier, now) and "target" in (earlier or now or ())):  # a part added or removed
        for name in dict.fromkeys((*(earlier or ()), *(now or ()))):
            yield from _differences((earlier or {}).get(name), (now or {}).get(name), f"{key}.{name}".lstrip("."))
    elif not (isinstance(earlier, str) and isinstance(now, str)) or Path(earlier).parts[-3:] != Path(now).parts[-3:]:
        old, new = (side.get("target", side) if isinstance(side, Mapping) else side for side in (earlier, now))
        yield key, *(_DEFAULT if side is None else side for side in (old, new))
