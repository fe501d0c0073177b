"""Training runs of the toy family: what they write, that they repeat, and how they fail."""
from __future__ import annotations

import json

import numpy as np
import pytest
from low_rank import lora_parameters
from mindspore import Tensor, ops
from PIL import Image
from records import column, records
from toy_run import SIDE, Module, poison, rows, train

from ms_diffsynth import FlowMatchSFTLoss, UnifiedDataset
from ms_diffsynth.data.loader import Loader
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError, TrainingError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.training.distributed import Accelerator, DistributedDataParallelKwargs
from ms_diffsynth.training.logger import COLUMNS, ModelLogger
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.trainer import Trainer


class Documented(Module):
    """The documents' simple training script."""

    def forward(self, data):
        inputs_posi = {"prompt": data["prompt"]}
        inputs_nega = {"negative_prompt": ""}
        inputs_shared = {
            "input_image": data["image"], "height": data["image"].size[1], "width": data["image"].size[0],
            "cfg_scale": 1, "rand_device": self.pipe.device, "use_gradient_checkpointing": True,
            "use_gradient_checkpointing_offload": False,
        }
        for unit in self.pipe.units:
            inputs_shared, inputs_posi, inputs_nega = self.pipe.unit_runner(unit, self.pipe, inputs_shared, inputs_posi,
                                                                            inputs_nega)
        return FlowMatchSFTLoss(self.pipe, **inputs_shared, **inputs_posi)


def events(path, kind=None):
    def refuse(text):
        raise ValueError(f"{text} is no JSON")

    lines = (path / "events.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    return [e for e in found if kind in (None, e["event"])]


def names(path):
    """Files of a run, but for its checkpoints and its lock."""
    found = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    return [n for n in found if not n.startswith("checkpoints/") and n != ".lock"]


def checkpoints(path):
    return [n for n in names(path) if n.endswith(".safetensors")]


def weights(module):
    return [p.asnumpy().copy() for p in lora_parameters(module.pipe.dit)]


# -- what a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_writes_its_records_checkpoints_and_pictures(folder, tmp_path, capfd):
    module = Module(folder)
    calls = []

    def sampler():
        calls.append(weights(module))
        return [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))]

    train(tmp_path / "run", module, rows(3), "graph", num_epochs=2, sample_steps=4, sampler=sampler,
          sample_captions=["a", "b"], settings={"note": "x"}, lr_scheduler="linear", lr_warmup_steps=2)
    run = tmp_path / "run"
    assert names(run) == ["epoch-0.safetensors", "epoch-1.safetensors", "events.jsonl", "loss.csv", "loss.png",
                          "report.html", "samples/before_after.png", "samples/step-0.png", "samples/step-4.png",
                          "samples/step-6.png", "training_args.json"]
    assert tuple(records(run)[0]) == COLUMNS and len(records(run)) == 6
    assert column(run, "step").tolist() == [1, 2, 3, 4, 5, 6] and column(run, "epoch").tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(column(run, "learning_rate"), [0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3], rtol=1e-6)
    assert np.isfinite(column(run)).all() and (column(run, "grad_norm") > 0).all()
    assert not column(run, "is_skipped").any()
    settings = json.loads((run / "training_args.json").read_text())
    assert settings["note"] == "x" and settings["learning_rate"] == 1e-2 and settings["mode"] == "graph"
    end, = events(run, "end")
    assert (column(run, "seconds") < end["compile_seconds"]).all(), "compiling does not count"
    assert end["compilations"] == 1 and end["compile_seconds"] > 0 and end["skipped"] == 0 and end["step"] == 6
    assert 0.1 < end["peak_memory_gib"] < 64
    assert [e["file"] for e in events(run, "saved")] == ["epoch-0.safetensors", "epoch-1.safetensors"]
    assert len(calls) == 3 and not all(np.array_equal(a, b) for a, b in zip(calls[0], calls[2]))
    lora = load_state_dict(run / "epoch-1.safetensors")
    assert len(lora) == 4 and any(np.array_equal(v, weights(module)[0]) for v in lora.values())
    shown = capfd.readouterr().err
    for part in ("training 128 parameters in 4 tensors in graph mode on CPU with ",
                 " kernels: 6 steps, 3 batches per epoch",
                 "compiled the training step (16 x 16) in", "trained 6 steps; the step was compiled 1 time(s)",
                 "epoch-1.safetensors"):
        assert part in shown


def test_a_compilation_is_told_with_its_size_where_there_are_several(folder, tmp_path, capfd):
    train(tmp_path, Module(folder), [*rows(1), *rows(1, 1, side=(16, 24))], "graph", num_epochs=None,
          max_train_steps=2, batch_size=2)
    shown = capfd.readouterr().err
    assert "compiling the training step 1 of 2 (" in shown and "compiled the training step 2 of 2 (" in shown
    assert all(f"({size}) in " in shown for size in ("16 x 16", "24 x 16"))


def test_what_is_compiled_to_prepare_rows_is_told_before_there_is_a_step(folder, tmp_path, capfd):
    class Compiling(Module):
        def prepare(self, data, cut):
            self.pipe.announce("the text encoder", "1x7")(1.5)
            return super().prepare(data, cut)

    train(tmp_path / "run", Compiling(folder), rows(2), mode="pynative", max_train_steps=1, batch_size=2)
    assert "compiled the text encoder in 1.5 s" in capfd.readouterr().err


def test_intervals_count_steps_and_part_of_an_epoch_is_no_epoch(folder, tmp_path):
    train(tmp_path / "a", Module(folder), rows(3), num_epochs=None, max_train_steps=5, save_steps=2)
    assert checkpoints(tmp_path / "a") == ["step-2.safetensors", "step-4.safetensors", "step-5.safetensors"]
    train(tmp_path / "b", Module(folder), rows(3), num_epochs=9, max_train_steps=4)
    assert checkpoints(tmp_path / "b") == ["epoch-0.safetensors", "step-4.safetensors"]
    assert len(records(tmp_path / "b")) == 4


def test_whole_weights_are_saved_by_name(folder, tmp_path):
    module = Module(folder, trainable_models="dit.layer_2,vae.encoder")
    logger = ModelLogger(tmp_path / "run", remove_prefix_in_ckpt="pipe.dit.")
    launch_training_task(Accelerator(mode="pynative"), rows(2), module, logger, learning_rate=1e-2,
                                 num_epochs=1)
    saved = load_state_dict(tmp_path / "run/epoch-0.safetensors")
    assert sorted(saved) == ["layer_2.bias", "layer_2.weight", "pipe.vae.encoder.bias", "pipe.vae.encoder.weight"]
    assert np.array_equal(saved["layer_2.weight"], module.pipe.dit.layer_2.weight.asnumpy())


# -- the same numbers, whatever the way ------------------------------------------------------------------------------


def test_both_modes_have_the_same_losses_over_twenty_steps_and_repeat_to_the_last_bit(folder, tmp_path):
    modules = {}
    for name, mode in (("graph", "graph"), ("again", "graph"), ("eager", "pynative")):
        modules[name] = Module(folder)
        train(tmp_path / name, modules[name], rows(4), mode, batch_size=2, num_epochs=None, max_train_steps=20,
              save_steps=20)
    graph, again, eager = (tmp_path / n for n in ("graph", "again", "eager"))
    # one rounding of float32 (6e-8) a step, in a loss of about 1; the learning rate does not blow it up
    np.testing.assert_allclose(column(eager), column(graph), rtol=2e-6)
    np.testing.assert_allclose(column(eager, "grad_norm"), column(graph, "grad_norm"), rtol=1e-5)
    for a, b in zip(weights(modules["eager"]), weights(modules["graph"])):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # of weights of size 0.3
    for name in COLUMNS[:-1]:
        assert [r[name] for r in records(again)] == [r[name] for r in records(graph)]
    assert (again / "step-20.safetensors").read_bytes() == (graph / "step-20.safetensors").read_bytes()
    assert column(graph)[-5:].mean() < column(graph)[:5].mean()
    assert events(graph, "end")[0]["compilations"] == 1


def test_the_documents_script_trains_with_the_same_losses(folder, tmp_path, capfd):
    data = tmp_path / "data"
    data.mkdir()
    table = ["image,prompt"]
    for k, row in enumerate(rows(3)):
        row["image"].save(data / f"{k}.png")
        table.append(f"{k}.png,{row['prompt']}")
    (data / "metadata.csv").write_text("\n".join(table))
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    dataset = UnifiedDataset(
        base_path=str(data), metadata_path=str(data / "metadata.csv"), repeat=2, data_file_keys="image",
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path=str(data), height=SIDE, width=SIDE, height_division_factor=16, width_division_factor=16))
    model = Documented(folder)
    model_logger = ModelLogger(output_path=tmp_path / "toy", remove_prefix_in_ckpt="pipe.dit.")
    launch_training_task(accelerator, dataset, model, model_logger, learning_rate=1e-2, num_epochs=1)
    assert "in graph mode, by the module's own forward" in capfd.readouterr().err
    drawn = [model.pipe.random("noise", "normal", (4,)).tolist() for _ in range(2)]
    assert drawn[0] != drawn[1], "draws of a training stay on the pipeline"
    train(tmp_path / "program", Module(folder), dataset, num_epochs=1)
    assert len(records(tmp_path / "toy")) == 6
    for name, tolerance in (("loss", 2e-6), ("grad_norm", 1e-5)):
        ours, program = column(tmp_path / "toy", name), column(tmp_path / "program", name)
        np.testing.assert_allclose(ours, program, rtol=tolerance)


def test_class_images_are_weighted_in_the_program_and_in_a_forward_of_ones_own(folder, tmp_path):
    """The loss of a batch is L_instance + w L_class."""
    found = {}
    for kind in (Module, Documented):
        for weight in (1e-6, 1.0, 3.0):
            objective = Objective(weighting_scheme="none", prior_loss_weight=weight, posterior="sample")
            module = kind(folder, objective=objective)
            path = tmp_path / f"{kind.__name__}-{weight}"
            train(path, module, rows(2), batch_size=2, max_train_steps=1, class_dataset=rows(3, 50))
            found[kind, weight] = column(path)[0]
    instance, one, three = (found[Module, w] for w in (1e-6, 1.0, 3.0))
    assert one > 1.2 * instance
    assert three - instance == pytest.approx(3 * (one - instance), rel=1e-5)
    for weight in (1e-6, 1.0, 3.0):
        assert found[Documented, weight] == pytest.approx(found[Module, weight], rel=2e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_accumulation_averages_and_the_rest_of_an_epoch_is_a_step(folder, tmp_path, size):
    path = tmp_path / "run"
    train(path, Module(folder), rows(3 * size), batch_size=size, accumulation=2, num_epochs=3, learning_rate=0.0)
    assert column(path, "epoch").tolist() == [0, 0, 1, 1, 2, 2]
    train(tmp_path / "single", Module(folder), rows(3 * size), batch_size=size, num_epochs=3, learning_rate=0.0)
    losses = column(tmp_path / "single").reshape(3, 3)  # the same draws
    wanted = np.stack([losses[:, :2].mean(1), losses[:, 2]], 1).ravel()
    np.testing.assert_allclose(column(path), wanted, rtol=1e-6)


def test_each_rank_gets_its_rows_of_what_one_process_gets(folder, tmp_path):
    module = Module(folder, objective=Objective(weighting_scheme="logit_normal", posterior="sample"))
    run = Trainer(Accelerator(mode="pynative"), rows(5), module, ModelLogger(tmp_path), TrainingOptions())
    whole = Loader(run.dataset, 4, seed=9)
    parts = [Loader(run.dataset, 2, seed=9, rank=r, world_size=2) for r in range(2)]
    for _ in range(2):
        for batches in zip(whole, *parts):
            one, *two = [[t.asnumpy() for t in run.inputs(b)] for b in batches]
            assert len(one) == len(run.cut.cache) + len(run.cut.draws) == 5
            for a, *b in zip(one, *two):
                assert a.shape[0] == 4 and np.array_equal(a, np.concatenate(b))


def test_each_bucket_is_compiled_once_and_no_other_shape_is(folder, tmp_path):
    module = Module(folder)
    dataset = [*rows(3), *rows(2, 10, (8, 32))]
    run = Trainer(Accelerator(mode="graph"), dataset, module, ModelLogger(tmp_path),
                  TrainingOptions(num_epochs=2, batch_size=2))
    run.run()
    assert run.step.compilations == 2 and len(records(tmp_path)) == 6
    batch = next(iter(Loader(run.dataset, 1)))  # a batch size that was not planned
    with pytest.raises(TrainingError, match=r"compilation 3.*2 were planned from the buckets"):
        run.step.step(*run.inputs(batch))


@pytest.mark.parametrize("more", [{}, {"use_ema": True}])
def test_the_newest_saves_are_kept_also_by_a_resumed_run(folder, tmp_path, more):
    path, options = tmp_path / "run", {"save_steps": 1, "keep_saved": 2, "num_epochs": None, **more}
    for steps, kept in ((3, (2, 3)), (5, (4, 5))):
        records = train(path, Module(folder), rows(3), max_train_steps=steps, resume="auto", **options)
        expected = {f"step-{k}{kind}.safetensors" for k in kept for kind in (("", "-ema") if more else ("",))}
        assert {p.name for p in path.glob("*.safetensors")} == {p.name for p in records.saved} == expected


# -- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_one_bad_step_is_passed_over_and_shown(folder, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, 2)
    path = tmp_path / "run"
    train(path, Module(folder), rows(3), "graph", num_epochs=2, save_steps=1)
    assert column(path, "is_skipped").tolist() == [0, 0, 1, 0, 0, 0]
    assert np.isnan(column(path)).tolist() == [False, False, True, False, False, False]
    saved = [load_state_dict(path / f"step-{k}.safetensors") for k in (2, 3, 4)]
    assert all(np.array_equal(saved[0][k], saved[1][k]) for k in saved[0])
    assert not all(np.array_equal(saved[1][k], saved[2][k]) for k in saved[1])
    assert all(np.isfinite(v).all() for v in saved[2].values())
    skipped, = events(path, "skipped")
    assert skipped["at"] == 3 and skipped["loss"] == "nan" and events(path, "end")[0]["skipped"] == 1
    shown = capfd.readouterr().err
    assert "skipped 1" in shown and "trained 6 steps, 1 skipped as non-finite" in shown
    assert (path / "loss.png").exists()


@pytest.mark.fault
def test_twenty_bad_steps_in_a_row_end_the_run_and_leave_whole_files(folder, tmp_path):
    module = Module(folder)
    first = lora_parameters(module.pipe.dit)[0]
    ops.assign(first, Tensor(np.full(first.shape, np.nan, np.float32)))
    before = weights(module)
    with pytest.raises(TrainingError, match=r"20 steps in a row .*step 20, loss nan.*lower learning_rate"):
        train(tmp_path / "run", module, rows(3), num_epochs=50, save_steps=100)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, weights(module)))
    path = tmp_path / "run"
    assert names(path) == ["events.jsonl", "loss.csv", "report.html", "training_args.json"]
    assert len(records(path)) == 20 and column(path, "is_skipped").all()
    assert [e["event"] for e in events(path)] == ["start"] + ["skipped"] * 20 + ["stopped"]
    assert "20 steps in a row" in events(path, "stopped")[0]["reason"]


@pytest.mark.fault
def test_nineteen_bad_steps_do_not_end_the_run(folder, tmp_path, monkeypatch):
    normal = Draws.normal
    monkeypatch.setattr(Draws, "normal", lambda self, stream, indices, shape=(): normal(self, stream, indices, shape)
                        * np.float32(np.nan if int(indices[0]) % 20 else 1))
    train(tmp_path / "run", Module(folder), rows(4), num_epochs=10)
    assert column(tmp_path / "run", "is_skipped").sum() == 38


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, part", [
    ({"num_epochs": None}, "neither num_epochs nor max_train_steps"), ({"batch_size": 0}, "batch_size=0"),
    ({"max_train_steps": 0}, "max_train_steps=0"), ({"loss_scale": 0.5}, "loss_scale=0.5"),
    ({"learning_rat": 1.0}, "Did you mean 'learning_rate'"), ({"lr_scheduler": "cosin"}, "Did you mean 'cosine'"),
    ({"class_dataset": rows(1)}, "no prior_loss_weight")])
def test_impossible_options(folder, tmp_path, options, part):
    with pytest.raises(ConfigError, match=part):
        train(tmp_path / "run", Module(folder), rows(2), **options)


def test_a_prior_without_class_images(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"prior_loss_weight=1.0, but there are no class images"):
        train(tmp_path / "run", Module(folder, objective=Objective(prior_loss_weight=1.0)), rows(2))


def test_a_row_without_a_prompt(folder, tmp_path):
    with pytest.raises(DataError, match=r"a row has no 'prompt': it has image, text"):
        train(tmp_path / "run", Module(folder), [{"image": rows(1)[0]["image"], "text": "a"}])


def test_options_of_a_command_line_win():
    class Arguments:
        learning_rate = 3.0
        other = 1

    options = TrainingOptions.of(Arguments(), {"learning_rate": 1.0, "batch_size": 4})
    assert (options.learning_rate, options.batch_size) == (3.0, 4)
