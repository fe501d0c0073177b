"""Resume: cut anywhere and gone on with, a run gives the bits of one that was never cut."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from PIL import Image
from toy_run import (
    Crash,
    Crashing,
    Module,
    Own,
    differing_bits,
    digests,
    equal,
    files,
    poison,
    rows,
    state,
    table,
    toy_model,
    train,
)

from ms_diffsynth import UnifiedDataset
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.pipelines.ddpm_unet import tiny as tiny_unet
from ms_diffsynth.pipelines.flux import tiny as tiny_flux
from ms_diffsynth.pipelines.flux2 import tiny as tiny_flux2
from ms_diffsynth.registry import family
from ms_diffsynth.storage.checkpoint import latest, open_checkpoint_folder
from ms_diffsynth.training.batches import Batches
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.hooks.checkpoints import Checkpoints
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.state import parameters_of
from ms_diffsynth.training.trainer import Trainer
from ms_diffsynth.training.two_stage import launch_data_process_task

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


@pytest.fixture
def crash(monkeypatch):
    return Crashing(monkeypatch)


COMMON = {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 7, "num_epochs": None}
# name: options, batches until the cut, step of the checkpoint that is gone on from. Five rows: in batches of two there
# are three of them an epoch, and three steps; in groups of three rows two steps
SCENARIOS = {
    "epoch end": ({"batch_size": 2, "loss_scale": 1024.0}, 8, 6),
    "mid-epoch": ({"batch_size": 2, "checkpoint_steps": 4, "save_steps": 6}, 6, 4),
    "accumulation": ({"accumulation": 3, "checkpoint_steps": 3, "save_steps": 6, "loss_scale": 1024.0}, 12, 3),
    "skipped step": ({"batch_size": 2, "checkpoint_steps": 1, "save_steps": 6, "loss_scale": 2.0**16}, 6, 5),
}


@pytest.fixture
def dynamic_scale_and_a_bad_step(monkeypatch):
    """The scale grows after two good steps; the samples of the fifth step are not finite."""
    poison(monkeypatch, 9)
    monkeypatch.setattr(ms.amp, "StaticLossScaler", lambda scale: ms.amp.DynamicLossScaler(scale, 2, 2))


@pytest.mark.parametrize("name, mode, steps", [
    *((name, "pynative", 12) for name in SCENARIOS), ("skipped step", "graph", 12),
    *(pytest.param(name, mode, 50, marks=pytest.mark.slow) for name in SCENARIOS for mode in ("pynative", "graph"))])
@pytest.mark.few(3)
def test_a_run_that_was_cut_gives_the_bits_of_one_that_was_not(folder, tmp_path, crash, request, name, mode, steps):
    options, batches, resumed_at = SCENARIOS[name]
    options = {**COMMON, **options, "max_train_steps": steps}
    if name == "skipped step":
        request.getfixturevalue("dynamic_scale_and_a_bad_step")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    crash.copies({batches: cut})
    train(whole, Module(folder), rows(5), mode, **options)
    assert len(table(cut)) > resumed_at and latest(cut / "checkpoints").step == resumed_at
    crash(None)
    train(cut, Module(folder), rows(5), mode, **options, resume="auto")
    assert equal(whole, cut) and len(table(whole)) == 1 + steps
    arrays, counts = state(whole)
    assert any(name.startswith("ema/") for name in arrays) and counts["skipped"] == (name == "skipped step")
    if name == "skipped step":  # the fifth of them halves the scale
        assert arrays["loss_scale/scale_value"] == 2.0 ** (17 + (steps - 5) // 2) and ",nan," in "\n".join(table(whole))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_fifty_steps_cut_after_the_first_the_seventh_the_twentieth_and_the_last_but_one(folder, tmp_path, crash, mode):
    options = {**COMMON, "batch_size": 2, "checkpoint_steps": 3, "save_steps": 10, "max_train_steps": 50}
    cuts = {batches: tmp_path / str(batches) for batches in (1, 7, 20, 49)}
    crash.copies(cuts)
    train(tmp_path / "whole", Module(folder), rows(5), mode, **options)
    crash(None)
    for batches, path in cuts.items():
        assert bool(latest(path / "checkpoints")) == (batches > 3)
        train(path, Module(folder), rows(5), mode, **options, resume="auto")
        assert equal(tmp_path / "whole", path), batches


@pytest.mark.parametrize("count, epochs", [(5, 2), pytest.param(20, 5, marks=pytest.mark.slow)])
def test_random_cuts(folder, tmp_path, crash, count, epochs):
    """In groups of two batches; each cut is at another batch."""
    options = {"accumulation": 2, "use_ema": True, "num_epochs": epochs, "checkpoint_steps": 2}
    cuts = np.random.default_rng(7).choice(range(1, 5 * epochs + 1), count, replace=False).tolist()
    cuts = {batches: tmp_path / str(batches) for batches in cuts}
    crash.copies(cuts)
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    crash(None)
    for batches, path in cuts.items():
        assert path.is_dir()
        train(path, Module(folder), rows(5), **options, resume="auto")
        assert equal(tmp_path / "whole", path), batches


def test_a_run_cut_again_and_again(folder, tmp_path, crash):
    options = {"num_epochs": 4, "batch_size": 2, "checkpoint_steps": 1}
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    for _ in range(5):  # two steps further each time; the third one's checkpoint is not written any more
        crash(3)
        with pytest.raises(Crash):
            train(tmp_path / "cut", Module(folder), rows(5), **options, resume="auto")
    crash(None)
    train(tmp_path / "cut", Module(folder), rows(5), **options, resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", ["whole weights", "class images", "buckets", "own forward", "split"])
@pytest.mark.few(2)
def test_other_kinds_of_runs(folder, tmp_path, crash, kind):
    objective = Objective(weighting_scheme="none", prior_loss_weight=1.0, posterior="sample")
    make, data, options = lambda: Module(folder), rows(5), {"batch_size": 2}
    if kind == "whole weights":
        make = lambda: Module(folder, trainable_models="dit,text_encoder")  # noqa: E731
    elif kind == "class images":
        make = lambda: Module(folder, "dreambooth", objective)  # noqa: E731
        options |= {"class_dataset": rows(3, 50)}
    elif kind == "buckets":
        data = [*rows(3), *rows(3, 10, (8, 32))]
    elif kind == "own forward":
        make = lambda: Own(folder)  # noqa: E731
    else:
        first = Module(folder, "sft:data_process")
        launch_data_process_task(Accelerator(1, "pynative", DEVICE), files(tmp_path / "data", 5), first,
                                 ModelLogger(tmp_path / "cache"))
        make, data = lambda: Module(folder, "sft:train"), UnifiedDataset(str(tmp_path / "cache"))
    options |= {"num_epochs": 3, "checkpoint_steps": 2}
    train(tmp_path / "whole", make(), data, **options)
    crash(6)
    with pytest.raises(Crash):
        train(tmp_path / "cut", make(), data, **options)
    crash(None)
    workers = {"num_workers": 0} if kind == "own forward" else {}  # the order does not depend on them
    train(tmp_path / "cut", make(), data, **options, **workers, resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "cut")
    assert len(table(tmp_path / "whole")) == (13 if kind == "buckets" else 10)


def test_two_runs_that_go_on_from_one_checkpoint(folder, tmp_path):
    options = {"batch_size": 2, "num_epochs": 4}
    train(tmp_path / "first", Module(folder), rows(5), checkpoint_steps=5, **options)
    before = digests(tmp_path / "first")
    for name in ("a", "b"):
        train(tmp_path / name, Module(folder), rows(5), checkpoint_steps=5, **options,
              resume=str(tmp_path / "first/checkpoints/step-00000010"))
        assert equal(tmp_path / "first", tmp_path / name)
        assert not (tmp_path / name / "epoch-0.safetensors").exists()
    assert digests(tmp_path / "first") == before


def test_pictures_are_those_of_a_run_that_was_not_cut(folder, tmp_path, crash):
    def run(path, **more):
        module = Module(folder)

        def sampler():
            value = int(np.abs(module.trainable_parameters()[0].asnumpy()).sum() * 1e4) % 256
            return [Image.new("RGB", (8, 8), (value, k, 0)) for k in range(2)]

        return train(path, module, rows(3), num_epochs=3, sample_steps=2, sampler=sampler, sample_captions=["a", "b"],
                     **more)

    run(tmp_path / "whole")
    crash(5)
    with pytest.raises(Crash):
        run(tmp_path / "cut")
    crash(None)
    records = run(tmp_path / "cut", resume="auto")
    assert sorted(records.samples) == [0, 9]
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole/samples").iterdir()]
    assert len(names) == 7
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "cut" / n).read_bytes() for n in names)
    assert [p.name for p in records.saved] == [f"epoch-{k}.safetensors" for k in range(3)]


def test_restoring_reaches_a_step_that_is_compiled(folder, tmp_path):
    """`Parameter.set_data` would not: compiled code goes on reading the memory that it replaced."""
    options = TrainingOptions(learning_rate=1e-2, num_epochs=2, checkpoint_steps=3, use_ema=True)
    run = Trainer(Accelerator(mode="graph"), rows(3), Module(folder), ModelLogger(tmp_path), options,
                  hooks=[Checkpoints(None, 3, 2)])
    run.run()
    trained = {f"{g}/{n}": to_numpy(p) for g, own in parameters_of(run.step).items() for n, p in own.items()}
    run.restore(open_checkpoint_folder(tmp_path / "checkpoints/step-00000003"))
    run.logger.num_steps, batches = 3, Batches(run.loader, run.inputs)
    while not run.is_done:
        run.train_on(*batches.next())
    again = {f"{g}/{n}": to_numpy(p) for g, own in parameters_of(run.step).items() for n, p in own.items()}
    assert run.step.compilations == 1 and differing_bits(trained, again) == 0


PRIOR = Objective(weighting_scheme="none", prior_loss_weight=1.0, posterior="sample")
BRIGHTNESS = Path(__file__).parents[2] / "examples/flux2/templates/brightness"
LORA = {"lora_base_model": "dit", "lora_rank": 2}
REAL = {  # name: family, mode, size of the pictures, what is trained
    "ddpm": ("ddpm_unet", "graph", (32, 32), {"trainable_models": "unet"}),
    "sft": ("flux2", "graph", (32, 32), LORA),
    "dreambooth": ("flux", "pynative", (32, 32), {**LORA, "task": "dreambooth", "objective": PRIOR}),
    "template": ("flux2", "pynative", (32, 32), {"trainable_models": "template_model",
                                                 "extra_inputs": "template_inputs"}),
}


def one_block_of_each_kind(monkeypatch):
    """The tiny networks have two of most, and compile for twice as long."""
    one = {"block_out_channels": [16], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    monkeypatch.setattr(tiny_unet, "CONFIG", tiny_unet.CONFIG | one)
    for tiny in (tiny_flux, tiny_flux2):
        dit = tiny.CONFIGS["dit"] | {"num_layers": 1, "num_single_layers": 1}
        monkeypatch.setattr(tiny, "CONFIGS", tiny.CONFIGS | {"dit": dit})


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_networks(tmp_path, crash, monkeypatch, name):
    kind, mode, side, how = REAL[name]
    if name != "template":  # which is made for two of each
        one_block_of_each_kind(monkeypatch)
    family(kind).write_tiny(tmp_path / "model", 0)
    data = [row | {"template_inputs": {"scale": k / 3}} for k, row in enumerate(rows(3, side=side))]

    def run(path, **more):
        module = DiffusionTrainingModule()
        module.pipe = family(kind).pipeline.from_pretrained(str(tmp_path / "model"))
        if name == "template":
            module.load_training_template_model(module.pipe, str(BRIGHTNESS), trust_template_code=True)
        module.switch_pipe_to_training_mode(module.pipe, **how)
        classes = {"class_dataset": rows(2, 50, side)} if name == "dreambooth" else {}
        options = {"num_epochs": None, "max_train_steps": 4, "checkpoint_steps": 2, "use_ema": True}  # 3 steps an epoch
        return train(path, module, data, mode, **options, **classes, **more)

    crash.copies({3: tmp_path / "cut"})
    run(tmp_path / "whole")
    assert latest(tmp_path / "cut/checkpoints").step == 2
    crash(None)
    run(tmp_path / "cut", resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "cut")
