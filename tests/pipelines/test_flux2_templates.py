"""The worked templates in examples/flux2/templates: they learn, what is frozen stays, and their effect is measured."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import AdamW, DiffusionTrainingModule, Draws, Flux2ImagePipeline, UnifiedDataset
from ms_diffsynth.cli.main import main
from ms_diffsynth.data.loader import collate
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.training.program_step import ProgramTrainStep

pytestmark = pytest.mark.usefixtures("eager")

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "examples/flux2/templates"
TILES = ROOT / "examples/data/photo_tiles64"
TRAINED = {"brightness": "template_model", "caption": "template_model", "thumbnail": "template_model.mlp"}
DRAWS = {"noise": Draws(1).normal("noise", np.arange(2), (128, 2, 2)),
         "timestep_index": np.int32([222, 777])}


@pytest.fixture
def metadata(tmp_path):
    """Rows of a dark and of a light tile, whose pictures are found from any folder."""
    rows = [json.loads(line) for line in (TILES / "train.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["image"] in ("hubble_00.jpg", "coffee_01.jpg")]
    for row in rows:
        row["template_inputs"]["image"] = str(TILES / row["image"])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def script(name):
    """A script of examples/flux2/templates as a module."""
    spec = importlib.util.spec_from_file_location(f"templates_{name}", TEMPLATES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_of(model, name):
    module = DiffusionTrainingModule()
    module.pipe = Flux2ImagePipeline.from_pretrained(str(model))
    module.pipe.max_sequence_length = 24
    module.load_training_template_model(module.pipe, str(TEMPLATES / name), trust_template_code=True)
    module.switch_pipe_to_training_mode(module.pipe, trainable_models=TRAINED[name], extra_inputs="template_inputs")
    return module


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.few(1)
def test_a_template_learns_and_what_is_frozen_stays(name, tiny_flux2, metadata):
    module = module_of(tiny_flux2, name)
    cut, template = module.training_cut(), module.pipe.template_model
    operator = UnifiedDataset.default_image_operator(str(TILES), height=32, width=32)
    dataset = UnifiedDataset(str(TILES), str(metadata), data_file_keys="image", main_data_operator=operator)
    slots = collate([module.prepare(dataset[k], cut) for k in range(2)]) | DRAWS
    batch = [Tensor(slots[n]) for n in (*cut.cache, *cut.draws)]
    before = {"template_model": state_dict(template), "dit": state_dict(module.pipe.dit)}
    optimizer = AdamW(module.trainable_parameters(), learning_rate=1e-2, weight_decay=0)  # gradients alone move
    step = ProgramTrainStep(module, cut, optimizer, mode="pynative")
    results = [step.step(*batch) for _ in range(3)]
    losses, norms = ([float(getattr(r, key).asnumpy()) for r in results] for key in ("loss", "grad_norm"))
    assert losses[2] < losses[0] and all(norm > 0 for norm in norms)
    moved = {n for n, array in state_dict(template).items() if not np.array_equal(array, before["template_model"][n])}
    inner = TRAINED[name].removeprefix("template_model").removeprefix(".")
    assert moved == {n for n in before["template_model"] if n.startswith(inner)}
    assert all(np.array_equal(array, before["dit"][n]) for n, array in state_dict(module.pipe.dit).items())


def test_the_caption_is_read_by_the_text_encoder_of_the_pipeline(tiny_flux2):
    """And by nothing else: the prompt's tokens, the text encoder and its three layers decide."""
    module = module_of(tiny_flux2, "caption")
    first, second = (module.pipe.template_model.process_inputs(text=text, pipe=module.pipe)["text_emb"].asnumpy()
                     for text in ("a dark photo", "a light photo"))
    mean = module.pipe.encode_prompt("a dark photo").asnumpy().mean(1)
    assert first == pytest.approx((mean - mean.mean()) / mean.std(), abs=1e-3)
    assert np.abs(first - second).max() > 0.1


def test_base_gives_latents_a_mean_of_0_and_a_variance_of_1_and_inserts_what_was_trained(tiny_flux2, tmp_path, capsys):
    base = script("base")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{k}.png")
    (pictures / "train.jsonl").write_text("".join(json.dumps({"image": f"{k}.png"}) + "\n" for k in range(2)))
    base.normalise(tiny_flux2, pictures, tmp_path / "new")
    pipe = Flux2ImagePipeline.from_pretrained(str(tmp_path / "new"))
    encode = [unit for unit in pipe.units if unit.name in ("load_pixels", "encode_image")]
    latents = np.concatenate([pipe.run(encode, {"input_image": Image.open(pictures / f"{k}.png")})["moments"].asnumpy()
                              for k in range(2)])[:, :128]
    assert np.abs(latents.mean((0, 2, 3))).max() < 1e-4
    assert np.abs(latents.std((0, 2, 3)) - 1).max() < 2e-3  # the batch norm adds 1e-4 to variances, here 0.03 at least
    save_state_dict(tmp_path / "step-1.safetensors", {"proj_out.weight": np.full((128, 96), 7, np.float32)})
    base.insert(tmp_path / "new", tmp_path / "step-1.safetensors", tmp_path / "base")
    dit = state_dict(Flux2ImagePipeline.from_pretrained(str(tmp_path / "base")).dit)
    known = load_state_dict(tiny_flux2 / "transformer/diffusion_pytorch_model.safetensors")
    assert {n for n, array in dit.items() if not np.array_equal(array, known[n])} == {"proj_out.weight"}
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.slow
def test_effect_measures_a_run(tiny_flux2, metadata, tmp_path):
    """Both losses under the same draws: rows that are told the same have the same."""
    effect = script("effect")
    assert main(["train", str(TEMPLATES / "brightness.yaml"), "--trust_template_code", "--mode", "pynative",
                 "--model_paths", str(tiny_flux2), "--template_model_id_or_path", str(TEMPLATES / "brightness"),
                 "--dataset_base_path", str(TILES), "--dataset_metadata_path", str(metadata), "--height", "32",
                 "--width", "32", "--batch_size", "2", "--max_train_steps", "2", "--lr_warmup_steps", "0",
                 "--output_path", "run"]) == 0
    right, wrong, without = effect.losses(Path("run"), str(metadata), True, times=2)
    assert right.shape == (2, 2) and np.isfinite(right).all() and (right != wrong).all() and (right != without).all()
    alike = tmp_path / "alike.jsonl"
    alike.write_text("".join(json.dumps(json.loads(line) | {"template_inputs": {"scale": 0.5}}) + "\n"
                             for line in metadata.read_text().splitlines()))
    right, wrong, _ = effect.losses(Path("run"), str(alike), True, times=1)
    assert np.array_equal(right, wrong)


@pytest.mark.parametrize(("effects", "code"), [((0.5, 0.5), 0), ((0.5, -0.5), 1), ((0.0, 0.5), 1)])
def test_effect_fails_when_one_run_has_none(effects, code, monkeypatch, capsys):
    effect, found = script("effect"), iter(effects)
    right = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    monkeypatch.setattr(effect, "losses", lambda *args: np.stack([right, right + np.float32(next(found)), right]))
    monkeypatch.setattr("sys.argv", ["effect.py", "runs/a", "runs/b"])
    assert effect.main() == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines[1:]] == [f"{x:.4f}" for x in (*effects, np.mean(effects))]


def test_a_derangement_leaves_nothing_in_its_place():
    derangement = script("effect").derangement
    for seed in range(20):
        found = derangement(np.random.default_rng(seed).permutation(5))
        assert sorted(found) == list(range(5)) and (found != np.arange(5)).all()
