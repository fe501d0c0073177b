"""The documents' loss functions: called eagerly, with the slots that the pipeline's units wrote."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mindspore import Tensor

from ms_diffsynth.diffusion.units import SampleLatents
from ms_diffsynth.errors import ProgramError
from ms_diffsynth.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class RecordedLoss:
    """The loss of one row before it is computed: the slots that it is computed of. See `training.own_forward`."""

    slots: dict[str, Any]


def FlowMatchSFTLoss(pipe: Pipeline, **inputs: Any) -> Tensor | RecordedLoss:
    """Loss of one prepared sample or batch, by the same units the compiled step runs: flow matching, or what else the
    family's objective is.

    Args:
        inputs: the slots that ``pipe.units`` wrote; ``input_latents`` (with posterior "sample" also ``moments``) and
            what the network reads are used, anything else is ignored.

    ``use_gradient_checkpointing`` and ``use_gradient_checkpointing_offload`` are obeyed, from the first call on.

    Returns: float32 scalar; a `RecordedLoss` while a ``forward`` is recorded to be compiled. Noise and noise level come
        from ``pipe.random``. The weight of class images is not applied here: `training.program_step.ModuleTrainStep`
        does that, when it averages the rows of a batch.
    Raises: ProgramError when there are no latents, or when the pipeline is not in training mode.
    Source: DiffSynth-Studio 2.1.12, diffusion/loss.py, with sigma looked up by index in float32.
    """
    if pipe.sigmas is None:
        raise ProgramError("FlowMatchSFTLoss needs a grid of noise levels, but the pipeline has none: call "
                           "switch_pipe_to_training_mode first.")
    pipe.recompute_as_asked(inputs)
    if pipe.records_loss:
        return RecordedLoss(inputs)
    latents = _latents(pipe, inputs)
    objective, shape = pipe.objective, tuple(latents.shape)
    drawn = {name: Tensor(objective.draw(name, shape, len(pipe.sigmas), pipe.random))
             for name in objective.draws if name != "posterior_noise"}  # `_latents` has drawn that one
    if objective.prior_loss_weight is not None:
        objective = replace(objective, prior_loss_weight=None)
    units = objective.units(pipe, pipe.sigmas)
    return pipe.run(units, inputs | drawn | {"input_latents": latents})["loss"]


def _latents(pipe: Pipeline, inputs: dict[str, Any]) -> Tensor:
    """``input_latents``, which hold the mean of the VAE's posterior, or a sample of it where the objective says so."""
    latents, moments = inputs.get("input_latents"), inputs.get("moments")
    if latents is None:
        raise ProgramError("FlowMatchSFTLoss needs 'input_latents', which no unit wrote: pass input_image to the "
                           f"pipeline's units. Given: {sorted(inputs)}.")
    if pipe.objective.posterior != "sample":
        return latents
    if moments is None:
        raise ProgramError("the objective has posterior='sample', for which FlowMatchSFTLoss needs 'moments', which no "
                           f"unit wrote. Pass them, or use posterior='mean'. Given: {sorted(inputs)}.")
    noise = Tensor(pipe.random("posterior_noise", "normal", tuple(latents.shape)))
    return pipe.run([SampleLatents("sample")], {"moments": moments, "posterior_noise": noise})["input_latents"]
