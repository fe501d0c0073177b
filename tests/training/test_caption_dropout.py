"""Caption dropout: which samples lose their prompt is drawn, and what the step takes of them is an empty prompt's."""
from __future__ import annotations

import numpy as np
import pytest
from device import DEVICE
from toy_run import Module, Own, rows, toy_model

from ms_diffsynth.cli.main import main
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


def trainer(path, module, mode="pynative", **options):
    given = {"num_epochs": None, "max_train_steps": 4, "batch_size": 4, "seed": 3}
    return Trainer(Accelerator(1, mode, DEVICE), rows(8), module, ModelLogger(path), TrainingOptions(**given | options))


def batches(run, count):
    """Of the first batches: each sample's number, and its slots by name."""
    names = (*run.cut.cache, *run.cut.draws)
    for _, batch in zip(range(count), run.loader):
        arrays = {name: tensor.asnumpy() for name, tensor in zip(names, run.inputs(batch))}
        for k, (row, sample) in enumerate(zip(batch.indices, batch.sample_indices)):
            yield int(row), int(sample), {name: array[k] for name, array in arrays.items()}


@pytest.mark.parametrize("trained", ["dit", "text_encoder"])
def test_a_sample_that_is_drawn_has_what_an_empty_prompt_gives_and_all_else_of_its_own(folder, tmp_path, trained):
    module = Module(folder, trainable_models=trained)
    name = "prompt_embeds" if trained == "dit" else "ids"
    empty = module.prepare_prompt("", module.training_cut())
    assert set(empty) == {name}
    without = {sample: slots for _, sample, slots in batches(trainer(tmp_path / "a", module), 2)}
    run = trainer(tmp_path / "b", module, caption_dropout=0.4)
    lost = []
    for row, sample, slots in batches(run, 2):
        draw = Draws(3).of(np.array([sample]))("caption_draw", "uniform", (1,))[0]
        own = module.prepare_prompt(f"picture {row}", run.cut)[name]
        assert np.array_equal(slots[name], empty[name] if draw < 0.4 else own)
        assert not np.array_equal(own, empty[name])
        assert all(np.array_equal(slots[other], without[sample][other]) for other in slots if other != name)
        lost.append(draw < 0.4)
    assert 0 < sum(lost) < len(lost) == 8


def test_all_or_none(folder, tmp_path):
    module = Module(folder)
    empty = module.prepare_prompt("", module.training_cut())["prompt_embeds"]
    for _, _, slots in batches(trainer(tmp_path, module, caption_dropout=1.0), 2):
        assert np.array_equal(slots["prompt_embeds"], empty)
    assert trainer(tmp_path / "none", module).no_caption == {}


def test_where_it_cannot_be_it_is_refused(folder, tmp_path, tiny_model, capsys):
    with pytest.raises(ConfigError, match=r"caption_dropout=0.1 with Own.forward"):
        trainer(tmp_path, Own(folder), caption_dropout=0.1)
    rows(1)[0]["image"].resize((32, 32)).save(tmp_path / "0.png")
    assert main(["train", "--family", "ddpm_unet", "--model_paths", str(tiny_model("ddpm_unet")), "--trainable_models",
                 "unet", "--dataset_base_path", str(tmp_path), "--height", "32", "--width", "32", "--caption_dropout",
                 "0.1", "--max_train_steps", "1", "--output_path", str(tmp_path / "out")]) != 0
    assert "caption_dropout=0.1: nothing that UnconditionalImagePipeline" in capsys.readouterr().err
