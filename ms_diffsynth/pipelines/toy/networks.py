"""The toy family's networks: a byte embedding, a linear patch autoencoder, and a two-layer denoiser."""
from __future__ import annotations

from mindspore import Tensor, mint, nn, ops

from ms_diffsynth.diffusion.packing import pack, unpack

PATCH = 4  # pixels per latent pixel


class ToyTextEncoder(nn.Cell):
    """Embedding of bytes: int32 [B, L] -> float32 [B, L, D]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.config = {"hidden_size": hidden_size}
        self.embedding = mint.nn.Embedding(256, hidden_size)

    def construct(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


class ToyAutoencoder(nn.Cell):
    """Linear maps between 4x4 patches of pixels and latent channels."""

    def __init__(self, latent_channels: int, scaling_factor: float = 1.0, shift_factor: float = 0.0):
        super().__init__()
        self.config = {"latent_channels": latent_channels, "scaling_factor": scaling_factor,
                       "shift_factor": shift_factor}
        self.encoder = mint.nn.Linear(3 * PATCH * PATCH, 2 * latent_channels)
        self.decoder = mint.nn.Linear(latent_channels, 3 * PATCH * PATCH)

    def encode(self, pixels: Tensor) -> Tensor:
        """Posterior mean and log-variance: [B, 3, H, W] -> [B, 2C, H/4, W/4]."""
        b, c, h, w = pixels.shape
        rows, columns = h // PATCH, w // PATCH
        patches = ops.transpose(pixels.reshape(b, c, rows, PATCH, columns, PATCH), (0, 2, 4, 1, 3, 5))
        return ops.transpose(self.encoder(patches.reshape(b, rows, columns, -1)), (0, 3, 1, 2))

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels from latents: [B, C, h, w] -> [B, 3, 4h, 4w]."""
        b, _, h, w = latents.shape
        patches = self.decoder(ops.transpose(latents, (0, 2, 3, 1))).reshape(b, h, w, 3, PATCH, PATCH)
        return ops.transpose(patches, (0, 3, 1, 4, 2, 5)).reshape(b, 3, h * PATCH, w * PATCH)


class ToyTransformer(nn.Cell):
    """Two layers on 2x2 latent patches, conditioned on sigma and on the mean of the prompt embeddings."""

    def __init__(self, latent_channels: int, hidden_size: int):
        super().__init__()
        self.config = {"latent_channels": latent_channels, "hidden_size": hidden_size}
        self.condition = mint.nn.Linear(hidden_size + 1, hidden_size)
        self.layer_1 = mint.nn.Linear(4 * latent_channels, hidden_size)
        self.layer_2 = mint.nn.Linear(hidden_size, 4 * latent_channels)

    def construct(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Velocity: [B, C, h, w], [B], [B, L, D] -> [B, C, h, w]."""
        height, width = latents.shape[2], latents.shape[3]
        known = ops.cat((prompt_embeds.mean(axis=1), sigma.reshape(-1, 1)), axis=1)
        hidden = self.layer_1(pack(latents)) + ops.expand_dims(self.condition(known), 1)
        return unpack(self.layer_2(hidden * ops.sigmoid(hidden)), height, width)
