"""mindone's CAME: Adafactor with a confidence, as a setting."""
from __future__ import annotations

from collections.abc import Sequence

from mindspore import Parameter

from ms_diffsynth import runtime
from ms_diffsynth.training.optim.contract import check
from ms_diffsynth.training.optim.foreign import Guarded


class CAME(Guarded):
    """`mindone.trainers.came.CAME` under the contract: factored second moments, and how far updates agree.

    A weight of one dimension, and the one flat Parameter of a LoRA, keep whole moments.

    Source: Luo et al. 2023 (2307.02047), as mindone 0.5.0 computes it.
    """

    @classmethod
    def from_settings(cls, parameters: Sequence[Parameter], learning_rate: float, weight_decay: float, *,
                      beta1: float = 0.9, beta2: float = 0.999, beta3: float = 0.9999, eps1: float = 1e-30,
                      eps2: float = 1e-16, clip_threshold: float = 1.0) -> CAME:
        """For `build_optimizer`."""
        parameters = list(parameters)
        check("CAME", parameters, learning_rate, weight_decay, [
            (not all(0 <= beta < 1 for beta in (beta1, beta2, beta3)),
             f"beta1={beta1}, beta2={beta2}, beta3={beta3}: expected numbers from 0 to below 1."),
            (not min(eps1, eps2) > 0, f"eps1={eps1}, eps2={eps2}: expected numbers above 0. Try 1e-30 and 1e-16."),
            (not clip_threshold > 0, f"clip_threshold={clip_threshold}: expected a number above 0. Try 1."),
        ])
        runtime.current()  # what mindone imports is adapted to the CPU then, and not afterwards
        from mindone.trainers.came import CAME as MindoneCAME

        return cls(MindoneCAME(parameters, learning_rate, (eps1, eps2), clip_threshold, (beta1, beta2, beta3),
                               weight_decay))
