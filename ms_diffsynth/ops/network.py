"""The operations that transformers are written in, each with one implementation per device behind its name.

| name | computes | shapes |
|---|---|---|
| linear | x W^T + b; b may be missing | x [..., in], weight [out, in], bias [out] -> [..., out] |
| add_low_rank | y + x down up | y [..., out], x [..., in], down [in, r], up [r, out] -> [..., out] |
| low_rank_each | x A^T B^T, A and B of each sample | x [B, S, in], a [B, r, in], b [B, out, r] -> [B, S, out] |
| gelu_tanh | the tanh form of GELU | any |
| layer_norm_modulate | norm(x) (1 + scale) + shift, the norm without affine | x [B, S, D], scale and shift [B, D] |
| layer_norm | norm(x) weight + bias | x [B, S, D], weight and bias [D] |
| group_norm_silu | silu of the group norm; not in a recomputed block | x [B, C, H, W], weight and bias [C] |
| rms_norm | x / sqrt(mean(x^2) + eps) * weight | x [..., D], weight [D] |
| rms_norm_modulate | rms_norm(x) (1 + scale) | x [B, S, D], weight [D], scale [B, D] |
| gate_add | residual + gate x | residual and x [B, S, D], gate [B, D] |
| swiglu | silu(first half) second half | [..., 2 D] -> [..., D] |
| geglu | first half gelu(second half), the exact GELU | [..., 2 D] -> [..., D] |
| gated_silu | silu(gate) x | any, the same for both |
| tanh | tanh(x) | any |
| positions | cosines or sines as `rotate` takes them | [1 or B, S, D], B, H, dtype -> the device's own |
| rotate | pairs (x[2i], x[2i+1]) turned by their token's angles | x [B, S, H, D], cos and sin of `positions` -> as x |
| norm_rotate | rotate(rms_norm(x)) | x [B, S, H, D], weight [D], cos and sin of `positions` -> as x |
| norm_rotate_joint | the same of two streams, joined | [B, L, H, D], [B, N, H, D], two weights -> [B, L + N, H, D] |
| shared | x as many times as it is used, so that its gradients are added pair by pair | any, 2 to 4 -> tuple |
| join, part | concatenation along axis 1 and its inverse | [B, L, ...] and [B, N, ...] <-> [B, L + N, ...] |
| join_last | concatenation along the last axis | [..., D] and [..., E] -> [..., D + E] |
| chunks | equal parts along axis 1 | [B, n D] -> n of [B, D] |
| parts | parts of given sizes along the last axis | [..., D + E + ...] -> [..., D], [..., E], ... |

How values of a dtype attend, softmax(q k^T D^-1/2) v, is chosen when a block is built:

| name | gives | shapes |
|---|---|---|
| attention(dtype) | f(q, k, v) | q [B, S, H, D], k and v [B, S', H, D] -> [B, S, H D] |
| masked_attention(dtype) | f(q, k, v, mask) | the same, and a mask of `text_mask` |
| attention_where(dtype) | f(q, k, v, looks) | q, k, v [B, H, S, D], looks float32 [1 or B, 1, S, S]: 1 -> as q |
| text_mask | that mask, once for all blocks | keys: 1 to take part, else 0: [B, S'], S, H, dtype -> the device's own |

On the CPU everything is float32: by native kernels (`ops.cpu.native.network`), or composed where there are none
(`ops.cpu.network`). On Ascend the dtype is that of x, and norms add up in float32 (`ops.ascend.network`); attention of
float32 is float32. The device is that of the process when this module is imported, as for `install_cpu_kernels`.

A block that is recomputed (`nn.recompute.Recomputed`) is differentiated inside a ``bprop``. There MindSpore 2.10 cannot
parse a Python function with an ``if`` a second time ("The func graph is empty"), so none that a block calls has
one, and neither may a block call other functions that do: many of `mindspore.mint` and `mindspore.ops`.
"""
from __future__ import annotations

from mindspore.ops import operations as P

from ms_diffsynth.ops import install_cpu_kernels, native_kernels

if native_kernels():
    from ms_diffsynth.ops.cpu.native import network as device
elif install_cpu_kernels():
    from ms_diffsynth.ops.cpu import network as device
else:
    from ms_diffsynth.ops.ascend import network as device

linear, linear_without_bias, add_low_rank = device.linear, device.linear_without_bias, device.add_low_rank
gelu_tanh, layer_norm_modulate, rms_norm, gate_add = (device.gelu_tanh, device.layer_norm_modulate, device.rms_norm,
                                                      device.gate_add)
low_rank_each, swiglu, geglu, gated_silu = device.low_rank_each, device.swiglu, device.geglu, device.gated_silu
layer_norm, group_norm_silu = device.layer_norm, device.group_norm_silu
rms_norm_modulate, positions, rotate = device.rms_norm_modulate, device.positions, device.rotate
norm_rotate, norm_rotate_joint = device.norm_rotate, device.norm_rotate_joint
attention, masked_attention, text_mask = device.attention, device.masked_attention, device.text_mask
attention_where = device.attention_where
chunks, join, join_last, part, parts = device.chunks, device.join, device.join_last, device.part, device.parts
shared, tanh = device.shared, P.Tanh()
