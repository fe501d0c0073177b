"""The hand-written DreamBooth step equals the fused program: five schemes, with and without prior, and gradients."""
from __future__ import annotations

import dataclasses
from argparse import Namespace

import mindspore as ms
import numpy as np
import pytest
from low_rank import inject_lora, lora_pairs, lora_parameters, set_lora
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.pipelines.flux import FAMILY
from ms_diffsynth.pipelines.flux.train_step import TrainStepForFluxDevDB
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.program_step import ProgramTrainStep

SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
SIZE, PIXELS, TOKENS = 4, 32, 6


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = FAMILY.pipeline.from_pretrained(str(tiny_flux))
    inject_lora(pipe.dit, ["attn.to_q", "proj_out"], rank=2)
    rng = np.random.default_rng(3)
    set_lora(pipe.dit, {n: tuple(0.1 * rng.standard_normal(a.shape).astype(np.float32) for a in pair)
                        for n, pair in lora_pairs(pipe.dit).items()})
    return pipe


def batch(pipe, scheme):
    rng = np.random.default_rng(7)
    shape = (SIZE, *pipe.latent_shape(PIXELS, PIXELS))
    return {
        "pixels": rng.uniform(-1, 1, (SIZE, 3, PIXELS, PIXELS)), "posterior_noise": rng.standard_normal(shape),
        "noise": rng.standard_normal(shape), "timestep_index": rng.integers(0, 1000, SIZE),
        "prompt_embeds": np.repeat(rng.standard_normal((2, TOKENS, 48)), 2, 0),
        "pooled_prompt_embeds": np.repeat(rng.standard_normal((2, 32)), 2, 0),
    }


def both_steps(pipe, scheme, has_prior, mode):
    """(hand-written step, its inputs), (fused program's step, its inputs), on the same weights and draws."""
    slots = {k: Tensor(v.astype(np.int32 if k == "timestep_index" else np.float32))
             for k, v in batch(pipe, scheme).items()}
    schedule = pipe.training_schedule("dreambooth")
    args = Namespace(max_grad_norm=1.0, gradient_accumulation_steps=1, weighting_scheme=scheme, logit_mean=0.1,
                     logit_std=1.2, mode_scale=1.29, guidance_scale=3.5, with_prior_preservation=has_prior,
                     prior_loss_weight=0.7, output_dir=None)
    optimizer = AdamW(lora_parameters(pipe.dit), learning_rate=0.0, weight_decay=0.0)
    by_hand = TrainStepForFluxDevDB(
        vae=pipe.vae, transformer=pipe.dit, optimizer=optimizer, noise_scheduler=schedule, weight_dtype=ms.float32,
        length_of_dataloader=10, args=args, prompt_embeds=slots["prompt_embeds"][::2],
        pooled_prompt_embeds=slots["pooled_prompt_embeds"][::2], mode=mode,
        text_ids=Tensor(np.zeros((TOKENS, 3), np.float32)))
    module = DiffusionTrainingModule()
    module.pipe, module.fuse, module.trainable, module.lora_base_models = pipe, ("encode_image",), ("dit",), ("dit",)
    pipe.objective = Objective(weighting_scheme=scheme, logit_mean=0.1, logit_std=1.2, mode_scale=1.29,
                               posterior="sample", guidance_scale=3.5, prior_loss_weight=0.7 if has_prior else None)
    pipe.sigmas = schedule.sigmas
    cut = module.training_cut()
    assert "encode_image" in [u.name for u in cut.step]
    fused = ProgramTrainStep(module, cut, optimizer, max_grad_norm=1.0, mode=mode)
    names = (*cut.cache, *cut.draws)
    return ((by_hand, [slots[n] for n in ("pixels", "posterior_noise", "noise", "timestep_index")]),
            (fused, [slots[n] for n in names]))


@pytest.mark.parametrize("has_prior", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.few(4)
def test_equal_values_and_gradients_eagerly(pipe, scheme, has_prior):
    (by_hand, a), (fused, b) = both_steps(pipe, scheme, has_prior, "pynative")
    ours, grads = by_hand.value_and_grad(tuple(a))
    theirs, expected = fused.value_and_grad(tuple(b))
    loss, wanted = ours[1].asnumpy(), theirs[1].asnumpy()
    assert abs(loss - wanted) <= 1e-6 * abs(wanted)
    for parameter, x, y in zip(by_hand.weights, grads, expected):
        x = x.asnumpy() / 4096  # StaticLossScaler: the raw gradient is scaled
        wanted = y.asnumpy()
        np.testing.assert_allclose(x, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0, err_msg=parameter.name)


@pytest.mark.slow
def test_equal_when_compiled(pipe):
    (by_hand, a), (fused, b) = both_steps(pipe, "cosmap", True, "graph")
    ours, theirs = by_hand.step(*a), fused.step(*b)
    assert abs(ours.loss.asnumpy() - theirs.loss.asnumpy()) <= 1e-6 * theirs.loss.asnumpy()
    assert abs(ours.grad_norm.asnumpy() - theirs.grad_norm.asnumpy()) <= 1e-5 * theirs.grad_norm.asnumpy()
    assert by_hand.compilations == fused.compilations == 1


def test_called_as_documented_with_its_own_draws(pipe):
    (by_hand, inputs), _ = both_steps(pipe, "none", True, "pynative")
    loss, model_pred = by_hand(inputs[0])
    assert np.isfinite(loss.asnumpy()) and model_pred.shape == (SIZE // 2, *pipe.latent_shape(PIXELS, PIXELS))
    again, _ = by_hand(inputs[0])
    assert by_hand.samples_seen == 2 * SIZE and again.asnumpy() != loss.asnumpy()


@pytest.mark.parametrize("has_prior", [False, True])
def test_each_rank_draws_for_its_part_of_the_batch_of_all(pipe, has_prior, monkeypatch):
    """What one process of twice the batch draws, for the same samples: no two ranks draw the same noise."""
    (whole, (pixels, *_)), _ = both_steps(pipe, "logit_normal", has_prior, "pynative")
    both = Tensor(np.repeat(pixels.asnumpy(), 2, 0))
    alone = [[d.asnumpy() for d in whole.draws(both)] for _ in range(2)]  # two batches of eight
    found = []
    for rank in range(2):
        (step, _), _ = both_steps(pipe, "logit_normal", has_prior, "pynative")
        place = dataclasses.replace(runtime.current(), rank=rank, world_size=2)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "current", lambda place=place: place)
            found.append([[d.asnumpy() for d in step.draws(pixels)] for _ in range(2)])
    rows = [[0, 1, 4, 5], [2, 3, 6, 7]] if has_prior else [[0, 1, 2, 3], [4, 5, 6, 7]]
    for rank, own in enumerate(rows):
        for step in range(2):
            assert all(np.array_equal(mine, one[own]) for mine, one in zip(found[rank][step], alone[step]))


def test_what_the_document_returns_and_calls(pipe):
    (step, (pixels, *draws)), _ = both_steps(pipe, "none", True, "pynative")
    loss, model_pred = step(pixels, *draws)
    assert loss.shape == () and model_pred.shape == (SIZE // 2, *pipe.latent_shape(PIXELS, PIXELS))
    (alone, _), _ = both_steps(pipe, "none", False, "pynative")
    np.testing.assert_array_equal(model_pred.asnumpy(), alone(pixels, *draws)[1].asnumpy()[: SIZE // 2])
    sigmas = step.get_sigmas(Tensor([0, 999], ms.int32), 3, ms.float16)
    assert sigmas.shape == (2, 1, 1) and sigmas.dtype == ms.float16 and sigmas.asnumpy()[0] == 1.0
    assert len(step.noise_scheduler.sigmas) == 1000 and step.sync_gradients is True
