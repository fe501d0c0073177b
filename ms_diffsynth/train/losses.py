"""The documents' loss functions: called eagerly, with the slots that the pipeline's units wrote."""
from __future__ import annotations

from typing import Any

from mindspore import Tensor

from ms_diffsynth.diffusion.units import flow_match_units
from ms_diffsynth.errors import ProgramError
from ms_diffsynth.pipeline import Pipeline


def FlowMatchSFTLoss(pipe: Pipeline, **inputs: Any) -> Tensor:
    """Flow-matching loss of one prepared sample or batch, by the same units the compiled step runs.

    Args:
        inputs: the slots that ``pipe.units`` wrote; ``input_latents`` and what the network reads are used.

    Returns: float32 scalar. Noise and noise level come from ``pipe.random``.
    Source: DiffSynth-Studio 2.1.12, diffusion/loss.py, with sigma looked up by index in float32.
    """
    if inputs.get("input_latents") is None:
        raise ProgramError("FlowMatchSFTLoss needs 'input_latents', which no unit wrote: pass input_image to the "
                           f"pipeline's units. Given: {sorted(inputs)}.")
    latents = inputs["input_latents"]
    drawn = {
        "noise": Tensor(pipe.random("noise", "normal", tuple(latents.shape))),
        "density_draw": Tensor(pipe.random("density_draw", pipe.objective.density_kind, latents.shape[:1])),
    }
    units = flow_match_units(pipe.objective, pipe.sigmas, pipe.denoise)
    return pipe.run(units, inputs | drawn)["loss"]
