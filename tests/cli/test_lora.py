"""``ms-diffsynth lora``: files in, files out. The files of other programs are those of tests/formats/foreign."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ms_diffsynth.formats.adapters import READ
from ms_diffsynth.formats.lora import load_adapters, metadata_of
from ms_diffsynth.formats.low_rank import decomposed, norm_of
from ms_diffsynth.formats.weights import load_state_dict, save_sharded, save_state_dict
from ms_diffsynth.registry import interchange

FOREIGN = Path(__file__).parents[1] / "formats/foreign"
LAYERS = json.loads((FOREIGN / "cases.json").read_text())["layers"]["flux"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lora(capsys):
    """``lora(words)`` -> exit code, what it printed, and its errors."""
    from ms_diffsynth.cli.main import main

    def run(*words):
        code = main(["lora", *map(str, words)])
        return code, *capsys.readouterr()
    return run


def file_of(name):
    return FOREIGN / f"{name}.safetensors"


def changes(path, family="flux"):
    """Module -> change of its weight."""
    file = load_adapters(path, {"dit": None}, READ, interchange(family))["dit"]
    return {m: file.formats[m].product(parts).astype(np.float64) for m, parts in file.with_scale().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformer of FLUX.1's layers, in three shards."""
    folder = tmp_path_factory.mktemp("base") / "transformer"
    random = np.random.default_rng(0)
    tensors = {f"{m}.weight": random.standard_normal(shape).astype(np.float32) for m, shape in LAYERS.items()}
    tensors |= {f"{m}.bias": np.zeros(shape[0], np.float32) for m, shape in LAYERS.items()}
    tensors |= {"transformer_blocks.0.attn.norm_q.weight": np.ones(8, np.float32)}
    save_sharded(folder, tensors, max_shard_bytes=40_000, config={"_class_name": "FluxTransformer2DModel"})
    return folder


def test_convert_needs_no_mindspore():
    import subprocess
    import sys

    code = ("import sys; from ms_diffsynth.cli.main import main; "
            f"code = main(['lora', 'convert', {str(file_of('flux/kohya_fused'))!r}, 'out.safetensors', '--to', "
            "'diffusers', '--family', 'flux']); sys.exit(code or 10 * ('mindspore' in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(key.startswith("transformer.") for key in load_state_dict("out.safetensors"))


def test_every_direction(lora):
    """Each layout from each other, and the change of each weight stays, to the bit."""
    for to in ("diffusers", "comfy", "kohya"):
        code, out, _ = lora("convert", file_of("flux/kohya_fused"), f"{to}.safetensors", "--to", to)
        assert code == 0 and f"{to}.safetensors: 23 layers, layout {to}: " in out
        for again in ("diffusers", "comfy", "kohya"):
            assert lora("convert", f"{to}.safetensors", f"{to}_{again}.safetensors", "--to", again)[0] == 0
            found, expected = changes(f"{to}_{again}.safetensors"), changes(file_of("flux/kohya_fused"))
            assert found.keys() == expected.keys()
            for module, change in expected.items():
                np.testing.assert_array_equal(found[module], change)


def test_a_file_that_leaves_its_run_is_named_after_it(lora, tmp_path):
    Path("runs/cats").mkdir(parents=True)
    tensors = load_state_dict(file_of("flux/diffusers_nometa"))
    save_state_dict("runs/cats/step-72.safetensors", tensors, {"ss_output_name": "my cats", "step": "72", "note": "x",
                                                               "modelspec.title": "cats", "ss_network_dim": "2"})
    Path("loras").mkdir()
    code, out, _ = lora("convert", "runs/cats/step-72.safetensors", "loras", "--to", "kohya", "--family", "flux")
    assert code == 0 and out.startswith("loras/my-cats-step-000072.safetensors: ")
    header = metadata_of("loras/my-cats-step-000072.safetensors")
    assert header["modelspec.title"] == "cats" and header["ss_network_module"] == "networks.lora_flux"
    assert "note" not in header
    assert lora("convert", "runs/cats/step-72.safetensors", "loras", "--to", "kohya", "--family", "flux")[0] == 74


@pytest.mark.parametrize("words, code, text", [
    (["convert", "flux/diffusers_nometa", "o.safetensors", "--to", "kohia"], 64, "Did you mean 'kohya'?"),
    (["convert", "sd3/diffsynth", "o.safetensors"], 64, "say which, as in --family"),
    (["convert", "flux/lokr", "o.safetensors", "--to", "diffusers", "--family", "flux"], 66, "lora resize --rank"),
    (["convert", "flux/oft", "o.safetensors"], 66, "is of OFT"),
    (["convert", "flux/kohya_fused", "o.bin"], 74, "ends in .safetensors"),
    (["convert", "flux/kohya_fused", "o.safetensors", "--family", "toy"], 64, "whose names others know"),
    (["resize", "flux/kohya_fused", "o.safetensors", "--rank", "0"], 64, "rank=0"),
    (["merge", "flux/dora_kohya", "--output", "o.safetensors", "--family", "flux"], 66, "expected LoRAs to merge"),
])
def test_mistakes(lora, words, code, text):
    words = [str(file_of(w)) if "/" in w else w for w in words]
    if "sd3/diffsynth" in words[1]:  # attention alone has the names of several families
        tensors = {k: v for k, v in load_state_dict(words[1]).items() if "attn.to_q" in k}
        save_state_dict("attention.safetensors", tensors)
        words[1] = "attention.safetensors"
    found, _, err = lora(*words)
    assert found == code and text in err, err
    assert not Path("o.safetensors").exists()


def test_inspect(lora, base):
    code, out, _ = lora("inspect", file_of("flux/kohya_with_encoders"), "--family", "flux")
    assert code == 0 and "FLUX.1 (flux)" in out and "layout kohya, original names" in out
    assert "text_encoder_1: 3 layers, LoRA" in out and "text_encoder_2: 1 layers, LoRA" in out
    assert "ranks 2; alpha / rank 0.5" in out
    change = changes(file_of("flux/kohya_fused"))["single_transformer_blocks.0.proj_mlp"]
    line = next(line for line in out.splitlines() if line.endswith("single_transformer_blocks.0.proj_mlp"))
    assert float(line.split()[0]) == pytest.approx(np.linalg.norm(change), rel=1e-3)
    code, out, _ = lora("inspect", file_of("flux/diffusers_nometa"), "--family", "flux", "--model", base.parent)
    assert code == 0 and f"11 layers of the file and {len(LAYERS)} of" in out
    code, _, err = lora("inspect", file_of("flux/other_depth"), "--family", "flux", "--model", base)
    assert code == 66 and "transformer_blocks.77.attn.to_q is not a module" in err and "not in it" in err


def test_merge_into_one(lora):
    names = [file_of("flux/diffusers_nometa"), file_of("flux/kohya_fused")]
    assert lora("merge", f"{names[0]}:0.5", f"{names[1]}:-2", "--output", "o.safetensors", "--family", "flux")[0] == 0
    first, second, found = changes(names[0]), changes(names[1]), changes("o.safetensors")
    assert found.keys() == first.keys() | second.keys()
    for module, change in found.items():
        expected = 0.5 * first.get(module, 0) - 2 * second.get(module, 0)
        np.testing.assert_allclose(change, expected, atol=1e-6)
    assert lora("merge", *names, "--output", "r.safetensors", "--family", "flux", "--rank", 4)[0] == 0
    small = load_state_dict("r.safetensors")
    assert {array.shape[0] for key, array in small.items() if "lora_A" in key} == {2, 4}


@pytest.mark.parametrize("name", ["flux/kohya_fused", "flux/lokr", "flux/dora_kohya", "flux/bias_change"])
def test_merge_into_a_base(lora, base, name):
    path = file_of(name)
    code, out, _ = lora("merge", f"{path}:0.5", "--base", base, "--output", "merged", "--family", "flux")
    assert code == 0, out
    before, after = load_state_dict(base), load_state_dict("merged")
    file = load_adapters(path, {"dit": None}, READ, interchange("flux"))["dit"]
    assert before.keys() == after.keys() and (Path("merged") / "config.json").is_file()
    assert len(list(Path("merged").glob("*-of-*.safetensors"))) == len(list(base.glob("*-of-*.safetensors"))) > 1
    scaled = file.with_scale()
    for key, array in before.items():
        module, _, part = key.rpartition(".")
        if part == "weight" and module in file.modules:
            array = file.formats[module].fused(array, scaled[module], 0.5)
        elif part == "bias" and module in file.biases:
            array = array + 0.5 * file.biases[module]
        np.testing.assert_array_equal(after[key], array, err_msg=key)


def test_merge_into_a_base_that_lacks_layers(lora, base):
    code, _, err = lora("merge", file_of("flux/other_depth"), "--base", base, "--output", "merged", "--family", "flux")
    assert code == 66 and "transformer_blocks.77.attn.to_q" in err and not Path("merged").exists()


def test_extract_gives_the_lora_that_was_merged(lora, base):
    path = file_of("flux/diffusers_nometa")
    assert lora("merge", path, "--base", base, "--output", "merged", "--family", "flux")[0] == 0
    code, out, err = lora("extract", base, "merged", "o.safetensors", "--rank", 2, "--family", "flux")
    assert code == 0 and "o.safetensors: 11 layers" in out and "lost of the change, at most: " in err
    expected, found = changes(path), changes("o.safetensors")
    assert found.keys() == expected.keys()
    for module, change in expected.items():  # the weights are up to 4 and float32
        np.testing.assert_allclose(found[module], change, atol=2e-6)


def test_resize(lora):
    code, _, err = lora("resize", file_of("flux/rank_over_width"), "o.safetensors", "--rank", 16, "--family", "flux")
    assert code == 0 and "2 layers; lost of the change, at most: " in err
    for module, change in changes(file_of("flux/rank_over_width")).items():
        np.testing.assert_allclose(changes("o.safetensors")[module], change, atol=1e-6)
    assert lora("resize", file_of("flux/lokr"), "k.safetensors", "--rank", 16, "--family", "flux", "--to",
                "diffusers")[0] == 0
    for module, change in changes(file_of("flux/lokr")).items():
        np.testing.assert_allclose(changes("k.safetensors")[module], change, atol=1e-6)
    assert lora("resize", file_of("flux/lokr"), "s.safetensors", "--rank", 3, "--family", "flux")[0] == 0
    module, change = next(iter(changes(file_of("flux/lokr")).items()))
    rest = np.linalg.norm(changes("s.safetensors")[module] - change)
    assert rest == pytest.approx(np.sqrt((np.linalg.svd(change)[1][3:] ** 2).sum()), rel=1e-4)


def test_large_matrices_are_decomposed_by_a_random_range():
    random = np.random.default_rng(1)
    low = (random.standard_normal((1500, 8)) @ random.standard_normal((8, 1100))).astype(np.float32)
    a, b = decomposed(low, 8)
    assert np.linalg.norm(low - b @ a) < 1e-5 * np.linalg.norm(low)


def test_the_norm_of_a_change_is_that_of_the_product():
    file = load_adapters(file_of("flux/kohya_fused"), {"dit": None}, READ, interchange("flux"))["dit"]
    for module, parts in file.modules.items():
        expected = np.linalg.norm(0.5 * file.formats[module].product(parts).astype(np.float64))
        assert norm_of(file.formats[module], parts, file.scales[module]) == pytest.approx(expected, rel=1e-5)
