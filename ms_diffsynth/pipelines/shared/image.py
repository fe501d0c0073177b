"""What every image pipeline shares: sampling with a compiled step, and decoding."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.data.images import to_pil, to_rgb
from ms_diffsynth.data.prompts import prompt_problem
from ms_diffsynth.diffusion.guidance import classifier_free
from ms_diffsynth.diffusion.samplers import SAMPLERS, Denoise
from ms_diffsynth.diffusion.schedule import (
    FlowMatchSettings,
    Grid,
    Schedule,
    check_strength,
    last_steps,
    to_one_nth_by_numpy,
)
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, ProgramError, listing, nearest, shortened
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.pipeline import Pipeline, UnitSequence, pad_prompts
from ms_diffsynth.pipelines.shared.edit import references, size_within
from ms_diffsynth.pipelines.shared.scheduler import Scheduler
from ms_diffsynth.pipelines.shared.tiles import Tiles
from ms_diffsynth.program import Program, slot
from ms_diffsynth.template.cache import JoinTemplateCache, TemplateCache, to_slots
from ms_diffsynth.units import TensorUnit, run_unit

logger = logging.getLogger(__name__)


class ImagePipeline(Pipeline):
    """A pipeline whose latents decode to images.

    Attributes:
        sft_grid: the sigmas that supervised training draws from.
        sampling_spacing: n even sigmas from 1 to 1/n, as the model's pipeline in diffusers gives them to its scheduler.
        dynamic_mu: from (image tokens, sampling steps) to the mu of dynamic shifting; None follows the scheduler.
        start_input: the slot of what sampling may start from.
        options: names of the arguments of a call, but for the prompts.
        latent_patch: sides of the square of latents that is one image token.
        edit_max_pixels: most pixels of a reference image; larger ones are made smaller.
        zeroed_slots: what is made of a prompt, and is zero where there is no negative prompt; none: it is that of "".
    """

    samplers = tuple(SAMPLERS)
    absent_inputs = ("edit_image",)
    start_input = "input_image"
    options = ("cfg_scale", "embedded_guidance", "height", "width", "seed", "num_inference_steps", "sampler", "on_step",
               "input_image", "denoising_strength", "tiled", "tile_size", "tile_stride")
    edit_max_pixels = 1024 * 1024
    sft_grid: Grid
    sampling_spacing = staticmethod(to_one_nth_by_numpy)
    dynamic_mu: Callable[[int, int], float] | None = None
    latent_patch = 2
    zeroed_slots: tuple[str, ...] = ()
    guidance_rule = staticmethod(classifier_free)  # how the two branches of cfg_scale become one velocity

    def __init__(self, models: dict[str, Any] | None = None, dtype: ms.Type | None = None):
        super().__init__(models, dtype)
        self._scheduler_settings: FlowMatchSettings | None = None

    def __call__(self, prompt: str, negative_prompt: str | None = None, cfg_scale: float | None = None,
                 embedded_guidance: float | None = None, height: int | None = None, width: int | None = None,
                 seed: int | None = None, num_inference_steps: int | None = None, sampler: str | None = None,
                 on_step: Callable[[int, int], None] | None = None, input_image: Image.Image | None = None,
                 denoising_strength: float = 1.0, tiled: bool = False, tile_size: int | None = None,
                 tile_stride: int | None = None, **inputs: Any) -> Image.Image:
        """Generate one image. What is None is as in ``sampling``.

        Args:
            cfg_scale: two-branch guidance with ``negative_prompt``; 1 runs one branch.
            negative_prompt: None is as ``""``; but of a family with ``zeroed_slots`` it is no text at all.
            embedded_guidance: the scale told to a guidance-distilled network; others ignore it.
            height, width: pixels, rounded up to the family's division factor.
            seed: of the initial noise; None is fresh.
            sampler: one of `diffusion.samplers.SAMPLERS`; None is the first, ``"euler"``.
            on_step: called with (step, steps) after every step.
            input_image: sampling starts from it instead of from noise alone. A side that is not given is that of the
                image; where they differ, the image is scaled (Lanczos) to height x width, whatever its proportions.
            denoising_strength: above 0, at most 1: the part of the steps that is walked, the last ones. The image is
                mixed with the noise of the first of them, which at 1 is noise alone.
            tiled: let the VAE encode and decode in tiles of ``tile_size`` latent pixels (None: 128), one every
                ``tile_stride`` (None: half of it), to save memory; see `shared.tiles`.
            inputs: further inputs of the family; ``edit_image``: the image that is edited, or several references in
                their order, whose size is then that of the result (`edited_size`); ``control_image``, one or several,
                after which it is drawn, ``control_mask``, and how these are used: ``conditioning_scale``,
                ``control_mode`` and ``control_range``, the part of the steps that reads them, from 0 to 1
                (docs/how_to/controlnet.md); ``template_cache``; with
                ``negative_`` in front, those of the branch of the negative prompt, instead of the same.

        Raises: ConfigError for an input the family does not have, an unknown sampler, or a value out of range.
        """
        default = self.usual_size
        inputs = those_given(inputs)
        if "control_image" in inputs:
            first = inputs["control_image"]
            default = (first[0] if isinstance(first, (list, tuple)) else first).size[::-1]
        if "edit_image" in inputs:
            default = self.edited_size(references(inputs["edit_image"]))
        if input_image is not None:
            if not isinstance(input_image, Image.Image):
                raise ConfigError(f"input_image={input_image!r:.80}: expected an image of Pillow. Open the file: "
                                  "Image.open(path).")
            default = input_image.size[::-1]
        size = self.check_resize_height_width(height or default[0], width or default[1])
        if input_image is not None:
            input_image = scaled(to_rgb(input_image, "input_image"), *size)
        tiling = {"tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        latents = self.sample(size, prompt, negative_prompt, cfg_scale, embedded_guidance, seed, num_inference_steps,
                              sampler, on_step, input_image, denoising_strength, tiling, inputs)
        return self.decode(latents, **tiling)[0]

    def sample(self, size: tuple[int, ...], prompt: str, negative_prompt: str, cfg_scale: float | None,
               embedded_guidance: float | None, seed: int | None, num_inference_steps: int | None, sampler: str | None,
               on_step: Callable[[int, int], None] | None, start: Any, denoising_strength: float,
               tiling: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        """Latents of one image or film of ``size``, as `latent_shape` takes it; arguments as `__call__`.

        Args:
            start: what sampling starts from, of that size; None for noise alone.

        Raises: as `__call__`.
        """
        self.check_sampled(inputs)
        inputs = dict(inputs)
        within = {"control_range": inputs.pop("control_range")} if "control_range" in inputs else {}
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if text and (problem := prompt_problem(text)):
                raise ConfigError(f"{name}={shortened(text)} {problem}.")
        sampler = self.check_sampler(sampler)
        check_strength(denoising_strength)
        self.check_tiles(**tiling)
        if start is None and denoising_strength != 1:
            raise ConfigError(f"denoising_strength={denoising_strength} without {self.start_input}: expected 1. Give "
                              f"the {self.medium} to start from as {self.start_input}.")
        own, shape = self.sampling, self.latent_shape(*size)
        cfg_scale = own.cfg_scale if cfg_scale is None else cfg_scale
        seed = int(np.random.SeedSequence().entropy % 2**63) if seed is None else seed
        noise = Draws(seed).normal("latents", np.array([0]), shape)
        self.check_widths({"latents": noise})
        guidance = own.embedded_guidance if embedded_guidance is None else embedded_guidance
        inputs = {**inputs, **self.size_inputs(size), "guidance": Tensor(np.full(1, guidance, np.float32))}
        positive = {name: value for name, value in inputs.items() if not name.startswith("negative_")} | tiling
        branches = [{"prompt": prompt, **positive}]
        if cfg_scale != 1:  # a template is of one branch only, everything else of both
            negative = {n.removeprefix("negative_"): value for n, value in inputs.items() if n not in positive}
            positive.pop("template_cache", None)
            branches.append({"prompt": negative_prompt, **positive, **negative})
        sigmas = last_steps(self.sampling_sigmas(num_inference_steps or own.num_inference_steps, shape),
                            denoising_strength)
        latents = self.start(start, noise, sigmas, tiling)
        return self.integrate(*self.conditions(*branches), latents, sigmas, cfg_scale, on_step, sampler,
                              lambda k: Draws(seed).normal(f"sampling step {k}", np.array([0]), shape), **within)

    def check_sampled(self, inputs: Mapping[str, Any]) -> None:
        """Raises: ConfigError for further inputs of a call that the family does not have, or that do not fit each other
        or the models."""
        known = [name for name in self.optional_units if name != "template_inputs"]  # TemplatePipeline takes those
        known += self.input_options
        known += ["template_cache"] if "template_cache?" in self.denoise.input_params else []
        odd = [name for name in inputs if name.removeprefix("negative_") not in known]
        if odd:
            options = [*self.options, *(name for name in known if name not in self.options)]
            raise ConfigError(f"{type(self).__name__} has no input {listing(odd)}; it has prompt, negative_prompt, "
                              f"{listing(options, 20)}.{nearest(odd[0], options)}")

    @property
    def usual_size(self) -> tuple[int, ...]:
        """The size that is sampled where none is asked for, as `latent_shape` takes it."""
        return self.sampling.height, self.sampling.width

    def size_inputs(self, size: tuple[int, ...]) -> dict[str, int]:
        """What units are told of a size in sampling."""
        return {"height": size[-2], "width": size[-1]}

    def edited_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Height and width of the image that is made of references: those of the first, as the VAE sees it."""
        return self.reference_size(images[0].height, images[0].width)

    def reference_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the VAE sees a reference of these."""
        return size_within(height, width, self.edit_max_pixels, self.division_factor)

    def picture_sides(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens that references of these (height, width) have in the prompt; empty where the
        text encoder does not see them."""
        return []

    def check_tiles(self, tiled: bool, tile_size: int | None, tile_stride: int | None) -> None:
        """Raises: ConfigError for tiles that cannot be, or of a family whose VAE takes none."""
        decode = self.build_decode()
        Tiles.of(tiled, tile_size, tile_stride, getattr(decode, "patch", 1))
        if tiled and "tiled" not in decode.options:
            raise ConfigError(f"tiled=True: the VAE of {type(self).__name__} takes no tiles. Leave tiled out, or make "
                              "its units of pipelines.shared.vae_units.")

    # -- noise levels --------------------------------------------------------------------------------------------

    def published_scheduler(self) -> FlowMatchSettings:
        """The scheduler_config.json that the model's authors published: what is computed with where there is none."""
        raise TypeError(f"{type(self).__name__} has no published_scheduler: implement it.")

    @property
    def scheduler_settings(self) -> FlowMatchSettings:
        """Those of the model's scheduler_config.json; without the file, the published ones."""
        if self._scheduler_settings is None:
            config = self.scheduler_config()
            self._scheduler_settings = (self.published_scheduler() if config is None
                                        else FlowMatchSettings.from_config(config))
        return self._scheduler_settings

    def training_schedule(self, objective: str) -> Schedule:
        """Of DreamBooth the grid of the model's scheduler, as in diffusers' script; of ``sft`` DiffSynth-Studio's.

        DiffSynth-Studio reads no scheduler_config.json. Where one shifts the grid of training in another way than the
        published one does, the model is another, and ``sft`` trains on that grid too.
        """
        settings, published = self.scheduler_settings, self.published_scheduler()
        if objective != "sft":
            return settings.schedule(self.dynamic_mu)
        if settings.training_shift == published.training_shift:
            return Schedule(training=self.sft_grid, inference=self.sft_grid)
        logger.info("scheduler_config.json shifts the noise levels of training by %g, that of the published model by "
                    "%g: training draws from the file's.", settings.training_shift, published.training_shift)
        return settings.schedule(self.dynamic_mu)

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        """Noise levels to integrate over: float32 [num_inference_steps + 1], decreasing, ends with 0."""
        schedule = self.scheduler_settings.schedule(self.dynamic_mu, self.sampling_spacing)
        return schedule.sampling(num_inference_steps, self.image_tokens(latent_shape))

    @property
    def scheduler(self) -> Scheduler:
        """The noise levels as DiffSynth-Studio's units ask for them."""
        return Scheduler(self)

    def start(self, given: Any, noise: np.ndarray, sigmas: np.ndarray,
              tiling: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        """Latents at ``sigmas[0]``, where sampling starts: those of ``given``, an image or a film, with noise, or noise
        alone.

        By the units of training, up to ``input_latents``. They see ``sigmas`` in ``scheduler``.

        Shapes: noise float32 [B, ...] -> float32 [B, ...]; what is given has its size.
        """
        slots = {self.start_input: given, "start_noise": Tensor(noise), **tiling}
        if given is None and not any("latents" in unit.output_params for unit in self.units):
            return slots["start_noise"]
        self.sampled_sigmas = sigmas
        try:
            return self.run(self.sampling_program().cut(("start_latents",)).prepare, slots)["start_latents"]
        finally:
            if self.sigmas is not None:  # training goes on
                self.sampled_sigmas = None

    def image_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Image tokens that the network makes of latents [C, H, W], or of F frames of them, [C, F, H, W]."""
        *frames, height, width = latent_shape[1:]
        return math.prod(frames) * (height // self.latent_patch) * (width // self.latent_patch)

    def coded(self, size: tuple[int, ...], what: str) -> float:
        """Pixels that the VAE holds at the peak of coding a size; ``what`` is "encode" or "decode"."""
        return math.prod(size)

    def build_decode(self) -> TensorUnit:
        """The unit from ``latents`` to ``pixels``."""
        raise TypeError(f"{type(self).__name__} has no build_decode: implement it.")

    def condition(self, prompt: str, template_cache: TemplateCache | None = None, **extra: Any) -> dict[str, Any]:
        """Prepared slots for one prompt, by name: exactly what the sampling step reads besides its draws."""
        return self.conditions({"prompt": prompt, "template_cache": template_cache, **extra})[0]

    def conditions(self, positive: dict[str, Any],
                   negative: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """`condition` for both branches of guidance, each given its arguments. A negative prompt of None has zeros in
        ``zeroed_slots``; of a family without such it is "".

        Of the negative branch only those units run whose inputs, or what they are made of, are other objects than in
        the positive one: an edit image is encoded once.
        """
        has_no_text = negative is not None and negative.get("prompt", "") is None
        if has_no_text:
            negative = negative | {"prompt": positive["prompt"] if self.zeroed_slots else ""}
        found: list[dict[str, Any] | None] = []
        first: dict[str, Any] = {}  # what the positive branch was given
        prepared: dict[str, Any] = {}  # and all slots that it has
        for branch in (positive, negative):
            if branch is None:
                found.append(None)
                continue
            given = {name: value for name, value in branch.items() if value is not None and name != "template_cache"}
            program = self.sampling_program([name for name in given if name in self.optional_units])
            cut = program.cut(self.denoise.output_params)
            known = {*cut.inputs, *self.input_defaults}
            slots, units = {name: value for name, value in given.items() if name in known}, cut.prepare
            if first.keys() == given.keys():
                again = program.branch([name for name in given if given[name] is not first[name]],
                                       self.denoise.output_params)
                slots, units = prepared | slots, tuple(unit for unit in units if unit.name in again)
            further = [unit for name in given if name in self.optional_units for unit in self.optional_units[name]]
            reads_prompt = any("prompt" in map(slot, unit.input_params) for unit in further)  # with its references, say
            if self.prepared_prompts is not None and "prompt" in given and not reads_prompt:
                there = self.prepared_prompt(given["prompt"])
                left = cut.still_to_run({*there, *given})
                slots, units = slots | there, tuple(unit for unit in units if unit in left)
            first, prepared = given, self.run(units, slots)
            self.check_widths(prepared)
            lost = [name for name in cut.cache if name not in prepared]
            if lost:
                raise ProgramError(f"condition() needs {listing(lost)}: pass {listing(n + '=Tensor' for n in lost)}.")
            # text is padded to one of few lengths, each of which is one compilation
            padded, _ = pad_prompts(self, {n: to_numpy(prepared[n])[0] for n in self.padded_slots if n in cut.cache})
            found.append({name: Tensor(padded[name][None]) if name in padded else prepared[name] for name in cut.cache}
                         | to_slots(branch.get("template_cache") or {}))
        if has_no_text:
            found[1] |= {name: ops.zeros_like(found[1][name]) for name in self.zeroed_slots}
        return found[0], found[1]

    def prepared_prompt(self, prompt: str) -> dict[str, Tensor]:
        """Slots of one of ``prepared_prompts``. Raises: ConfigError for another prompt."""
        if prompt not in self.prepared_prompts:
            raise ConfigError(f"prompt={shortened(prompt)} is not in the cache, and this stage of split training loads "
                              f"no text encoder: expected one of {listing(map(repr, self.prepared_prompts), 3)}. "
                              "Run stage one, --task sft:data_process, with it among sample_prompts.")
        return {name: runtime.to_device(array[None]) for name, array in self.prepared_prompts[prompt].items()}

    def denoiser(self, condition: dict[str, Any], unit: TensorUnit | None = None) -> Denoise:
        """``denoise(latents, sigma) -> velocity``, or with what else the network takes and gives, under one condition;
        compiled once per shape in mode graph."""
        slots = tuple(condition)  # those of a branch with a template and of one without are two compilations
        unit = unit or self.denoise

        def build():
            join = JoinTemplateCache(slots)
            units = [join, unit] if join.input_params else [unit]
            fuse = [unit.name for unit in units if unit.is_always_fused]
            cut = Program(units, slots, self.sampled_draws).cut(self.denoise.output_params, fuse=fuse)
            return UnitSequence(cut, self, inputs=(*slots, *self.sampled_draws)).positional

        network = unit.onload_model_names[0]
        what = "the sampling step" if network == self.network else f"the sampling step of {network}"
        step = self.compiled(what, build, slots)
        return lambda latents, sigma: step(*condition.values(), latents, sigma)[0]

    def generate(self, positive: dict[str, Any], negative: dict[str, Any] | None, latents: np.ndarray,
                 sigmas: np.ndarray, cfg_scale: float = 1.0, on_step: Callable[[int, int], None] | None = None,
                 sampler: str = "euler") -> list[Image.Image]:
        """Integrate from noise to images; arguments as `integrate`."""
        return self.decode(self.integrate(positive, negative, latents, sigmas, cfg_scale, on_step, sampler))

    def integrate(self, positive: dict[str, Any], negative: dict[str, Any] | None, latents: np.ndarray | Tensor,
                  sigmas: np.ndarray, cfg_scale: float = 1.0, on_step: Callable[[int, int], None] | None = None,
                  sampler: str = "euler", noise: Callable[[int], np.ndarray] | None = None,
                  control_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Latents at the last of ``sigmas``, float32 [B, ...].

        Args:
            positive, negative: conditions from `condition`; ``negative`` is used when ``cfg_scale`` is not 1.
            latents: at ``sigmas[0]`` (noise alone where it is 1), float32 [B, ...].
            sigmas: float32 [n + 1], decreasing, ends with 0.
            noise: what sampling step k adds, for samplers that add some.
            control_range: the part of the steps in which control images are read.

        Raises: ConfigError for a part that is none.
        """
        first, last = control_range
        if not 0 <= first < last <= 1:
            raise ConfigError(f"control_range={first, last}: expected two numbers of 0 to 1, the second larger.")
        denoise = self.guided(positive, negative, cfg_scale)
        if "control_scales" in positive and (first, last) != (0, 1):
            without = self.guided(_without_control(positive), negative and _without_control(negative), cfg_scale)
            denoise = _within(control_range, np.asarray(sigmas, np.float32), denoise, without)
        return SAMPLERS[sampler](denoise, Tensor(latents), sigmas, on_step)

    def guided(self, positive: dict[str, Any], negative: dict[str, Any] | None, cfg_scale: float,
               unit: TensorUnit | None = None) -> Denoise:
        """``denoise(latents, sigma) -> velocity`` under one condition, or under two with guidance; by ``unit`` instead
        of ``denoise``."""
        denoise = self.denoiser(positive, unit)
        if cfg_scale != 1 and negative is not None:
            return self.guidance_rule(denoise, self.denoiser(negative, unit), cfg_scale)
        return denoise

    def decode(self, latents: Tensor, tiled: bool = False, tile_size: int | None = None,
               tile_stride: int | None = None) -> list[Image.Image]:
        """Images from latents; in tiles as `__call__`."""
        return [to_pil(pixels) for pixels in self.pixels(latents, tiled, tile_size, tile_stride)]

    def pixels(self, latents: Tensor, tiled: bool = False, tile_size: int | None = None,
               tile_stride: int | None = None) -> np.ndarray:
        """Pixels from latents, float32 [B, 3, ...]; in tiles as `__call__`."""
        slots = {"latents": latents, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        pipe = self if self.prepared_prompts is None else _WithDecoder(self)
        return run_unit(self.build_decode(), pipe, slots)["pixels"].asnumpy()


def _without_control(condition: dict[str, Any]) -> dict[str, Any]:
    """The same step with a scale of 0 for control images."""
    return condition | {"control_scales": ms.mint.zeros_like(condition["control_scales"])}


def _within(part: tuple[float, float], sigmas: np.ndarray, denoise: Denoise, without: Denoise) -> Denoise:
    """``denoise`` in this part of the steps, ``without`` outside of it, as diffusers counts."""
    steps = len(sigmas) - 1

    def at(latents: Tensor, sigma: Tensor) -> Tensor:
        step = int(np.argmin(np.abs(sigmas[:-1] - sigma.asnumpy()[0])))
        return (denoise if step / steps >= part[0] and (step + 1) / steps <= part[1] else without)(latents, sigma)

    return at


class _WithDecoder:
    """A pipeline whose models are for decoding alone; see `models.ModelStore.decoder`."""

    def __init__(self, pipe: ImagePipeline):
        self._pipe = pipe

    def __getattr__(self, name: str) -> Any:
        return self._pipe.store.decoder(name) if name in self._pipe.model_names else getattr(self._pipe, name)


def those_given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None or empty."""
    return {name: value for name, value in inputs.items() if value is not None and value not in ([], ())}


def scaled(image: Image.Image, height: int, width: int) -> Image.Image:
    """An image at a size in pixels. Source: diffusers 0.39, VaeImageProcessor with its default resampling."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
