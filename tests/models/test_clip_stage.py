"""Training the small CLIP: steps, accuracy, and the folder that open_clip loads."""

import json
import math
import shutil

import open_clip
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from ldm.data.vocabulary import AttributeVocabulary
from ldm.models.clip import AttributeCLIP, longest_caption
from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.util import ConfigError, UserError

VOCABULARY = AttributeVocabulary(
    factor_names=("colour", "size"),
    words=(("red", "green", "blue"), ("small", "large")),
    value_to_word=((0, 1, 2), (0, 0, 1, 1)),
    templates=(("{} thing", "the thing is {}"), ("{} in size",)),
)
PARAMS = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"width": 16, "heads": 2, "layers": 1},
    "vocabulary": VOCABULARY.to_dict(),
}


class Toy(Dataset):
    """Images whose brightness in two halves tells both factors."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        factors = torch.tensor([index % 3, index % 4])
        image = torch.zeros(16, 16, 3, dtype=torch.uint8)
        image[:8, :, factors[0]] = 255
        image[8:] = 60 * factors[1]
        text = VOCABULARY.texts(factors[None].numpy())[0]
        return {"image": image, "factors": factors, "text": text[0], "caption_mask": torch.tensor([True, False])}


def loader(batch_size=8):
    return DataLoader(Toy(), batch_size=batch_size)


def trainer(root, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=root, accelerator="cpu", enable_checkpointing=False, **quiet, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = AttributeCLIP(**OmegaConf.create(PARAMS))
    before = {name: value.clone() for name, value in model.clip.named_parameters()}
    fit = trainer(root, max_steps=2, limit_val_batches=1)
    fit.fit(model, loader(12), loader())
    return root, model, before, fit


def test_two_steps_train_both_towers(trained):
    _, model, before, fit = trained
    changed = {name for name, value in model.clip.named_parameters() if not torch.equal(value, before[name])}
    assert {"visual.conv1.weight", "token_embedding.weight", "text_projection", "logit_scale"} <= changed
    assert 0.0 <= fit.callback_metrics["val/attribute_accuracy"] <= 1.0
    assert {"val/attribute_accuracy_colour", "val/attribute_accuracy_size", "train/loss"} <= set(fit.callback_metrics)


def test_open_clip_loads_the_folder(trained):
    root, model, *_ = trained
    folder = root / "clip"
    assert {p.name for p in folder.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors", "words.json"}
    loaded = open_clip.create_model(f"local-dir:{folder}").eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    pixels = loaded.visual.preprocess_cfg
    assert tuple(pixels["mean"]) == tuple(pixels["std"]) == (0.5, 0.5, 0.5) and list(pixels["size"]) == [16, 16]
    model.eval()
    assert torch.allclose(loaded.encode_image(x, normalize=True), model.encode_image(x), atol=1e-6)


def test_embedders_load_the_folder(trained):
    root, model, *_ = trained
    model.eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    image = FrozenClipImageEmbedder(str(root / "clip"))(x)
    assert torch.allclose(image / image.norm(dim=1, keepdim=True), model.encode_image(x), atol=1e-5)
    texts = ["red thing", "small in size"]
    assert torch.allclose(FrozenCLIPTextEmbedder(str(root / "clip"))(texts), model.encode_text(texts), atol=1e-6)


def test_test_pass_gives_figures(trained, tmp_path):
    _, model, *_ = trained
    metrics = trainer(tmp_path).test(model, loader(5), verbose=False)[0]
    per_attribute = [metrics["figure/clip_accuracy_colour"], metrics["figure/clip_accuracy_size"]]
    assert metrics["figure/clip_accuracy"] == pytest.approx(sum(per_attribute) / 2)
    assert (tmp_path / "clip" / "open_clip_config.json").is_file()


def test_training_learns_the_toy(tmp_path):
    torch.manual_seed(0)
    model = AttributeCLIP(**PARAMS, num_captions=12)
    model.learning_rate = 1e-2
    run = trainer(tmp_path, max_steps=60, limit_val_batches=1)
    run.fit(model, loader(24), loader(24))
    assert run.callback_metrics["val/attribute_accuracy_colour"] > 0.9


def test_words_follow_the_factors():
    model = AttributeCLIP(**PARAMS)
    labels = model.get_labels({"factors": torch.tensor([[2, 3], [0, 1]])})
    assert labels.tolist() == [[2, 1], [0, 0]]
    assert longest_caption(VOCABULARY) == 7 and model.tokenizer.context_length == 9


def test_temperature_is_limited_and_not_decayed():
    model = AttributeCLIP(**PARAMS)
    model.clip.logit_scale.data.fill_(9.0)
    model.on_train_batch_end()
    assert model.clip.logit_scale.item() == pytest.approx(math.log(100.0))
    decayed, others = model.configure_optimizers().param_groups
    assert any(p is model.clip.logit_scale for p in others["params"]) and others["weight_decay"] == 0
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.clip.parameters()))


def test_schedule_multiplies_the_learning_rate():
    target = "ldm.lr_scheduler.LambdaWarmUpCosineScheduler"
    params = {"warm_up_steps": 4, "lr_min": 0.0, "lr_max": 1.0, "lr_start": 0.0, "max_decay_steps": 8}
    model = AttributeCLIP(**PARAMS, scheduler_config={"target": target, "params": params})
    _, [schedule] = model.configure_optimizers()
    assert schedule["interval"] == "step" and schedule["scheduler"].lr_lambdas[0](4) == 1.0


def test_wrong_image_size_and_missing_text():
    model = AttributeCLIP(**PARAMS)
    with pytest.raises(UserError, match="16 x 16 pixels, got 32 x 32"):
        model.get_input({"image": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)})
    with pytest.raises(UserError, match="caption_mask"):
        model.training_step({"image": torch.zeros(2, 16, 16, 3, dtype=torch.uint8), "text": ["a", "b"]}, 0)


def test_pictures_are_captioned_with_words():
    model = AttributeCLIP(**PARAMS).eval()
    grid = model.log_images(next(iter(loader())), N=3)["zero_shot"]
    assert grid.images.shape == (3, 3, 16, 16) and len(grid.rows) == 3
    assert grid.rows[0].split(" / ")[0] in VOCABULARY.words[0]


def test_saving_replaces_whole_files(tmp_path):
    model = AttributeCLIP(**PARAMS)
    (tmp_path / "open_clip_config.json").write_text("old")
    model.save_folder(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] == model.tokenizer.vocab_size
    assert not list(tmp_path.glob(".*"))


def test_training_continues_a_clip_with_its_own_tokenizer_and_pixels(trained, tmp_path):
    root, source, *_ = trained
    config = json.loads((root / "clip" / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    shutil.copytree(root / "clip", tmp_path / "given")
    (tmp_path / "given" / "open_clip_config.json").write_text(json.dumps(config))
    model = AttributeCLIP(vocabulary=VOCABULARY.to_dict(), pretrained=str(tmp_path / "given")).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    expected = FrozenClipImageEmbedder(str(tmp_path / "given"))(x)
    assert torch.allclose(model.encode_image(x), torch.nn.functional.normalize(expected, dim=-1), atol=1e-6)
    assert torch.allclose(model.encode_text(["red thing"]), source.encode_text(["red thing"]), atol=1e-6)
    before = {name: value.clone() for name, value in model.clip.named_parameters()}
    model.learning_rate = 1e-4
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(model, loader(12))
    moved = [(value - before[name]).abs().max().item() for name, value in model.clip.named_parameters()]
    assert all(0 < move < 3e-4 for move in moved)  # no centring, which moves biases further
    written = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    assert written == config and (tmp_path / "clip" / "words.json").is_file()
    again = FrozenClipImageEmbedder(str(tmp_path / "clip"))(x)
    assert torch.allclose(torch.nn.functional.normalize(again, dim=-1), model.encode_image(x), atol=1e-6)


def test_without_steps_a_clip_is_only_measured(trained, tmp_path):
    root, source, *_ = trained
    model = AttributeCLIP(vocabulary=VOCABULARY.to_dict(), pretrained=str(root / "clip"))
    run = trainer(tmp_path, max_steps=0)
    run.fit(model, loader(12), loader())
    expected = source.clip.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.clip.state_dict().items())
    (figures,) = run.test(model, loader(5), verbose=False)
    (expected,) = trainer(tmp_path / "source").test(source, loader(5), verbose=False)
    assert figures == expected and (tmp_path / "clip" / "open_clip_model.safetensors").is_file()


def test_a_clip_with_the_tokenizer_of_open_clip(tmp_path, monkeypatch):
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    pixels = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    (tmp_path / "published").mkdir()
    torch.save(open_clip.CLIP(**architecture).state_dict(), tmp_path / "published" / "open_clip_pytorch_model.bin")
    content = json.dumps({"model_cfg": architecture, "preprocess_cfg": pixels})
    (tmp_path / "published" / "open_clip_config.json").write_text(content)
    model = AttributeCLIP(vocabulary=VOCABULARY.to_dict(), pretrained=str(tmp_path / "published"))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=1)
    run.fit(model, loader(12), loader())
    assert 0 <= run.callback_metrics["val/attribute_accuracy"] <= 1
    model.eval()
    texts = ["any words at all", "red thing"]
    embedded = FrozenCLIPTextEmbedder(str(tmp_path / "clip"))(texts)
    assert torch.allclose(embedded, model.encode_text(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pretrained": "somewhere", "embed_dim": 8}, "or pretrained instead of them, got embed_dim, pretrained"),
        ({}, "got neither"),
        ({"embed_dim": 8, "vision_cfg": PARAMS["vision_cfg"]}, "got embed_dim, vision_cfg"),
        ({"pretrained": "ViT-B/32", "weights": "/nowhere/at/all.pt"}, "weights are missing"),
        ({"pretrained": "./nowhere"}, "CLIP folder nowhere does not exist"),
    ],
)
def test_sizes_or_a_pretrained_clip(params, message):
    with pytest.raises((ConfigError, UserError), match=message):
        AttributeCLIP(vocabulary=VOCABULARY.to_dict(), **params)


def test_images_of_another_size_than_the_pretrained_clip(trained):
    model = AttributeCLIP(vocabulary=VOCABULARY.to_dict(), pretrained=str(trained[0] / "clip"))
    with pytest.raises(UserError, match="params.pretrained: expected images of 16 x 16 pixels, got 32 x 32"):
        model.get_input({"image": torch.zeros(2, 32, 32, 3, dtype=torch.uint8)})


def test_words_that_the_pretrained_tokenizer_does_not_have(trained):
    words = VOCABULARY.to_dict() | {"words": [["red", "green", "teal"], ["small", "large"]]}
    with pytest.raises(UserError, match="teal"):
        AttributeCLIP(vocabulary=words, pretrained=str(trained[0] / "clip"))
