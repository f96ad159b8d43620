"""``scripts/bench_training.py``: the plain way gives equal losses and gradients, and steps are divided into parts."""

import importlib
import json
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
UNET = "model.params.unet_config.params"
SMALL_UNET = [
    f"{UNET}.model_channels=32",
    f"{UNET}.channel_mult=[1,2]",
    f"{UNET}.num_res_blocks=1",
    f"{UNET}.num_heads=4",
]
SMALL_UNET += [f"{UNET}.attention_resolutions=[2]"]
SMALL_STAGE = [
    f"model.params.first_stage_config.params.ddconfig.{word}" for word in ("num_res_blocks=1", "ch_mult=[1,1,1]")
]
SMALL_VQ = [
    *(f"model.params.ddconfig.{word}" for word in ("num_res_blocks=1", "ch_mult=[1,1,1]")),
    *(f"model.params.lossconfig.params.{word}" for word in ("disc_ndf=8", "perceptual_weight=0")),
]
ENCODER = ["model.params.cond_stage_config.params.d=8"]
SMALL = {
    "shift": [*SMALL_UNET, *SMALL_STAGE, *ENCODER],
    "encdiff": [*SMALL_UNET, *SMALL_STAGE, *ENCODER],
    "unet": [*SMALL_UNET, *SMALL_STAGE],
    "vqvae": SMALL_VQ,
    "full_vq": SMALL_VQ,
    "full_disdiff": [*SMALL_UNET, *SMALL_STAGE, *ENCODER],
    "encdiff_stage": ENCODER,
    "clip_guided": [f"{UNET}.down_chs=[32,32,64]"],
    "full_clip_disdiff": [*SMALL_UNET, *SMALL_STAGE],
    "full_ldm": [*SMALL_UNET, *SMALL_STAGE],
    "full_encdiff": [*SMALL_UNET, *SMALL_STAGE, *ENCODER],
}
FAST = ("shift", "encdiff-network", "vqvae", "vq", "clip_disdiff")


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("bench_training")


def ways_of(script, case, folder, overrides=()):
    key = f"{case.name}_stage" if case.name == "encdiff" and not case.is_network else case.name
    bench = script.Bench(torch.device("cpu"), folder, [*SMALL.get(key, []), *overrides], batch_size=2)
    return bench, *bench.ways(case, ["fp32"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench_training")


def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        module = importlib.import_module("bench_cases")
    for case in [*module.NETWORKS, *module.STAGES]:
        name = f"{case.name}-{'network' if case.is_network else 'stage'}"
        is_fast = case.name in FAST or name in FAST
        yield pytest.param(case, id=name, marks=[] if is_fast else [pytest.mark.slow])


@pytest.mark.parametrize("case", cases())
def test_the_plain_way_has_equal_losses_and_gradients(script, case, folder):
    _, (ours, plain), batch = ways_of(script, case, folder)
    loss, gradient = script.differences(ours, plain, batch)
    assert loss < 1e-4 and gradient < 1e-4


@pytest.mark.slow
def test_the_plain_way_checkpoints_residual_blocks_if_the_config_does(script, folder):
    case = next(case for case in script.NETWORKS if case.name == "unet")
    _, (ours, plain), batch = ways_of(script, case, folder, [f"{UNET}.use_checkpoint=true"])
    assert max(script.differences(ours, plain, batch)) < 1e-4


def test_both_ways_make_equal_updates(script, folder):
    """Optimizer, clipping of gradients and moving average agree, too."""
    case = next(case for case in script.STAGES if case.name == "ldm")
    _, (ours, plain), batch = ways_of(script, case, folder)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    for way in (ours, plain):
        torch.manual_seed(3)
        for _ in range(3):
            way.step(batch)
    changed = 0
    theirs = plain.model.state_dict()
    for name, value in ours.model.state_dict().items():
        assert torch.allclose(value.float(), theirs[name].float(), atol=2e-3, rtol=1e-2), name
        changed += not torch.equal(value, before[name])
    assert changed > 100 and any("model_ema" in name for name in theirs)


def test_a_difference_is_found(script, folder):
    case = next(case for case in script.STAGES if case.name == "judge")
    _, (ours, plain), batch = ways_of(script, case, folder)
    with torch.no_grad():
        plain.model.network.heads[0].bias[0] += 1.0
    assert min(script.differences(ours, plain, batch)) > 1e-3


def test_operations_convolutions_and_memory_of_a_step(script):
    """A step of one 3x3 convolution of 2 images, whose numbers of operations and bytes are known."""
    layer = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)
    image = torch.randn(2, 4, 16, 16, requires_grad=True)
    trace = script.StepTrace(script.make_clock(torch.device("cpu"), "wall"))
    with script.FlopCounterMode(display=False) as counter, trace:
        layer(image).sum().backward()
    once = 2 * (2 * 8 * 16 * 16) * (4 * 9)  # for the output, for the gradient of the input, and for that of the weight
    assert script.operations_of_convolutions(counter) == counter.get_total_flops() == 3 * once
    assert trace.seconds > 0
    output, gradients = 2 * 8 * 16 * 16 * 4, (image.numel() + layer.weight.numel()) * 4
    assert output < trace.largest <= 2 * output + gradients + 64


def test_parts_cover_the_step(script, folder):
    case = next(case for case in script.STAGES if case.name == "clip_disdiff")
    bench, (ours, _), batch = ways_of(script, case, folder)
    times = iter(range(10**6))
    parts = script.seconds_of_parts(ours, batch, lambda: float(next(times)), steps=1)
    assert {"first stage", "frozen U-Net", "U-Net decoder", "decoder of the loss", "CLIP", "condition"} <= parts.keys()
    assert {"optimizer", "moving average", "loss, other layers"} <= parts.keys() and min(parts.values()) > 0
    assert script.lightning_seconds(bench, case, batch, ours, lambda: float(next(times)), steps=1) > 0
    assert script.data_seconds(bench, case, lambda: float(next(times)), count=2) == 0.5


@pytest.mark.slow
def test_parts_of_an_autoencoder(script, folder):
    case = next(case for case in script.STAGES if case.name == "full_vq")
    bench, (ours, _), batch = ways_of(script, case, folder)
    times = iter(range(10**6))
    parts = script.seconds_of_parts(ours, batch, lambda: float(next(times)), steps=1)
    assert {"encoder", "codebook", "decoder", "discriminator", "optimizer"} <= parts.keys()
    assert script.lightning_seconds(bench, case, batch, ours, lambda: float(next(times)), steps=1) > 0


def test_tables_and_file(script, tmp_path, capsys):
    words = ["--stages", "judge", "--steps", "1", "--batch-size", "2", "--parts", "--device", "cpu"]
    assert script.main([*words, "--json", str(tmp_path / "speed.json")]) == 0
    printed = capsys.readouterr().out
    assert "peak of a matrix product" in printed and "training steps" in printed and "Lightning" in printed
    kept = json.loads((tmp_path / "speed.json").read_text())
    assert [found["way"] for found in kept["results"]] == ["fp32", "bf16", "plain"]
    ours, _, plain = kept["results"]
    assert plain["ratio"] == 1 and plain["parts"] is None and ours["gradient_difference"] < 1e-4
    assert ours["operations"] > 0 and ours["memory_bytes"] > 0 and ours["seconds"] > 0
    assert kept["peaks"].keys() == {"fp32", "bf16"} and "torch" in kept["machine"]


def test_choice_of_cases(script):
    names = [case.name for case in script.NETWORKS], [case.name for case in script.STAGES]

    def chosen(*words):
        return [case.name for case in script.chosen_cases(script.read_options(list(words)))]

    assert chosen() == [*names[0], *names[1]]
    assert chosen("--networks") == names[0] == ["shift", "encdiff", "unet", "vqvae"]
    assert chosen("--networks", "unet", "--stages", "vq", "clip") == ["unet", "clip", "vq"]
    assert {"clip", "judge", "vq", "ldm", "clip_disdiff", "encdiff", "disdiff", "text_to_image"} <= set(
        chosen("--stages")
    )
    for words in (["--stages", "nothing"], ["--steps", "0"], ["--precision", "int8"]):
        with pytest.raises(SystemExit):
            script.read_options(words)
