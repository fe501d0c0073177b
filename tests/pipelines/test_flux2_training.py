"""Training FLUX.2 on pictures to be edited, eager and compiled, with recompute and with frozen models in 8 bits."""
from __future__ import annotations

import numpy as np
import pytest
from device import DEVICE
from low_rank import lora_pairs, set_lora
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import DiffusionTrainingModule, Flux2ImagePipeline, runtime
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.draws import Draws
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep

pytestmark = pytest.mark.usefixtures("eager")

DRAWS = {name: Objective().draw(name, (1, 128, 2, 3), 1000, Draws(5).of(np.array([0])))
         for name in ("noise", "timestep_index")}


class EditingModule(DiffusionTrainingModule):
    def __init__(self, folder, **how):
        super().__init__()
        self.pipe = Flux2ImagePipeline.from_pretrained(str(folder))
        self.pipe.max_sequence_length = 24
        self.pipe.random = Draws(5).of(np.array([0]))
        self.switch_pipe_to_training_mode(self.pipe, lora_base_model="dit", lora_rank=2,
                                          extra_inputs="edit_image", **how)
        rng = np.random.default_rng(3)  # away from its start, where a LoRA adds nothing
        set_lora(self.pipe.dit, {n: tuple((0.1 * rng.standard_normal(x.shape)).astype(np.float32) for x in pair)
                                 for n, pair in lora_pairs(self.pipe.dit).items()})


def row(seed=1):
    """A picture, and one to be edited into it."""
    image, edit = (np.random.default_rng(s).integers(0, 256, (32, 48, 3), np.uint8) for s in (0, seed))
    return {"image": Image.fromarray(image), "edit_image": Image.fromarray(edit), "prompt": "the cat wears a hat"}


def step_of(module, data, mode):
    """Loss and gradient norm of one step."""
    cut = module.training_cut()
    slots = {n: v[None] for n, v in in_bucket(module.prepare(data, cut), (32, 48), module.pipe).slots.items()} | DRAWS
    step = ProgramTrainStep(module, cut, AdamW(module.trainable_parameters(), learning_rate=1e-3), mode=mode)
    result = step.step(*[Tensor(slots[n]) for n in (*cut.cache, *cut.draws)])
    return float(result.loss.asnumpy()), float(result.grad_norm.asnumpy())


@pytest.fixture(scope="module")
def plain(tiny_flux2):
    """Loss and gradient norm, eager and with nothing special."""
    runtime.configure("pynative", DEVICE)
    return step_of(EditingModule(tiny_flux2), row(), "pynative")


@pytest.mark.slow
def test_an_editing_step_is_the_same_eager_compiled_and_by_the_documents_forward(tiny_flux2, plain):
    loss, norm = plain
    assert norm > 0 and step_of(EditingModule(tiny_flux2), row(2), "pynative")[0] != pytest.approx(loss, rel=1e-5)
    assert float(EditingModule(tiny_flux2).forward(row()).asnumpy()) == pytest.approx(loss, rel=2e-6)
    assert step_of(EditingModule(tiny_flux2), row(), "graph") == pytest.approx(plain, rel=1e-5)


def test_recompute_changes_no_bit(tiny_flux2, plain):
    module = EditingModule(tiny_flux2, use_gradient_checkpointing=True)
    blocks = [*module.pipe.dit.transformer_blocks, *module.pipe.dit.single_transformer_blocks]
    assert all(block.is_recomputed for block in blocks)
    assert step_of(module, row(), "pynative") == plain


def test_frozen_models_in_eight_bits_change_little(tiny_flux2, plain):
    loss = plain[0]
    stored, norm = step_of(EditingModule(tiny_flux2, fp8_models="text_encoder,vae,dit"), row(), "pynative")
    assert stored != loss and norm > 0 and stored == pytest.approx(loss, rel=0.03)


def test_sampling_without_an_edit_picture_leaves_training_on_them(tiny_flux2):
    module = EditingModule(tiny_flux2)
    before = float(module.forward(row()).asnumpy())
    module.pipe("a cat", height=32, width=32, seed=0, num_inference_steps=1)
    module.pipe("a cat", height=32, width=32, seed=0, num_inference_steps=1, edit_image=row()["edit_image"])
    assert float(module.forward(row()).asnumpy()) == before
    assert {"edit_latents", "edit_places"} <= set(module.training_cut().cache)
