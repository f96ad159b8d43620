"""CLIP, judge and a model of captions on a user's folder by the command line, with the edit score at the end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from test_edit_groups import WORDS, draw, rows_of

import main as front_door
from ldm.data.formats.folder import ImageFolder
from ldm.evaluation.editing.callback import EditScore
from ldm.evaluation.prompts.callback import PromptScore
from ldm.evaluation.prompts.measure import plan_prompts
from ldm.evaluation.representation import RepresentationWriter
from ldm.models.diffusion.latent import LatentDiffusion, has_test_pass

CLIP = {
    "vocabulary": "${data:vocabulary}",
    "embed_dim": 16,
    "vision_cfg": {"image_size": "${data:image_size}", "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
}
CAPTIONS = {
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
    "conditioning_key": "crossattn",
    "cond_stage_key": "text",
    "cond_stage_config": {
        "target": "ldm.modules.encoders.modules.FrozenCLIPTextEmbedder",
        "params": {"version": "${last_run:clip}/clip", "max_phrases": "${data:num_attributes}"},
    },
    "cond_drop_prob": 0.1,
    "image_size": 16,
    "channels": 3,
    "timesteps": 20,
    "unet_config": {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": [1, 1],
            "num_heads": 2,
            "attention_resolutions": [2],
            "use_spatial_transformer": True,
            "context_dim": 16,
        },
    },
}


def sampled(steps):
    return {"target": "ldm.diffusion.samplers.DDIMSampler", "params": {"num_steps": steps}}


def stage(tmp_path, name, target, params, callbacks=None):
    """Train one stage for two steps and return its exit status and run folder."""
    pictures = {"path": str(tmp_path / "pictures"), "attributes": str(tmp_path / "pictures" / "table.csv")}
    pictures |= {"image_size": 16, "holdout": 0.25, "text": "caption"}
    split = {"target": "ldm.data.formats.folder.ImageFolder"}
    sections = {"train": "train", "validation": "validation", "test": "evaluation"}
    data = {key: {**split, "params": {**pictures, "split": value}} for key, value in sections.items()}
    data |= {"batch_size": 8, "num_workers": 0}
    config = {
        "model": {"base_learning_rate": 1e-3, "target": target, "params": params},
        "data": {
            "target": "ldm.data.module.DataModuleFromConfig",
            "params": {"batch_size": 8, "num_workers": 0, **data},
        },
        "lightning": {
            "scale_lr": False,
            "callbacks": {"image_logger": {"params": {"disabled": True}}, **(callbacks or {})},
            "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1},
        },
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    status = front_door.main(["--base", str(path), "-t", "-n", name, "-l", str(tmp_path / "logs")])
    return status, next(iter((tmp_path / "logs").glob(f"*_{name}")), None)


@pytest.mark.slow
def test_own_pictures_from_clip_to_edits(tmp_path, capsys):
    draw(tmp_path / "pictures", rows_of(copies=5))
    edit = {"judge": "${last_ckpt:judge}", "num_samples": 5, "batch_size": 8, "columns": 2, "sampler": sampled(2)}
    edit |= {"guidance_scale": [1.0, 2.0], "num_guidance_samples": 4, "ordered": {"hue": WORDS["hue"]}}
    callbacks = {"edit_score": {"target": "ldm.evaluation.editing.callback.EditScore", "params": edit}}
    for name, target, params in (
        ("clip", "ldm.models.clip.AttributeCLIP", CLIP),
        (
            "judge",
            "ldm.models.judge.AttributeJudge",
            {"vocabulary": "${data:vocabulary}", "image_size": 16, "channels": 4},
        ),
    ):
        status, run = stage(tmp_path, name, target, params)
        assert status == 0
        figures = json.loads((run / "results.json").read_text())
        for attribute in WORDS:
            assert {f"{name}_accuracy_{attribute}{group}" for group in ("", "_seen", "_unseen")} <= set(figures)
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    status, run = stage(tmp_path, "captions", target, CAPTIONS, callbacks)
    assert status == 0, capsys.readouterr().err
    results = json.loads((run / "results.json").read_text())
    for figure in ("edit_accuracy", "edit_leakage", "all_right", "edit_accuracy_hue"):
        assert 0 <= results[f"{figure}_unseen"] <= 1 and 0 <= results[f"{figure}_seen"] <= 1
    report = json.loads((run / "edit_score" / "2.json").read_text())
    assert report["sampler"]["guidance_scale"] in (1.0, 2.0) and report["groups"]["seen"]["num_samples"] == 5
    assert not (run / "dis_repre").exists()


def test_only_scores_of_samples_ask_for_a_test_pass():
    model = object.__new__(LatentDiffusion)
    assert has_test_pass(model, [RepresentationWriter(), EditScore("judge")])
    assert has_test_pass(model, [PromptScore("judge")])
    assert not has_test_pass(model, [RepresentationWriter()]) and not has_test_pass(model)
    assert LatentDiffusion.test_step(model, {}, 0) is None


def test_prompts_are_those_of_pictures_with_all_attributes(tmp_path):
    rows = [("amber", "", "calm"), ("", "small", "wild"), *rows_of(copies=2)]
    dataset = ImageFolder(**draw(tmp_path / "pictures", rows))
    plan = plan_prompts(dataset, (1, 4, 4), 16, seed=0, template="{hue} and {size}")
    assert (plan.words >= 0).all() and len(plan.images) == len(plan.others) == 16
    for text, words, image in zip(plan.texts, plan.words, plan.images):
        assert text == f"{WORDS['hue'][words[0]]} and {WORDS['size'][words[1]]}"
        assert np.array_equal(image[0, 0].numpy(), words * 60)
    with pytest.raises(ValueError, match="num_prompts of 2 to 16, .* got 17"):
        plan_prompts(dataset, (1, 4, 4), 17, seed=0)
