"""An evaluation as a whole, on real pictures: what is found, noted, written and refused."""
from __future__ import annotations

import io
import json

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image, ImageChops, ImageOps

from ms_diffsynth.errors import DataError, OutputError
from ms_diffsynth.evaluate import Evaluator, evaluate, features
from ms_diffsynth.evaluate.kid import floor, kid
from ms_diffsynth.evaluate.memorisation import neighbours


def noisy(picture, deviation, seed=0):
    pixels = np.asarray(picture, np.float64)
    pixels = pixels + np.random.default_rng(seed).normal(size=pixels.shape) * deviation
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def noise(count, side):
    pixels = np.random.default_rng(1).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture
def reference(tmp_path, animals):
    """Eight animals of 64 x 64 pixels in a folder."""
    folder = tmp_path / "real"
    folder.mkdir()
    for k in range(8):
        animals[k].resize((64, 64)).save(folder / f"real_{k}.png")
    return folder


@pytest.fixture
def strangers(animals):
    """Four pictures unlike those: other animals in the colours of a negative."""
    return [ImageOps.invert(animals[k].resize((64, 64))) for k in range(8, 12)]


@pytest.fixture
def quick(monkeypatch):
    """A network of no time: averages of 28 x 28 pixels, mixed at random."""
    mix = np.random.default_rng(0).normal(size=(192, 300)).astype(np.float32)

    def network(tensor):
        pixels = tensor.asnumpy().reshape(-1, 3, 8, 28, 8, 28).mean((3, 5)).reshape(-1, 192)
        return Tensor(np.maximum(pixels @ mix, 0))

    monkeypatch.setattr(features, "EfficientNetLite0", lambda weights: network)


def opened(folder, k):
    return Image.open(folder / f"real_{k}.png")


def test_copies_are_flagged_in_the_space_that_sees_them(reference):
    copies = [opened(reference, 3), noisy(opened(reference, 5), 15), ImageChops.offset(opened(reference, 6), 2)]
    found = evaluate([*copies, *noise(1, 64)], reference)
    assert found.names[:2] == ("image 1", "image 2") and found.reference_names[3] == "real_3.png"
    assert found.is_memorised.tolist() == [True, True, True, False]
    assert found.memorised == 0.75
    assert found.features.is_near[:3].tolist() == [True, False, True]  # blind to noise
    assert found.pixels.is_near[:2].tolist() == [True, True]
    assert found.features.index[[0, 2]].tolist() == [3, 6] and found.pixels.index[:2].tolist() == [3, 5]
    assert "3 of 4 (75 %)" in found.summary() and "image 1 to real_3.png" in found.summary()


def test_the_parts_are_put_together_rightly(quick, reference, strangers):
    found = evaluate(strangers, reference, seed=3)
    describe = features.Describer()
    x, y = describe(strangers), describe([opened(reference, k).convert("RGB") for k in range(8)])
    assert found.kid.value == pytest.approx(kid(x.features, y.features).value, rel=1e-4)
    assert found.floor == pytest.approx(floor(y.features, 3), rel=1e-4)
    for space, a, b in ((found.features, x.features, y.features), (found.pixels, x.pixels, y.pixels)):
        assert np.allclose(space.distance, neighbours(a, b).distance, rtol=1e-3)
    assert found.record() == {"kid": found.kid.value, "kid_low": found.kid.low, "kid_high": found.kid.high,
                              "kid_floor": found.floor[1], "memorised": 0.0}
    assert all(type(value) is float for value in found.record().values())
    assert found.summary().startswith("KID on EfficientNet-Lite0 features, not comparable with Inception KID\n")
    assert any("too small (4 generated, 8 reference images)" in note for note in found.notes)
    assert "too small" in found.summary()


def test_the_reference_is_described_once_for_each_size(quick, reference, strangers, monkeypatch):
    evaluator = Evaluator(reference, size=(64, 64))
    calls = []
    describe = evaluator._describe
    monkeypatch.setattr(evaluator, "_describe", lambda pictures, *size: calls.append(len(pictures))
                        or describe(pictures, *size))
    first, second = evaluator.evaluate(strangers), evaluator.evaluate(strangers)
    assert calls == [4, 4] and first.record() == second.record()
    small = evaluator.evaluate([picture.resize((32, 32)) for picture in strangers])
    assert calls == [4, 4, 4, 8]
    assert any("scaled and cropped to 32 x 32" in note for note in small.notes)
    assert not any("cropped" in note for note in first.notes)


def test_pictures_of_several_sizes_meet_the_reference_as_it_is(quick, reference, strangers):
    found = evaluate([strangers[0].resize((48, 32)), opened(reference, 2), *strangers], reference)
    assert any("2 sizes" in note for note in found.notes)
    assert found.is_memorised[1] and found.features.distance[1] < 1e-3


def test_the_seed_draws_the_halves_and_nothing_else(quick, animals, strangers):
    one, same, other = (evaluate(strangers, animals.folder, seed) for seed in (3, 3, 4))
    assert one.record() == same.record() and one.floor != other.floor
    assert one.kid == other.kid and one.memorised == other.memorised


def test_twins_in_the_reference_are_noted(quick, reference, strangers):
    opened(reference, 1).save(reference / "twin.png")
    found = evaluate(strangers, reference)
    assert any(note.startswith("2 reference images have a twin") for note in found.notes)


def test_no_difference_from_real_pictures_is_said(quick, reference, animals):
    found = evaluate([opened(reference, k) for k in range(8)], reference)
    assert any("finds no difference" in note for note in found.notes) and found.memorised == 1
    far = evaluate(noise(4, 64), reference)
    assert not any("finds no difference" in note for note in far.notes) and far.kid.low > found.floor[1]


def test_what_is_written(quick, reference, strangers, tmp_path):
    found = evaluate([opened(reference, 4), *strangers], reference)
    paths = found.save(tmp_path / "made" / "out")
    assert [path.name for path in paths] == ["evaluation.json", "nearest.png"]
    assert sorted(path.name for path in (tmp_path / "made" / "out").iterdir()) == ["evaluation.json", "nearest.png"]
    written = json.loads(paths[0].read_text())
    assert written["metric"].endswith("not comparable with Inception KID")
    assert written["kid"] == {"value": found.kid.value, "low": found.kid.low, "high": found.kid.high}
    assert (written["generated"], written["reference"], written["seed"]) == (5, 8, 0)
    first = written["nearest"][0]
    assert first["image"] == "image 1" and first["is_memorised"] is True
    assert first["features"]["reference"] == first["pixels"]["reference"] == "real_4.png"
    assert first["pixels"]["distance"] == 0 and written["memorised"]["share"] == 0.2
    assert written["notes"] == list(found.notes)
    with pytest.raises(OutputError, match="ENOTDIR"):
        found.save(paths[0] / "below")


def test_the_grid_shows_the_nearest_first_and_stays_small(quick, reference):
    found = evaluate([*noise(13, 256), opened(reference, 7).resize((256, 256))], reference)
    assert len(found.nearest_png) <= 300_000
    sheet = np.asarray(Image.open(io.BytesIO(found.nearest_png)).convert("RGB"), np.float64)
    assert sheet.shape[0] > 6 * 48 and sheet.shape[1] > 6 * 48
    # the copy, with its white corners, comes first; noise is nowhere white
    margin, cell = 11, 2 * 48  # small images are shown larger
    assert found.is_memorised.tolist() == [False] * 13 + [True]
    first = sheet[margin + 15 :][:cell, margin : margin + cell]
    second = sheet[margin + 15 :][:cell, margin + cell + 5 :][:, :cell]
    assert first.mean() > second.mean() and first[2, 2].min() > 240


@pytest.mark.parametrize("given, expected", [
    (3, "3 generated images were given: expected at least 4"),
    (0, "0 generated images"),
])
def test_too_few_pictures_are_refused(quick, reference, strangers, given, expected):
    with pytest.raises(DataError, match=expected):
        evaluate(strangers[:given], reference)


def test_too_few_in_both_folders_are_told_together(quick, reference, tmp_path, strangers):
    made = tmp_path / "made"
    made.mkdir()
    strangers[0].save(made / "one.png")
    for k in range(5):
        (reference / f"real_{k}.png").unlink()
    with pytest.raises(DataError, match="1 generated images and 3 reference images"):
        evaluate(made, reference)


def test_one_folder_twice_is_refused_also_in_disguise(quick, reference, tmp_path, strangers):
    with pytest.raises(DataError, match="they are the same folder"):
        evaluate(reference, str(reference) + "/../real")
    with pytest.raises(DataError, match=r"8 images are in both, such as .*real_0\.png"):
        evaluate(tmp_path, reference)
    (tmp_path / "link").symlink_to(reference)
    with pytest.raises(DataError, match="they are the same folder"):
        evaluate(tmp_path / "link", reference)
