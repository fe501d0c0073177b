"""LoRA files: our own mean the same to every reader; those of others are understood whole or refused whole."""
from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.adapters import DORA, LORA, READ
from ms_diffsynth.formats.lora import AdapterFile, load_adapter, load_lora, save_adapter, save_adapters, save_lora
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import interchange, interchange_tables

MODULES = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "proj_out"]


def pairs(dtype=np.float32, rank=4):
    generator = np.random.default_rng(1)
    return {m: (generator.standard_normal((rank, 8)).astype(dtype), generator.standard_normal((6, rank)).astype(dtype))
            for m in MODULES}


def metadata_of(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def write(path, entries, metadata=None):
    save_state_dict(path, entries, metadata)
    return path


def delta(a, b, scale=1.0):
    return scale * b.astype(np.float64) @ a.astype(np.float64)


@pytest.mark.parametrize("alpha", [4, 8.0, 1.0])
def test_the_scale_is_folded_so_that_every_reader_agrees(tmp_path, alpha):
    path, mine = tmp_path / "f.safetensors", pairs()
    save_lora(path, mine, alpha, metadata={"note": "x"})
    raw = load_state_dict(path)
    assert set(raw) == {f"transformer.{m}.lora_{s}.weight" for m in MODULES for s in "AB"}
    metadata = metadata_of(path)
    assert metadata["format"] == "pt" and metadata["note"] == "x"
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 4, "transformer.lora_alpha": 4, "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
        "transformer.target_modules": sorted(MODULES)}
    loaded = load_lora(path, MODULES)
    for module, (a, b) in mine.items():
        assert loaded[module][2] == 1.0
        # one float32 multiplication in B: 2^-24 relative
        np.testing.assert_allclose(delta(*loaded[module]), delta(a, b, alpha / 4), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_folded_in_float32_and_unscaled_pairs_keep_their_bits(tmp_path):
    mine = pairs(ml_dtypes.bfloat16)
    save_lora(tmp_path / "f.safetensors", mine, alpha=3)
    for module, (a, b) in mine.items():
        found = load_lora(tmp_path / "f.safetensors")[module]
        assert found[0].tobytes() == a.tobytes()
        assert found[1].tobytes() == (b.astype(np.float32) * np.float32(0.75)).astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("prefix, start", [
    ("diffusion_model", "diffusion_model."), ("transformer.", "transformer."), ("", ""),
])
def test_prefixes(tmp_path, prefix, start):
    save_lora(tmp_path / "f.safetensors", pairs(), alpha=4, prefix=prefix)
    assert f"{start}proj_out.lora_A.weight" in load_state_dict(tmp_path / "f.safetensors")
    assert set(load_lora(tmp_path / "f.safetensors", MODULES)) == set(MODULES)


@pytest.mark.parametrize("wrong", [
    {"x": (np.ones((2, 3), np.float32), np.ones((3, 2, 1), np.float32))},
    {"x": (np.ones((2, 3), np.float32), np.ones((4, 3), np.float32))},
])
def test_pairs_that_do_not_fit_are_not_saved(tmp_path, wrong):
    with pytest.raises(WeightError, match=r"do not fit together: x: A"):
        save_lora(tmp_path / "f.safetensors", wrong, alpha=2)
    with pytest.raises(WeightError, match="no LoRA pairs to save"):
        save_lora(tmp_path / "f.safetensors", {}, alpha=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
@pytest.mark.parametrize("down, up", [
    ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
])
@pytest.mark.parametrize("with_modules", [True, False])
def test_namings_of_others(tmp_path, prefix, down, up, with_modules):
    entries = {}
    for module, (a, b) in pairs().items():
        start = prefix + module
        entries |= {f"{start}.{down}": a, f"{start}.{up}": b, f"{start}.alpha": np.array(2.0)}
    loaded = load_lora(write(tmp_path / "f.safetensors", entries), MODULES if with_modules else None)
    assert set(loaded) == set(MODULES)
    for module, (a, b) in pairs().items():
        assert loaded[module][2] == 0.5
        assert loaded[module][0].tobytes() == a.tobytes() and loaded[module][1].tobytes() == b.tobytes()


def kohya(names):
    entries = {}
    for name in names:
        a, b = pairs()["proj_out"]
        entries |= {f"lora_unet_{name}.lora_down.weight": a, f"lora_unet_{name}.lora_up.weight": b,
                    f"lora_unet_{name}.alpha": np.array(4, ml_dtypes.bfloat16)}
    return entries


def test_kohya_names_are_taken_where_they_mean_one_module(tmp_path):
    path = write(tmp_path / "f.safetensors", kohya(["transformer_blocks_0_attn_to_out_0", "proj_out"]))
    assert set(load_lora(path, MODULES)) == set(MODULES[1:])
    with pytest.raises(WeightError, match="need the list of the model's modules"):
        load_lora(path)
    with pytest.raises(WeightError, match=r"lora_unet_proj_out could be proj\.out, proj_out"):
        load_lora(path, [*MODULES, "proj.out"])
    path = write(tmp_path / "f.safetensors", kohya(["proj_out", "double_blocks_0_img_attn_qkv"]))
    with pytest.raises(WeightError, match="1 entries cannot be used: lora_unet_double_blocks_0_img_attn_qkv is no"):
        load_lora(path, MODULES)


def test_a_module_whose_own_name_begins_like_a_prefix(tmp_path):
    a, b = pairs()["proj_out"]
    path = write(tmp_path / "f.safetensors", {"transformer.x.lora_A.weight": a, "transformer.x.lora_B.weight": b})
    assert set(load_lora(path, ["transformer.x"])) == {"transformer.x"}
    assert set(load_lora(path, ["x"])) == {"x"}


A, B = "transformer.proj_out.lora_A.weight", "transformer.proj_out.lora_B.weight"


@pytest.mark.fault
@pytest.mark.parametrize("change, text", [
    ({"transformer.proj_ouch.lora_A.weight": np.ones((4, 8), np.float32)}, "proj_ouch is not a module of the mo"),
    ({B: None}, "proj_out has no B"),
    ({A: None, B: None, "transformer.proj_out.alpha": np.ones(())}, "has no A and no B"),
    ({A: np.ones((3, 8), np.float32)}, r"A \(3, 8\) and B \(6, 4\) are not a pair"),
    ({A: np.ones((4, 8, 1, 1), np.float32)}, "are not a pair"),
    ({"proj_out.lora_A.weight": np.ones((4, 8), np.float32)}, "both mean proj_out"),
    ({"transformer.proj_out.dora_scale": np.ones(4, np.float32)}, "dora_scale is not part of a LoRA"),
    ({"proj_out.weight": np.ones(4, np.float32)}, "proj_out.weight is not part of a LoRA"),
    ({"transformer.proj_out.alpha": np.ones(2)}, r"alpha has shape \(2,\)"),
])
def test_whatever_is_left_over_is_an_error(tmp_path, change, text):
    a, b = pairs()["proj_out"]
    entries = {k: v for k, v in ({A: a, B: b} | change).items() if v is not None}
    with pytest.raises(WeightError, match=text):
        load_lora(write(tmp_path / "f.safetensors", entries), MODULES)


@pytest.mark.fault
def test_all_left_overs_are_listed_at_once(tmp_path):
    entries = {f"x{k}.lora_A.weight": np.ones((2, 2), np.float32) for k in range(12)}
    entries |= dict(zip((A, B), pairs()["proj_out"]))
    with pytest.raises(WeightError, match=r"12 entries cannot be used") as caught:
        load_lora(write(tmp_path / "f.safetensors", entries), MODULES)
    assert "x0 is not a module" in str(caught.value) and "and 2 more (12 in all)" in str(caught.value)


FOREIGN = Path(__file__).parent / "foreign"


@pytest.mark.parametrize("file, header, other", [
    ("flux/kohya_fused", {}, "FLUX.1 (flux)"), ("flux/diffusers_nometa", {}, "FLUX.1 (flux)"),
    ("wan/comfy", {}, "Wan (wan)"), ("", {"ms_diffsynth.family": "z_image"}, "Z-Image (z_image)"),
    ("", {"ss_base_model_version": "flux2_dev"}, "FLUX.2 (flux2)"),
])
def test_a_lora_of_another_family_is_named_so(tmp_path, file, header, other):
    path = FOREIGN / f"{file}.safetensors" if file else tmp_path / "f.safetensors"
    if not file:
        save_state_dict(path, {"a.lora_A.weight": np.ones((2, 2), np.float32)}, header)
    names = ["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"]
    with pytest.raises(WeightError) as caught:
        load_adapter(path, names, READ, interchange("sdxl"), families=interchange_tables)
    assert str(caught.value) == (f"{path} is a LoRA of {other}; this model is Stable Diffusion XL (sdxl). Nothing was "
                                 "loaded. Give a LoRA made for this model.")


@pytest.mark.parametrize("header", [{}, {"ms_diffsynth.family": "sdxl"}])
def test_a_lora_of_no_known_family_is_told_in_few_words(tmp_path, header):
    path = tmp_path / "f.safetensors"
    save_state_dict(path, {f"mid_block.{k}.lora_{s}.weight": np.ones((2, 2), np.float32) for k in range(9)
                           for s in "AB"}, header)
    with pytest.raises(WeightError) as caught:
        load_adapter(path, [f"mid_block.{k}.proj" for k in range(9)], READ, interchange("sdxl"),
                     families=interchange_tables)
    assert str(caught.value) == (
        f"{path}: none of its 9 layers is a module of the model. It has mid_block.0, mid_block.1, mid_block.2 and 6 "
        "more (9 in all); the model has mid_block.0.proj, mid_block.1.proj, mid_block.2.proj and 6 more (9 in all). "
        "Nothing was loaded. Give a LoRA made for this model.")


def test_a_file_without_lora(tmp_path):
    with pytest.raises(WeightError, match="holds no LoRA"):
        load_lora(write(tmp_path / "f.safetensors", {}))


@pytest.mark.parametrize("settings, scale", [
    ({"transformer.lora_alpha": 8, "transformer.r": 4}, 2.0), ({"r": 4, "lora_alpha": 2}, 0.5), ({}, 1.0),
    ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
    ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"proj_out": 16}}, 4.0),
    ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"out": 16}}, 2.0),
])
def test_the_metadata_gives_the_scale(tmp_path, settings, scale):
    a, b = pairs()["proj_out"]
    path = write(tmp_path / "f.safetensors", {A: a, B: b}, {"lora_adapter_metadata": json.dumps(settings)})
    assert load_lora(path)["proj_out"][2] == scale


@pytest.mark.fault
def test_two_scales_that_disagree_are_refused(tmp_path):
    a, b = pairs()["proj_out"]
    metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'}
    path = tmp_path / "f.safetensors"
    assert load_lora(write(path, {A: a, B: b, "proj_out.alpha": np.array(8)}, metadata))["proj_out"][2] == 2
    with pytest.raises(WeightError, match=r"scale 1 by its \.alpha but 2 by the metadata"):
        load_lora(write(path, {A: a, B: b, "proj_out.alpha": np.array(4)}, metadata))
    with pytest.raises(WeightError, match="is not JSON"):
        load_lora(write(path, {A: a, B: b}, {"lora_adapter_metadata": "x"}))


M = "transformer.proj_out.lora_magnitude_vector"


def triples():
    """A LoRA's pairs and a magnitude vector each, by part."""
    magnitude = np.arange(1, 7, dtype=np.float32)
    return {module: dict(zip(DORA.parts, (*pair, magnitude))) for module, pair in pairs().items()}


def test_a_dora_is_written_as_diffusers_writes_it(tmp_path):
    path = tmp_path / "f.safetensors"
    save_adapter(path, DORA, triples(), scale=2.0)
    assert set(load_state_dict(path)) == {f"transformer.{m}.{part}" for m in MODULES for part in (
        "lora_A.weight", "lora_B.weight", "lora_magnitude_vector")}
    settings = json.loads(metadata_of(path)["lora_adapter_metadata"])
    assert settings["transformer.use_dora"] is True and settings["transformer.lora_alpha"] == settings["transformer.r"]
    found = load_adapter(path, MODULES, [LORA, DORA])
    assert found.format is DORA and set(found.scales.values()) == {1.0}
    for module, parts in triples().items():
        for part, array in parts.items():
            expected = 2 * array if part == "lora_B.weight" else array
            assert found.modules[module][part].tobytes() == expected.tobytes()
    with pytest.raises(WeightError, match="lora_magnitude_vector is not part of a LoRA"):
        load_lora(path, MODULES)


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_magnitudes_of_others(tmp_path, end):
    path = tmp_path / "f.safetensors"
    parts = triples()["proj_out"]
    write(path, {A: parts["lora_A.weight"], B: parts["lora_B.weight"], M + end: parts["lora_magnitude_vector"]})
    assert load_adapter(path, MODULES, [LORA, DORA]).format is DORA


@pytest.mark.fault
@pytest.mark.parametrize("change, metadata, text", [
    ({M: np.ones(5, np.float32)}, {}, r"magnitude_vector \(5,\) are not a triple A \[r, in\]"),
    ({M: np.full(6, np.nan, np.float32)}, {}, "not finite"),
    ({"transformer.x.lora_A.weight": np.ones((4, 8), np.float32),
      "transformer.x.lora_B.weight": np.ones((6, 4), np.float32)}, {}, "x has no magnitude_vector"),
    ({}, {"transformer.use_dora": False}, "the metadata say use_dora=False, the tensors are those of a DoRA"),
    ({M: None}, {"transformer.use_dora": True}, "the metadata say use_dora=True, the tensors are those of a LoRA"),
])
def test_a_dora_that_makes_no_sense(tmp_path, change, metadata, text):
    parts = triples()["proj_out"]
    entries = {A: parts["lora_A.weight"], B: parts["lora_B.weight"], M: parts["lora_magnitude_vector"]} | change
    path = write(tmp_path / "f.safetensors", {name: array for name, array in entries.items() if array is not None},
                 {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    with pytest.raises(WeightError, match=text):
        load_adapter(path, [*MODULES, "x"], [LORA, DORA])


def test_triples_that_do_not_fit_are_not_saved(tmp_path):
    wrong = {"x": {**triples()["proj_out"], "lora_magnitude_vector": np.ones(5, np.float32)}}
    with pytest.raises(WeightError, match=r"DoRA triples do not fit together: x: A .* Expected A \[r, in\], B"):
        save_adapter(tmp_path / "f.safetensors", DORA, wrong, scale=1.0)


def test_the_halves_of_a_scale_and_a_shift_are_told_by_the_shape(tmp_path):
    """Stable Diffusion 3's last block has them in the other order, and only there is its modulation two squares."""
    table, random = interchange("sd3"), np.random.default_rng(0)
    down, up = LORA.parts
    names = {k: f"transformer_blocks.{k}.norm1_context.linear" for k in (0, 1)}
    parts = {names[k]: {down: random.standard_normal((2, 8), np.float32),
                        up: random.standard_normal((rows, 2), np.float32)}
             for k, rows in ((0, 48), (1, 16))}
    file = AdapterFile(parts, dict.fromkeys(parts, 1.0), dict.fromkeys(parts, LORA))
    save_adapters(tmp_path / "l.safetensors", {"dit": file}, table, "kohya")
    theirs = {k: load_state_dict(tmp_path / "l.safetensors")[
        f"lora_unet_joint_blocks_{k}_context_block_adaLN_modulation_1.lora_up.weight"] for k in (0, 1)}
    np.testing.assert_array_equal(theirs[0], parts[names[0]][up])
    np.testing.assert_array_equal(theirs[1], np.roll(parts[names[1]][up], 8, axis=0))
    again = load_adapter(tmp_path / "l.safetensors", None, (LORA,), table)
    assert all(np.array_equal(again.modules[m][part], array) for m in parts for part, array in parts[m].items())
