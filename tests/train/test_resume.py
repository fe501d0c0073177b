"""Resume: cut anywhere and gone on with, a run gives the bits of one that was never cut; nothing is ever mixed."""
from __future__ import annotations

import hashlib
import logging
import shutil
import signal
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ms_diffsynth import UnifiedDataset, runtime
from ms_diffsynth.config import SETTINGS
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import CheckpointError, ConfigError, OutputError, WeightError
from ms_diffsynth.io.checkpoint import latest, open_checkpoint_folder
from ms_diffsynth.io.lock import lock_folder
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.registry import family
from ms_diffsynth.train import loop, resume
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.draws import Draws
from ms_diffsynth.train.logger import COLUMNS, ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.signals import Stopped
from ms_diffsynth.train.split import launch_data_process_task

SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "toy"
    family("toy").write_tiny(path, 0)
    return path


@pytest.fixture(autouse=True, scope="module")
def runtime_restored():
    yield
    runtime.configure("graph", "CPU")


def rows(count, first=0, side=(SIDE, SIDE)):
    return [{"image": Image.fromarray(np.random.default_rng(first + k).integers(0, 256, (*side, 3), np.uint8)),
             "prompt": f"picture {first + k}"} for k in range(count)]


def files(base, count=3, first=0):
    """A data set of files."""
    base.mkdir(exist_ok=True)
    for k, row in enumerate(rows(count, first)):
        row["image"].save(base / f"{first + k}.png")
    lines = ["image,prompt", *(f"{first + k}.png,picture {first + k}" for k in range(count))]
    (base / "metadata.csv").write_text("\n".join(lines))
    return dataset_of(base)


def dataset_of(base):
    return UnifiedDataset(str(base), str(base / "metadata.csv"), 1, "image",
                          UnifiedDataset.default_image_operator(str(base), height=SIDE, width=SIDE))


class Module(DiffusionTrainingModule):
    def __init__(self, folder, task="sft", objective=None, **how):
        super().__init__()
        self.pipe = family("toy").pipeline.from_pretrained(str(folder))
        self.switch_pipe_to_training_mode(self.pipe, task=task, objective=objective,
                                          **(how or {"lora_base_model": "dit", "lora_rank": 2}))


class Own(Module):
    """A module that computes its loss itself."""

    def forward(self, data):
        return super().forward(data) * 1.0


def train(path, module, dataset, mode="pynative", accumulation=1, **options):
    return loop.launch_training_task(Accelerator(accumulation, mode, "CPU"), dataset, module, ModelLogger(path),
                                     **{"learning_rate": 1e-2, **options})


class Crash(Exception):
    """What a kill is to the files: the run is not asked."""


@pytest.fixture
def crash(monkeypatch):
    """``crash(n)``: the run dies right after its n-th batch, before anything that is due then. None: it lives."""
    original = loop._Run._train_on

    def set_to(count):
        seen = []

        def train_on(self, batch):
            found = original(self, batch)
            seen.append(batch)
            if len(seen) == count:
                raise Crash
            return found

        monkeypatch.setattr(loop._Run, "_train_on", train_on)

    return set_to


def table(path):
    """loss.csv without the seconds."""
    return [line.rsplit(",", 1)[0] for line in (path / "loss.csv").read_text().splitlines()]


def state(path):
    """Every array of a run's last checkpoint, and what is no array but for the configuration."""
    found = latest(path / "checkpoints")
    arrays = {f"{group}/{name}": array for group in found.groups for name, array in found.read(group).items()}
    return arrays, {k: v for k, v in found.state.items() if k not in ("identity", "saved", "saved_at")}


def differing_bits(one, two):
    assert one.keys() == two.keys() and all(one[k].dtype == two[k].dtype for k in one)
    return sum(int(np.unpackbits(np.frombuffer(one[k].tobytes(), np.uint8) ^ np.frombuffer(two[k].tobytes(), np.uint8))
                   .sum()) for k in one)


def equal(one, two):
    """Whether two runs left the same losses, weights, moments, averages, scales and counts, to the bit."""
    (arrays, counts), (other_arrays, other_counts) = state(one), state(two)
    last = sorted(p.name for p in one.glob("*.safetensors"))[-1]
    return (table(one) == table(two) and differing_bits(arrays, other_arrays) == 0 and counts == other_counts
            and (one / last).read_bytes() == (two / last).read_bytes())


def digests(path):
    """SHA-256 of every file below a folder, locks excepted."""
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def steps_in(path):
    return sorted(p.name for p in (path / "checkpoints").iterdir() if p.is_dir())


# -- the same bits ---------------------------------------------------------------------------------------------------

COMMON = {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "num_epochs": 4}
# five rows: in batches of two there are three of them an epoch, and three steps; in groups of three rows two steps
SCENARIOS = {
    "epoch end": ({"batch_size": 2, "loss_scale": 1024.0}, 8, 6),
    "mid-epoch": ({"batch_size": 2, "checkpoint_steps": 4}, 6, 4),
    "accumulation": ({"accumulation": 3, "checkpoint_steps": 3, "loss_scale": 1024.0}, 12, 3),
    "skipped step": ({"batch_size": 2, "checkpoint_steps": 1, "loss_scale": 2.0**16}, 6, 5),
}


@pytest.fixture
def dynamic_scale_and_a_bad_step(monkeypatch):
    """The scale grows after two good steps; the samples of the fifth step are not finite."""
    normal = Draws.normal

    def poisoned(self, stream, sample_indices, shape=()):
        values = normal(self, stream, sample_indices, shape)
        values[np.isin(sample_indices, [9])] *= np.nan
        return values

    monkeypatch.setattr(Draws, "normal", poisoned)
    monkeypatch.setattr(ms.amp, "StaticLossScaler", lambda scale: ms.amp.DynamicLossScaler(scale, 2, 2))


@pytest.mark.parametrize("name, mode", [
    pytest.param(name, mode, marks=[pytest.mark.slow] * ((name, mode) == ("accumulation", "graph")))
    for name in SCENARIOS for mode in ("pynative", "graph")])
def test_a_run_that_was_cut_gives_the_bits_of_one_that_was_not(folder, tmp_path, crash, request, name, mode):
    options, batches, resumed_at = SCENARIOS[name]
    if name == "skipped step":
        request.getfixturevalue("dynamic_scale_and_a_bad_step")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, Module(folder), rows(5), mode, **COMMON, **options)
    crash(batches)
    with pytest.raises(Crash):
        train(cut, Module(folder), rows(5), mode, **COMMON, **options)
    assert len(table(cut)) > resumed_at and latest(cut / "checkpoints").step == resumed_at
    crash(None)
    train(cut, Module(folder), rows(5), mode, **COMMON, **options, resume="auto")
    assert equal(whole, cut)
    assert len(table(whole)) == 1 + (8 if name == "accumulation" else 12)
    arrays, counts = state(whole)
    assert any(name.startswith("ema/") for name in arrays) and counts["skipped"] == (name == "skipped step")
    if name == "skipped step":
        assert arrays["loss_scale/scale_value"] == 2.0**20 and ",nan," in "\n".join(table(whole))  # 5 up, 1 down


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_random_cuts(folder, tmp_path, crash, count):
    options = {"accumulation": 2, "use_ema": True, "num_epochs": 2, "checkpoint_steps": 2}
    train(tmp_path / "whole", Module(folder), rows(5), **options)  # 10 batches, 6 steps
    for number, batches in enumerate(np.random.default_rng(7).integers(1, 11, count).tolist()):
        path = tmp_path / str(number)
        crash(batches)
        with pytest.raises(Crash):
            train(path, Module(folder), rows(5), **options)
        crash(None)
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
        launch_data_process_task(Accelerator(1, "pynative", "CPU"), files(tmp_path / "data", 5), first,
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
    assert sorted(records.samples) == [0, 2, 4, 6, 8, 9]
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole/samples").iterdir()]
    assert len(names) == 7
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "cut" / n).read_bytes() for n in names)
    assert [p.name for p in records.saved] == [f"epoch-{k}.safetensors" for k in range(3)]


def test_restoring_reaches_a_step_that_is_compiled(folder, tmp_path):
    """`Parameter.set_data` would not: compiled code goes on reading the memory that it replaced."""
    options = loop.TrainingOptions(learning_rate=1e-2, num_epochs=2, checkpoint_steps=3, use_ema=True)
    run = loop._Run(Accelerator(mode="graph"), rows(3), Module(folder), ModelLogger(tmp_path), options, None, None, [])
    run.start({})
    run.prepare()
    run.train()
    trained = {f"{g}/{n}": to_numpy(p) for g, own in resume.parameters_of(run.step).items() for n, p in own.items()}
    run.restore(open_checkpoint_folder(tmp_path / "checkpoints/step-00000003"))
    run.logger.num_steps = 3
    run.train()
    again = {f"{g}/{n}": to_numpy(p) for g, own in resume.parameters_of(run.step).items() for n, p in own.items()}
    assert run.step.compilations == 1 and differing_bits(trained, again) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm_unet", "flux2"])
def test_real_networks(tmp_path, crash, name):
    family(name).write_tiny(tmp_path / "model", 0)
    module = type("Real", (DiffusionTrainingModule,), {})
    how = {"trainable_models": "unet"} if name == "ddpm_unet" else {"lora_base_model": "dit", "lora_rank": 2}

    def run(path, **more):
        made = module()
        made.pipe = family(name).pipeline.from_pretrained(str(tmp_path / "model"))
        made.switch_pipe_to_training_mode(made.pipe, **how)
        size = (32, 32) if name == "ddpm_unet" else (64, 64)
        return train(path, made, rows(3, side=size), "graph", num_epochs=2, checkpoint_steps=2, use_ema=True, **more)

    run(tmp_path / "whole")
    crash(3)
    with pytest.raises(Crash):
        run(tmp_path / "cut")
    crash(None)
    run(tmp_path / "cut", resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "cut")


# -- longer, and with changes ----------------------------------------------------------------------------------------


def test_a_finished_run_is_made_longer(folder, tmp_path):
    train(tmp_path / "whole", Module(folder), rows(5), num_epochs=None, max_train_steps=9, batch_size=2)
    for steps in (4, 4, 9):  # the second one finds nothing to do
        train(tmp_path / "run", Module(folder), rows(5), num_epochs=None, max_train_steps=steps, batch_size=2,
              resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "run")


def test_where_the_learning_rate_depends_on_the_length_it_is_a_change(folder, tmp_path):
    def run(**more):
        return train(tmp_path / "run", Module(folder), rows(3), **({"num_epochs": 1, "lr_scheduler": "linear"} | more))

    run()
    with pytest.raises(CheckpointError, match=r"num_epochs: 1 when saved, 2 now\n.*--accept_changes num_epochs"):
        run(num_epochs=2, resume="auto")
    run(num_epochs=2, resume="auto", accept_changes=("num_epochs",))
    assert [row.split(",")[3] for row in table(tmp_path / "run")[4:]] == ["0.005", "0.00333333333", "0.00166666667"]


def test_changed_settings_are_refused_one_by_one_and_accepted_one_by_one(folder, tmp_path):
    def run(module=None, **more):
        return train(tmp_path / "run", module or Module(folder), rows(3), **{"num_epochs": 1, **more})

    run()
    before = digests(tmp_path / "run")
    changes = {"learning_rate": 2e-2, "seed": 3, "batch_size": 2, "resume": "auto", "num_epochs": 2}
    with pytest.raises(CheckpointError) as error:
        run(**changes)
    assert str(error.value).splitlines()[1:] == [
        "  learning_rate: 0.01 when saved, 0.02 now", "  batch_size: 1 when saved, 2 now",
        "  seed: 42 when saved, 3 now", "Set them back, or go on with the change by --accept_changes "
        "learning_rate,batch_size,seed, or choose another output_path to start afresh with --resume none."]
    with pytest.raises(CheckpointError, match=r"than this one:\n  seed: 42 when saved, 3 now\nSet"):
        run(**changes, accept_changes=("learning_rate", "batch_size"))
    with pytest.raises(CheckpointError, match=r"posterior: \"mean\" when saved, \"sample\" now"):
        run(Module(folder, objective=Objective(posterior="sample")), resume="auto")
    with pytest.raises(CheckpointError, match=r"mode: \"pynative\" when saved, \"graph\" now"):
        run(mode="graph", resume="auto")
    with pytest.raises(ConfigError, match=r"accept_changes names sed: .*Did you mean 'seed'\?"):
        run(**changes, accept_changes=("sed",))
    assert digests(tmp_path / "run") == before, "refused before anything is written"
    run(**changes, accept_changes=("learning_rate", "batch_size", "seed", "max_train_steps"))
    assert [row.split(",")[3] for row in table(tmp_path / "run")[1:]] == ["0.01"] * 3 + ["0.02"]
    assert latest(tmp_path / "run/checkpoints").state["identity"]["seed"] == 3, "accepted for good"


def test_a_changed_loss_scale_is_obeyed_and_an_average_begins_at_the_weights(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3), loss_scale=64.0)
    trained = latest(tmp_path / "run/checkpoints").read("weights")
    train(tmp_path / "run", Module(folder), rows(3), loss_scale=8.0, use_ema=True, num_epochs=2, learning_rate=0.0,
          resume="auto", accept_changes=("loss_scale", "use_ema", "learning_rate"))
    arrays, _ = state(tmp_path / "run")
    assert arrays["loss_scale/scale_value"] == 8
    assert all(np.array_equal(arrays[f"ema/ema.{name}"], value) for name, value in trained.items())


def test_the_average_of_weights_from_a_file_begins_at_them(folder, tmp_path):
    train(tmp_path / "run", Module(folder, trainable_models="dit"), rows(3), learning_rate=0.0, use_ema=True)
    arrays, _ = state(tmp_path / "run")
    weights = {name: array for name, array in arrays.items() if name.startswith("weights/")}
    assert len(weights) == 6
    assert all(np.array_equal(arrays[name.replace("weights/", "ema/ema.")], weights[name]) for name in weights)


def test_another_lora_is_refused_even_when_it_is_accepted(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    with pytest.raises(WeightError, match="Resume with the model, LoRA"):
        train(tmp_path / "run", Module(folder, lora_base_model="dit", lora_rank=3), rows(3), resume="auto")


def test_what_may_change_is_a_setting_or_an_option():
    others = resume.MAY_CHANGE - SETTINGS.keys()
    assert others == {"num_workers", "find_unused_parameters"}


@pytest.mark.parametrize("change, expected", [
    ("caption", ["data.digest"]), ("picture", ["data.digest"]), ("row", ["data.rows", "data.digest"]),
    ("size", ["data.pictures"]), ("weights", ["weights.dit"]), ("place", [])])
def test_changed_data_and_weights(folder, tmp_path, change, expected):
    dataset, model = files(tmp_path / "data"), folder
    train(tmp_path / "run", Module(folder), dataset)
    metadata = tmp_path / "data/metadata.csv"
    if change == "caption":
        metadata.write_text(metadata.read_text().replace("picture 1", "a picture"))
        dataset = dataset_of(tmp_path / "data")
    elif change == "picture":
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "data/1.png")
    elif change == "row":
        dataset = files(tmp_path / "data", 4)
    elif change == "size":
        dataset.main_data_operator = UnifiedDataset.default_image_operator(str(tmp_path / "data"), height=32, width=32)
    elif change == "weights":
        model = tmp_path / "other"
        family("toy").write_tiny(tmp_path / "new", 1)
        shutil.copytree(folder, model)
        shutil.copytree(tmp_path / "new/transformer", model / "transformer", dirs_exist_ok=True)
    else:
        shutil.copytree(tmp_path / "data", tmp_path / "moved")
        dataset, model = dataset_of(tmp_path / "moved"), shutil.copytree(folder, tmp_path / "model")
    more = {"num_epochs": 2, "resume": "auto"}
    if expected:
        with pytest.raises(CheckpointError) as error:
            train(tmp_path / "run", Module(model), dataset, **more)
        lines = str(error.value).splitlines()[1:-1]
        assert [line.partition(":")[0].strip() for line in lines] == expected
        assert change != "row" or lines[0] == "  data.rows: 3 when saved, 4 now"
    train(tmp_path / "run", Module(model), dataset, **more, accept_changes=("data", "weights"))
    assert len(table(tmp_path / "run")) == 1 + 3 + (5 if change == "row" else 3)


def test_other_versions_are_told(folder, tmp_path, monkeypatch, caplog):
    train(tmp_path / "run", Module(folder), rows(3))
    monkeypatch.setattr(resume, "version", lambda name: "0.1")
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", Module(folder), rows(3), resume="auto")
    assert "the same bits are not promised" in caplog.text and "mindspore: " in caplog.text


# -- nothing is mixed ------------------------------------------------------------------------------------------------


def damage(checkpoint):
    file = checkpoint / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def test_a_new_run_does_not_start_among_the_checkpoints_of_another(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    before = digests(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run holds checkpoints of another run, the last one step-00000003. Go "
                                              r"on with it by --resume auto, or choose another output_path"):
        train(tmp_path / "run", Module(folder), rows(3))
    train(tmp_path / "other", Module(folder), rows(4))
    with pytest.raises(CheckpointError, match=r"holds checkpoints of another run than .*step-00000004"):
        train(tmp_path / "run", Module(folder), rows(4), resume=str(tmp_path / "other/checkpoints/step-00000004"))
    assert digests(tmp_path / "run") == before


def test_the_newest_checkpoint_is_damaged(folder, tmp_path, caplog):
    options = {"num_epochs": 2, "batch_size": 2, "checkpoint_steps": 2}
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    train(tmp_path / "run", Module(folder), rows(5), **options)
    damage(tmp_path / "run/checkpoints/step-00000006")
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", Module(folder), rows(5), **options, resume="auto")
    assert "has another SHA-256" in caplog.text and "aside-step-00000006" in caplog.text
    assert steps_in(tmp_path / "run") == ["aside-step-00000006", "step-00000004", "step-00000006"]
    assert equal(tmp_path / "whole", tmp_path / "run")


def test_every_checkpoint_is_damaged(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3), save_steps=1)
    for name in steps_in(tmp_path / "run"):
        damage(tmp_path / "run/checkpoints" / name)
    before = digests(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used \(step-00000002, "):
        train(tmp_path / "run", Module(folder), rows(3), resume="auto")
    assert digests(tmp_path / "run") == before


def test_going_back_keeps_later_checkpoints_but_never_uses_them(folder, tmp_path):
    options = {"num_epochs": 3, "save_steps": 1, "keep_checkpoints": 9}
    train(tmp_path / "whole", Module(folder), rows(3), **options)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for _ in range(2):
        train(run, Module(folder), rows(3), **options, resume=str(run / "checkpoints/step-00000007"))
        assert equal(tmp_path / "whole", run)
    aside = ["aside-step-00000008", "aside-step-00000008-2", "aside-step-00000009", "aside-step-00000009-2"]
    assert steps_in(run) == [*aside, *(f"step-{k:08d}" for k in range(1, 10))]


@pytest.mark.parametrize("path, expected", [
    ("atuo", r"resume=atuo: there is no such folder. Did you mean 'auto'\? .*checkpoints/step-00000120"),
    (".", "is no checkpoint, but something else")])
def test_no_checkpoint(folder, tmp_path, path, expected):
    with pytest.raises(CheckpointError, match=expected):
        train(tmp_path / "run", Module(folder), rows(3), resume=path)


def test_two_runs_in_one_folder(folder, tmp_path):
    with lock_folder(tmp_path / "run"):
        before = digests(tmp_path / "run")
        with pytest.raises(OutputError, match="is in use by another run: process"):
            train(tmp_path / "run", Module(folder), rows(3))
        assert digests(tmp_path / "run") == before
    train(tmp_path / "run", Module(folder), rows(3))


def test_what_a_killed_run_left_half_written_is_removed(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    left = tmp_path / "run/checkpoints/.tmp-999999999-0123abcd"
    left.mkdir()
    train(tmp_path / "run", Module(folder), rows(3), num_epochs=2, resume="auto")
    assert not left.exists()


# -- when, and how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, expected", [
    ({}, [4, 6]), ({"save_steps": 5}, [5, 6]), ({"checkpoint_steps": 4}, [4, 6]), ({"checkpoint_steps": 0}, []),
    ({"save_steps": 2, "keep_checkpoints": 3}, [2, 4, 6])])
def test_when_a_state_is_saved(folder, tmp_path, options, expected):
    train(tmp_path / "run", Module(folder), rows(4), num_epochs=2, batch_size=2 if not options else 1,
          **{"max_train_steps": 6, **options})
    found = sorted(int(p.name[5:]) for p in (tmp_path / "run").glob("checkpoints/step-*"))
    assert found == (expected if options else [2, 4])


def test_no_secret_is_in_a_checkpoint(folder, tmp_path):
    token = "hf_abcdefghijklmnop0123"
    args = SimpleNamespace(my_api_key="swordfish", note=f"a {token}", num_epochs=1)
    train(tmp_path / "run", Module(folder), rows(2), args=args, sample_captions=[token])
    text = (tmp_path / "run/checkpoints/step-00000002/state.json").read_text()
    assert token not in text and "swordfish" not in text and "[redacted]" in text


# -- signals ---------------------------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_after_its_step_with_everything_saved(folder, tmp_path, monkeypatch, capfd):
    options = {"accumulation": 2, "num_epochs": 3, "use_ema": True}
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    original, seen = loop._Run._train_on, []

    def train_on(self, batch):
        seen.append(batch)
        if len(seen) == 6:  # the first micro-step of step 4
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(loop._Run, "_train_on", train_on)
    with pytest.raises(Stopped) as error:
        train(tmp_path / "run", Module(folder), rows(5), **options)
    assert error.value.code == 143 and table(tmp_path / "run")[-1].startswith("4,1,")
    assert (tmp_path / "run/step-4.safetensors").exists() and (tmp_path / "run/step-4-ema.safetensors").exists()
    said = capfd.readouterr().err
    assert "stopped by SIGTERM after step 4 of 9: go on from" in said and "step-00000004 with --resume auto" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(tmp_path / "run", Module(folder), rows(5), **options, resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "run")


# -- loss.csv --------------------------------------------------------------------------------------------------------


def test_rows_after_the_checkpoint_and_torn_rows_are_cut(tmp_path, caplog):
    path = tmp_path / "run"
    path.mkdir()
    lines = [",".join(COLUMNS), "1,0,0.5,1e-4,1.5,0,0.25", "2,0,nan,1e-4,nan,1,0.25", "3,0,0.2", "4,0,0.3,1e-4,1,0,0.2"]
    (path / "loss.csv").write_text("\n".join(lines) + "\n5,0,")
    for after, count in ((2, 3), (4, 4)):
        copy = shutil.copytree(path, tmp_path / str(after))
        records = ModelLogger(copy)
        with caplog.at_level(logging.WARNING):
            records.start({}, after, copy)
        assert len((copy / "loss.csv").read_text().splitlines()) == count and records.num_steps == after
        assert records.losses == [(1, 0.5), (4, 0.3)][:count // 2]
    assert [r.message.partition("loss.csv ")[2] for r in caplog.records] == [
        "has the rows of 3 of 4 steps: the others are lost."]
