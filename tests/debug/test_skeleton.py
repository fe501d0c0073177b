"""Published models without their weights: names and shapes as in torch, and the step's graph on the stand-in."""
from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path

import mindspore as ms
import pytest

from ms_diffsynth.debug.skeleton import Plan, build, measure, measure_by_depth, published
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.nn.names import torch_parameters, torch_shapes
from ms_diffsynth.registry import family
from ms_diffsynth.standin import Log

KNOWN = json.loads((Path(__file__).parents[1] / "golden" / "published.json").read_text())
SMALL = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 1}


def one_of_each_family_first() -> list[str]:
    of_family = {key: [other for other in KNOWN if other.split(":")[0] == key.split(":")[0]] for key in KNOWN}
    return sorted(KNOWN, key=lambda key: of_family[key].index(key))


@pytest.mark.few(2)
@pytest.mark.parametrize("key", one_of_each_family_first())
def test_names_and_shapes_are_those_of_the_published_checkpoints(key):
    name, model = key.split(":")
    pipeline = family(name).pipeline(dtype=ms.float32)
    controlnets = import_module(f"ms_diffsynth.pipelines.{name}.published").__dict__.get("CONTROLNETS", {})
    config = controlnets.get(model) or family(name).published[model][pipeline.network]
    component = next(c for c in (*pipeline.components, *pipeline.further) if c.class_name == config["_class_name"])
    cell = build(component, config, ms.bfloat16, is_allocated=False)
    parameters = torch_parameters(cell)
    assert all(p.has_init for p in parameters.values() if p.ndim > 1), "a matrix has memory"
    lines = sorted(f"{n} {list(shape)} {str(parameters[n].dtype).lower()}" for n, shape in torch_shapes(cell).items())
    assert len(lines) == KNOWN[key]["tensors"]
    assert sum(p.size for p in parameters.values()) == KNOWN[key]["parameters"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KNOWN[key]["digest"]


def test_the_published_files_are_known_to_have_them():
    """DiffSynth-Studio knows some by their publisher's files only, and not diffusers' own ControlNets."""
    unknown = [key.split(":")[1] for key, entry in KNOWN.items() if not entry["is_known"] and key[:4] != "wan:"]
    assert unknown == ["FLUX.1-schnell", "FLUX.1-Fill-dev", "FLUX.1-Canny-dev", "FLUX.1-dev-Controlnet-Union-alpha",
                       "Flux.1-dev-Controlnet-Upscaler", "Qwen-Image-ControlNet-Union", "SDXL-base"]


def test_another_model_is_an_error_that_names_those_there_are():
    with pytest.raises(ConfigError, match=r"'FLUX.1-pro'.*FLUX.1-dev, FLUX.1-schnell"):
        published(Plan(family="flux", model="FLUX.1-pro"))
    with pytest.raises(ConfigError, match=r"the family toy.*it has none"):
        published(Plan(family="toy", model="x"))


@pytest.mark.slow
def test_a_recomputed_step_reads_its_weights_where_they_lie(on_standin, tmp_path):
    report = measure(Plan(family="flux", model="FLUX.1-dev", height=64, width=64, settings=SMALL), folder=tmp_path)
    step = Log.read(tmp_path / "log.jsonl").between("step 2 begins", "step 2 ends")
    moved = [k.tensors()[0]["shape"] for k in step.kernels() if k.name == "TensorMove"]
    assert not [shape for shape in moved if len(shape) > 1], "MindSpore copies weights"  # the flat LoRA, it does
    assert step.counts()["aclnnFlashAttentionScore"] == 2 * step.counts()["aclnnFlashAttentionScoreGrad"] == 8
    assert report.kernels == len(step.kernels())
    assert report.synchronisations == 1  # that at its end
    assert report.held < report.peak < 2 * report.held


@pytest.mark.slow
def test_a_network_in_8_bits_compiles_with_recompute_and_holds_a_byte_a_weight(on_standin):
    plan = {"family": "flux", "model": "FLUX.1-dev", "height": 64, "width": 64, "settings": SMALL}
    whole, stored = measure(Plan(**plan)), measure(Plan(**plan, is_8bit=True))
    assert stored.parameters > whole.parameters  # the scales
    assert 0.95 * whole.parameters < whole.held - stored.held < whole.parameters


@pytest.mark.slow
def test_a_deep_network_is_measured_by_a_shallow_one(on_standin):
    """A large part of it: what is alike in all blocks grows with their number alone."""
    plan = Plan(family="flux", model="FLUX.1-dev", height=256, width=256,
                settings={"num_attention_heads": 2, "num_layers": 5, "num_single_layers": 6})
    whole, by_depth = measure(plan), measure_by_depth(plan)
    assert (by_depth.kernels, by_depth.casts, by_depth.transposes, by_depth.synchronisations) == (
        whole.kernels, whole.casts, whole.transposes, whole.synchronisations)
    assert by_depth.parameters == whole.parameters and by_depth.trained == whole.trained
    assert by_depth.held == pytest.approx(whole.held, rel=0.01) and by_depth.peak == pytest.approx(whole.peak, rel=0.05)
