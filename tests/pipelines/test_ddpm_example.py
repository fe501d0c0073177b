"""The example with a training step and a loop of one's own."""
from __future__ import annotations

import logging
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth import UnconditionalImagePipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples/unconditional/train_ddpm.py"))


@pytest.fixture
def train(example, tmp_path):
    """Two steps on four pictures, eagerly; returns the losses."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for k in range(4):
        Image.fromarray(rng.integers(0, 256, (24, 16, 3), np.uint8)).save(tmp_path / f"data/{k}.png")

    def run(**settings):
        config = example["TrainingConfig"](
            dataset_name=str(tmp_path / "data"), image_size=8, train_batch_size=2, eval_batch_size=2, num_epochs=1,
            lr_warmup_steps=0, num_inference_steps=1, mode="pynative", output_dir=str(tmp_path / "out"), **settings)
        return example["main"](config)

    return run


def test_with_draws_of_the_host_it_can_be_repeated_and_leaves_a_grid_and_a_model(train, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        losses = train(draws="host")
    assert len(losses) == 2 and np.isfinite(losses).all() and "resum" not in caplog.text
    assert (tmp_path / "out/samples/0000.png").is_file()
    model = UnconditionalImagePipeline.from_pretrained(str(tmp_path / "out/model"))
    assert model.config("unet")["sample_size"] == 8 and model.unet is not None
    assert train(draws="host") == losses


def test_with_draws_inside_the_step_it_trains_and_says_what_that_costs(train, caplog):
    with caplog.at_level(logging.WARNING):
        losses = train()
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert caplog.text.count("Exact resumption does not cover this step") == 1


def test_pictures_are_cropped_to_a_square_of_their_middle(example, tmp_path):
    stripes = np.zeros((24, 8, 3), np.uint8)
    stripes[8:16] = 255
    config = example["TrainingConfig"](image_size=8, train_batch_size=1)
    loader = example["make_dataloader"](config, [Image.fromarray(stripes)], example["Accelerator"]())
    batch = next(iter(loader))
    assert batch[0].shape == (1, 3, 8, 8) and np.allclose(batch[0].asnumpy(), 1.0)
