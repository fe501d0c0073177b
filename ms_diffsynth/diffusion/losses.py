"""Losses of flow matching. Run inside the compiled step, in float32 whatever the network computes in."""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, mint


def weighted_mse(velocity: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the batch of weight times each sample's mean squared error.

    Shapes: velocity, target float [B, ...]; weight float32 [B] -> loss float32 scalar, weighted losses float32 [B].
    """
    error = (velocity.astype(ms.float32) - target.astype(ms.float32)).reshape((velocity.shape[0], -1))
    per_sample = weight.astype(ms.float32) * mint.mean(mint.square(error), 1)
    return mint.mean(per_sample), per_sample


def prior_preservation(per_sample: Tensor, prior_loss_weight: float) -> Tensor:
    """Mean over the instances plus ``prior_loss_weight`` times the mean over the class images.

    Each half keeps its own weights. The documents' code multiplies every half by the weights of the whole batch, which
    mixes them; their intent is meant here.

    Shapes: per_sample float32 [B], weighted; the first half are instances, the second half class images -> scalar.
    Raises: ValueError for an odd batch, while compiling.
    Source: Ruiz et al. 2023 (DreamBooth, 2208.12242), equation 2.
    """
    batch = per_sample.shape[0]
    if batch % 2 != 0:
        raise ValueError(f"a batch of {batch} with prior preservation: expected instances, then as many class images.")
    instances, images = mint.split(per_sample, batch // 2)
    return mint.mean(instances) + prior_loss_weight * mint.mean(images)
