"""FLUX.2-dev: its prompt, padding, its two ways of naming weights, a training step.

What its text encoder computes is in the case flux2_dev_end_to_end.
"""
from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from arrays import noise_image, relative
from mindspore import Tensor, mint

from ms_diffsynth import DiffusionTrainingModule, Flux2ImagePipeline
from ms_diffsynth.cli.main import main
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.weights import load_state_dict, save_sharded, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipelines.flux2.pipeline import COMPONENTS, DEV_COMPONENTS
from ms_diffsynth.pipelines.flux2.tiny import CONFIGS
from ms_diffsynth.pipelines.shared.tiny import write_model
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep
from ms_diffsynth.units import run_unit

pytestmark = pytest.mark.usefixtures("eager")

PROMPT = "a red cat by the sea"
PAD = 11
@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A tiny FLUX.2-dev: text encoder and tokenizer of the golden case, transformer and VAE with random weights."""
    path = tmp_path_factory.mktemp("models") / "dev"
    rest = [c for c in DEV_COMPONENTS if c.name in ("vae", "dit")]
    write_model(path, "Flux2Pipeline", rest, CONFIGS | {"dit": CONFIGS["dit"] | {"guidance_embeds": True}})
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(golden / "flux2_dev_end_to_end" / name, path / name)
    return path


def config_of(folder):
    return json.loads((folder / "text_encoder/config.json").read_text())


def pipeline(folder, **how):
    pipe = Flux2ImagePipeline.from_pretrained(folder if isinstance(folder, list) else str(folder), **how)
    pipe.max_sequence_length = 128
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline(folder)


# -- the prompt ------------------------------------------------------------------------------------------------------


def test_the_prompt_stands_behind_its_padding_in_mistrals_template(pipe):
    slots = run_unit(pipe.units[0], pipe, {"prompt": "a photo [IMG]of sks dog"})
    ids, mask = (slots[name].asnumpy()[0] for name in ("prompt_ids", "prompt_mask"))
    start = int((mask == 0).sum())
    assert 0 < start < 100 and ids.shape == mask.shape == (128,) and (np.diff(mask) >= 0).all()
    assert (ids[:start] == PAD).all() and ids[start:start + 2].tolist() == [1, 17] and ids[-1] == 4
    assert pipe.tokenizer.decode(ids[start:]) == (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing "
        "on object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT]"
        "[INST]a photo of sks dog[/INST]")


def test_a_long_prompt_loses_its_end_and_it_is_said(pipe, caplog):
    whole = run_unit(pipe.units[0], pipe, {"prompt": PROMPT})
    short = pipeline_with(pipe, max_sequence_length=20)
    with caplog.at_level("WARNING"):
        slots = run_unit(pipe.units[0], short, {"prompt": PROMPT})
    assert slots["prompt_mask"].asnumpy().tolist() == [[1.0] * 20]
    text = whole["prompt_ids"].asnumpy()[whole["prompt_mask"].asnumpy() == 1]
    np.testing.assert_array_equal(slots["prompt_ids"].asnumpy()[0], text[:20])
    assert f"prompt of {len(text)} tokens, template included, is cut to 20" in caplog.text


def pipeline_with(pipe, **settings):
    other = Flux2ImagePipeline(models=pipe.models, dtype=ms.float32)
    other.sources.update(pipe.sources)
    other.store.components = pipe.store.components
    for name, value in settings.items():
        setattr(other, name, value)
    return other


# -- the text encoder ------------------------------------------------------------------------------------------------


def padded(side, seed=0):
    """Random text of 15 tokens among 24."""
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(20, 384, (1, 24)).astype(np.int32), np.ones((1, 24), np.float32)
    empty = slice(0, 9) if side == "left" else slice(15, 24)
    ids[:, empty], mask[:, empty] = PAD, 0
    return Tensor(ids), Tensor(mask)


def test_more_padding_in_front_changes_nothing(pipe):
    """Rotary positions count from each other."""
    ids, mask = (x.asnumpy() for x in padded("left"))
    longer = [np.concatenate([np.full((1, 5), value, x.dtype), x], 1) for value, x in ((PAD, ids), (0, mask))]
    moved = pipe.text_encoder(*(Tensor(x) for x in longer))
    assert relative(moved[:, 5:], pipe.text_encoder(Tensor(ids), Tensor(mask))) < 5e-6


def test_padding_in_front_of_the_text_attends_to_nothing(pipe):
    """As PyTorch's attention, which gives zeros where every key is masked: only the MLPs are left."""
    ids, mask = padded("left")
    model = pipe.text_encoder.language_model.model
    x, kept = model.embed_tokens(ids[:, :1]), []
    for layer in model.layers:
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        kept.append(x)
    found = pipe.text_encoder(ids, mask)
    assert relative(found[:, :9], mint.cat(kept, -1).broadcast_to((1, 9, 96))) < 2e-6
    np.testing.assert_array_equal(pipe.text_encoder(*padded("left", seed=1))[:, :9].asnumpy(), found[:, :9].asnumpy())


def test_the_text_encoder_is_the_same_eager_and_compiled_in_value_and_gradient(folder):
    pipe = pipeline(folder)
    unit, (ids, mask) = pipe.units[1], padded("left")
    unit.attach(pipe)
    weights = ms.ParameterTuple(list(unit.get_parameters()))
    for weight in weights:
        weight.requires_grad = True
    direction = Tensor(np.random.default_rng(2).standard_normal((1, 24, 96)).astype(np.float32))

    def projected(ids, mask):
        embeds = unit(ids, mask)[0]
        return (embeds * direction).sum(), embeds

    function = ms.value_and_grad(projected, None, weights, has_aux=True)

    def both(ids, mask):
        values, gradients = function(ids, mask)
        return values[1], gradients

    (wanted, slow), (found, fast) = (CompiledStep(both, "encode_prompt", mode)(ids, mask)
                                     for mode in ("pynative", "graph"))
    assert relative(found, wanted) < 2e-6
    size = max(np.abs(g.asnumpy()).max() for g in slow)
    assert len(slow) == len(fast) == 1 + 3 * 9
    for weight, a, b in zip(weights, slow, fast):
        assert np.abs(a.asnumpy()).max() > 0, weight.name
        assert np.abs(a.asnumpy() - b.asnumpy()).max() < 1e-5 * size, weight.name


# -- loading ---------------------------------------------------------------------------------------------------------


def whole_checkpoint(folder, target, renamed=False, **config):
    """The text encoder as FLUX.2-dev's files have it: with the head, the last norm, upper layers and the tower."""
    weights = dict(load_state_dict(folder / "text_encoder/model.safetensors"))
    layer = {n.replace("layers.0.", "layers.39."): v for n, v in weights.items() if "layers.0." in n}
    other = ("language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.patch_conv.weight",
             "vision_tower.transformer.layers.0.attention.k_proj.weight", "multi_modal_projector.linear_1.weight")
    weights |= layer | {name: np.zeros(3, np.float32) for name in other}
    if renamed:
        for old, new in (("language_model.lm_head", "lm_head"), ("language_model.model", "model.language_model"),
                         ("vision_tower", "model.vision_tower"), ("multi_modal", "model.multi_modal")):
            weights = {name.replace(old, new): value for name, value in weights.items()}
    save_sharded(target, weights, stem="model", max_shard_bytes=30_000, config=config_of(folder) | config)
    return target


@pytest.mark.parametrize("renamed", [False, True])
def test_both_namings_of_the_weights_are_read_and_the_rest_is_not_loaded(folder, pipe, tmp_path, renamed):
    path = whole_checkpoint(folder, tmp_path / "text_encoder", renamed)
    loaded = pipeline([ModelConfig(str(path))])
    slots = dict(zip(("prompt_ids", "prompt_mask"), padded("left")))
    np.testing.assert_array_equal(*(run_unit(p.units[1], p, slots)["prompt_embeds"].asnumpy() for p in (loaded, pipe)))
    names = [name for name, _ in loaded.text_encoder.parameters_and_names()]
    start = "model.language_model." if renamed else "language_model.model."
    assert len(names) == 1 + 3 * 9 and all(name.startswith(start) for name in names)


def comfy_file(folder, target):
    """The text encoder as ComfyUI's single file has it: cut behind the layer that is read last, with the tokenizer."""
    weights = {name.replace("language_model.model.", "model."): value
               for name, value in load_state_dict(folder / "text_encoder/model.safetensors").items()}
    weights |= {name: np.zeros(3, np.float32) for name in ("vision_tower.ln_pre.weight", "model.norm.weight",
                                                           "multi_modal_projector.norm.weight")}
    target.mkdir()
    save_state_dict(target / "mistral.safetensors", weights | {"tekken_model": np.zeros(9, np.uint8)})
    return target


def test_comfyuis_file_gives_the_same_embeddings_and_is_not_converted(folder, pipe, tmp_path, monkeypatch, capsys):
    dev = [replace(c, known={"dev": config_of(folder)}) if c.name == "text_encoder" else c for c in DEV_COMPONENTS]
    monkeypatch.setattr(Flux2ImagePipeline, "variants", (tuple(dev),))
    file = comfy_file(folder, tmp_path / "comfy") / "mistral.safetensors"
    loaded = pipeline([ModelConfig(str(file))])
    slots = dict(zip(("prompt_ids", "prompt_mask"), padded("left")))
    np.testing.assert_array_equal(*(run_unit(p.units[1], p, slots)["prompt_embeds"].asnumpy() for p in (loaded, pipe)))
    for source, output, to in ((file, "out", "diffusers"), (folder / "text_encoder", "out.safetensors", "original")):
        assert main(["convert", str(source), str(tmp_path / output), "--to", to]) == 66
        assert "ends at layer 30 of 40, and has the tokenizer in it. Give another model" in capsys.readouterr().err


def test_what_is_no_part_of_it_is_an_error(folder, tmp_path):
    path = shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    weights = dict(load_state_dict(path / "model.safetensors")) | {"more.weight": np.zeros(3, np.float32)}
    shutil.rmtree(path)
    save_sharded(path, weights, stem="model", config=config_of(folder))
    with pytest.raises(WeightError, match=r"1 superfluous: more\.weight"):
        pipeline([ModelConfig(str(path))]).text_encoder  # noqa: B018
    text = config_of(folder)["text_config"] | {"num_hidden_layers": 30}
    pruned = whole_checkpoint(folder, tmp_path / "pruned", text_config=text)
    with pytest.raises(WeightError, match=r"num_hidden_layers=30: .* a multiple of 4 is expected"):
        pipeline([ModelConfig(str(pruned))]).text_encoder  # noqa: B018


def test_rope_theta_is_found_where_a_newer_transformers_writes_it(folder, pipe, tmp_path):
    text = config_of(folder)["text_config"] | {"rope_parameters": {"rope_theta": 1e9}}
    del text["rope_theta"]
    path = whole_checkpoint(folder, tmp_path / "text_encoder", text_config=text)
    assert pipeline([ModelConfig(str(path))]).text_encoder.language_model.model.theta == 1e9


def test_the_tokenizer_comes_with_the_model(folder, pipe, tmp_path):
    parts = [ModelConfig(str(folder / name)) for name in ("text_encoder", "vae", "transformer")]
    with pytest.raises(WeightError, match="'tokenizer' is needed, but no files were given"):
        pipeline(parts).encode_prompt("a cat")
    given = pipeline(parts, tokenizer_config=ModelConfig(str(folder / "tokenizer")))
    found, wanted = (p.encode_prompt(PROMPT).asnumpy() for p in (given, pipe))
    np.testing.assert_array_equal(found, wanted)
    bare = shutil.copytree(folder / "tokenizer", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(WeightError, match=r"no chat template: .* Download the whole tokenizer/ folder"):
        pipeline(parts, tokenizer_config=ModelConfig(str(bare))).encode_prompt("a cat")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(WeightError, match=r"no tokenizer\.json"):
        pipeline(parts, tokenizer_config=ModelConfig(str(bare))).encode_prompt("a cat")


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (copy / "chat_template.jinja").write_text("{{- messages[1]['content'][0]['text'] }}")
    parts = [ModelConfig(str(folder / name)) for name in ("text_encoder", "vae", "transformer")]
    with pytest.raises(WeightError, match=r"another model's\. Give the tokenizer/ folder of FLUX\.2-dev"):
        pipeline(parts, tokenizer_config=ModelConfig(str(copy))).encode_prompt("a cat")


def test_files_that_do_not_fit_change_nothing(tiny_flux2, tmp_path):
    pipe = Flux2ImagePipeline.from_pretrained(str(tiny_flux2))
    before = pipe.store.components
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(WeightError, match="Mistral3ForConditionalGeneration"):  # dev's is named as well
        pipe.store.add(ModelConfig(str(tmp_path / "odd")), pipe.network)
    assert pipe.store.components is before and Flux2ImagePipeline.components is COMPONENTS


def test_klein_keeps_its_own_components(tiny_flux2):
    klein = Flux2ImagePipeline.from_pretrained(str(tiny_flux2))
    assert [c.class_name for c in klein.store.components][:2] == ["", "Qwen3ForCausalLM"]
    assert len(klein.model_names) == len(set(klein.model_names)) == 4


# -- end to end ------------------------------------------------------------------------------------------------------


DRAWS = {"noise": Draws(5).normal("noise", np.array([0]), (128, 2, 3)),
         "timestep_index": np.int32([427])}


def loss_and_norm(folder, mode):
    """Of one training step of a LoRA."""
    module = DiffusionTrainingModule()
    module.pipe = pipeline(folder)
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="dit", lora_rank=2)
    cut = module.training_cut()
    assert "guidance" not in cut.cache and cut.models("step") == ("dit",)
    row = module.prepare({"image": noise_image(32, 48), "prompt": PROMPT}, cut)
    slots = {n: v[None] for n, v in in_bucket(row, (32, 48), module.pipe).slots.items()} | DRAWS
    step = ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=1e-3), mode=mode)
    result = step.step(*[Tensor(slots[n]) for n in (*cut.cache, *cut.draws)])
    return float(result.loss.asnumpy()), float(result.grad_norm.asnumpy())


@pytest.fixture(scope="module")
def plain(folder):
    return loss_and_norm(folder, "pynative")


def test_a_training_step_has_a_loss_and_a_gradient(plain):
    assert np.isfinite(plain[0]) and plain[1] > 0


@pytest.mark.slow
def test_a_training_step_is_the_same_eager_and_compiled(folder, plain):
    assert loss_and_norm(folder, "graph") == pytest.approx(plain, rel=1e-5)
