"""The operations that transformers are written in, each with one implementation per device behind its name.

| name | computes | shapes |
|---|---|---|
| linear | x W^T + b; b may be missing | x [..., in], weight [out, in], bias [out] -> [..., out] |
| low_rank | x down up | x [..., in], down [in, r], up [r, out] -> [..., out] |
| gelu_tanh | the tanh form of GELU | any |
| layer_norm_modulate | norm(x) (1 + scale) + shift, the norm without affine | x [B, S, D], scale and shift [B, D] |
| rms_norm | x / sqrt(mean(x^2) + eps) * weight | x [..., D], weight [D] |
| gate_add | residual + gate x | residual and x [B, S, D], gate [B, D] |
| attend | q and k rotated, then softmax(q k^T D^-1/2) v | q, k, v [B, S, H, D], cos, sin [S, D] -> [B, S, H D] |
| shared | x as many times as it is used, so that its gradients are added pair by pair | any, 2 to 4 -> tuple |
| join, part | concatenation along axis 1 and its inverse | [B, L, ...] and [B, N, ...] <-> [B, L + N, ...] |
| join_last | concatenation along the last axis | [..., D] and [..., E] -> [..., D + E] |
| chunks | equal parts along axis 1 | [B, n D] -> n of [B, D] |

On the CPU everything is float32 (`ops.cpu.network`); on Ascend the dtype is that of x, and norms add up in float32
(`ops.ascend.network`). The device is that of the process when this module is imported, as for `install_cpu_kernels`.

A block that is recomputed (`nn.recompute.Recomputed`) is differentiated inside a ``bprop``. There MindSpore 2.10 cannot
parse a Python function with an ``if`` a second time ("The func graph is empty"), so none of these has one, and neither
may a block call other functions that do: many of `mindspore.mint` and `mindspore.ops`.
"""
from __future__ import annotations

from ms_diffsynth.ops import install_cpu_kernels

if install_cpu_kernels():
    from ms_diffsynth.ops.cpu import network as device
else:
    from ms_diffsynth.ops.ascend import network as device

linear, linear_without_bias, low_rank = device.linear, device.linear_without_bias, device.low_rank
gelu_tanh, layer_norm_modulate, rms_norm, gate_add = (device.gelu_tanh, device.layer_norm_modulate, device.rms_norm,
                                                      device.gate_add)
attend, chunks, join, join_last, part = device.attend, device.chunks, device.join, device.join_last, device.part
shared = device.shared
