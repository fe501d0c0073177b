"""docs/contributing/extending.md: applied to a copy of the package, which then trains with it.

This file is also the program that runs in the copy: ``python tests/test_extending.py RESULTS`` runs every function of
``CASES`` and writes name -> traceback, empty when it passed.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/contributing/extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"(?ms)^## (.+?)\n(.*?)(?=^## |\Z)", TEXT))


# -- in the copy -----------------------------------------------------------------------------------------------------


def toy(path: Path) -> Path:
    from ms_diffsynth.registry import family

    if not path.exists():
        family("toy").write_tiny(path, 0)
    return path


def configuration(family: str, model: Path) -> str:
    from toy_run import files

    files(Path("rows"))
    Path(f"{family}.yaml").write_text(f"model:\n  family: {family}\n  model_paths: {model}\n  lora_rank: 2\ndata:\n"
                                      "  dataset_base_path: rows\n  dataset_metadata_path: rows/metadata.csv\n"
                                      "  height: 16\n  width: 16\nrun:\n  max_train_steps: 3\n  batch_size: 2\n")
    return f"{family}.yaml"


def command(*words) -> None:
    from ms_diffsynth.cli.main import main

    code = main([str(w) for w in words])
    assert code == 0, f"{words} ended with {code}"


def losses(folder: str) -> list[float]:
    return [float(line.split(",")[2]) for line in Path(folder, "loss.csv").read_text().splitlines()[1:]]


def moved(module) -> None:
    """Away from the start, where an adapter changes nothing."""
    network, rng = module.pipe.dit, np.random.default_rng(3)
    module.adapter.load(network, {n: array + 0.3 * rng.standard_normal(array.shape).astype(np.float32)
                                  for n, array in module.adapter.tensors(network).items()})


def adapter() -> None:
    """Trained compiled; fused it computes what it computes beside the weights, on toy and in FLUX.1's blocks."""
    from mindspore import Tensor

    from ms_diffsynth import Draws
    from ms_diffsynth.registry import family
    from ms_diffsynth.training.module import DiffusionTrainingModule

    config = configuration("toy", toy(Path("toy")))
    command("train", config, "--adapter", "ia3", "--output_path", "ia3", "--learning_rate", "0.05")
    assert len(losses("ia3")) == 3
    command("sample", "toy", "toy", "--prompt", "a", "--height", 16, "--width", 16, "--num_inference_steps", 2,
            "--lora", "ia3/step-3.safetensors")
    for name in ("toy", "flux"):
        folder = Path(name)
        if not folder.exists():
            family(name).write_tiny(folder, 0)
        module = DiffusionTrainingModule()
        module.pipe = pipe = family(name).pipeline.from_pretrained(str(folder))
        if name == "flux":
            pipe.max_sequence_length = 16
        module.switch_pipe_to_training_mode(pipe, lora_base_model="dit", adapter="ia3")
        moved(module)
        module.save(Path(f"{name}.safetensors"))
        slots = pipe.condition("a red cat", guidance=Tensor(np.float32([3.5]))) | {
            "latents": Tensor(Draws(0).normal("latents", np.array([0]), pipe.latent_shape(32, 32))),
            "sigma": Tensor(np.float32([0.7]))}
        fresh = family(name).pipeline.from_pretrained(str(folder))
        plain = fresh.model_fn(**slots).asnumpy()
        fresh.load_lora(fresh.dit, Path(f"{name}.safetensors"))
        beside, fused = pipe.model_fn(**slots).asnumpy(), fresh.model_fn(**slots).asnumpy()
        assert np.abs(beside - plain).max() > 1e-2 * np.abs(plain).max()
        np.testing.assert_allclose(fused, beside, rtol=0, atol=2e-5 * np.abs(beside).max())


def optimizer() -> None:
    """Against the formula; resumed to the bit; a gradient that is not finite changes nothing."""
    import mindspore as ms
    from mindspore import Parameter, Tensor
    from toy_run import Module, equal, rows, train

    from ms_diffsynth.training.optim.lion import Lion

    how = {"batch_size": 2, "optimizer": "lion", "optimizer_args": ("beta2=0.98",), "num_epochs": None, "mode": "graph",
           "learning_rate": 1e-3}
    folder = toy(Path("toy"))
    train(Path("whole"), Module(folder), rows(5), max_train_steps=4, **how)
    for steps in (2, 4):
        train(Path("run"), Module(folder), rows(5), max_train_steps=steps, resume="auto", **how)
    assert equal(Path("whole"), Path("run"))
    rng = np.random.default_rng(0)
    value, moment = rng.standard_normal(7).astype(np.float32), np.zeros(7, np.float32)
    weight = Parameter(Tensor(value), name="w")
    lion = Lion([weight], 0.1, 0.01, 0.9, 0.99)
    for _ in range(3):
        gradient = rng.standard_normal(7).astype(np.float32)
        lion((Tensor(gradient),))
        value = value - 0.1 * (np.sign(0.9 * moment + 0.1 * gradient) + 0.01 * value)
        moment = 0.99 * moment + 0.01 * gradient
        np.testing.assert_allclose(weight.asnumpy(), value, rtol=0, atol=1e-6)
    lion((Tensor(np.full(7, np.nan, np.float32)),), Tensor(1.0, ms.float32), Tensor(False))
    assert np.array_equal(weight.asnumpy(), lion.parameters[0].asnumpy())
    np.testing.assert_allclose(weight.asnumpy(), value, rtol=0, atol=1e-6)
    np.testing.assert_allclose(lion.moment[0].asnumpy(), moment, rtol=0, atol=1e-6)


def task() -> None:
    """Trained; near the loss of sft for a large constant, below it for a small one."""
    from toy_run import Module, rows, train

    from ms_diffsynth.diffusion.huber import HuberObjective
    from ms_diffsynth.registry import TASKS

    folder, how = toy(Path("toy")), {"num_epochs": None, "max_train_steps": 2, "batch_size": 2, "mode": "graph"}
    train(Path("sft"), Module(folder), rows(3), **how)
    train(Path("huber"), Module(folder, task="huber"), rows(3), **how)
    defaults = TASKS["huber"].defaults
    train(Path("flat"), Module(folder, objective=HuberObjective(huber_c=1000.0, **defaults)), rows(3), **how)
    assert losses("huber")[0] < 0.9 * losses("sft")[0]
    assert abs(losses("flat")[0] / losses("sft")[0] - 1) < 1e-5


def sampler() -> None:
    """Of second order where the velocity is x; and a flag of the command line."""
    from mindspore import Tensor

    from ms_diffsynth.diffusion.samplers import SAMPLERS

    start = Tensor(np.float32([[1.0]]))
    error = [abs(SAMPLERS["ab2"](lambda x, sigma: x, start, np.linspace(1, 0, n + 1)).asnumpy().item() - np.exp(-1))
             for n in (8, 16)]
    assert 3.0 < error[0] / error[1] < 5.0, error
    command("sample", "toy", toy(Path("toy")), "--prompt", "a", "--height", 16, "--width", 16,
            "--num_inference_steps", 3, "--sampler", "ab2")


def hook() -> None:
    """Rows for every weight at its steps, in a run that is resumed; rows after the checkpoint are dropped."""
    from toy_run import Module, rows, train

    from ms_diffsynth.training.hooks.weight_norms import WeightNorms

    folder, how = toy(Path("toy")), {"num_epochs": None, "batch_size": 2, "resume": "auto", "checkpoint_steps": 3}
    table = Path("run/weights.csv")
    for steps in (3, 6):
        train(Path("run"), Module(folder), rows(3), max_train_steps=steps, hooks=[WeightNorms(every=2)], **how)
        found = [line.split(",") for line in table.read_text().splitlines()]
        assert found[0] == ["step", "weight", "norm"] and len({row[1] for row in found[1:]}) == 4
        assert [int(row[0]) for row in found[1::4]] == list(range(2, steps + 1, 2))
        table.write_text(table.read_text() + "9,of a step that is made again,1\n")
    assert float(found[-1][2]) > 0


def family() -> None:
    """Tiny, described, trained compiled with samples, and sampled."""
    command("tiny", "patches", "patches")
    config = configuration("patches", Path("patches"))
    command("describe", config)
    command("train", config, "--output_path", "trained", "--sample_prompts", '["a"]', "--num_inference_steps", 2)
    assert len(losses("trained")) == 3 and Path("trained/samples/before_after.png").is_file()
    command("sample", "patches", "patches", "--prompt", "a", "--height", 16, "--width", 16, "--num_inference_steps", 2,
            "--lora", "trained/step-3.safetensors")


CASES = {"An adapter": adapter, "An optimizer": optimizer, "A task": task, "A sampler": sampler, "A hook": hook,
         "A model family": family}


# -- the copy --------------------------------------------------------------------------------------------------------


def files_of(section: str) -> dict[str, str]:
    """Path -> text of the files that a section shows."""
    blocks = re.findall(r"(?ms)^```python\n# (ms_diffsynth/\S+)\n(.*?)^```$", SECTIONS[section])
    return dict(blocks)


def changes_of(section: str) -> dict[str, list[tuple[list[str], list[str]]]]:
    """Path -> the pieces of a section's diff, each as the lines before and after."""
    found = {}
    for path, body in re.findall(r"(?ms)^```diff\n--- (\S+)\n(.*?)^```$", SECTIONS[section]):
        pieces = [piece.splitlines() for piece in body.split("@@\n")]
        found[path] = [tuple([line[1:] for line in piece if line[:1] != other] for other in "+-") for piece in pieces]
    return found


def apply(root: Path, section: str) -> None:
    for name, text in files_of(section).items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name, pieces in changes_of(section).items():
        path = root / name
        if not path.exists():  # a script
            path.parent.mkdir(exist_ok=True)
            path.write_text((ROOT / name).read_text())
        text = path.read_text()
        for before, after in pieces:
            before, after = ("".join(line + "\n" for line in lines) for lines in (before, after))
            assert text.count(before) == 1, f"{section}: {name} does not hold once:\n{before}"
            text = text.replace(before, after)
        path.unlink()
        path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("extended")
    for folder, _, names in os.walk(ROOT / "ms_diffsynth"):
        target = root / Path(folder).relative_to(ROOT)
        target.mkdir()
        for name in names:
            if not name.endswith(".pyc"):
                (target / name).symlink_to(Path(folder, name))
    for section in CASES:
        apply(root, section)
    ruff = subprocess.run([sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", "--no-cache",
                           *(root / name for section in CASES for name in files_of(section))],
                          capture_output=True, text=True, cwd=root)
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr
    return root


@pytest.fixture(scope="module")
def results(copy):
    work = copy / "work"
    work.mkdir()
    place = {"PYTHONPATH": os.pathsep.join(map(str, (copy, ROOT / "tests/shared", ROOT / "tests/training")))}
    child = subprocess.run([sys.executable, __file__, "results.json"], env=os.environ | place, cwd=work,
                           capture_output=True, text=True, timeout=550)
    assert child.returncode == 0, child.stderr
    return json.loads((work / "results.json").read_text())


@pytest.mark.parametrize("section", CASES)
def test_an_addition_of_the_page_works(results, section):
    assert not results[section], results[section]


ABOUT_A_VAE = "test_programs_build or test_every_tensor_unit or test_split_equals or patches-sample"  # and its units


@pytest.mark.slow
def test_the_tests_over_the_registries_pass_for_the_additions(copy):
    files = ("training/test_adapters.py", "training/test_optimizers.py", "diffusion/test_samplers.py",
             "test_registry.py", "pipelines/test_contract.py", "cli/test_tiny.py")
    child = subprocess.run([sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider",
                            "--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-k",
                            f"(test_contract and patches and not ({ABOUT_A_VAE})) or "
                            "(not test_contract and (ia3 or lion or ab2 or patches))",
                            *(ROOT / "tests" / name for name in files)],
                           env=os.environ | {"PYTHONPATH": str(copy)}, cwd=copy, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) >= 15, child.stdout[-500:]


@pytest.mark.parametrize("section", CASES)
def test_an_addition_is_one_file_and_one_line(section):
    assert len(files_of(section)) == 1
    added = [line for pieces in changes_of(section).values() for before, after in pieces for line in after
             if line.strip() and line not in before]
    entries = [line for line in added if not line.startswith("from ")]
    assert len(entries) == 1


def run_all(path: str) -> None:
    found = {}
    for section, case in CASES.items():
        folder = Path(case.__name__)
        folder.mkdir()
        home = os.getcwd()
        os.chdir(folder)
        try:
            case()
            found[section] = ""
        except (Exception, SystemExit):
            found[section] = traceback.format_exc()
        finally:
            os.chdir(home)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    run_all(sys.argv[1])
