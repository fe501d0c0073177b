"""The native library by itself: what is not finite passes through, and no bit depends on the number of threads."""
from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.ops.cpu.native import build
from ms_diffsynth.ops.cpu.native.selftest import Library, check

if build.library() is None:
    pytest.skip("there are no native kernels here", allow_module_level=True)

ONEDNN = build._onednn()
random = np.random.default_rng(0)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def library():
    return Library(str(ONEDNN), str(build.library()))


def kernels():
    """(name, inputs, shapes of the outputs), large enough for several tasks and oneDNN's pieces; odd sizes."""
    q, k, v = normal(2, 301, 3, 20), normal(2, 449, 3, 20), normal(2, 449, 3, 20)
    mask = np.where(normal(2, 449) > 0, 0, -1e30).astype(np.float32)
    lse, out = (2, 3, 301), (2, 301, 60)
    x, tokens = normal(301, 129), normal(2, 101, 33)
    image, kernel, geometry = normal(2, 5, 17, 19), normal(7, 5, 3, 3), np.zeros((1, 1, 2, 2))
    eps, groups, norm = [1e-6], np.zeros(5), [1e-5, 1]
    yield "linear_forward", [x, normal(257, 129), normal(257)], [(301, 257)]
    yield "linear_backward_x", [normal(301, 257), normal(257, 129)], [(301, 129)]
    yield "linear_backward_w", [normal(301, 257), x], [(257, 129)]
    yield "linear_backward_b", [normal(301, 257)], [(257,)]
    yield "low_rank_forward", [normal(301, 257), x, normal(129, 5), normal(5, 257)], [(301, 257), (301, 5)]
    yield ("low_rank_backward", [normal(301, 257), x, normal(301, 5), normal(129, 5), normal(5, 257)],
           [(301, 129), (129, 5), (5, 257)])
    for name in ("gelu", "silu"):
        yield f"{name}_forward", [normal(40001)], [(40001,)]
        yield f"{name}_backward", [normal(40001), normal(40001)], [(40001,)]
    yield "swiglu_forward", [normal(101, 2 * 33)], [(101, 33)]
    yield "swiglu_backward", [normal(101, 33), normal(101, 2 * 33)], [(101, 2 * 33)]
    yield "layer_norm_modulate_forward", [tokens, normal(2, 33), normal(2, 33), eps], [(2, 101, 33), (2, 101, 2)]
    yield ("layer_norm_modulate_backward", [normal(2, 101, 33), tokens, normal(2, 33), normal(2, 101, 2)],
           [(2, 101, 33), (2, 33), (2, 33)])
    yield "gate_add_forward", [tokens, normal(2, 33), tokens], [(2, 101, 33)]
    yield "gate_add_backward", [tokens, normal(2, 33), tokens], [(2, 101, 33), (2, 33)]
    yield "rms_norm_forward", [normal(601, 20), normal(20), eps], [(601, 20)]
    yield "rms_norm_backward", [normal(601, 20), normal(601, 20), normal(20), eps], [(601, 20), (20,)]
    for name in ("rotate_forward", "rotate_backward"):
        yield name, [q, normal(1, 301, 20), normal(1, 301, 20)], [q.shape]
    angles = [normal(1, 301, 20), normal(1, 301, 20), eps]
    yield "norm_rotate_forward", [q, normal(20), *angles], [q.shape]
    yield "norm_rotate_backward", [q, q, normal(20), *angles], [q.shape, (20,)]
    streams = [normal(2, 100, 3, 20), normal(2, 201, 3, 20)]
    yield "norm_rotate_forward", [*streams, normal(20), normal(20), *angles], [q.shape]
    yield ("norm_rotate_backward", [q, *streams, normal(20), normal(20), *angles],
           [*[x.shape for x in streams], (20,), (20,)])
    yield "attention_forward", [q, k, v], [out, lse]
    yield "attention_forward", [q, k, v, mask], [out, lse]
    yield "attention_backward", [normal(*out), normal(*out), normal(*lse) + 5, q, k, v], [q.shape, k.shape, v.shape]
    if ONEDNN.name == "libdnnl.so.3":
        yield "conv2d_forward", [image, kernel, geometry, normal(7)], [(2, 7, 17, 19)]
        yield "conv2d_backward_x", [normal(2, 7, 17, 19), kernel, geometry, image], [image.shape]
        yield "conv2d_backward_w", [normal(2, 7, 17, 19), image, geometry, kernel], [kernel.shape, (7,)]
    yield "group_norm_forward", [norm, groups, image, normal(5), normal(5)], [image.shape, (2, 5, 2)]
    yield ("group_norm_backward", [norm, image, image, normal(5), normal(5), normal(2, 5, 2)],
           [image.shape, (5,), (5,)])
    yield "double_forward", [image], [(2, 5, 34, 38)]
    yield "double_backward", [normal(2, 5, 34, 38)], [image.shape]
    yield "sum_of_squares", [normal(40001), normal(3)], [(1,)]


def digests(library):
    """Of all results of all kernels."""
    global random
    random = np.random.default_rng(0)
    for name, inputs, shapes in kernels():
        outputs = library.call(name, inputs, shapes)
        assert all(np.isfinite(x).all() for x in outputs), name
        yield name, hashlib.sha256(b"".join(x.tobytes() for x in outputs)).hexdigest()


def test_no_bit_depends_on_the_number_of_threads(python, library):
    here = str(Path(__file__))
    results = [python(here, ONEDNN, build.library(),
                      env=os.environ | {"MS_DIFFSYNTH_NATIVE_THREADS": threads,
                                        "PYTHONPATH": os.pathsep.join(sys.path)}) for threads in ("1", "3")]
    assert all(r.returncode == 0 for r in results), results[0].stderr + results[1].stderr
    assert results[0].stdout.count("\n") >= 25
    assert results[0].stdout == results[1].stdout


def test_every_kernel_is_called_here():
    names = {line.split("(")[1].split(")")[0] for path in build.HERE.iterdir() if path.suffix in (".cc", ".inc")
             for line in path.read_text().splitlines() if line.startswith("KERNEL(")}
    assert names - {name for name in CARRIED if "conv2d" in name} <= {name for name, *_ in kernels()} | {"adamw"}
    assert names == {*CARRIED, "adamw"}


# from which input and where a value that is not finite reaches the first output
CARRIED = {"linear_forward": (0, 1, 2), "linear_backward_x": (0, 1), "linear_backward_w": (0, 1),
           "linear_backward_b": (0,), "low_rank_forward": (0, 1, 2, 3), "low_rank_backward": (0, 3, 4),
           "layer_norm_modulate_forward": (0, 1, 2),
           "layer_norm_modulate_backward": (0, 1, 2, 3), "gate_add_forward": (0, 1, 2), "gate_add_backward": (0, 1),
           "rms_norm_forward": (0, 1), "rms_norm_backward": (0, 1, 2), "rotate_forward": (0, 1, 2),
           "norm_rotate_forward": (0, 1, 2, 3), "norm_rotate_backward": (0, 1, 2, 3, 4),
           "rotate_backward": (0, 1, 2), "attention_forward": (0, 1, 2), "attention_backward": (0, 1, 3, 4, 5),
           "conv2d_forward": (0, 1, 3), "conv2d_backward_x": (0, 1), "conv2d_backward_w": (0, 1),
           "group_norm_forward": (2, 3, 4), "group_norm_backward": (1, 2, 3, 4, 5), "gelu_forward": (0,),
           "gelu_backward": (0, 1), "silu_forward": (0,), "silu_backward": (0, 1), "swiglu_forward": (0,),
           "swiglu_backward": (0, 1), "double_forward": (0,), "double_backward": (0,), "sum_of_squares": (0, 1)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_through(library, value):
    for name, inputs, shapes in kernels():
        for place in CARRIED[name]:
            spoilt = [np.array(x, np.float32) for x in inputs]
            spoilt[place].flat[spoilt[place].size // 2] = value
            outputs = library.call(name, spoilt, shapes)
            if value == -np.inf and name in ("silu_forward", "gelu_forward", "swiglu_forward"):
                continue  # 0 is as right
            assert not all(np.isfinite(x).all() for x in outputs), (name, place)


def adamw(library, numbers, parameter, moment1, moment2, gradient):
    """A copy of the first three after one update; as one call of two tensors."""
    changed, cut = [x.copy() for x in (parameter, moment1, moment2)], len(gradient) // 3
    halves = [half for x in (*changed, gradient) for half in (x[:cut], x[cut:])]
    library.call("adamw", [*[np.float32(n).reshape(()) for n in numbers], *halves], [(1,)])
    return changed


def test_adamw_equals_its_formula(library):
    p, m, v, g = normal(40001), normal(40001), normal(40001) ** 2, normal(40001)
    wide = [x.astype(np.float64) for x in (p, m, v)]
    got = adamw(library, (0.5, 0.01, 1e-6, 0.9, 0.99, 1e-3), p, m, v, g)
    half = g.astype(np.float64) * 0.5
    m1, v1 = 0.9 * wide[1] + 0.1 * half, 0.99 * wide[2] + 0.01 * half * half
    for a, b in zip(got, (wide[0] - 1e-6 * wide[0] - 0.01 * m1 / (np.sqrt(v1) + 1e-3), m1, v1)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0])
def test_a_skipped_update_changes_no_bit(library, value):
    p, m, v = normal(1001), normal(1001), normal(1001) ** 2
    p[3], p[4], m[5] = -0.0, np.inf, -0.0
    got = adamw(library, (0, 0, 0, 1, 1, 1e-8), p, m, v, np.full(1001, value, np.float32))
    assert [x.tobytes() for x in got] == [x.tobytes() for x in (p, m, v)]


def test_it_stays_where_threads_of_its_pool_may_be():
    """MindSpore unloads it while the process ends."""
    said = subprocess.run([sys.executable, "-c", f"""
import _ctypes, ctypes
ctypes.CDLL({str(ONEDNN)!r}, ctypes.RTLD_GLOBAL)
_ctypes.dlclose(ctypes.CDLL({str(build.library())!r})._handle)
print({build.library().name!r} in open("/proc/self/maps").read())"""], capture_output=True, text=True, check=True)
    assert said.stdout == "True\n"


def test_the_self_test_finds_a_wrong_kernel(library):
    class Wrong:
        def call(self, name, inputs, shapes):
            outputs = library.call(name, inputs, shapes)
            if name == "attention_forward":
                outputs[0][0, 0, 0] = np.nan
            return outputs

    check(library)
    with pytest.raises(AssertionError):
        check(Wrong())


def test_another_dtype_is_refused(library):
    with pytest.raises(RuntimeError):
        library.call("silu_forward", [[1.0]], [(1,)], dtype=b"float16")


if __name__ == "__main__":
    for line in digests(Library(sys.argv[1], sys.argv[2])):
        print(*line)
