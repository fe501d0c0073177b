"""The autoencoders of films: Wan 2.1's, which Qwen-Image has too, and Wan 2.2's. Names of tensors as in diffusers.

A frame is computed from itself and from frames before it. A film of 4 n + 1 frames has n + 1 frames of latents: the
first frame is one by itself, and then every four are one. So a film may be computed in pieces, each from what the one
before has kept: of every convolution over time the last two frames of its input. Kept frames are inputs and outputs
here, never state, and compiled code computes what eager code does. diffusers and mindone keep them in a list that they
write to, which in a graph of MindSpore gives a wrong number of frames, without an error.

A convolution over time is one of images whose channels are those of three frames, one after the other: of the first
frame, before which there are only zeros, one third is computed.

Shape legend: B batch, T frames, C channels; inside, x is [B, T, C, H, W].

Source: diffusers 0.39, AutoencoderKLWan.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.common.initializer import initializer

from ms_diffsynth.models import LIST, NUMBERS, SIZE
from ms_diffsynth.nn.blocks import held
from ms_diffsynth.ops import network
from ms_diffsynth.ops.clamp import clamp
from ms_diffsynth.pipelines.shared import vae_units

TIMES = 4  # frames of a film to one of its latents, but for the first
LEAST_NORM = 1e-12
# pixels of a piece: those of four frames at 480p; a film of fewer is one piece
PIECE_PIXELS = 4 * 480 * 832

conv2d, silu = mint.nn.functional.conv2d, mint.nn.functional.silu


def by_image(x):
    """[B, T, C, H, W] -> [B T, C, H, W]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def by_film(x, batch):
    """Back again."""
    return x.reshape(batch, x.shape[0] // batch, *x.shape[1:])


def alone(x):
    """A copy of a slice, which as a view would keep all of what it was cut from in memory until the next piece."""
    return mint.index_select(x, 1, mint.arange(x.shape[1]))


def at_once(height: int, width: int) -> int:
    """Frames of latents in a piece of a film with sides in pixels."""
    return max(1, PIECE_PIXELS // (TIMES * height * width))


class _Weights(nn.Cell):
    """A weight of a convolution, and its bias."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = Parameter(initializer("zeros", shape, ms.float32), "weight")
        self.bias = Parameter(initializer("zeros", shape[:1], ms.float32), "bias")


class ImageConv(_Weights):
    """A convolution of each frame by itself."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, padding: int = 0):
        super().__init__(outputs, inputs, side, side)
        self.stride, self.padding = stride, padding

    def construct(self, x):
        return by_film(conv2d(by_image(x), self.weight, self.bias, self.stride, self.padding), x.shape[0])


class CausalConv(_Weights):
    """A convolution of frames and the two before each.

    Attributes:
        place: of its kept frames among those of the coder.
    """

    place = 0

    def __init__(self, inputs: int, outputs: int, frames: int = 3, side: int = 3):
        super().__init__(outputs, inputs, frames, side, side)
        self.frames, self.padding = frames, side // 2

    def construct(self, x, past):
        """x [B, T, C, H, W], past: kept frames of all, none of a first piece, None of a whole film -> as x, and a tuple
        of what is kept."""
        if self.frames == 1:
            return self.images(x, self.weight[:, :, 0]), ()
        is_begun = past is not None and len(past) > 0
        if x.shape[1] == 1 and not is_begun:
            out = self.images(x, self.weight[:, :, 2])
            return out, () if past is None else (ops.cat((ops.zeros_like(x), x), 1),)
        before = past[self.place] if is_begun else ops.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        x, count = ops.cat((before, x), 1), x.shape[1]
        return self.windows(x, count), () if past is None else (alone(x[:, count:]),)

    def windows(self, x, count):
        """The convolution at ``count`` places of time, which see three frames each: x [B, count + 2, C, H, W]."""
        seen = ops.cat((x[:, :count], x[:, 1:count + 1], x[:, 2:]), 2)
        return self.images(seen, self.by_channel())

    def by_channel(self):
        """The weight as one of images with the channels of three frames: [C', 3 C, h, w]."""
        outputs, inputs, frames, height, width = self.weight.shape
        return self.weight.swapaxes(1, 2).reshape(outputs, frames * inputs, height, width)

    def images(self, x, weight):
        return by_film(conv2d(by_image(x), weight, self.bias, 1, self.padding), x.shape[0])


class Norm(nn.Cell):
    """Channels of a pixel, divided by the root of their mean square."""

    def __init__(self, channels: int, axes: int = 3):
        super().__init__()
        self.gamma = Parameter(initializer("ones", (channels, *(1,) * axes), ms.float32), "gamma")
        self.scale = channels**0.5

    def construct(self, x):
        wide = x.astype(ms.float32)
        length = mint.sqrt(mint.sum(mint.square(wide), 2, True))
        normal = (wide / ops.maximum(length, LEAST_NORM)).astype(x.dtype)
        return normal * self.scale * self.gamma.reshape(-1, 1, 1)


class ResidualBlock(nn.Cell):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(inputs), CausalConv(inputs, outputs)
        self.norm2, self.conv2 = Norm(outputs), CausalConv(outputs, outputs)
        self.conv_shortcut = CausalConv(inputs, outputs, 1, 1) if inputs != outputs else None

    def construct(self, x, past):
        y, kept = self.conv1(silu(self.norm1(x)), past)
        y, kept_2 = self.conv2(silu(self.norm2(y)), past)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x, None)[0]
        return y + x, kept + kept_2


class Attention(nn.Cell):
    """Of the pixels of a frame, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.to_qkv, self.proj = Norm(channels, 2), ImageConv(channels, 3 * channels, 1), ImageConv(
            channels, channels, 1)

    def construct(self, x, past):
        batch, frames, channels, height, width = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch * frames, 3, channels, height * width)
        q, k, v = [qkv[:, k].swapaxes(1, 2).expand_dims(2) for k in range(3)]  # [B T, H W, 1, C]
        out = network.attention(x.dtype)(q, k, v).swapaxes(1, 2)
        return x + self.proj(out.reshape(x.shape)), ()


class MidBlock(nn.Cell):
    def __init__(self, channels: int):
        super().__init__()
        self.attentions = nn.CellList([Attention(channels)])
        self.resnets = nn.CellList([ResidualBlock(channels, channels) for _ in range(2)])

    def construct(self, x, past):
        x, kept = self.resnets[0](x, past)
        x, _ = self.attentions[0](x, past)
        x, kept_2 = self.resnets[1](x, past)
        return x, kept + kept_2


class Downsample(nn.Cell):
    """Half the sides; with ``of_time``, one frame of two, but for the first of a film."""

    place = 0

    def __init__(self, channels: int, of_time: bool):
        super().__init__()
        self.resample = held(**{"1": ImageConv(channels, channels, 3, 2)})
        self.time_conv = CausalConv(channels, channels, 3, 1) if of_time else None

    def construct(self, x, past):
        x = getattr(self.resample, "1")(mint.nn.functional.pad(x, (0, 1, 0, 1)))
        if self.time_conv is None:
            return x, ()
        kept = () if past is None else (alone(x[:, -1:]),)
        if past is not None and len(past) > 0:
            return self.halve(ops.cat((past[self.place], x), 1)), kept
        return x if x.shape[1] == 1 else ops.cat((x[:, :1], self.halve(x)), 1), kept

    def halve(self, x):
        """[B, 2 n + 1, ...] -> [B, n, ...]: a window of three frames at every second."""
        count = x.shape[1] // 2
        pairs = x[:, :2 * count].reshape(x.shape[0], count, 2 * x.shape[2], *x.shape[3:])
        seen = ops.cat((pairs, x[:, 2::2]), 2)
        return self.time_conv.images(seen, self.time_conv.by_channel())


class Upsample(nn.Cell):
    """Twice the sides; with ``of_time``, two frames of one, but for the first of a film, which none after it sees."""

    place = 0

    def __init__(self, channels: int, outputs: int, of_time: bool):
        super().__init__()
        self.resample = held(**{"1": ImageConv(channels, outputs, 3, 1, 1)})
        self.time_conv = CausalConv(channels, 2 * channels, 3, 1) if of_time else None

    def construct(self, x, past):
        kept = ()
        if self.time_conv is not None:
            if past is not None and len(past) > 0:
                x, kept = self.double(x, past[self.place])
            else:
                zeros = ops.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
                kept = () if past is None else (zeros,)
                if x.shape[1] > 1:
                    rest, later = self.double(x[:, 1:], zeros)
                    x, kept = ops.cat((x[:, :1], rest), 1), () if past is None else later
        doubled = mint.nn.functional.interpolate(by_image(x), scale_factor=2.0, mode="nearest")
        return getattr(self.resample, "1")(by_film(doubled, x.shape[0])), kept

    def double(self, x, before):
        """[B, T, C, ...] -> [B, 2 T, C, ...], and the last two frames of the input."""
        x, (batch, count, channels, *sides) = ops.cat((before, x), 1), x.shape
        return self.time_conv.windows(x, count).reshape(batch, 2 * count, channels, *sides), (alone(x[:, count:]),)


class AverageDown(nn.Cell):
    """Means of pixels and channels that become one: the way around a block."""

    def __init__(self, inputs: int, outputs: int, times: int, side: int):
        super().__init__()
        self.outputs, self.times, self.side = outputs, times, side

    def construct(self, x):
        rest, side = -x.shape[1] % self.times, self.side
        if rest:
            x = ops.cat((ops.zeros((x.shape[0], rest, *x.shape[2:]), x.dtype), x), 1)
        batch, frames, channels, height, width = x.shape
        x = x.reshape(batch, frames // self.times, self.times, channels, height // side, side, width // side, side)
        x = ops.transpose(x, (0, 1, 3, 2, 5, 7, 4, 6))
        return x.reshape(batch, frames // self.times, self.outputs, -1, height // side, width // side).mean(3)


class RepeatUp(nn.Cell):
    """Pixels and channels, repeated: the way around a block. Of the first frame of a film there is one."""

    def __init__(self, inputs: int, outputs: int, times: int, side: int):
        super().__init__()
        self.outputs, self.times, self.side = outputs, times, side
        self.repeats = outputs * times * side * side // inputs

    def construct(self, x, is_first):
        batch, frames, channels, height, width = x.shape
        side, times = self.side, self.times
        x = ops.broadcast_to(x.expand_dims(3), (batch, frames, channels, self.repeats, height, width))
        x = ops.transpose(x.reshape(batch, frames, self.outputs, times, side, side, height, width),
                          (0, 1, 3, 2, 6, 4, 7, 5))
        x = x.reshape(batch, frames * times, self.outputs, height * side, width * side)
        return x[:, times - 1:] if is_first else x


class DownBlock(nn.Cell):
    """A level of Wan 2.2's encoder."""

    def __init__(self, inputs: int, outputs: int, blocks: int, is_halved: bool, of_time: bool):
        super().__init__()
        self.resnets = nn.CellList([ResidualBlock(outputs if k else inputs, outputs) for k in range(blocks)])
        self.downsampler = Downsample(outputs, of_time) if is_halved else None
        self.around = AverageDown(inputs, outputs, 2 if of_time else 1, 2 if is_halved else 1)

    def construct(self, x, past):
        y, kept = through(self.resnets, x, past)
        if self.downsampler is not None:
            y, later = self.downsampler(y, past)
            kept += later
        return y + self.around(x), kept


class UpBlock(nn.Cell):
    """A level of a decoder; ``is_residual``: Wan 2.2's, with a way around it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, is_doubled: bool, of_time: bool, is_residual: bool):
        super().__init__()
        self.resnets = nn.CellList([ResidualBlock(outputs if k else inputs, outputs) for k in range(blocks + 1)])
        self.is_doubled, self.is_residual = is_doubled, is_residual
        if is_doubled and is_residual:
            self.upsampler = Upsample(outputs, outputs, of_time)
            self.around = RepeatUp(inputs, outputs, 2 if of_time else 1, 2)
        elif is_doubled:
            self.upsamplers = nn.CellList([Upsample(outputs, outputs // 2, of_time)])

    def construct(self, x, past):
        y, kept = through(self.resnets, x, past)
        if self.is_doubled:
            y, later = self.upsampler(y, past) if self.is_residual else self.upsamplers[0](y, past)
            kept += later
            if self.is_residual:
                y = y + self.around(x, past is None or len(past) == 0)
        return y, kept


def through(cells, x, past):
    """x through one cell after the other, and what all of them keep."""
    kept = ()
    for cell in cells:
        x, own = cell(x, past)
        kept += own
    return x, kept


class _Coder(nn.Cell):
    """Convolution, levels, norm and convolution; what an encoder and a decoder have in common."""

    def number(self) -> None:
        """Give everything that keeps frames its place among those that do, in the order of `construct`."""
        keepers = [cell for cell in self.in_order() if (isinstance(cell, (Downsample, Upsample)) and cell.time_conv
                   is not None) or (isinstance(cell, CausalConv) and cell.frames > 1)]
        inner = {id(cell.time_conv) for cell in keepers if isinstance(cell, (Downsample, Upsample))}
        for place, cell in enumerate(cell for cell in keepers if id(cell) not in inner):
            cell.place = place

    def in_order(self) -> list[nn.Cell]:
        raise TypeError(f"{type(self).__name__} has no in_order: implement it.")

    def end(self, x, past):
        return self.conv_out(silu(self.norm_out(x)), past)


def _cells(*parts: nn.Cell) -> list[nn.Cell]:
    """All cells of these, in the order in which they were made: that in which a block calls them."""
    return [cell for part in parts for _, cell in part.cells_and_names()]


class Encoder(_Coder):
    def __init__(self, channels: int, base: int, outputs: int, multiples: Sequence[int], blocks: int,
                 of_time: Sequence[bool], scales: Sequence[float], is_residual: bool):
        super().__init__()
        sizes = [base * multiple for multiple in (1, *multiples)]
        self.conv_in, levels, scale = CausalConv(channels, base), [], 1.0
        for k, (inner, outer) in enumerate(pairwise(sizes)):
            is_halved = k < len(multiples) - 1
            if is_residual:
                levels.append(DownBlock(inner, outer, blocks, is_halved, is_halved and of_time[k]))
                continue
            for block in range(blocks):
                levels.append(ResidualBlock(outer if block else inner, outer))
                levels += [Attention(outer)] if scale in scales else []
            if is_halved:
                levels.append(Downsample(outer, of_time[k]))
                scale /= 2
        self.down_blocks, self.mid_block = nn.CellList(levels), MidBlock(sizes[-1])
        self.norm_out, self.conv_out = Norm(sizes[-1]), CausalConv(sizes[-1], outputs)
        self.number()

    def in_order(self):
        return _cells(self.conv_in, self.down_blocks, self.mid_block, self.conv_out)

    def construct(self, x, past):
        """x [B, T, C, H, W]; of ``past`` see `CausalConv` -> [B, T', C', h, w], and what is kept."""
        x, first = self.conv_in(x, past)
        x, kept = through(self.down_blocks, x, past)
        x, middle = self.mid_block(x, past)
        x, last = self.end(x, past)
        return x, first + kept + middle + last


class Decoder(_Coder):
    def __init__(self, channels: int, base: int, outputs: int, multiples: Sequence[int], blocks: int,
                 of_time: Sequence[bool], is_residual: bool):
        super().__init__()
        sizes = [base * multiple for multiple in (multiples[-1], *multiples[::-1])]
        self.conv_in, self.mid_block, levels = CausalConv(channels, sizes[0]), MidBlock(sizes[0]), []
        for k, (inner, outer) in enumerate(pairwise(sizes)):
            is_doubled = k < len(multiples) - 1
            inner = inner // 2 if k and not is_residual else inner
            levels.append(UpBlock(inner, outer, blocks, is_doubled, is_doubled and of_time[k], is_residual))
        self.up_blocks = nn.CellList(levels)
        self.norm_out, self.conv_out = Norm(sizes[-1]), CausalConv(sizes[-1], outputs)
        self.number()

    def in_order(self):
        return _cells(self.conv_in, self.mid_block, self.up_blocks, self.conv_out)

    def construct(self, x, past):
        """As `Encoder`."""
        x, first = self.conv_in(x, past)
        x, middle = self.mid_block(x, past)
        x, kept = through(self.up_blocks, x, past)
        x, last = self.end(x, past)
        return x, first + middle + kept + last


class CausalVAE(nn.Cell):
    """The arguments are the settings of diffusers' AutoencoderKLWan, whose defaults are Wan 2.1's.

    Raises: TypeError for an autoencoder of another make.
    """

    def __init__(self, *, base_dim: int = 96, z_dim: int = 16, dim_mult: Sequence[int] = (1, 2, 4, 4),
                 num_res_blocks: int = 2, attn_scales: Sequence[float] = (),
                 temperal_downsample: Sequence[bool] = (False, True, True), dropout: float = 0.0,
                 latents_mean: Sequence[float] = (), latents_std: Sequence[float] = (),
                 decoder_base_dim: int | None = None, is_residual: bool = False, in_channels: int = 3,
                 out_channels: int = 3, patch_size: int | None = None, scale_factor_temporal: int = TIMES,
                 scale_factor_spatial: int | None = None, input_channels: int = 3):
        super().__init__()
        self.config: dict[str, Any] = {
            "base_dim": base_dim, "decoder_base_dim": decoder_base_dim, "z_dim": z_dim, "dim_mult": list(dim_mult),
            "num_res_blocks": num_res_blocks, "attn_scales": list(attn_scales),
            "temperal_downsample": list(temperal_downsample), "dropout": dropout, "latents_mean": list(latents_mean),
            "latents_std": list(latents_std), "is_residual": is_residual, "in_channels": in_channels,
            "out_channels": out_channels, "patch_size": patch_size}
        patch = patch_size or 1
        halves = f"{len(dim_mult) - 1} values, two of them true"
        fixed = {"temperal_downsample": (halves, len(temperal_downsample) == len(dim_mult) - 1
                                         and sum(temperal_downsample) == 2),
                 "dropout": ("0", not dropout), "in_channels": (3 * patch**2, in_channels == 3 * patch**2),
                 "out_channels": (3 * patch**2, out_channels == 3 * patch**2),
                 "input_channels": (3, input_channels == 3)}
        if wrong := [f"{name}: expected {wanted}" for name, (wanted, is_right) in fixed.items() if not is_right]:
            raise TypeError("; ".join(wrong))
        self.patch, self.factor = patch, patch * 2 ** len(temperal_downsample)
        self.encoder = Encoder(in_channels, base_dim, 2 * z_dim, dim_mult, num_res_blocks, temperal_downsample,
                               attn_scales, is_residual)
        self.quant_conv, self.post_quant_conv = CausalConv(2 * z_dim, 2 * z_dim, 1, 1), CausalConv(z_dim, z_dim, 1, 1)
        self.decoder = Decoder(z_dim, decoder_base_dim or base_dim, out_channels, dim_mult, num_res_blocks,
                               temperal_downsample[::-1], is_residual)

    def encode(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Mean and log-variance of a film. Shapes: x [B, 3, 4 n + 1, H, W] -> [B, 2 C, n + 1, h, w]."""
        x = self.to_patches(x.swapaxes(1, 2))
        count = at_once(x.shape[3] * self.patch, x.shape[4] * self.patch)
        latents = x.shape[1] // TIMES + 1
        if latents <= count:
            found = self.encoder(x, None)[0]
        else:
            end = 1 + TIMES * (count - 1)
            piece, kept = self.encoder(x[:, :end], ())
            pieces = (piece,)
            for begin in range(end, x.shape[1], TIMES * count):
                piece, kept = self.encoder(x[:, begin:begin + TIMES * count], kept)
                pieces += (piece,)
            found = ops.cat(pieces, 1)
        return (self.quant_conv(found, None)[0].swapaxes(1, 2),)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """A film of latents. Shapes: z [B, C, n + 1, h, w] -> [B, 3, 4 n + 1, H, W] in [-1, 1]."""
        x = self.post_quant_conv(z.swapaxes(1, 2), None)[0]
        count = at_once(x.shape[3] * self.factor, x.shape[4] * self.factor)
        if x.shape[1] <= count:
            found = self.decoder(x, None)[0]
        else:
            piece, kept = self.decoder(x[:, :count], ())
            pieces = (piece,)
            for begin in range(count, x.shape[1], count):
                piece, kept = self.decoder(x[:, begin:begin + count], kept)
                pieces += (piece,)
            found = ops.cat(pieces, 1)
        return (clamp(self.from_patches(found).swapaxes(1, 2), -1.0, 1.0),)

    def to_patches(self, x):
        """[B, T, 3, H, W] -> [B, T, 3 p p, H / p, W / p]: in a patch the column before the row."""
        side = self.patch
        if side == 1:
            return x
        batch, frames, channels, height, width = x.shape
        x = x.reshape(batch, frames, channels, height // side, side, width // side, side)
        x = ops.transpose(x, (0, 1, 2, 6, 4, 3, 5))
        return x.reshape(batch, frames, channels * side * side, height // side, width // side)

    def from_patches(self, x):
        """Inverse of `to_patches`."""
        side = self.patch
        if side == 1:
            return x
        batch, frames, channels, height, width = x.shape
        x = x.reshape(batch, frames, channels // side**2, side, side, height, width)
        x = ops.transpose(x, (0, 1, 2, 5, 4, 6, 3))
        return x.reshape(batch, frames, channels // side**2, height * side, width * side)


def statistics(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the latents' channels: float32 [1, C, 1, 1, 1] each."""
    return tuple(Tensor(np.array(config[name], np.float32).reshape(1, -1, 1, 1, 1))
                 for name in ("latents_mean", "latents_std"))


def means(vae: CausalVAE, pixels: Tensor) -> Tensor:
    """The posterior's mean, not normalised: [B, 3, F, H, W] -> float32 [B, C, f, h, w]."""
    dtype = vae.quant_conv.weight.dtype
    return mint.split(vae.encode(pixels.astype(dtype))[0], vae.config["z_dim"], 1)[0].astype(ms.float32)


def scale_factor(config: dict[str, Any]) -> int:
    """Pixels on a side of a latent pixel."""
    return (config.get("patch_size") or 1) * 2 ** len(config["temperal_downsample"])  # the config's spelling


def latent_shape(config: dict[str, Any], size: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Shape of the latents of a film of (frames, height, width)."""
    frames, height, width = size
    factor = scale_factor(config)
    return config["z_dim"], (frames - 1) // TIMES + 1, height // factor, width // factor


class EncodeImage(vae_units.EncodeImage):
    """The posterior of a film: mean and log-variance, in the dtype of the VAE's weights.

    Shapes: pixels float32 [B, 3, 4 n + 1, H, W] in [-1, 1] -> moments float32 [B, 2 C, n + 1, h, w].
    """

    scale_factor = staticmethod(scale_factor)

    def construct(self, pixels):
        return (self.vae.encode(pixels.astype(self.vae.quant_conv.weight.dtype))[0].astype(ms.float32),)


class Decode(vae_units.Decode):
    """A film from latents.

    Shapes: latents float32 [B, C, n + 1, h, w] -> pixels float32 [B, 3, 4 n + 1, H, W] in [-1, 1].
    """

    scale_factor = staticmethod(scale_factor)

    def attach(self, pipe):
        super().attach(pipe)
        self.mean, self.std = statistics(pipe.config("vae"))

    def construct(self, latents):
        latents = (latents * self.std + self.mean).astype(self.vae.post_quant_conv.weight.dtype)
        return (self.vae.decode(latents)[0].astype(ms.float32),)


VAE_READS = {"z_dim": SIZE, "temperal_downsample": LIST, "latents_mean": NUMBERS, "latents_std": NUMBERS}
