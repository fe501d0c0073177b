"""Images without a prompt: mindone's UNet2DModel on pixels, with DDPM's noise schedule."""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.data.images import to_pil
from ms_diffsynth.diffusion.ddpm import NoiseSchedule, ddim, ddpm
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.formats.weights import save_sharded
from ms_diffsynth.models import SCHEDULER_FILE, SIDES, SIZES, Component, arguments
from ms_diffsynth.nn.adapters.layer import adapted_layers
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipeline import Pipeline, SamplingDefaults, UnitSequence
from ms_diffsynth.pipelines.ddpm_unet.units import Denoise, LoadPixels
from ms_diffsynth.pipelines.shared.denoising import DenoisingDiffusion
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.program import Program
from ms_diffsynth.storage.files import stage_folder, write_file

STEPS = {"ddim": 50, "ddpm": 1000}  # samplers, and how many steps each takes by default


def build_unet(config: dict[str, Any]):
    """The network of a ``config.json``, its weights still to come.

    Raises: WeightError for a network that needs labels, predicts variances, or has other than three channels.
    """
    wrong = [f"{n}={config[n]}" for n in ("class_embed_type", "num_class_embeds") if config.get(n) is not None]
    wrong += [f"{n}={config[n]}" for n in ("in_channels", "out_channels") if config.get(n, 3) != 3]
    if wrong:
        raise WeightError(f"this UNet2DModel has {', '.join(wrong)}: expected one without classes, of three channels "
                          "in and out (RGB). Give the folder of such a network.")
    with quiet_imports():
        from mindone.diffusers import UNet2DModel

    return UNet2DModel(**arguments(UNet2DModel, config))


COMPONENTS = (Component(name="unet", folder="unet", class_name="UNet2DModel", build=build_unet,
                        reads={"block_out_channels": SIZES, "sample_size": SIDES}),)


class UnconditionalImagePipeline(DenoisingDiffusion, Pipeline):
    """Random images of the kind the network was trained on, and the units its training reuses.

    Args:
        models: ``{"unet": ...}`` for a network that comes from no folder.
        noise_schedule: None takes the one of the model's folder, else DDPM's own.
    """

    components = COMPONENTS
    inputs = ("input_image",)
    division_factor = 8
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")
    lora_prefixes = {"unet": "unet"}
    samplers = tuple(STEPS)
    sampling = SamplingDefaults(height=None, width=None, num_inference_steps=None)

    def __init__(self, models: dict[str, Any] | None = None, dtype: ms.Type | None = None,
                 noise_schedule: NoiseSchedule | None = None):
        super().__init__(models, dtype)
        self._schedule = noise_schedule

    # -- what a family provides ----------------------------------------------------------------------------------

    def build_units(self) -> list:
        return [LoadPixels()]

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = 2 ** (len(self.config("unet")["block_out_channels"]) - 1)
        if height % factor or width % factor:
            raise ConfigError(f"{height} x {width} pixels: this network halves the sides {factor.bit_length() - 1} "
                              f"times, so they must be multiples of {factor}. Set height and width to such.")
        return (3, height, width)

    def sampling_program(self, extra: Sequence[str] = ()) -> Program:
        return Program([self.denoise], (), self.sampled_draws)

    # -- sampling ------------------------------------------------------------------------------------------------

    def __call__(self, batch_size: int = 1, seed: int | None = None, num_inference_steps: int | None = None,
                 sampler: str | None = None, eta: float = 0.0, height: int | None = None, width: int | None = None,
                 on_step: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        """Generate images. The noise of image k does not depend on the batch size.

        Args:
            seed: of all noise; None is fresh.
            num_inference_steps: None is 50 for ddim, 1000 for ddpm.
            sampler: ``"ddim"``, the default, deterministic from the first noise on unless ``eta`` says otherwise, or
                ``"ddpm"``.
            eta: of ddim, 0 to 1: how much noise is added on the way.
            height, width: pixels; None is the size the network was made for.
            on_step: called with (step, steps) after every step.
        """
        side = self.config("unet").get("sample_size") or 32
        sides = side if isinstance(side, (list, tuple)) else (side, side)
        shape = self.latent_shape(height or sides[0], width or sides[1])
        draws = Draws(int(np.random.SeedSequence().entropy % 2**63) if seed is None else seed)
        samples = np.arange(batch_size)
        return self.generate(draws.normal("latents", samples, shape), num_inference_steps, sampler, eta,
                             lambda k: draws.normal(f"sampling step {k}", samples, shape), on_step)

    def generate(self, latents: np.ndarray, num_inference_steps: int | None = None, sampler: str | None = None,
                 eta: float = 0.0, noise: Callable[[int], np.ndarray] | None = None,
                 on_step: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        """Go from noise to images.

        Args:
            latents: float32 [B, 3, H, W], standard normal.
            noise: what sampling step k adds, of the same shape; ddpm needs it, and ddim where ``eta`` is not 0.

        Raises: ConfigError for an unknown sampler, or ``eta`` outside 0 to 1, or with ddpm.
        """
        sampler = self.check_sampler(sampler)
        if not 0 <= eta <= 1 or (eta and sampler == "ddpm"):
            raise ConfigError(f"eta={eta} with sampler='{sampler}': expected 0 to 1 for ddim, and 0 for ddpm, which "
                              "adds all noise by itself.")
        steps = num_inference_steps or STEPS[sampler]
        start, step = Tensor(latents), self._sampling_step()
        arguments = (lambda x, t: step(x, t)[0], start, self.noise_schedule, steps)
        if sampler == "ddpm":
            pixels = ddpm(*arguments, lambda k: Tensor(noise(k)), on_step)
        else:
            pixels = ddim(*arguments, eta, lambda k: Tensor(noise(k)), on_step)
        return [to_pil(p) for p in pixels.asnumpy()]

    def _sampling_step(self) -> CompiledStep:
        """The network, compiled once per shape in mode graph."""
        return self.compiled("the sampling step", lambda: UnitSequence(
            self.sampling_program().cut(self.denoise.output_params), self).positional)

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, replace: bool = False) -> None:
        """Write a folder that `from_pretrained` and diffusers' DDPMPipeline load: network and noise schedule.

        Args:
            replace: put it in the place of what ``folder`` holds.

        Raises: OutputError, also for a folder that is not empty without ``replace``; WeightError for a network that
            carries a LoRA.
        """
        with stage_folder(folder, replace=replace) as stage:
            self._save_network(Path(stage) / "unet")
            for name, content in self._descriptions().items():
                stage.write(name, content)

    def update_pretrained(self, folder: str | Path) -> None:
        """Write the same files among others that ``folder`` holds; the network is replaced as one.

        Raises: as `save_pretrained`.
        """
        with stage_folder(Path(folder) / "unet", replace=True) as stage:
            self._save_network(Path(stage))
        for name, content in self._descriptions().items():
            write_file(Path(folder) / name, content)

    def _save_network(self, folder: Path) -> None:
        if adapted_layers(self.unet):
            raise WeightError("the network carries a LoRA, which this format has no place for: save the LoRA by "
                              "itself (DiffusionTrainingModule.save), and fuse it by load_lora into a fresh pipeline.")
        config = {"_class_name": "UNet2DModel", **{k: v for k, v in self.config("unet").items() if k[0] != "_"}}
        save_sharded(folder, state_dict(self.unet), config=config)

    def _descriptions(self) -> dict[str, bytes]:
        """The JSON files beside the network, by name."""
        index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.35.2",
                 "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        files = {"model_index.json": index, f"scheduler/{SCHEDULER_FILE}": self.noise_schedule.to_config()}
        return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
