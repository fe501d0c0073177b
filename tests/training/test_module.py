"""What learns: names, freezing, LoRA or whole weights; what is saved."""
from __future__ import annotations

import numpy as np
import pytest
from low_rank import lora_pairs, set_lora
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, DataError, ProgramError, TrainingError, WeightError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.registry import family
from ms_diffsynth.training.losses import FlowMatchSFTLoss
from ms_diffsynth.training.module import DiffusionTrainingModule


@pytest.fixture(scope="module")
def folder(tiny_model):
    return tiny_model("toy")


@pytest.fixture
def module(folder):
    module = DiffusionTrainingModule()
    module.pipe = family("toy").pipeline.from_pretrained(str(folder))
    return module


def names(module):
    return sorted(p.name for p in module.trainable_parameters())


def test_a_lora_learns_and_nothing_else(module):
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="dit", lora_target_modules="layer_1", lora_rank=3)
    assert names(module) == ["layer_1.lora_A.weight", "layer_1.lora_B.weight"]
    assert [p.name for p in module.pipe.dit.trainable_params()] == names(module)
    assert list(module.pipe.models) == ["dit"], "no other model is loaded"
    assert module.training_cut().models("step") == ("dit",)


def test_whole_models_and_dotted_parts(module):
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit.layer_2, text_encoder ,dit.condition.weight")
    assert len(names(module)) == 4  # layer_2: weight, bias; the embedding; one weight
    cut = module.training_cut()
    assert cut.models("step") == ("dit", "text_encoder") and "ids" in cut.cache
    assert sorted(module.export_trainable_state_dict("pipe.")) == [
        "dit.condition.weight", "dit.layer_2.bias", "dit.layer_2.weight", "text_encoder.embedding.weight"]


def test_training_mode_freezes_what_was_trained_before(module):
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="vae")
    vae = module.pipe.vae
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit")
    assert not vae.trainable_params() and len(module.pipe.dit.trainable_params()) == 6


@pytest.mark.parametrize("how, part", [
    ({}, "nothing would be trained: set lora_base_model"),
    ({"lora_base_model": "dot"}, r"'dot' cannot be trained: ToyImagePipeline has the models .*Did you mean 'dit'"),
    ({"trainable_models": "dit.layer_3"}, r"'dit.layer_3' names no weights: 'dit' has condition, layer_1, layer_2"),
    ({"trainable_models": "dit.layer"}, r"names no weights.*Did you mean 'layer_"),
    ({"trainable_models": "dit", "lora_base_model": "dit"}, "expected one of the two"),
    ({"lora_base_model": "dit", "lora_target_modules": "layer_9"}, "Did you mean 'layer_1'|Did you mean 'layer_2'"),
    ({"lora_base_model": "dit", "lora_rank": 0}, "lora_rank=0")])
def test_impossible_choices(module, how, part):
    with pytest.raises(ConfigError, match=part):
        module.switch_pipe_to_training_mode(module.pipe, **how)


def test_a_tokenizer_cannot_be_trained():
    module = DiffusionTrainingModule()
    module.pipe = family("flux").pipeline()
    with pytest.raises(ConfigError, match=r"'tokenizer_1' cannot be trained: .*text_encoder_2, vae, dit"):
        module.switch_pipe_to_training_mode(module.pipe, lora_base_model="tokenizer_1")


def test_a_model_the_loss_does_not_depend_on_is_named(module):
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="text_encoder")
    module.pipe.units[1].no_grad = True
    with pytest.raises(ProgramError, match="'text_encoder' is to be trained, but its gradient cannot reach loss"):
        module.training_cut()


def test_nothing_is_trainable_before_training_mode(module):
    with pytest.raises(TrainingError, match="call switch_pipe_to_training_mode first"):
        module.trainable_parameters()
    with pytest.raises(ProgramError, match="call switch_pipe_to_training_mode first"):
        FlowMatchSFTLoss(module.pipe, input_latents=Tensor(np.zeros((1, 4, 2, 2), np.float32)))


def test_a_lora_goes_on_from_a_file_whatever_its_alpha(module, folder, tmp_path):
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="dit", lora_rank=2, lora_alpha=1.0)
    pairs = {n: (a, np.ones_like(b)) for n, (a, b) in lora_pairs(module.pipe.dit).items()}
    set_lora(module.pipe.dit, pairs)
    module.save(tmp_path / "a.safetensors", metadata={"note": "x"})
    assert sorted(load_state_dict(tmp_path / "a.safetensors"))[0].startswith("transformer.layer_1.lora_A")
    other = DiffusionTrainingModule()
    other.pipe = family("toy").pipeline.from_pretrained(str(folder))
    other.switch_pipe_to_training_mode(other.pipe, lora_base_model="dit", lora_rank=2, lora_alpha=4.0,
                                       lora_checkpoint=tmp_path / "a.safetensors")
    for name, (a, b) in lora_pairs(other.pipe.dit).items():
        np.testing.assert_allclose(4.0 / 2 * b @ a, 1.0 / 2 * pairs[name][1] @ pairs[name][0], rtol=1e-6)
    third = DiffusionTrainingModule()
    third.pipe = family("toy").pipeline.from_pretrained(str(folder))
    with pytest.raises(WeightError, match="expected A"):
        third.switch_pipe_to_training_mode(third.pipe, lora_base_model="dit", lora_rank=5,
                                           lora_checkpoint=tmp_path / "a.safetensors")


def test_rows_and_losses_that_lack_something_say_what(module):
    image = Image.new("RGB", (16, 16))
    with pytest.raises(DataError, match=r"a row has no 'image' and no 'prompt': it has picture, text"):
        module.get_pipeline_inputs({"picture": image, "text": "a"})
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit", objective=Objective(posterior="sample"))
    with pytest.raises(ProgramError, match="needs 'input_latents', which no unit wrote"):
        FlowMatchSFTLoss(module.pipe, prompt_embeds=None)
    with pytest.raises(ProgramError, match="posterior='sample', for which FlowMatchSFTLoss needs 'moments'"):
        FlowMatchSFTLoss(module.pipe, input_latents=Tensor(np.zeros((1, 4, 2, 2), np.float32)))


def test_only_a_forward_of_its_own_makes_a_module_eager(module):
    class Own(DiffusionTrainingModule):
        def forward(self, data):
            return data

    assert Own().has_own_forward and not module.has_own_forward
