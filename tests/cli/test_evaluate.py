"""``ms-diffsynth evaluate`` on real pictures."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ms_diffsynth.evaluate import weights

DATA = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture
def made(tmp_path):
    """Nine cats, and one of the real animals among them."""
    folder = tmp_path / "made"
    folder.mkdir()
    cats = sorted((DATA / "dreambooth_cat_fluent").glob("*.png"))
    for path in (*cats, DATA / "dreambooth_cat_fluent_class" / "1f436.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


REFERENCE = ("--reference", DATA / "dreambooth_cat_fluent_class")


def test_two_folders_are_compared(run, made):
    code, out, _ = run("evaluate", "--generated", made, *REFERENCE, "--output", "out")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "KID on EfficientNet-Lite0 features, not comparable with Inception KID"
    assert "10 generated, 25 reference images" in out and "1 of 10 (10 %)" in out
    assert "the nearest is 1f436.png to 1f436.png" in out and "too small" in out
    assert lines[-2:] == ["  out/evaluation.json", "  out/nearest.png"]
    written = json.loads(Path("out/evaluation.json").read_text())
    assert written["kid"]["value"] > 2 * written["floor"]["high"] > 0  # cats are not the other animals
    assert [entry["image"] for entry in written["nearest"] if entry["is_memorised"]] == ["1f436.png"]
    assert Image.open("out/nearest.png").size[0] > 300


@pytest.mark.parametrize("output", [".", "deeper/out"])
def test_the_output_stays_out_of_the_pictures(run, made, output):
    code, out, err = run("evaluate", "--generated", made, *REFERENCE, "--output", made / output)
    assert code == 64 and out == "" and "is inside --generated" in err
    assert len(list(made.iterdir())) == 10


def test_damaged_pictures_are_all_named_and_nothing_is_written(run, made):
    names = sorted(path.name for path in made.iterdir())[:2]
    for name in names:
        (made / name).write_bytes((made / name).read_bytes()[:3000])
    code, out, err = run("evaluate", "--generated", made, *REFERENCE, "--output", "out")
    assert code == 65 and out == "" and "2 of 10 images" in err and all(name in err for name in names)
    assert not Path("out").exists()


def test_without_the_extra_its_command_is_named(run, made, monkeypatch):
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    code, _, err = run("evaluate", "--generated", made, *REFERENCE)
    assert code == 69 and "pip install 'ms_diffsynth[eval]'" in err


def test_a_negative_seed_is_refused(run, made):
    code, _, err = run("evaluate", "--generated", made, *REFERENCE, "--seed", "-1")
    assert code == 64 and "--seed -1: expected 0 or more" in err
