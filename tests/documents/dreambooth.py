"""Document 003 as a script of its reader: `TrainStepForFluxDevDB` of mindone's "FLUX.1 DreamBooth LoRA".

The class is the document's (mindone, Apache License 2.0), but for its imports and for what docs/explanation/porting.md
says of it; each such line says why. Everything random is drawn inside ``forward``.

    python dreambooth.py MODEL OUT BATCH    one rank of a job; what it computes goes to OUT/rank-RANK-of-RANKS.npz
"""
# ruff: noqa: C408, I001  (the document's own lines)
from __future__ import annotations

import ms_diffsynth  # before the first import from mindone

import os
import sys
from argparse import Namespace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindone.diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from mindone.peft import LoraConfig
from mindone.diffusers.training_utils import compute_loss_weighting_for_sd3
from mindspore import nn, ops
from mindspore.amp import StaticLossScaler

from ms_diffsynth import Accelerator, AttrJitWrapper, TrainStep  # the last two: in the document from mindone

DEVICE = os.environ.get("MS_DIFFSYNTH_TEST_DEVICE", "CPU")


def compute_weighting_mse_loss(weighting, pred, target):
    """
    When argument with_prior_preservation is True in DreamBooth training, weighting has different batch_size
    with pred/target which causes errors, therefore we broadcast them to proper shape before mul
    """
    repeats = weighting.shape[0] // pred.shape[0]
    target_ndim = target.ndim
    square_loss = ((pred.float() - target.float()) ** 2).tile((repeats,) + (1,) * (target_ndim - 1))

    weighting_mse_loss = ops.mean(
        (weighting * square_loss).reshape(target.shape[0], -1),
        1,
    )
    weighting_mse_loss = weighting_mse_loss.mean()

    return weighting_mse_loss


class TrainStepForFluxDevDB(TrainStep):

    def __init__(
        self,
        vae: nn.Cell,
        transformer: nn.Cell,
        optimizer: nn.Optimizer,
        noise_scheduler,
        weight_dtype,
        length_of_dataloader,
        args,                   # args dicts
        prompt_embeds,          # outputs of text encoders
        pooled_prompt_embeds,   # outputs of text encoders
        text_ids,               # outputs of text encoders
    ):
        super().__init__(
            model = transformer,
            optimizer = optimizer,
            loss_scaler = StaticLossScaler(4096),
            max_grad_norm = args.max_grad_norm,
            gradient_accumulation_steps = args.gradient_accumulation_steps,
            gradient_accumulation_kwargs=dict(length_of_dataloader=length_of_dataloader),
        )
        # transformer
        self.transformer = transformer
        self.transformer_config_guidance_embeds = transformer.config.guidance_embeds

        # vae
        self.vae = vae
        self.vae_dtype = vae.dtype
        self.vae_config_scaling_factor = vae.config.scaling_factor
        self.vae_config_shift_factor = vae.config.shift_factor
        self.vae_config_block_out_channels = vae.config.block_out_channels
        self.vae_scale_factor = 2 ** (len(self.vae_config_block_out_channels) - 1)  # the document has no "- 1"

        # noise_scheduler and others args
        self.noise_scheduler = noise_scheduler
        self.noise_scheduler_num_train_timesteps = noise_scheduler.config.num_train_timesteps
        self.weight_dtype = weight_dtype
        self.args = AttrJitWrapper(**vars(args))

        self.prompt_embeds = prompt_embeds
        self.pooled_prompt_embeds = pooled_prompt_embeds
        self.text_ids = text_ids

    def get_sigmas(self, indices, n_dim=4, dtype=ms.float32):
        sigma = self.noise_scheduler.sigmas[indices].to(dtype=dtype)
        while len(sigma.shape) < n_dim:
            sigma = sigma.unsqueeze(-1)
        return sigma

    def forward(self, pixel_values):

            # use pre-computed embeddings.
            prompt_embeds, pooled_prompt_embeds, text_ids = (
                self.prompt_embeds,
                self.pooled_prompt_embeds,
                self.text_ids,
            )

            # Convert images to latent space
            pixel_values = pixel_values.to(dtype=self.vae_dtype)

            model_input = self.vae.diag_gauss_dist.sample(self.vae.encode(pixel_values)[0])
            model_input = (model_input - self.vae_config_shift_factor) * self.vae_config_scaling_factor
            model_input = model_input.to(dtype=self.weight_dtype)

            latent_image_ids = FluxPipeline._prepare_latent_image_ids(
                model_input.shape[0],
                model_input.shape[2] // 2,  # the document has no "// 2"
                model_input.shape[3] // 2,
                self.weight_dtype,
            )

            # Sample noise that we'll add to the latents
            noise = ops.randn_like(model_input, dtype=model_input.dtype)
            bsz = model_input.shape[0]

            # Sample a random timestep for each image
            # for weighting schemes where we sample timesteps non-uniformly
            if self.args.weighting_scheme == "logit_normal":
                # See 3.1 in the SD3 paper ($rf/lognorm(0.00,1.00)$).
                u = ops.normal(mean=self.args.logit_mean, stddev=self.args.logit_std, shape=(bsz,))
                u = ops.sigmoid(u)
            elif self.args.weighting_scheme == "mode":
                u = ops.rand(bsz)
                u = 1 - u - self.args.mode_scale * (ops.cos(ms.numpy.pi * u / 2) ** 2 - 1 + u)
            else:
                u = ops.rand(bsz)

            indices = (u * self.noise_scheduler_num_train_timesteps).long()
            indices = indices.clamp(0, self.noise_scheduler_num_train_timesteps - 1)  # in the document it can be 1000
            timesteps = self.noise_scheduler.timesteps[indices]

            # Add noise according to flow matching.
            # zt = (1 - texp) * x + texp * z1
            sigmas = self.get_sigmas(indices, n_dim=model_input.ndim, dtype=model_input.dtype)
            noisy_model_input = sigmas * noise + (1.0 - sigmas) * model_input

            packed_noisy_model_input = FluxPipeline._pack_latents(
                noisy_model_input,
                batch_size=model_input.shape[0],
                num_channels_latents=model_input.shape[1],
                height=model_input.shape[2],
                width=model_input.shape[3],
            )

            # handle guidance
            if self.transformer_config_guidance_embeds:
                guidance = ms.tensor([self.args.guidance_scale])
                guidance = guidance.broadcast_to((model_input.shape[0],))
            else:
                guidance = None

            # Predict the noise residual
            model_pred = self.transformer(
                hidden_states=packed_noisy_model_input,
                # YiYi notes: divide it by 1000 for now because we scale it by 1000 in the transforme rmodel (we should not keep it but I want to keep the inputs same for the model for testing) # noqa E501
                timestep=timesteps / 1000,
                guidance=guidance,
                pooled_projections=pooled_prompt_embeds,
                encoder_hidden_states=prompt_embeds,
                txt_ids=text_ids,
                img_ids=latent_image_ids,
                return_dict=False,
            )[0]
            model_pred = FluxPipeline._unpack_latents(
                model_pred,
                height=int(model_input.shape[2] * self.vae_scale_factor),  # in the document "/ 2": its factor is double
                width=int(model_input.shape[3] * self.vae_scale_factor),
                vae_scale_factor=self.vae_scale_factor,
            )

            # these weighting schemes use a uniform timestep sampling
            # and instead post-weight the loss
            weighting = compute_loss_weighting_for_sd3(weighting_scheme=self.args.weighting_scheme, sigmas=sigmas)

            # flow matching loss
            target = noise - model_input

            prior_loss = 0.0  # not in the document: compiled code has a value on every path
            if self.args.with_prior_preservation:
                # Chunk the noise and model_pred into two parts and compute the loss on each part separately.
                model_pred, model_pred_prior = ops.chunk(model_pred, 2, axis=0)
                target, target_prior = ops.chunk(target, 2, axis=0)

                # Compute prior loss
                prior_loss = compute_weighting_mse_loss(weighting, model_pred_prior, target_prior)

            # Compute regular loss.
            loss = compute_weighting_mse_loss(weighting, model_pred, target)

            if self.args.with_prior_preservation:  # in the document "args", the module's global
                # Add the prior loss to the instance loss.
                loss = loss + self.args.prior_loss_weight * prior_loss

            loss = self.scale_loss(loss)
            return loss, model_pred


# -- what the document leaves to the script around it ------------------------------------------------------------------

SIDE, TOKENS = 32, 6  # pixels of an image, tokens of the prompt


def pictures(first: int, count: int) -> ms.Tensor:
    """Float32 [count, 3, SIDE, SIDE] in [-1, 1]; those with the same number are the same."""
    return ms.Tensor(np.stack([np.random.default_rng(first + k).uniform(-1, 1, (3, SIDE, SIDE))
                               for k in range(count)]).astype(np.float32))


def make_step(folder: Path | str, batch: int, kind: type[TrainStep] = TrainStepForFluxDevDB, **settings) -> TrainStep:
    """The step over mindone's networks, with a LoRA of PEFT on the queries of the transformer's blocks."""
    defaults = {"max_grad_norm": 1.0, "gradient_accumulation_steps": 1, "weighting_scheme": "none", "logit_mean": 0.0,
                "logit_std": 1.0, "mode_scale": 1.29, "guidance_scale": 3.5, "with_prior_preservation": False,
                "prior_loss_weight": 1.0, "output_dir": None}
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    for network in (vae, transformer):
        for parameter in network.get_parameters():
            parameter.requires_grad = False
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["attn.to_q"]))
    trained = [p for p in transformer.get_parameters() if p.requires_grad]
    rng = np.random.default_rng(1)
    return kind(
        vae=vae, transformer=transformer, optimizer=nn.AdamWeightDecay(trained, learning_rate=1e-2),
        noise_scheduler=noise_scheduler, weight_dtype=ms.float32, length_of_dataloader=10,
        args=Namespace(**(defaults | settings)),
        prompt_embeds=ms.Tensor(rng.standard_normal((1, TOKENS, 48)).astype(np.float32)).tile((batch, 1, 1)),
        pooled_prompt_embeds=ms.Tensor(rng.standard_normal((1, 32)).astype(np.float32)).tile((batch, 1)),
        text_ids=ms.Tensor(np.zeros((TOKENS, 3), np.float32)))


# -- a job -------------------------------------------------------------------------------------------------------------


def main(folder: str, out: str, batch: int) -> dict[str, np.ndarray]:
    """Losses of the package's own step; predictions of the document's, whose noise is drawn in the step."""
    accelerator = Accelerator(mode="pynative", device=DEVICE)
    rank, ranks, found = accelerator.process_index, accelerator.num_processes, {}
    for has_prior in (False, True):
        ms.set_seed(5)  # of the LoRA's first weights
        step = make_step(folder, batch, ms_diffsynth.TrainStepForFluxDevDB, with_prior_preservation=has_prior)
        halves = 2 if has_prior else 1
        own = batch // halves  # instances, and with prior preservation as many images of the class
        images = ops.cat([pictures(100 * half + rank * own, own) for half in range(halves)])
        found[f"losses {has_prior}"] = [float(step(images)[0]) for _ in range(3)]
    ms.set_seed(5)  # by every rank the same
    step = make_step(folder, 1)
    found["predictions"] = [step(pictures(0, 1))[1].asnumpy() for _ in range(2)]
    np.savez(Path(out) / f"rank-{rank}-of-{ranks}.npz", **found)
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
