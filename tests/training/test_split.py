"""Split training: the same losses and weights to the bit, nothing loaded that a stage does not need, no false cache."""
from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import toy_run
from device import DEVICE
from PIL import Image
from toy_run import table

from ms_diffsynth import models
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import family
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.two_stage import launch_data_process_task, stage_of


def pictures(base, count=3, first=0, side=16, repeat=1, extra=None):
    """A data set of files; ``extra`` is a column that nothing reads."""
    base.mkdir(exist_ok=True)
    lines = ["image,prompt,note"]
    for k in range(first, first + count):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(base / f"{k}.png")
        lines.append(f"{k}.png,picture {k},{extra}")
    (base / "metadata.csv").write_text("\n".join(lines))
    return UnifiedDataset(str(base), str(base / "metadata.csv"), repeat, "image",
                          UnifiedDataset.default_image_operator(str(base), height=side, width=side))


class Module(toy_run.Module):
    prepared = 0

    def prepare(self, data, cut):
        self.prepared += 1
        return super().prepare(data, cut)


def process(path, module, dataset, **options):
    return launch_data_process_task(Accelerator(1, "pynative", DEVICE), dataset, module, ModelLogger(path), **options)


def train(path, module, dataset, mode="pynative", **options):
    return toy_run.train(path, module, dataset, mode, **{"max_train_steps": 7, "num_epochs": None, **options})


@pytest.mark.fault
@pytest.mark.parametrize("how", [
    {"lora_base_model": "dit", "lora_rank": 2}, {"trainable_models": "dit"}, {"trainable_models": "text_encoder,dit"},
    {"trainable_models": "vae.encoder,dit.layer_1"},
], ids=["lora", "whole", "text encoder", "vae encoder"])
@pytest.mark.parametrize("mode", ["pynative", "graph"])
@pytest.mark.few(2)
def test_both_stages_give_the_bits_of_one(folder, tmp_path, how, mode):
    train(tmp_path / "one", Module(folder, **how), pictures(tmp_path / "data", repeat=2), mode, batch_size=2)
    first = Module(folder, "sft:data_process", **how)
    cache = process(tmp_path / "cache", first, pictures(tmp_path / "data"))
    second = Module(folder, "sft:train", **how)
    train(tmp_path / "two", second, UnifiedDataset(str(cache.folder), repeat=2), mode, batch_size=2)
    assert table(tmp_path / "one") == table(tmp_path / "two") and len(table(tmp_path / "one")) > 7
    one, two = (load_state_dict(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert set(first.pipe.models) == set(first.training_cut().models("prepare"))
    assert set(second.pipe.models) == set(second.training_cut().models("step"))


@pytest.mark.parametrize("how, prepare, step, slots", [
    ({"lora_base_model": "dit"}, {"text_encoder", "vae"}, {"dit"}, {"moments", "prompt_embeds"}),
    ({"trainable_models": "text_encoder"}, {"vae"}, {"dit", "text_encoder"}, {"moments", "ids"}),
    ({"trainable_models": "vae.encoder"}, {"text_encoder"}, {"dit", "vae"}, {"pixels", "prompt_embeds"}),
], ids=["lora", "text encoder", "vae encoder"])
def test_the_cut_decides_what_is_loaded_and_cached(folder, tmp_path, how, prepare, step, slots):
    module = Module(folder, "sft:data_process", **how)
    cache = process(tmp_path / "cache", module, pictures(tmp_path / "data"))
    assert set(module.pipe.models) == prepare and set(module.training_cut().models("step")) == step
    assert set(cache.read(cache.keys()[0])[0]) == slots


def test_the_second_stage_reads_each_config_once_however_many_steps_it_takes(folder, tmp_path, monkeypatch):
    cache = process(tmp_path / "cache", Module(folder, "sft:data_process"), pictures(tmp_path / "data"))
    read, read_config = [], models.read_config

    def noting(folder, name="config.json"):
        read.append((folder, name))
        return read_config(folder, name)

    monkeypatch.setattr(models, "read_config", noting)
    counts = []
    for steps in (1, 9):
        read.clear()
        train(tmp_path / str(steps), Module(folder, "sft:train"), UnifiedDataset(str(cache.folder), repeat=9),
              max_train_steps=steps)
        counts.append(sorted(read))
    assert counts[0] == counts[1] and (folder / "vae", "config.json") in counts[0]
    built = [(folder / "transformer", "config.json")]  # once more, to build the network
    assert max(counts[0].count(file) for file in counts[0] if file not in built) == 1


def test_class_images_are_cached_beside_the_pictures(folder, tmp_path):
    objective = Objective(weighting_scheme="none", posterior="sample", prior_loss_weight=0.5)
    how = {"lora_base_model": "dit", "lora_rank": 4, "objective": objective}
    sets = pictures(tmp_path / "data"), pictures(tmp_path / "class", 2, 10)
    train(tmp_path / "one", Module(folder, "dreambooth", **how), sets[0], class_dataset=sets[1])
    cache = process(tmp_path / "cache", Module(folder, "dreambooth:data_process", **how), sets[0],
                    class_dataset=sets[1])
    assert len(cache.rows("instance")) == 3 and len(cache.rows("class")) == 2
    train(tmp_path / "two", Module(folder, "dreambooth:train", **how), UnifiedDataset(str(cache.folder)))
    assert table(tmp_path / "one") == table(tmp_path / "two")


def test_a_second_run_prepares_only_what_is_new(folder, tmp_path):
    def counted(dataset, **how):
        module = Module(folder, "sft:data_process", **how)
        process(tmp_path / "cache", module, dataset)
        return module.prepared

    data = tmp_path / "data"
    assert counted(pictures(data)) == 3 and counted(pictures(data)) == 0
    assert counted(pictures(data, extra="other")) == 0, "a column that is not read shapes nothing"
    assert counted(pictures(data, 4)) == 1 and counted(pictures(data, 2)) == 0
    assert counted(pictures(data, side=32)) == 3 and counted(pictures(data, 3)) == 0, "both resolutions are kept"
    (data / "1.png").write_bytes((data / "0.png").read_bytes())
    same = UnifiedDataset(str(data), None, 1, "image", UnifiedDataset.default_image_operator(str(data), height=16,
                                                                                          width=16), captions=False)
    same.rows = [row | {"prompt": "picture 0"} for row in same.rows if row["image"] in ("0.png", "1.png")]
    assert counted(same) == 0, "equal pictures share an entry, whatever they are called"


@pytest.mark.fault
def test_a_lora_fused_into_an_encoder_shapes_the_cache(folder, tmp_path, monkeypatch):
    module = Module(folder, "sft:data_process")
    before = module.pipe.weights_digest("text_encoder")
    module.pipe.store.weight_changes["text_encoder"] = ["LoRA abc x 1.0"]
    assert module.pipe.weights_digest("text_encoder") != before
    assert module.pipe.weights_digest("vae") == Module(folder).pipe.weights_digest("vae")


@pytest.mark.fault
def test_tokenizer_files_shape_the_cache(tmp_path, monkeypatch):
    pipe = family("flux").pipeline()
    shipped = pipe.weights_digest("tokenizer_1")
    (tmp_path / "vocab.json").write_text("{}")
    pipe.sources["tokenizer_1"] = type(pipe.store.source("tokenizer_1"))(tmp_path)
    assert pipe.weights_digest("tokenizer_1") != shipped and pipe.weights_digest("vae") is None


def test_stage_two_needs_no_files_of_the_encoders(folder, tmp_path, caplog):
    cache = process(tmp_path / "cache", Module(folder, "sft:data_process"), pictures(tmp_path / "data"))
    module = Module(folder / "transformer", "sft:train")
    with caplog.at_level(logging.INFO):
        caplog.clear()  # stage one had no use for the network
        train(tmp_path / "out", module, UnifiedDataset(str(cache.folder)))
    assert list(module.pipe.models) == ["dit"] and "does not need" not in caplog.text
    with caplog.at_level(logging.INFO):
        train(tmp_path / "more", Module(folder, "sft:train"), UnifiedDataset(str(cache.folder)))
    assert "this stage does not need text_encoder, vae: not loaded." in caplog.text


def test_one_call_does_both_stages(folder, tmp_path):
    dataset = pictures(tmp_path / "data", repeat=2)
    train(tmp_path / "one", Module(folder), dataset)
    for prepared in (3, 0):
        module = Module(folder)
        out = tmp_path / f"both {prepared}"
        train(out, module, dataset, args=SimpleNamespace(cache_dir=str(tmp_path / "cache")))
        assert table(out) == table(tmp_path / "one")
        assert module.prepared == prepared and list(module.pipe.models) == ["dit"]


def test_an_own_forward_cannot_train_from_a_cache(folder, tmp_path):
    class Own(Module):
        def forward(self, data):
            return None

    cache = process(tmp_path / "cache", Own(folder, "sft:data_process"), pictures(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"Own\.forward with sft:train: a cache holds what the compiled step"):
        train(tmp_path / "out", Own(folder, "sft:train"), UnifiedDataset(str(cache.folder)))


def test_plain_lists_of_rows_are_cached_by_their_content(folder, tmp_path):
    rows = [{"image": Image.new("RGB", (16, 16), (k, 0, 0)), "prompt": "p"} for k in (1, 2, 1)]
    module = Module(folder, "sft:data_process")
    cache = process(tmp_path / "cache", module, rows)
    assert module.prepared == 2 and len(cache.rows("instance")) == 3


def test_stages():
    assert [stage_of(t) for t in ("sft", "sft:data_process", "dreambooth:train")] == ["", "data_process", "train"]
    with pytest.raises(ConfigError, match="task='sft:trian': expected 'sft', 'sft:data_process' or 'sft:train'"):
        stage_of("sft:trian")
    assert Pipeline.padded_slots == ()
