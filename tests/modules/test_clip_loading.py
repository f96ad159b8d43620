"""Finding CLIP weights on the disk, and saying plainly what is missing."""

import json
import socket

import huggingface_hub.constants
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ldm.modules.encoders import clip_loading
from ldm.modules.encoders.clip_loading import build_clip, find_clip, load_clip, load_tokenizer, parse_name
from ldm.util import UserError

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No weights anywhere, and no network."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv(clip_loading.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(clip_loading, "OPENAI_CACHE", str(tmp_path / "openai"))


@pytest.fixture
def tiny(tmp_path):
    """A tiny architecture under an open_clip name, and its weights."""
    (tmp_path / "Tiny-8.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "Tiny-8.json")
    return build_clip(TINY)


def write_folder(folder, model, **preprocess):
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": TINY, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-L/14", ("ViT-L-14-quickgelu", "openai")),
        ("ViT-B/32", ("ViT-B-32-quickgelu", "openai")),
        ("ViT-L/14@336px", ("ViT-L-14-336-quickgelu", "openai")),
        ("RN50x4", ("RN50x4-quickgelu", "openai")),
        ("ViT-B-32", ("ViT-B-32", None)),
        ("ViT-B-32:laion2b_s34b_b79k", ("ViT-B-32", "laion2b_s34b_b79k")),
    ],
)
def test_names_are_mapped(name, expected):
    assert parse_name(name) == expected


@pytest.mark.parametrize("name", clip_loading._OPENAI_NAMES)
def test_every_openai_name_has_quick_gelu_and_published_weights(name):
    architecture, tag = parse_name(name)
    assert open_clip.get_model_config(architecture)["quick_gelu"] is True
    assert open_clip.is_pretrained_cfg(architecture, tag)


def test_missing_weights_name_the_files_and_the_remedies(tmp_path):
    with pytest.raises(UserError) as error:
        find_clip("ViT-L/14")
    message = str(error.value)
    assert str(tmp_path / "openai" / "ViT-L-14.pt") in message
    assert "models--timm--vit_large_patch14_clip_224.openai" in message
    assert clip_loading.WEIGHTS_VARIABLE in message and "allow_download" in message


def test_wrong_explicit_path_is_not_replaced_by_a_cached_file(tmp_path):
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "ViT-L-14.pt").write_bytes(b"x")
    assert find_clip("ViT-L/14").weights == tmp_path / "openai" / "ViT-L-14.pt"
    with pytest.raises(UserError, match="nowhere.pt"):
        find_clip("ViT-L/14", weights=tmp_path / "nowhere.pt")


def test_weights_from_variable_folder_and_hub_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--timm--vit_large_patch14_clip_224.openai"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("abc")
    cached = snapshot / "snapshots" / "abc" / "open_clip_model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    assert find_clip("ViT-L/14").weights == cached
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "ViT-L-14.pt").write_bytes(b"x")
    (shelf / "ViT-B-32.pt").write_bytes(b"x")
    monkeypatch.setenv(clip_loading.WEIGHTS_VARIABLE, str(shelf))
    assert find_clip("ViT-L/14").weights == shelf / "ViT-L-14.pt"
    (shelf / "ViT-L-14.pt").unlink()
    assert find_clip("ViT-L/14").weights == shelf / "ViT-B-32.pt"  # the only file of the folder that was named


def test_unknown_names_and_tags():
    with pytest.raises(UserError, match="expected a folder, an OpenAI name"):
        find_clip("ViT-XXL-99")
    with pytest.raises(UserError, match="expected a tag .*laion2b_s34b_b79k"):
        find_clip("ViT-B-32:nonsense")
    with pytest.raises(UserError, match="does not exist"):
        find_clip("./no/such/folder")
    with pytest.raises(UserError, match="Hugging Face hub"):
        find_clip("ViT-B-16-SigLIP:webli")
    with pytest.raises(UserError, match="not in the Hugging Face cache"):
        find_clip("hf-hub:nobody/nothing")


@pytest.mark.parametrize("file", ["Tiny-8.safetensors", "Tiny-8.pt", "scripted.pt"])
def test_named_architecture_with_explicit_weights(tmp_path, tiny, file):
    path = tmp_path / file
    if file == "scripted.pt":
        torch.jit.script(tiny).save(str(path))
    elif file.endswith(".pt"):
        torch.save(tiny.state_dict(), path)
    else:
        save_file(tiny.state_dict(), path)
    source = find_clip("Tiny-8", weights=path)
    model = load_clip(source)
    assert same_weights(model, tiny) and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert source.preprocess_cfg["mean"] == open_clip.OPENAI_DATASET_MEAN


def test_folder_brings_its_architecture_and_preprocessing(tmp_path, tiny):
    folder = write_folder(tmp_path / "own", tiny, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    for name in (str(folder), f"local-dir:{folder}"):
        source = find_clip(name)
        assert same_weights(load_clip(source), tiny)
        assert source.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]
    assert load_tokenizer(source)(["a red floor"], context_length=12).shape == (1, 12)


def test_broken_folders(tmp_path, tiny):
    folder = write_folder(tmp_path / "own", tiny)
    (folder / "open_clip_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="open_clip_model.safetensors: expected weights"):
        load_clip(find_clip(str(folder)))
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="expected .*open_clip_model.safetensors"):
        find_clip(str(folder))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        find_clip(str(folder))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        find_clip(str(folder))


def test_weights_of_another_model_are_refused(tmp_path, tiny):
    folder = write_folder(tmp_path / "own", tiny)
    other = {**TINY, "embed_dim": 4}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": other}))
    with pytest.raises(UserError, match="belongs to another model"):
        load_clip(find_clip(str(folder)))


def test_pickled_code_is_not_run(tmp_path, tiny):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code in a weight file was run",))

    torch.save({"state_dict": Evil()}, tmp_path / "Tiny-8.pt")
    with pytest.raises(UserError, match="expected weights of the CLIP"):
        load_clip(find_clip("Tiny-8", weights=tmp_path / "Tiny-8.pt"))
