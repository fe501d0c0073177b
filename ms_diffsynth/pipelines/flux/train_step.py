"""FLUX.1 DreamBooth LoRA as one hand-written step: VAE encode, sigma by index, flow-matching loss, prior preservation.

The program of `FluxImagePipeline` fused with ``encode_image`` computes the same; the tests hold the two equal.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.amp import StaticLossScaler

from ms_diffsynth import runtime
from ms_diffsynth.diffusion import density, flow, losses, weighting
from ms_diffsynth.diffusion.packing import pack, unpack
from ms_diffsynth.draws import Draws
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.pipelines.flux.denoise import image_ids
from ms_diffsynth.training.step import AttrJitWrapper, TrainStep


class TrainStepForFluxDevDB(TrainStep):
    """The user's document 003 with its errors corrected (docs/explanation/porting.md lists them).

    Args:
        vae, transformer: mindone's AutoencoderKL (frozen) and FluxTransformer2DModel.
        optimizer: of what is trained, e.g. the transformer's LoRA.
        noise_scheduler: has 1000 ``sigmas``; mindone's FlowMatchEulerDiscreteScheduler, or a `Schedule`.
        weight_dtype: dtype the transformer computes in.
        length_of_dataloader: batches per epoch; the last accumulation group of an epoch may be smaller.
        args: attributes max_grad_norm, gradient_accumulation_steps, weighting_scheme, logit_mean, logit_std,
            mode_scale, guidance_scale, with_prior_preservation, prior_loss_weight, and optionally seed and loss_scale.
        prompt_embeds, pooled_prompt_embeds, text_ids: the text encoders' outputs, float [b, L, D], [b, P], [L, 3];
            b is 1 (one prompt for all), 2 (instance prompt, class prompt: each serves its half), or the batch size.

    Called with ``pixel_values`` float32 [B, 3, H, W] in [-1, 1]; with prior preservation the first half are instances.
    The draws are appended on the host, keyed by (seed, stream, the sample's number in the whole job): with several
    ranks each draws for its part of the batch of all. They may also be given:
    ``step(pixel_values, posterior_noise, noise, timestep_index)``. Returns ``(loss, model_pred)``; with prior
    preservation ``model_pred`` is that of the instances.
    """

    def __init__(self, vae: nn.Cell, transformer: nn.Cell, optimizer: nn.Cell, noise_scheduler: Any,
                 weight_dtype: ms.Type, length_of_dataloader: int, args: Any, prompt_embeds: Tensor,
                 pooled_prompt_embeds: Tensor, text_ids: Tensor, **options: Any):
        super().__init__(
            model=transformer,
            optimizer=optimizer,
            loss_scaler=StaticLossScaler(float(getattr(args, "loss_scale", 4096))),
            max_grad_norm=args.max_grad_norm,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_accumulation_kwargs={"length_of_dataloader": length_of_dataloader},
            **options,
        )
        self.transformer = transformer
        self.transformer_config_guidance_embeds = bool(transformer.config.guidance_embeds)
        self.vae = vae
        self.vae_dtype = vae.dtype
        self.vae_config_scaling_factor = vae.config.scaling_factor
        self.vae_config_shift_factor = vae.config.shift_factor
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_channels = vae.config.latent_channels
        self.noise_scheduler = noise_scheduler
        sigmas = np.asarray(getattr(noise_scheduler.sigmas, "asnumpy", lambda: noise_scheduler.sigmas)(), np.float32)
        self.sigmas = Tensor(sigmas)
        self.loss_weights = Tensor(weighting.table(args.weighting_scheme, sigmas), ms.float32)
        self.weight_dtype = weight_dtype
        settings = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, bool, str, tuple, type(None)))}
        self.args = AttrJitWrapper(**settings)
        # parameters, not attributes: a Tensor attribute would be a constant of the graph, compiled in
        self.prompt_embeds = Parameter(prompt_embeds, name="prompt_embeds", requires_grad=False)
        self.pooled_prompt_embeds = Parameter(pooled_prompt_embeds, name="pooled_prompt_embeds", requires_grad=False)
        self.text_ids = Parameter(text_ids, name="text_ids", requires_grad=False)
        self._draws = Draws(getattr(args, "seed", None) or 0)
        self.samples_seen = 0

    def draws(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Posterior noise, noise and indices of noise levels for a batch of images, unless they were given."""
        if len(batch) > 1:
            return ()
        size, _, height, width = batch[0].shape
        place, halves = runtime.current(), 2 if self.args.with_prior_preservation else 1
        own = np.arange(size // halves) + place.rank * (size // halves)
        indices = np.concatenate([self.samples_seen + half * place.world_size * (size // halves) + own
                                  for half in range(halves)])
        self.samples_seen += size * place.world_size
        shape = (self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        args = self.args
        draw = self._draws.normal if density.draw_kind(args.weighting_scheme) == "normal" else self._draws.uniform
        u = density.density(draw("density_draw", indices), args.weighting_scheme, args.logit_mean, args.logit_std,
                            args.mode_scale)
        return (Tensor(self._draws.normal("posterior_noise", indices, shape)),
                Tensor(self._draws.normal("noise", indices, shape)),
                Tensor(density.timestep_index(u, len(self.sigmas))))

    def repeated(self, condition: Tensor, size: int) -> Tensor:
        """A condition for each row of a batch of ``size``: [b, ...] -> [size, ...]."""
        times = size // condition.shape[0]
        if times == 1:
            return condition
        return ops.repeat_interleave(condition, times, 0)

    def get_sigmas(self, indices: Tensor, n_dim: int = 4, dtype: ms.Type = ms.float32) -> Tensor:
        """Noise level by index, [B, 1, ...] with ``n_dim`` axes."""
        return ops.gather(self.sigmas, indices, 0).reshape((-1,) + (1,) * (n_dim - 1)).astype(dtype)

    def forward(self, pixel_values, posterior_noise, noise, timestep_index):
        args = self.args
        moments = self.vae.encode(pixel_values.astype(self.vae_dtype))[0].astype(ms.float32)
        mean, log_variance = moments[:, : self.latent_channels], moments[:, self.latent_channels :]
        # exp(x / 2) as a power: the CPU's exp is good to 5e-6 only, its pow to 1e-7
        std = ops.pow(Tensor(np.float32(np.exp(0.5))), clamp(log_variance, -30.0, 20.0))
        model_input = (mean + std * posterior_noise - self.vae_config_shift_factor) * self.vae_config_scaling_factor
        model_input = ops.stop_gradient(model_input)

        sigmas = self.get_sigmas(timestep_index, model_input.ndim)
        noisy = flow.interpolate(model_input, noise, sigmas.reshape(-1))

        size, _, height, width = noisy.shape
        guidance = None
        if self.transformer_config_guidance_embeds:
            guidance = ops.full((size,), args.guidance_scale, dtype=ms.float32)
        model_pred = self.transformer(
            hidden_states=pack(noisy).astype(self.weight_dtype),
            timestep=sigmas.reshape(-1),
            guidance=guidance,
            pooled_projections=self.repeated(self.pooled_prompt_embeds, size).astype(self.weight_dtype),
            encoder_hidden_states=self.repeated(self.prompt_embeds, size).astype(self.weight_dtype),
            txt_ids=self.text_ids,
            img_ids=image_ids(height, width),
            return_dict=False,
        )[0]
        model_pred = unpack(model_pred, height, width).astype(ms.float32)

        weights = ops.gather(self.loss_weights, timestep_index, 0)
        target = flow.velocity_target(model_input, noise)
        loss, sample_losses = losses.weighted_mse(model_pred, target, weights)
        if args.with_prior_preservation:
            loss = losses.prior_preservation(sample_losses, args.prior_loss_weight)
            model_pred = mint.chunk(model_pred, 2, 0)[0]
        loss = self.scale_loss(loss)
        return loss, model_pred
