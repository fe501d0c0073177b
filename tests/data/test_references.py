"""Rows with references: by a column that may be empty, and by folders; what cannot be meant."""
from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from ms_diffsynth.data import UnifiedDataset
from ms_diffsynth.data.operators import describe
from ms_diffsynth.errors import DataError

READ = {"data_file_keys": "image,edit_image", "required": ("image", "prompt", "edit_image"), "optional": "edit_image",
        "instance_prompt": "a"}


def images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32 + 16 * k, 32), (10 * k, 0, 0)).save(folder / name)


def jsonl(folder, *rows):
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "m.jsonl")


def edits(dataset):
    return [row["edit_image"] for row in dataset.rows]


def test_a_row_has_one_reference_several_or_none(tmp_path):
    images(tmp_path, *(f"{k}.png" for k in range(6)))
    rows = [{"image": "0.png", "edit_image": "5.png"}, {"image": "1.png"}, {"image": "2.png", "edit_image": None},
            {"image": "3.png", "edit_image": []}, {"image": "4.png", "edit_image": ["5.png", "4.png"]}]
    operator = UnifiedDataset.default_image_operator(base_path=str(tmp_path), resize=False)
    dataset = UnifiedDataset(str(tmp_path), jsonl(tmp_path, *rows), main_data_operator=operator, **READ)
    assert edits(dataset) == ["5.png", None, None, None, ["5.png", "4.png"]]
    assert dataset[1]["edit_image"] is None and dataset[0]["edit_image"].size == (112, 32)
    assert [image.size for image in dataset[4]["edit_image"]] == [(112, 32), (96, 32)]  # as they are, in order
    assert dataset.label(4) == "4.png, 5.png, 4.png" and dataset.image_size(1) == (48, 32)
    found = [dataset.content(row)["edit_image"] for row in range(5)]
    assert [len(digests) for digests in found] == [1, 0, 0, 0, 2] and found[4][0] == found[0][0]
    assert "ImageCropAndResize" not in describe(operator) and dataset.fingerprint()


def test_an_empty_cell_of_csv_is_no_reference(tmp_path):
    images(tmp_path, "0.png", "1.png")
    (tmp_path / "m.csv").write_text("image,edit_image,prompt\n0.png,1.png,a\n1.png,,b\n")
    assert edits(UnifiedDataset(str(tmp_path), str(tmp_path / "m.csv"), **READ)) == ["1.png", None]


@pytest.mark.parametrize("cell", ["0.png;1.png", '"[""0.png"", ""1.png""]"'])
def test_several_references_in_a_cell_of_csv(tmp_path, cell):
    images(tmp_path, "0.png", "1.png", "a;b.png")
    (tmp_path / "m.csv").write_text(f"image,edit_image,prompt\n0.png,{cell},a\n1.png,a;b.png,b\n")
    with pytest.raises(DataError, match=r'several need JSON lines.*"edit_image": \["r0.png", "r1.png"\]') as error:
        UnifiedDataset(str(tmp_path), str(tmp_path / "m.csv"), **READ)
    assert "1 of 2 rows" in str(error.value) and "does not exist" not in str(error.value)


@pytest.mark.parametrize("cell, says", [("absent.png", "does not exist"), (["0.png", None], "is empty"),
                                        ([["0.png"]], "edit_image"), (0, "edit_image=0")])
def test_a_reference_that_is_none(tmp_path, cell, says):
    images(tmp_path, "0.png")
    with pytest.raises(DataError, match=says):
        UnifiedDataset(str(tmp_path), jsonl(tmp_path, {"image": "0.png", "edit_image": cell}), **READ)


def test_the_column_must_be_in_one_row(tmp_path):
    images(tmp_path, "0.png")
    with pytest.raises(DataError, match="has no column edit_image"):
        UnifiedDataset(str(tmp_path), jsonl(tmp_path, {"image": "0.png"}), **READ)


def test_references_by_folders(tmp_path, caplog):
    images(tmp_path / "after", "1.png", "cats/2.png", "3.png")
    (tmp_path / "after/1.txt").write_text("make it red")
    images(tmp_path / "before", "1.jpg", "cats/2.png", "9.png")
    images(tmp_path / "style", "1.webp")
    with caplog.at_level(logging.WARNING):
        dataset = UnifiedDataset(str(tmp_path), edit_folders=("before", "style"), **READ)
    assert [(row["image"], row["edit_image"]) for row in dataset.rows] == [
        ("after/1.png", ["before/1.jpg", "style/1.webp"]), ("after/3.png", None),
        ("after/cats/2.png", ["before/cats/2.png"])]
    assert dataset.rows[0]["prompt"] == "make it red" and dataset.rows[1]["prompt"] == "a"
    assert "references without an image of that name, and not used: 'before/9.png'" in caplog.text


@pytest.mark.parametrize("files, folders, says", [
    ({"after": ["1.png"], "before": ["2.png"]}, ["before"], "no image has a reference in before"),
    ({"after": ["1.png"], "before": ["1.png"]}, ["behind"], "behind has no images"),
    ({"after": ["1.png"], "before": ["1.png", "1.jpg"]}, ["before"], "are references of one image"),
    ({"after": ["1.png", "2.png"], "before": ["1.png"], "style": ["2.png"]}, ["before", "style"],
     "style/2.png has no reference in before before it"),
])
def test_folders_that_do_not_fit(tmp_path, files, folders, says):
    for folder, names in files.items():
        images(tmp_path / folder, *names)
    with pytest.raises(DataError, match=says):
        UnifiedDataset(str(tmp_path), edit_folders=folders, **READ)


def test_folders_beside_metadata(tmp_path):
    images(tmp_path / "after", "1.png")
    images(tmp_path / "before", "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,prompt\nafter/1.png,a\n")
    with pytest.raises(DataError, match="expected references either by folders or in metadata"):
        UnifiedDataset(str(tmp_path), edit_folders=("before",), **READ)
