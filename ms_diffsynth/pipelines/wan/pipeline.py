"""Wan 2.1 and 2.2: UMT5 as text encoder, an autoencoder of films, and one transformer or two for parts of the noise."""
from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ms_diffsynth.diffusion.flow import with_given
from ms_diffsynth.diffusion.samplers import Denoise as Denoiser
from ms_diffsynth.diffusion.schedule import FlowMatchSettings, Grid, Schedule, Shift, obeyed, to_one_nth
from ms_diffsynth.diffusion.tasks import Task
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import ConfigError, listing, naming
from ms_diffsynth.formats.interchange import Table, read_table
from ms_diffsynth.formats.lora import TRAINED_MODELS, metadata_of
from ms_diffsynth.models import SIZE, Component, arguments, blocks, columns, has, rows
from ms_diffsynth.pipeline import SamplingDefaults
from ms_diffsynth.pipelines.shared import causal_vae, t5
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.vae_units import with_latents
from ms_diffsynth.pipelines.shared.video import LoadPixels, VideoPipeline
from ms_diffsynth.pipelines.wan import units
from ms_diffsynth.pipelines.wan.denoise import Denoise, DenoiseLittle
from ms_diffsynth.pipelines.wan.published import IMAGE_ENCODER, PUBLISHED, UMT5_XXL, VAE_21, VAE_22
from ms_diffsynth.units import TensorUnit

# what a frame of a piece, and what is kept of the piece before, take of the VAE, by what an image takes
CODED = {"encode": (1.8, 4.6), "decode": (1.25, 11.7)}
NETWORKS, EXPERTS = ("dit", "dit2"), ("high_noise", "low_noise")
# the least sigma of the expert for much noise. Source: Wan 2.2, wan_t2v_A14B.py and wan_i2v_A14B.py
T2V_BOUNDARY, I2V_BOUNDARY = 0.875, 0.9


def _build_dit(config: dict[str, Any]):
    from ms_diffsynth.pipelines.wan.transformer import WanTransformer  # imports mindone's networks

    return WanTransformer(**arguments(WanTransformer, config))


def _build_vae(config: dict[str, Any]):
    return with_latents(causal_vae.CausalVAE, causal_vae.EncodeImage, causal_vae.Decode)(
        **arguments(causal_vae.CausalVAE, config))


def _build_text_encoder(config: dict[str, Any]):
    with quiet_imports():
        from mindone.transformers import UMT5EncoderModel
        from transformers import UMT5Config

    return t5.with_exact_buckets(UMT5EncoderModel(UMT5Config(**arguments(UMT5Config, config))))


def _build_image_encoder(config: dict[str, Any]):
    from ms_diffsynth.pipelines.wan.image_encoder import ImageEncoder  # imports mindone's networks

    return ImageEncoder(config)


def _build_tokenizer(folder: Path):
    with quiet_imports():
        from transformers import T5Tokenizer, T5TokenizerFast

    is_fast = (folder / "tokenizer.json").is_file()
    return (T5TokenizerFast if is_fast else T5Tokenizer).from_pretrained(folder)


def weight_dtype(name: str, dtype: ms.Type) -> ms.Type:
    """float32 for what embeds the time and for the tables of modulations, as diffusers keeps them; else ``dtype``."""
    return ms.float32 if ".time_embedder." in name or name.endswith("scale_shift_table") else dtype


def _in_float32(name: str, dtype: ms.Type) -> ms.Type:
    return ms.float32


_DIT = Component(
    name="dit", folder="transformer", class_name="WanTransformer3DModel", build=_build_dit, weight_dtype=weight_dtype,
    reads={"in_channels": SIZE, "out_channels": SIZE, "text_dim": SIZE},
    known={name: configs["dit"] for name, configs in PUBLISHED.items()},
    told_by={"num_layers": blocks("blocks."), "in_channels": columns("patch_embedding.weight"),
             "ffn_dim": lambda shapes: shapes.get("blocks.0.ffn.net.0.proj.bias", (None,))[0],
             "image_dim": lambda shapes: shapes.get("condition_embedder.image_embedder.norm1.weight", (None,))[0],
             "pos_embed_seq_len": columns("condition_embedder.image_embedder.pos_embed")})
COMPONENTS = (
    Component(name="tokenizer", folder="tokenizer", build=_build_tokenizer, libraries=("transformers", "ftfy")),
    Component(name="text_encoder", folder="text_encoder", class_name="UMT5EncoderModel", build=_build_text_encoder,
              ignored=("encoder.embed_tokens.weight",), weight_dtype=t5.weight_dtype, reads={"vocab_size": SIZE},
              known={"UMT5-XXL": UMT5_XXL},
              told_by={"d_model": columns("shared.weight"), "num_layers": blocks("encoder.block.")}),
    Component(name="image_encoder", folder="image_encoder", class_name="CLIPVisionModel", build=_build_image_encoder,
              ignored=("vision_model.embeddings.position_ids",), weight_dtype=_in_float32,
              known={"CLIP ViT-H": IMAGE_ENCODER}, is_optional=True,
              told_by={"num_hidden_layers": blocks("vision_model.encoder.layers.")}),
    Component(name="vae", folder="vae", class_name="AutoencoderKLWan", build=_build_vae, weight_dtype=_in_float32,
              reads=causal_vae.VAE_READS, known={"Wan 2.1": VAE_21, "Wan 2.2 TI2V-5B": VAE_22},
              told_by={"base_dim": rows("encoder.conv_in.weight"), "z_dim": columns("decoder.conv_in.weight"),
                       "is_residual": has("decoder.up_blocks.0.upsampler.resample.1.weight")},
              encoder=("encoder", "quant_conv")),
    _DIT,
    replace(_DIT, name="dit2", folder="transformer_2", is_optional=True),
)

# What DiffSynth-Studio's Wan LoRA scripts adapt
LORA_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How a model is sampled: its shift, its defaults, and the guidance of the expert for little noise.

    Source: the configurations of Wan2.1 and Wan2.2, and the models' cards.
    """

    shift: float
    sampling: SamplingDefaults
    low_noise_cfg_scale: float | None = None


_480P = {"height": 480, "width": 832, "num_frames": 81}
TEXT = Defaults(shift=5.0, sampling=SamplingDefaults(cfg_scale=5.0, num_inference_steps=50, **_480P))
IMAGE = Defaults(shift=5.0, sampling=SamplingDefaults(cfg_scale=5.0, num_inference_steps=40, **_480P))
TEXT_EXPERTS = Defaults(shift=12.0, low_noise_cfg_scale=3.0,
                        sampling=SamplingDefaults(cfg_scale=4.0, num_inference_steps=40, **_480P))
IMAGE_EXPERTS = Defaults(shift=5.0, low_noise_cfg_scale=3.5,
                         sampling=SamplingDefaults(cfg_scale=3.5, num_inference_steps=40, **_480P))
COMPLETING = Defaults(shift=5.0, sampling=SamplingDefaults(cfg_scale=5.0, num_inference_steps=50, height=704,
                                                           width=1280, num_frames=121))


def to_one_thousandth(n: int) -> np.ndarray:
    """1, ..., towards 1/1000, which is not reached, in float64 until it is shifted.

    Source: diffusers 0.39, UniPCMultistepScheduler, flow sigmas; it starts at 1 - 1e-6, of which it takes a logarithm.
    """
    return np.linspace(1.0, 1e-3, n + 1)[:-1]


@dataclass(frozen=True)
class UniPCSettings:
    """Of diffusers' UniPCMultistepScheduler what a flow-matching model needs."""

    flow_shift: float = 1.0


class WanVideoPipeline(VideoPipeline):
    """Text to video and image to video with Wan 2.1 and 2.2, and the units their training reuses.

    What a model takes is in its files: further channels (image to video of 14B), tokens of an image besides (2.1), or a
    first frame among its latents (TI2V-5B, which completes films). Of Wan 2.2's two experts ``dit`` is that for much
    noise and ``dit2`` that for little, as in diffusers and DiffSynth-Studio.

    Attributes:
        max_sequence_length: tokens of a prompt that are kept; at most 512, which the transformer always sees.
        expert: "high_noise" or "low_noise": which part of the noise levels the network is trained on. None goes by the
            network that is trained where there are two experts, and is all levels otherwise.
        low_noise_cfg_scale: guidance of the expert for little noise where the cfg_scale is the model's own.
    """

    components = COMPONENTS
    lora_target_modules = LORA_TARGET_MODULES
    interchange = read_table(Path(__file__).with_name("interchange.yaml"))
    widths = {"latents": ("out_channels", -4, 1), "prompt_embeds": ("text_dim", -1, 1)}
    prepare_settings = ("max_sequence_length",)
    padded_slots = ("prompt_ids",)  # where the text encoder is trained
    prompt_lengths = (units.TEXT_TOKENS,)
    max_sequence_length = units.TEXT_TOKENS
    frame_factor = causal_vae.TIMES
    sampling = TEXT.sampling
    low_noise_cfg_scale: float | None = None
    sft_grid = Grid(to_one_nth, (Shift(5.0),))  # DiffSynth-Studio 2.1.12, FlowMatchScheduler("Wan"): of all models
    expert: str | None = None

    # -- what a model is -------------------------------------------------------------------------------------------

    def _knows(self, name: str) -> bool:
        return self.store.has_config(name)

    @property
    def completes(self) -> bool:
        """Whether a first frame that is given stands among the latents."""
        patch = self._knows("vae") and self.config("vae").get("patch_size")
        return bool(self.store.index.get("expand_timesteps", patch))

    def _of_network(self, setting: str) -> Any:
        """A setting of the network, or of either expert, which agree in it; None where it is not known."""
        name = next((name for name in NETWORKS if self._knows(name)), None)
        return name and self.config(name).get(setting)

    @property
    def has_condition(self) -> bool:
        """Whether the network has channels for given frames."""
        return self._of_network("in_channels") != self._of_network("out_channels")

    @property
    def has_image_tokens(self) -> bool:
        """Whether the network sees tokens of an image."""
        return self._of_network("image_dim") is not None

    @property
    def has_experts(self) -> bool:
        """Whether there are two networks."""
        return self._knows("dit2") or self.store.index.get("boundary_ratio") is not None

    @property
    def boundary(self) -> float:
        """The least sigma of the expert for much noise."""
        return self.store.index.get("boundary_ratio") or (I2V_BOUNDARY if self.has_condition else T2V_BOUNDARY)

    @property
    def defaults(self) -> Defaults:
        """How this model is sampled."""
        if self.completes:
            return COMPLETING
        if self.has_experts:
            return IMAGE_EXPERTS if self.has_condition else TEXT_EXPERTS
        return IMAGE if self.has_condition else TEXT

    @property
    def diffusers_class(self) -> str:
        return "WanImageToVideoPipeline" if self.has_condition else "WanPipeline"

    @property
    def division_factor(self) -> int:
        """A token is 2 x 2 latent pixels: 16 pixels on a side, of TI2V-5B 32."""
        return 2 * (causal_vae.scale_factor(self.config("vae")) if self._knows("vae") else 8)

    @property
    def frame_rate(self) -> float:
        return 24.0 if self.completes else 16.0

    def coded(self, size: tuple[int, ...], what: str) -> float:
        """As `ImagePipeline.coded`. A film is coded in pieces, beside what they have kept of the pieces before: by
        MindSpore's allocator (``python benchmarks/vae_peaks.py``), in pixels of an image."""
        *frames, height, width = size
        config = self.config("vae")
        pixels = height * width / (config.get("patch_size") or 1) ** 2
        if what == "decode":
            pixels *= (config.get("decoder_base_dim") or config["base_dim"]) / config["base_dim"]
        if frames in ([], [1]):
            return pixels
        piece = causal_vae.TIMES * causal_vae.at_once(height, width)
        each, kept = CODED[what]
        return pixels * (each * min(*frames, piece) + (kept if frames[0] > piece else 0))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return causal_vae.latent_shape(self.config("vae"), (num_frames, height, width))

    def use_sampling_config(self, config: Mapping[str, Any]) -> None:
        """As `Pipeline.use_sampling_config`, after the model's own defaults. An expert that is alone is the network."""
        if self._knows("dit2") and not self._knows("dit"):
            self.denoise = DenoiseLittle(self.dtype)
        self.sampling, self.low_noise_cfg_scale = self.defaults.sampling, self.defaults.low_noise_cfg_scale
        super().use_sampling_config(config)

    # -- units -----------------------------------------------------------------------------------------------------

    def build_units(self) -> list:
        return [units.TokenizePrompt(), units.EncodePrompt(), LoadPixels(), units.EncodeImage(self.dtype)]

    def build_optional_units(self) -> dict[str, list]:
        if self.completes:
            return {"input_image": [units.LoadGiven(), units.EncodeFirst()]}
        if not self.has_condition:
            return {}
        tokens = [units.EncodeImageTokens()] if self.has_image_tokens else []
        return {"input_image": [units.LoadGiven(), units.EncodeGiven(), *tokens], "end_image": []}

    @property
    def fusible(self) -> tuple[str, ...]:
        """What the VAE encodes."""
        further = [unit for units in self.optional_units.values() for unit in units]
        return ("encode_image", *(unit.name for unit in further if "vae" in unit.onload_model_names))

    def build_denoise(self) -> Denoise:
        return Denoise(self.dtype)

    def build_decode(self) -> causal_vae.Decode:
        return causal_vae.Decode(self.dtype)

    # -- noise levels ----------------------------------------------------------------------------------------------

    def published_scheduler(self) -> FlowMatchSettings:
        return FlowMatchSettings(shift=self.defaults.shift)

    @property
    def scheduler_settings(self) -> FlowMatchSettings:
        """Those of scheduler_config.json, of diffusers' UniPC or Euler; without the file, the model's own."""
        config = self.scheduler_config()
        if self._scheduler_settings is None and (config or {}).get("_class_name") == "UniPCMultistepScheduler":
            fixed = {"num_train_timesteps": 1000, "use_flow_sigmas": True, "prediction_type": "flow_prediction",
                     "final_sigmas_type": "zero"}
            ours = {name: value for name, value in config.items() if name in (*fixed, "flow_shift", "_class_name")}
            with naming("scheduler_config.json"):
                found = UniPCSettings(**obeyed(UniPCSettings, ours, ("UniPCMultistepScheduler",), fixed))
            self._scheduler_settings = FlowMatchSettings(shift=found.flow_shift)
        return super().scheduler_settings

    def training_schedule(self, objective: str) -> Schedule:
        """Of ``sft`` DiffSynth-Studio's grid, the same for all models; of DreamBooth that of the model's scheduler."""
        if objective != "sft":
            return self.scheduler_settings.schedule()
        return Schedule(training=self.sft_grid, inference=self.sft_grid)

    def sampling_sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> np.ndarray:
        """Noise levels to integrate over: float32 [num_inference_steps + 1], decreasing, ends with 0."""
        settings, config = self.scheduler_settings, self.scheduler_config() or {}
        spacing = to_one_nth if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler" else to_one_thousandth
        grid = Grid(spacing, (Shift(settings.shift),))
        return Schedule(training=grid, inference=grid).sampling(num_inference_steps)

    # -- training --------------------------------------------------------------------------------------------------

    def prepare_training(self, trained: Sequence[str]) -> None:
        """Train one expert. Raises: ConfigError for two, or for a network that needs frames that it is not given."""
        named = [name for name in NETWORKS if name in {part.split(".")[0] for part in trained}]
        if len(named) == 2:
            raise ConfigError("dit and dit2 are to be trained: a run trains one expert, on its own noise levels. Train "
                              "them in two runs, and give both files when sampling.")
        if "dit2" in named:
            self.denoise = DenoiseLittle(self.dtype)
        if self.expert not in (None, *EXPERTS):
            raise ConfigError(f"expert={self.expert}: expected {listing(EXPERTS)}, or nothing.")
        if self.expert and self.has_experts and self.expert != self._expert_of(self.network):
            right = "dit" if self.expert == EXPERTS[0] else "dit2"
            raise ConfigError(f"expert={self.expert}, but {listing(trained)} is to be trained, which is the expert "
                              f"{self._expert_of(self.network)}. Train {right}, or remove expert.")
        if self.has_condition and "input_image" not in self.inputs:
            raise ConfigError("this model makes videos of images: its network takes the first frame in channels of its "
                              "own. Set extra_inputs to input_image; it is the first frame of each video.")

    def film_problem(self, frames: int, inputs: Collection[str]) -> str:
        """As `Pipeline.film_problem`: a first frame that is given must not be all of the film."""
        if frames > 1 or "input_image" not in inputs:
            return ""
        other = "" if self.has_condition else ", or take input_image out of extra_inputs"
        return ("one frame, and input_image gives the first frame, which leaves nothing to learn; expected 5 frames or "
                f"more. Train on longer films alone{other}")

    @staticmethod
    def _expert_of(network: str) -> str:
        return EXPERTS[network == "dit2"]

    def objective_for(self, objective: Task | None, name: str = "sft") -> Task:
        """As `Pipeline.objective_for`; for an expert, on its noise levels."""
        found = super().objective_for(objective, name)
        expert = self.expert or (self._expert_of(self.network) if self.has_experts else None)
        if expert is None or not isinstance(found, Objective) or found.index_range is not None:
            return found
        sigmas = self.training_schedule(name).sigmas
        count = int((sigmas >= np.float32(self.boundary)).sum())
        return replace(found, index_range=(0, count) if expert == EXPERTS[0] else (count, len(sigmas)))

    @property
    def lora_table(self) -> Table:
        """As `Pipeline.lora_table`; where the expert for little noise is the network, files have the same names."""
        table = super().lora_table
        return self._for_little(table) if self.network == "dit2" else table

    def lora_table_of(self, name: str) -> Table:
        table = super().lora_table
        return self._for_little(table) if name == "dit2" else table

    def models_of_lora(self, path: Path) -> list[str]:
        """As `Pipeline.models_of_lora`. Both experts' files have the names of ``dit``: the header says which it is.

        Raises: ConfigError where there are two experts and the header, of another program, says nothing.
        """
        found = super().models_of_lora(path)
        if found[0] != "dit" or not (self._knows("dit") and self._knows("dit2")):
            return found
        trained = re.split(r"[,.]", metadata_of(path).get(TRAINED_MODELS, ""))
        if not (told := [name for name in NETWORKS if name in trained]):
            raise ConfigError(f"{path}: the files of both experts have the same names, and this one does not say which "
                              f"it is for. Say it: --lora dit={path} for the expert for much noise, --lora dit2={path} "
                              "for little noise; in Python pipe.load_lora(pipe.dit2, path).")
        return [told[0], *found[1:]]

    @staticmethod
    def _for_little(table: Table) -> Table:
        own, further = table.models["dit"], table.models["dit2"].prefixes.values()
        rest = {name: model for name, model in table.models.items() if name not in NETWORKS}
        return replace(table, models={"dit2": replace(own, also=(*own.also, *further)), **rest})

    # -- sampling --------------------------------------------------------------------------------------------------

    def check_sampled(self, inputs: Mapping[str, Any]) -> None:
        """As `ImagePipeline.check_sampled`. Raises: ConfigError also for a model that needs an image and has none."""
        super().check_sampled(inputs)
        if self.has_condition and "input_image" not in inputs:
            raise ConfigError("input_image is missing: this model makes videos of images. Give the first frame as "
                              "input_image.")

    def guided(self, positive: dict[str, Any], negative: dict[str, Any] | None, cfg_scale: float,
               unit: TensorUnit | None = None) -> Denoiser:
        """The velocity by the expert that a noise level is for, each with its guidance."""
        if not (self._knows("dit") and self._knows("dit2")):
            return super().guided(positive, negative, cfg_scale, unit)
        is_own = cfg_scale == self.sampling.cfg_scale and self.low_noise_cfg_scale is not None
        much = super().guided(positive, negative, cfg_scale, Denoise(self.dtype))
        little = super().guided(positive, negative, self.low_noise_cfg_scale if is_own else cfg_scale,
                                DenoiseLittle(self.dtype))

        def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
            return (much if float(sigma.asnumpy()[0]) >= self.boundary else little)(latents, sigma)

        return denoise

    def integrate(self, positive: dict[str, Any], negative: dict[str, Any] | None, latents: np.ndarray | Tensor,
                  sigmas: np.ndarray, cfg_scale: float = 1.0, on_step: Callable[[int, int], None] | None = None,
                  sampler: str = "euler", noise: Callable[[int], np.ndarray] | None = None) -> Tensor:
        """As `ImagePipeline.integrate`. Frames that are given are what they were, whatever the steps made of them:
        the network saw them clean at every step."""
        found = super().integrate(positive, negative, latents, sigmas, cfg_scale, on_step, sampler, noise)
        return with_given(found, positive["given_latents"]) if "given_latents" in positive else found
