"""LoRA files of other programs: what each does to the weights, and written in every layout and read again.

The files and what they do are made by foreign/make.py in PyTorch.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ms_diffsynth.errors import WeightError
from ms_diffsynth.formats.adapters import DORA, LORA, READ
from ms_diffsynth.formats.lora import AdapterFile, load_adapters, metadata_of, models_in, save_adapters, unmatched
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import interchange, interchange_tables

FOREIGN = Path(__file__).parent / "foreign"
DATA = json.loads((FOREIGN / "cases.json").read_text())
LAYERS, CASES = DATA["layers"], DATA["cases"]
READABLE = [name for name, case in CASES.items() if "changes" in case]


def path_of(name):
    return FOREIGN / name if (FOREIGN / name).is_dir() else FOREIGN / f"{name}.safetensors"


def read(path, family, with_layers=True):
    table = interchange(family)
    models = models_in(path, table)
    layers = {model: list(LAYERS[family]) if model == table.network and with_layers else None for model in models}
    return load_adapters(path, layers, READ, table)


def network(family):
    return interchange(family).network


def weight(module, family):
    shape = LAYERS[family][module]
    return np.sin(np.arange(1, 1 + shape[0] * shape[1])).reshape(shape).astype(np.float32)


def effect(file: AdapterFile, family) -> dict[str, np.ndarray]:
    """What a file does to each weight, times cos(0, 1, 2, ...)."""
    found = {}
    for module, parts in file.with_scale().items():
        before = weight(module, family)
        change = file.formats[module].fused(before, parts, 1.0).astype(np.float64) - before
        found[module] = change @ np.cos(np.arange(change.shape[1]))
    return found


def assert_equal(found, expected):
    # a module of zeros may be there or not
    for module in found.keys() | expected.keys():
        # the weights are up to 1 and float32: each of up to 64 columns is off by 2^-24; magnitudes are up to 2
        np.testing.assert_allclose(found.get(module, 0), expected.get(module, 0), atol=4e-6, err_msg=module)


@pytest.mark.parametrize("with_layers", [True, False])
@pytest.mark.parametrize("name", READABLE)
def test_it_does_what_its_program_does(name, with_layers):
    family = name.partition("/")[0]
    file = read(path_of(name), family, with_layers)[network(family)]
    assert set(file.modules) == set(CASES[name]["changes"])
    assert_equal(effect(file, family), CASES[name]["changes"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "refused" in case])
def test_what_cannot_be_read_says_why_and_what_it_was_taken_for(name):
    with pytest.raises(WeightError) as caught:
        read(path_of(name), name.partition("/")[0])
    assert CASES[name]["refused"] in str(caught.value)
    if "other_depth" in name:
        assert "(diffusers, diffusers names)" in str(caught.value)
        assert "layers 11 are in the file; not in it: " in str(caught.value)


@pytest.mark.parametrize("name, models", [
    ("flux/kohya_with_encoders", {"dit": 17, "text_encoder_1": 3, "text_encoder_2": 1}),
    ("flux/comfy_with_encoders", {"dit": 17, "text_encoder_1": 3, "text_encoder_2": 1}),
    ("flux/diffusers_with_encoder", {"dit": 11, "text_encoder_1": 3}), ("flux/real_encoder", {"text_encoder_1": 2}),
    ("sdxl/kohya", {"text_encoder_1": 3, "text_encoder_2": 3}),
    ("sdxl/real_three", {"text_encoder_1": 4, "text_encoder_2": 4}),
    ("sdxl/real_kohya_format", {"text_encoder_1": 4, "text_encoder_2": 4}),
])
def test_text_encoders_get_theirs(name, models):
    family = name.partition("/")[0]
    found = read(path_of(name), family)
    assert {model: len(file.modules) for model, file in found.items() if model != network(family)} == {
        model: count for model, count in models.items() if model != network(family)}
    if name == "sdxl/real_three":  # its own alphas 3 and 5 and r 1
        assert {model: set(file.scales.values()) for model, file in found.items()} == {
            "unet": {4.0}, "text_encoder_1": {3.0}, "text_encoder_2": {5.0}}
    if name == "flux/real_encoder":  # its own alpha 9 and r 1
        assert set(found["text_encoder_1"].scales.values()) == {9.0} and set(found["dit"].scales.values()) == {4.0}


def test_biases_are_read_with_their_scale():
    bias = load_state_dict(path_of("flux/real_bias"))["transformer.transformer_blocks.0.attn.to_q.lora_B.bias"]
    file = read(path_of("flux/real_bias"), "flux")["dit"]
    np.testing.assert_array_equal(file.biases["transformer_blocks.0.attn.to_q"], 4 * bias)
    alone = read(path_of("flux/bias_alone"), "flux")["dit"].biases
    assert list(alone) == ["single_transformer_blocks.0.norm.linear"]


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "kohya", "diffsynth"])
@pytest.mark.parametrize("name", READABLE)
def test_written_in_a_layout_and_read_again_it_does_the_same(tmp_path, name, layout):
    family = name.partition("/")[0]
    table, files = interchange(family), read(path_of(name), family)
    kinds = {kind.name for file in files.values() for kind in file.formats.values()}
    path = tmp_path / "f.safetensors"
    try:
        save_adapters(path, files, table, layout)
    except WeightError as error:
        assert "layout" in str(error)
        assert (kinds - {"LoRA"} or "encoder" in name or "norm_out" in name or "original" in name or "fused" in name
                or family in ("sd3", "sdxl") or "bias" in name or name in ("flux/fal_kontext", "flux/real_encoder"))
        return
    again = read(path, family)
    for model, file in files.items():
        if model == table.network:
            assert_equal(effect(again[model], family), effect(file, family))
        assert file.biases.keys() <= again[model].biases.keys()
        for module, bias in again[model].biases.items():
            np.testing.assert_array_equal(bias, file.biases.get(module, np.zeros_like(bias)))


@pytest.mark.parametrize("name, layout", [("flux/kohya_fused", "kohya"), ("flux2/aitoolkit", "comfy"),
                                          ("flux2/kohya", "kohya"),
                                          ("sd3/kohya", "kohya"),
                                          ("qwen_image/musubi", "kohya"), ("qwen_image/aitoolkit", "comfy"),
                                          ("flux/diffsynth_own", "diffsynth"), ("flux/lokr_fused", "comfy"),
                                          ("z_image/aitoolkit", "comfy"), ("z_image/musubi", "kohya"),
                                          ("z_image/diffsynth", "diffsynth"), ("flux2/diffsynth", "diffsynth"),
                                          ("sdxl/kohya", "kohya"), ("sdxl/comfy", "comfy"), ("wan/comfy", "comfy"),
                                          ("wan/diffsynth", "diffsynth"), ("wan/musubi", "kohya")])
def test_split_and_joined_again_a_file_has_the_same_tensors(tmp_path, name, layout):
    family, path = name.partition("/")[0], tmp_path / "f.safetensors"
    save_adapters(path, read(path_of(name), family), interchange(family), layout)
    before, after = load_state_dict(path_of(name)), load_state_dict(path)
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key)


@pytest.mark.parametrize("layout", ["comfy", "kohya", "diffsynth"])
def test_joined_and_split_again_it_has_the_same_bits(tmp_path, layout):
    """Also where not all members of a joined layer are there, or they have several ranks."""
    for name in ("flux/diffusers_nometa", "flux/mixed_ranks"):
        files, path = read(path_of(name), "flux"), tmp_path / f"{Path(name).name}.safetensors"
        save_adapters(path, files, interchange("flux"), layout)
        again = read(path, "flux")["dit"]
        assert again.modules.keys() == files["dit"].modules.keys()
        if layout != "diffsynth" and "mixed" in name:  # of one rank, which diffusers needs
            ranks = {array.shape[0] for key, array in load_state_dict(path).items() if "lora_down" in key}
            assert ranks == {4, 3 * 4, 4 * 4}
            assert_equal(effect(again, "flux"), effect(files["dit"], "flux"))
            continue
        for module, parts in files["dit"].modules.items():
            for part, array in parts.items():
                np.testing.assert_array_equal(again.modules[module][part], array, err_msg=module)
        key = "lora_unet_single_blocks_0_linear1.lora_up.weight"
        if layout == "kohya":  # q, k and v of 16 rows, and 64 rows of zeros for proj_mlp, which sd-scripts asks for
            up = load_state_dict(path)[key]
            assert up.shape[0] == 3 * 16 + 64 and not up[48:].any() and up.shape[1] % 4 == 0


def test_the_header_is_what_peft_makes_its_settings_of(tmp_path):
    files = read(path_of("flux/mixed_ranks"), "flux")
    save_adapters(tmp_path / "f.safetensors", files, interchange("flux"), "diffusers", {"modelspec.title": "x"})
    header = metadata_of(tmp_path / "f.safetensors")
    settings = json.loads(header["lora_adapter_metadata"])
    assert header["format"] == "pt" and header["modelspec.title"] == "x"
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == 2
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == {
        m: 4 if "to_q" in m else 1 for m in files["dit"].modules if "to_q" in m or "to_k" in m}
    save_adapters(tmp_path / "c.safetensors", files, interchange("flux"), "comfy")
    assert "lora_adapter_metadata" not in metadata_of(tmp_path / "c.safetensors")  # it has alphas
    files = read(path_of("flux2/diffusers"), "flux2")
    save_adapters(tmp_path / "c.safetensors", files, interchange("flux2"), "comfy")
    settings = json.loads(metadata_of(tmp_path / "c.safetensors")["lora_adapter_metadata"])
    assert settings["transformer.alpha_pattern"] == {  # q, k and v are one layer of rank 6 there
        m: 6 for m in files["dit"].modules if m.endswith(("_q", "_k", "_v", "_q_proj", "_k_proj", "_v_proj"))}


@pytest.mark.parametrize("family", list(interchange_tables()))
@pytest.mark.few(3)
def test_a_table_knows_each_layer_once_and_both_ways(family):
    table = interchange(family)
    model = table.models[table.network]
    own = {member.replace(".N", ".0") for row in model.rows for member in row.members}
    for module in LAYERS.get(family, sorted(own)):  # of some families no files of others are here
        if family == "sd3" and "norm1_context" in module:  # said in the table
            continue
        for layout, column in table.columns.items():
            place = model.place(module, column)
            if column != "diffusers" and place is None and layout == "diffsynth":
                continue
            name, _, members = place
            for is_flat in (False, True):
                found = model.find(name.replace(".", "_") if is_flat else name, is_flat)
                assert [f.modules for f in found] == [members], (module, layout, found)


def test_a_scale_that_is_no_power_of_two_is_rounded_once(tmp_path):
    a, b = np.ones((2, 3), np.float32), np.full((4, 2), 0.1, np.float32)
    table = interchange("flux")
    file = AdapterFile({"x_embedder": {"lora_A.weight": a, "lora_B.weight": b}}, {"x_embedder": 1 / 3},
                       {"x_embedder": LORA})
    save_adapters(tmp_path / "f.safetensors", {"dit": file}, table, "diffusers")
    up = load_state_dict(tmp_path / "f.safetensors")["transformer.x_embedder.lora_B.weight"]
    assert up.tobytes() == (b * np.float32(1 / 3)).tobytes()


def test_what_a_layout_has_no_names_for_is_told_and_nothing_is_written(tmp_path):
    file = read(path_of("flux/lokr"), "flux")
    with pytest.raises(WeightError, match=r"cannot be written in the layout diffusers .*\(LoKr\).*lora resize --rank"):
        save_adapters(tmp_path / "f.safetensors", file, interchange("flux"), "diffusers")
    with pytest.raises(WeightError, match=r"norm_out\.linear .no name for it"):
        save_adapters(tmp_path / "f.safetensors", read(path_of("flux/norm_out"), "flux"), interchange("flux"),
                      "diffsynth")
    with pytest.raises(WeightError, match="DiffSynth-Studio has no names for Stable Diffusion 3"):
        save_adapters(tmp_path / "f.safetensors", read(path_of("sd3/diffusers"), "sd3"), interchange("sd3"),
                      "diffsynth")
    dora = read(path_of("flux/dora_kohya"), "flux")["dit"]
    assert dora.format is DORA
    del dora.modules["transformer_blocks.0.attn.to_q"]
    with pytest.raises(WeightError, match="to_q: a DoRA is of a whole layer"):
        save_adapters(tmp_path / "f.safetensors", {"dit": dora}, interchange("flux"), "comfy")
    assert not list(tmp_path.iterdir())


def test_the_family_is_recognised_by_its_names():
    fitting = {name: [family for family, table in interchange_tables().items() if not unmatched(path_of(name), table)]
               for name in ("flux/kohya_fused", "flux2/kohya", "flux2/diffusers", "qwen_image/musubi", "sd3/kohya",
                            "sdxl/kohya", "wan/comfy", "wan/musubi", "z_image/musubi")}
    assert fitting == {"sdxl/kohya": ["sdxl"], "wan/comfy": ["wan"], "wan/musubi": ["wan"],
                       "flux/kohya_fused": ["flux"], "flux2/kohya": ["flux2"], "flux2/diffusers": ["flux2"],
                       "qwen_image/musubi": ["qwen_image"], "sd3/kohya": ["sd3"], "z_image/musubi": ["z_image"]}


def test_a_file_of_both_kinds_of_names_is_refused(tmp_path):
    tensors = load_state_dict(path_of("flux/diffusers_nometa"))
    tensors |= load_state_dict(path_of("flux/kohya_fused"))
    save_state_dict(tmp_path / "f.safetensors", tensors)
    with pytest.raises(WeightError, match="is changed twice"):
        read(tmp_path / "f.safetensors", "flux")


@pytest.mark.parametrize("shapes", [((2, 16), (3, 2)), ((2, 8), (16, 2))])
def test_members_that_do_not_fit_together_are_not_joined(tmp_path, shapes):
    file = read(path_of("flux/diffusers_nometa"), "flux")
    file["dit"].modules["transformer_blocks.0.attn.to_k"] = dict(zip(LORA.parts, (np.ones(s, np.float32)
                                                                                  for s in shapes)))
    with pytest.raises(WeightError, match=r"to_k A .* expected \(1, 1, 1\) parts of 16 rows, and one width"):
        save_adapters(tmp_path / "f.safetensors", file, interchange("flux"), "comfy")


@pytest.mark.parametrize("name, shape", [("lora_B.bias", (3,)), ("diff_b", (16, 1)), ("diff_b", ())])
def test_a_bias_of_another_shape_is_refused(tmp_path, name, shape):
    tensors = load_state_dict(path_of("flux/diffusers_nometa"))
    tensors[f"transformer.transformer_blocks.0.attn.to_q.{name}"] = np.ones(shape, np.float32)
    save_state_dict(tmp_path / "f.safetensors", tensors)
    with pytest.raises(WeightError, match=r"to_q: the change of the bias has shape .*, expected \(16,\)"):
        read(tmp_path / "f.safetensors", "flux")


def test_every_stored_file_is_a_case():
    stored = {p.relative_to(FOREIGN).as_posix() for p in FOREIGN.rglob("*.safetensors")}
    assert stored == {f"{n}/adapter_model.safetensors" if n == "flux/peft_folder" else f"{n}.safetensors"
                      for n in CASES}
    with safe_open(path_of("flux/diffusers_fp8"), "np") as file:
        assert file.get_slice(next(iter(file.keys()))).get_dtype() == "F8_E4M3"
