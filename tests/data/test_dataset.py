"""UnifiedDataset: what it returns, and settings it refuses. Bad metadata: tests/fault/test_metadata.py."""
from __future__ import annotations

import json

import pytest
from PIL import Image

from ms_diffsynth.data import Bucket, ToFloat, ToInt, UnifiedDataset
from ms_diffsynth.errors import ConfigError, DataError


@pytest.fixture
def folder(tmp_path):
    """Three pictures whose colour is their number."""
    base = tmp_path / "set"
    base.mkdir()
    for number, size in enumerate([(40, 32), (32, 40), (64, 20)]):
        Image.new("RGB", size, (number, number, number)).save(base / f"{number}.png")
    return base


def table(folder, text, name="metadata.csv", **options):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return UnifiedDataset(str(folder), str(path), **{"data_file_keys": "image", **options})


def refused(folder, text, *words, name="metadata.csv", **options):
    with pytest.raises(DataError) as caught:
        table(folder, text, name, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


GOOD = "image,prompt\n0.png,zero\n1.png,one\n2.png,two\n"


# ---- what it returns

def test_the_documents_call(folder):
    (folder / "metadata.csv").write_text(GOOD)
    dataset = UnifiedDataset(
        base_path=str(folder),
        metadata_path=str(folder / "metadata.csv"),
        repeat=50,
        data_file_keys="image",
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path=str(folder), height=512, width=512, height_division_factor=16, width_division_factor=16,
        ),
    )
    assert len(dataset) == 150
    item = dataset[4]
    assert item["prompt"] == "one" and item["image"].size == (512, 512) and item["image"].getpixel((9, 9)) == (1, 1, 1)
    assert dataset.rows[1] == {"image": "1.png", "prompt": "one"}
    assert dataset[-1]["prompt"] == "two"
    with pytest.raises(IndexError):
        dataset[150]


@pytest.mark.parametrize("name, text", [
    ("m.csv", "\ufeff" + GOOD),
    ("m.csv", GOOD.replace("\n", "\r\n\r\n")),
    ("m.json", json.dumps([{"image": f"{i}.png", "prompt": p} for i, p in enumerate(["zero", "one", "two"])])),
    ("m.jsonl", "\ufeff" + "\n\n".join(json.dumps({"image": f"{i}.png", "prompt": p})
                                       for i, p in enumerate(["zero", "one", "two"]))),
])
def test_formats_give_the_same_rows(folder, name, text):
    dataset = table(folder, text, name)
    assert [row["prompt"] for row in dataset.rows] == ["zero", "one", "two"] and dataset[1]["image"] == "1.png"


def test_quoted_cells_and_line_separators(folder):
    dataset = table(folder, 'image,prompt\n0.png,"a, ""b""\nc"\n1.png,a\u2028b\n')
    assert [row["prompt"] for row in dataset.rows] == ['a, "b"\nc', "a\u2028b"]


def test_length(folder):
    assert len(table(folder, GOOD, repeat=2)) == 6
    limited = table(folder, GOOD, repeat=2, max_data_items=4)
    assert len(limited) == 4 and [item["prompt"] for item in limited] == ["zero", "one", "two", "zero"]


def test_special_operators_apply_to_every_key_they_name(folder):
    dataset = table(folder, "image,prompt,scale,mask\n0.png,a,0.5,1.png\n", data_file_keys=("image", "mask"),
                    special_operator_map={"scale": ToFloat(), "mask": lambda name: name.upper()})
    assert dataset[0] == {"image": "0.png", "prompt": "a", "scale": 0.5, "mask": "1.PNG"}
    assert dataset.rows[0]["scale"] == "0.5"


def test_lists_of_pictures_and_nested_fields(folder):
    rows = [{"image": ["0.png", "1.png"], "prompt": "a", "template_inputs": {"scale": 0.2}}]
    dataset = table(folder, json.dumps(rows), "m.json",
                    main_data_operator=UnifiedDataset.default_image_operator(str(folder)))
    assert [image.size for image in dataset[0]["image"]] == [(32, 32), (32, 32)]
    assert dataset[0]["template_inputs"] == {"scale": 0.2}


def test_bucket_operator_and_header_sizes(folder):
    buckets = [Bucket(32, 48), Bucket(48, 32)]
    operator = UnifiedDataset.default_image_operator(str(folder), buckets=buckets)
    dataset = table(folder, GOOD, main_data_operator=operator, repeat=2)
    assert [dataset.image_size(i) for i in range(4)] == [(40, 32), (32, 40), (64, 20), (40, 32)]
    assert {(b["image"].height, b["image"].width) for b in dataset} <= {(b.height, b.width) for b in buckets}
    with pytest.raises(ConfigError, match="height=64 and buckets are both set"):
        UnifiedDataset.default_image_operator(height=64, width=64, buckets=buckets)


def test_fingerprint_follows_rows_and_bytes(folder):
    first = table(folder, GOOD).fingerprint()
    assert first == table(folder, GOOD).fingerprint() and len(first) == 64
    assert first != table(folder, GOOD.replace("two", "too")).fingerprint()
    Image.new("RGB", (40, 32), (9, 9, 9)).save(folder / "0.png")
    assert first != table(folder, GOOD).fingerprint()


# ---- a folder with captions

def test_sidecars(folder):
    (folder / "sub").mkdir()
    Image.new("RGB", (20, 20)).save(folder / "sub" / "x.jpeg")
    for name, text in (("0.txt", "zero\n"), ("1.txt", "\ufeffone"), ("2.caption", "zwei \u00fc"), ("sub/x.txt", "x")):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "._0.png").write_bytes(b"left by another system")
    dataset = UnifiedDataset(str(folder), main_data_operator=UnifiedDataset.default_image_operator(str(folder)))
    assert [(row["image"], row["prompt"]) for row in dataset.rows] == [
        ("0.png", "zero"), ("1.png", "one"), ("2.png", "zwei \u00fc"), ("sub/x.jpeg", "x")]
    assert dataset[3]["image"].size == (16, 16)


def test_folder_without_captions(folder):
    assert UnifiedDataset(str(folder), captions=False).rows == [{"image": f"{i}.png"} for i in range(3)]


def test_missing_and_bad_sidecars(folder):
    (folder / "0.txt").write_bytes(b"ok\nf\xfcr")
    (folder / "1.txt").write_text(" \n")
    with pytest.raises(DataError) as caught:
        UnifiedDataset(str(folder))
    for word in ("2 of 3 rows", "0.txt line 2 is not UTF-8 (byte 0xfc", "the image 2.png has no caption file", "2.txt"):
        assert word in str(caught.value)


def test_two_sidecars(folder):
    for name in ("0.txt", "0.caption", "1.txt", "2.txt"):
        (folder / name).write_text("a")
    with pytest.raises(DataError, match=r"1 of 3 rows(.|\n)*0\.png has two caption files, 0\.txt and 0\.caption\. Rem"):
        UnifiedDataset(str(folder))


# ---- bad rows

def test_links_out_are_allowed_on_request(folder):
    Image.new("RGB", (20, 20), (7, 7, 7)).save(folder.parent / "out.png")
    (folder / "link.png").symlink_to(folder.parent / "out.png")
    operator = UnifiedDataset.default_image_operator(str(folder), allow_outside_base=True)
    dataset = table(folder, "image\nlink.png\n", allow_outside_base=True, main_data_operator=operator)
    assert dataset[0]["image"].getpixel((0, 0)) == (7, 7, 7)


def test_a_row_that_spans_lines_keeps_line_numbers_right(folder):
    refused(folder, 'image,prompt\n0.png,"a\nb"\n\n9.png,"c\nd"\n', "row 2 (line 5)")


def test_folders_that_are_not_there_or_empty(folder):
    with pytest.raises(DataError, match=r"is not a folder.*Correct dataset_base_path"):
        UnifiedDataset(str(folder / "nowhere"))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty data set: it has no images"):
        UnifiedDataset(str(folder / "empty"))


def test_required_columns(folder):
    refused(folder, "image\n0.png\n", "has no column prompt", required="prompt")
    assert len(table(folder, "image\n0.png\n")) == 1


def test_special_files_are_only_checked_to_be_files(folder):
    (folder / "depth.npy").write_bytes(b"x")
    options = {"data_file_keys": "image,depth", "special_operator_map": {"depth": str.upper}}
    assert table(folder, "image,depth\n0.png,depth.npy\n", **options)[0]["depth"] == "DEPTH.NPY"
    refused(folder, "image,depth\n0.png,none.npy\n", "depth='none.npy'", "does not exist", **options)


def test_impossible_settings(folder):
    with pytest.raises(ConfigError, match="repeat=0: expected at least 1"):
        table(folder, GOOD, repeat=0)
    with pytest.raises(ConfigError, match="max_data_items=0: expected at least 1"):
        table(folder, GOOD, max_data_items=0)
    with pytest.raises(ConfigError, match="both missing"):
        UnifiedDataset()


def test_failing_operators_name_row_and_cell(folder):
    dataset = table(folder, GOOD, special_operator_map={"prompt": ToInt()})
    with pytest.raises(DataError, match=r"row 3 \(line 4\), prompt='two': 'two' is not an integer"):
        dataset[2]
    dataset = table(folder, GOOD, main_data_operator=lambda name: name.missing)
    with pytest.raises(DataError, match=r"row 1 \(line 2\), image='0\.png': AttributeError"):
        dataset[0]
