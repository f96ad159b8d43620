"""Files of directions and of learned tokens: every format is read and written, and bad files are refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from stable_diffusion_pipeline import WIDTH, save_pipeline

from ldm.models.diffusion.methods.noiseclr.directions import DirectionSet
from ldm.models.diffusion.methods.noiseclr.files import save_pipeline as save_with_tokens
from ldm.models.diffusion.methods.noiseclr.files import token_names
from ldm.models.diffusion.methods.noiseclr.pipeline import PipelineDenoiser, load_pipeline
from ldm.util import UserError

K = 12
TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("diffusers") / "pipeline")


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return dict(zip(token_names(K), torch.randn(K, WIDTH)))


def assert_read(path, tokens, **options):
    found = DirectionSet.load(path, **options)
    assert (found.kind, found.names) == ("token", tuple(tokens))
    assert torch.equal(found.values, torch.stack(list(tokens.values())))
    return found


def encoder_state(rows, tokens, prefix="", key=TABLE):
    """A checkpoint of accelerate: all weights of a text encoder whose table has further rows."""
    table = torch.cat([torch.randn(rows, WIDTH), *(value[None] for value in tokens.values())])
    return {f"{prefix}{key}": table, f"{prefix}text_model.final_layer_norm.weight": torch.ones(WIDTH)}


def test_noiseclr_learned_embeds_are_read(tokens, tmp_path):
    torch.save(tokens, tmp_path / "learned_embeds.bin")
    assert_read(tmp_path / "learned_embeds.bin", tokens, num_tokens=K)
    assert_read(str(tmp_path), tokens)  # the folder of the reference's training
    save_file({name: value[None] for name, value in tokens.items()}, tmp_path / "embeds.safetensors")
    assert_read(tmp_path / "embeds.safetensors", tokens)  # sorted there as <t1>, <t10>, ...
    one = {"<smile>": torch.randn(WIDTH)}
    torch.save({name: value.half() for name, value in one.items()}, tmp_path / "smile.pt")
    found = DirectionSet.load(tmp_path / "smile.pt")
    assert (found.names, found.values.dtype) == (("<smile>",), torch.float32)
    assert found.fingerprint is None and found.latent_shape is None


@pytest.mark.parametrize("prefix, key", [("", TABLE), ("module.", TABLE), ("", TABLE.removeprefix("text_model."))])
def test_noiseclr_checkpoints_of_accelerate_are_read(prefix, key, tokens, tmp_path):
    torch.save(encoder_state(49408, tokens, prefix, key), tmp_path / "pytorch_model.bin")
    for options in ({}, {"num_tokens": K}, {"num_tokens": K, "vocabulary": 49408}):
        assert_read(tmp_path / "pytorch_model.bin", tokens, **options)
    with pytest.raises(UserError, match=r"expected 13 directions \(num_tokens\), got 12"):
        DirectionSet.load(tmp_path / "pytorch_model.bin", num_tokens=13)
    (tmp_path / "checkpoint-100").mkdir()
    save_file(encoder_state(60, tokens, prefix, key), tmp_path / "checkpoint-100" / "model.safetensors")
    assert_read(tmp_path / "checkpoint-100", tokens, num_tokens=K)
    assert_read(tmp_path / "checkpoint-100", tokens, vocabulary=60)
    for options in ({}, {"num_tokens": 100}, {"num_tokens": 72}, {"vocabulary": 72}, {"num_tokens": 0}):
        with pytest.raises(UserError, match="checkpoint-100.*: expected a table of more token embeddings"):
            DirectionSet.load(tmp_path / "checkpoint-100", **options)
    with pytest.raises(UserError, match="expected 11 directions"):
        DirectionSet.load(tmp_path / "checkpoint-100", num_tokens=11, vocabulary=60)


def test_noiseclr_directions_round_trip(folder, tokens, tmp_path):
    denoiser = PipelineDenoiser(str(folder))
    values = torch.stack(list(tokens.values()))
    for kind in ("token", "bottleneck"):
        directions = DirectionSet.of(denoiser, values, kind, "noiseclr")
        path = tmp_path / kind / "directions.safetensors"
        directions.save(path)
        found = DirectionSet.load(path.parent, num_tokens=K)
        assert torch.equal(found.values, values)
        assert {**vars(found), "values": None} == {**vars(directions), "values": None}
        with pytest.raises(UserError, match="expected 3 directions"):
            DirectionSet.load(path, num_tokens=3)
    directions = DirectionSet.load(tmp_path / "token")
    assert sorted(load_file(tmp_path / "token" / "directions.safetensors")) == sorted(tokens)
    directions.save(tmp_path / "learned_embeds.bin")
    written = torch.load(tmp_path / "learned_embeds.bin", weights_only=True)
    assert list(written) == list(tokens) and all(torch.equal(written[name], tokens[name]) for name in tokens)
    assert all(value.untyped_storage().nbytes() == 4 * WIDTH for value in written.values())
    with pytest.raises(UserError, match=r"expected a file \*.safetensors"):
        directions.save(tmp_path / "tokens.npz")
    with pytest.raises(UserError, match="got directions of kind bottleneck"):
        DirectionSet.load(tmp_path / "bottleneck").save(tmp_path / "learned_embeds.bin")


def test_noiseclr_checkpoints_are_read_by_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": {"rows": torch.ones(2, WIDTH)}}, tmp_path / "checkpoints" / "last.ckpt")
    monkeypatch.chdir(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="expected one vector of the same width per token"):
        DirectionSet.load("last.ckpt")
    DirectionSet(torch.zeros(2, WIDTH), "token", ("<t1>", "<t2>"), "noiseclr").save(tmp_path / "directions.safetensors")
    found = DirectionSet.load("last.ckpt")
    assert torch.equal(found.values, torch.ones(2, WIDTH)) and found.names == ("<t1>", "<t2>")


def test_noiseclr_one_token_is_a_file_of_textual_inversion(folder, tmp_path):
    directions = DirectionSet(torch.randn(1, WIDTH), "token", ("<smile>",), "noiseclr")
    for name in ("smile.safetensors", "smile.bin"):
        directions.save(tmp_path / name)
        pipeline = load_pipeline(str(folder))
        pipeline.load_textual_inversion(str(tmp_path / name), local_files_only=True)
        row = pipeline.tokenizer.convert_tokens_to_ids("<smile>")
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[row], directions.values[0])


def test_noiseclr_pipeline_with_tokens(folder, tokens, tmp_path):
    save_with_tokens(tmp_path / "new" / "pipeline", tokens, load_pipeline(str(folder)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pipeline"]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "new" / "pipeline")
    ids = pipeline.tokenizer("<t1> <t12>").input_ids
    assert ids[1:3] == [49408, 49419]
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[49408:], torch.stack(list(tokens.values())))
    before = load_pipeline(str(folder))
    assert torch.equal(table[:49408], before.text_encoder.get_input_embeddings().weight)

    assert_read(tmp_path / "new" / "pipeline", tokens, num_tokens=K)
    directions = DirectionSet.load(tmp_path / "new" / "pipeline")
    denoiser = PipelineDenoiser(str(folder))
    with torch.no_grad():
        spliced = denoiser.conditions(directions.values[11:]).value
    prompt = PipelineDenoiser(str(tmp_path / "new" / "pipeline")).condition_from_texts(["<t12>"]).value
    torch.testing.assert_close(spliced, prompt)

    with pytest.raises(
        UserError, match="expected a tokenizer without the tokens to be learned, got one with <t1>, <t2>,"
    ):
        save_with_tokens(tmp_path / "again", tokens, pipeline)
    save_with_tokens(tmp_path / "new" / "pipeline", {"<t1>": torch.ones(WIDTH)}, before)  # replaces the other
    assert len(DirectionSet.load(tmp_path / "new" / "pipeline")) == 1


def test_noiseclr_released_pipeline_in_older_layout(folder, tokens, tmp_path):
    """A tokenizer without tokenizer.json and a text encoder with text_model. and in a .bin, as older versions wrote."""
    old = shutil.copytree(folder, tmp_path / "released")
    source = folder.parent / "pipeline_tokenizer"
    shutil.rmtree(old / "tokenizer")
    shutil.copytree(source, old / "tokenizer")
    ends = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>") | {"bos_token": "<|startoftext|>"}
    (old / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(ends))
    settings = {**ends, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (old / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    added = {name: 49408 + position for position, name in enumerate(tokens)}
    (old / "tokenizer" / "added_tokens.json").write_text(json.dumps(dict(sorted(added.items()))))
    (old / "text_encoder" / "model.safetensors").unlink()
    torch.save(encoder_state(49408, tokens), old / "text_encoder" / "pytorch_model.bin")
    assert_read(old, tokens, num_tokens=K)
    torch.save(encoder_state(49405, tokens), old / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(UserError, match="expected at least 49420 token embeddings .* got 49417"):
        DirectionSet.load(old)


def test_noiseclr_folders_of_the_user_are_not_replaced(folder, tokens, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("...")
    with_more = shutil.copytree(folder, tmp_path / "with_more")
    (with_more / "checkpoint-100").mkdir()
    (tmp_path / "file").write_text("...")
    for path, found in ((work, "thesis.tex"), (with_more, "checkpoint-100"), (tmp_path / "file", "a file")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"or a pipeline to be replaced, got {found}. Choose another folder"):
            save_with_tokens(path, tokens, load_pipeline(str(folder)))
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=f"expected vectors of width {WIDTH}, .* got 17"):
        save_with_tokens(tmp_path / "new", {"<t1>": torch.zeros(17)}, load_pipeline(str(folder)))

    pipeline, copy = load_pipeline(str(folder)), shutil.copytree(folder, tmp_path / "copy")
    pipeline.save_pretrained = lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError):
        save_with_tokens(copy, tokens, pipeline)
    assert sorted(tmp_path.rglob("*")) == before


def test_noiseclr_other_files_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save({"<t1>": torch.ones(4), "<t2>": torch.ones(5)}, tmp_path / "widths.bin")
    torch.save({"<t1>": torch.ones(3, 4)}, tmp_path / "several.bin")
    torch.save({"conv.weight": torch.ones(2, 2, 3, 3), "conv.bias": torch.ones(2)}, tmp_path / "network.bin")
    torch.save({"step": torch.tensor(1.0)}, tmp_path / "scalar.bin")
    torch.save([1, 2], tmp_path / "list.bin")
    cases = {
        tmp_path / "missing": "missing",
        tmp_path / "empty": "expected a folder with one of directions.safetensors",
        tmp_path / "text.safetensors": "text.safetensors: damaged",
        tmp_path / "widths.bin": "expected one vector of the same width per token",
        tmp_path / "several.bin": "expected one vector of the same width per token",
        tmp_path / "network.bin": "expected one vector .* such as conv.weight",
        tmp_path / "scalar.bin": "expected one vector",
        tmp_path / "list.bin": "got no tensors",
        folder: "expected a pipeline with learned tokens in its tokenizer, got none",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            DirectionSet.load(path)
