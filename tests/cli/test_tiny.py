"""``ms-diffsynth tiny``."""
from __future__ import annotations

import pytest

from ms_diffsynth.registry import FAMILIES, family


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.few(3)
def test_it_writes_a_model_that_loads_and_keeps_one_that_is_there(run, tmp_path, name):
    folder = tmp_path / "models" / name
    code, out, err = run("tiny", name, folder)
    assert (code, out) == (0, "") and err.startswith(f"wrote a tiny {name} model with random weights to {folder} (")
    pipe = family(name).pipeline.from_pretrained(str(folder))
    pipe.load_models_to_device(pipe.model_names)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = run("tiny", name, folder)
    assert code == 0 and err == f"{folder} already holds a model: kept\n"
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_seed_decides(run, tmp_path, toy_model):
    assert run("tiny", "toy", tmp_path / "same")[0] == 0 and run("tiny", "toy", tmp_path / "other", "--seed", 1)[0] == 0
    weights = [next((folder / "transformer").glob("*.safetensors")).read_bytes()
               for folder in (toy_model, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_a_variant_has_what_editing_needs(run, tmp_path):
    assert run("tiny", "qwen_image", tmp_path / "edit", "--variant", "edit-2511")[0] == 0
    pipe = family("qwen_image").pipeline.from_pretrained(str(tmp_path / "edit"))
    assert "vision_tower" in pipe.model_names and pipe.config("dit")["zero_cond_t"]
    code, _, err = run("tiny", "qwen_image", tmp_path / "none", "--variant", "edit-2510")
    assert code == 64 and ("variant=edit-2510: the family qwen_image has edit, edit-2509, edit-2511, controlnet, "
                           "inpaint.") in err
    code, _, err = run("tiny", "toy", tmp_path / "none", "--variant", "edit")
    assert code == 64 and "variant=edit: the family toy has none." in err


def test_a_folder_with_something_else_in_it_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, _, err = run("tiny", "toy", tmp_path / "full")
    assert code == 74 and "exists and is not empty" in err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
