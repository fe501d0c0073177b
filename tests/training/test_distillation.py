"""Direct distillation: the loss by hand, its gradient, and a student that comes nearer to its teacher."""
from __future__ import annotations

import csv

import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, ops
from records import column

from ms_diffsynth.cli.main import main
from ms_diffsynth.diffusion.distillation import DirectDistillation, ReplayNoise, Unroll
from ms_diffsynth.diffusion.samplers import euler
from ms_diffsynth.errors import DataError
from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline, write_tiny
from ms_diffsynth.units import TensorUnit, run_unit

SIDE = 32
PROMPTS = ("a cat", "a dog", "a red house", "blue")


class Linear(TensorUnit):
    """A velocity with one weight, which also reads a condition."""

    input_params, output_params = ("sigma", "latents", "shift"), ("velocity",)

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.float32(0.7)), name="weight")

    def construct(self, sigma, latents, shift):
        return (latents * self.weight + shift - sigma.reshape((-1, 1)),)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_students_sample_is_eulers_and_its_gradient_passes_through_all_steps(steps):
    denoise, noise, shift = Linear(), np.float32([[0.5, -1.0], [2.0, 0.1]]), np.float32([[0.2, 0.3], [0.0, -0.4]])
    sigmas = np.linspace(1, 0, steps + 1).astype(np.float32)
    unit = Unroll(denoise, steps)
    assert unit.input_params == ("noise", "sigmas", "shift")

    def sample():
        return unit(Tensor(noise), Tensor(np.tile(sigmas, (2, 1))), Tensor(shift))[0]

    expected = euler(lambda x, s: denoise(s, x, Tensor(shift))[0], Tensor(noise), sigmas)
    np.testing.assert_allclose(sample().asnumpy(), expected.asnumpy(), rtol=1e-6)
    found = ops.value_and_grad(lambda: sample().sum(), None, ParameterTuple([denoise.weight]))()[1][0].asnumpy()
    denoise.weight.set_data(Tensor(np.float32(0.701)))
    above = sample().asnumpy().sum()
    denoise.weight.set_data(Tensor(np.float32(0.699)))
    assert found == pytest.approx((above - sample().asnumpy().sum()) / 0.002, rel=2e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A toy model, and a data set of samples of another one with their seeds."""
    folder = tmp_path_factory.mktemp("teacher")
    write_tiny(folder / "model", 0)
    write_tiny(folder / "other", 1)
    pipe = ToyImagePipeline.from_pretrained(str(folder / "other"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "prompt", "seed"])
        for seed, prompt in enumerate(PROMPTS):
            pipe(prompt, height=SIDE, width=SIDE, seed=seed, num_inference_steps=8).save(folder / f"{seed}.png")
            table.writerow([f"{seed}.png", prompt, seed])
    return folder


def test_the_noise_is_that_of_the_sample(teacher):
    pipe = ToyImagePipeline.from_pretrained(str(teacher / "model"))
    seen = []
    pipe.integrate = lambda positive, negative, latents, *rest: seen.append(latents.asnumpy()) or latents
    pipe("a cat", height=SIDE, width=SIDE, seed=3)
    slots = run_unit(ReplayNoise(2), pipe, {"seed": "3", "height": SIDE, "width": SIDE})
    assert np.array_equal(slots["noise"].asnumpy(), seen[0])
    assert np.array_equal(slots["sigmas"].asnumpy()[0], pipe.sampling_sigmas(2, slots["noise"].shape[1:]))
    for seed in ("", "a", -1, None):
        with pytest.raises(DataError, match="whole number, at least 0"):
            run_unit(ReplayNoise(2), pipe, {"seed": seed, "height": SIDE, "width": SIDE})


def train(teacher, output, *more):
    return main(["train", "--family", "toy", "--model_paths", str(teacher / "model"), "--dataset_base_path",
                 str(teacher), "--dataset_metadata_path", str(teacher / "metadata.csv"), "--height", str(SIDE),
                 "--width", str(SIDE), "--task", "direct_distill", "--distill_steps", "2", "--batch_size", "2",
                 "--learning_rate", "0.02", "--max_train_steps", "30", "--output_path", str(output), *more])


def test_a_student_comes_nearer_to_its_teacher_alike_in_both_modes_and_from_a_cache(teacher, tmp_path):
    assert train(teacher, tmp_path / "graph") == 0
    losses = column(tmp_path / "graph")
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    assert train(teacher, tmp_path / "eager", "--mode", "pynative", "--max_train_steps", "4") == 0
    np.testing.assert_allclose(column(tmp_path / "eager"), losses[:4], rtol=1e-5)
    assert train(teacher, tmp_path / "cached", "--cache_dir", str(tmp_path / "cache"), "--max_train_steps", "4") == 0
    assert np.array_equal(column(tmp_path / "cached"), losses[:4])


def test_a_row_without_a_seed_and_settings_of_other_tasks_are_refused(teacher, tmp_path, capsys):
    (tmp_path / "metadata.csv").write_text("image,prompt\n0.png,a cat\n")
    assert train(teacher, tmp_path / "out", "--dataset_metadata_path", str(tmp_path / "metadata.csv")) != 0
    assert "no seed, which task=direct_distill reads" in capsys.readouterr().err
    assert train(teacher, tmp_path / "out", "--weighting_scheme", "cosmap") != 0
    told = capsys.readouterr().err
    assert "weighting_scheme=cosmap: the family toy has no such setting for task=direct_distill" in told
    assert str(DirectDistillation(distill_steps=3)).startswith("direct distillation to 3 steps")
