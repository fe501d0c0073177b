"""Operators: composition, paths, cropping."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.data import (
    DataProcessingOperator,
    ImageCropAndResize,
    LoadImage,
    RouteByExtensionName,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
)
from ms_diffsynth.errors import ConfigError, DataError


class Double(DataProcessingOperator):
    def __call__(self, data):
        return data * 2


def test_composition_is_left_to_right_and_associative():
    assert (ToInt() >> Double() >> ToStr())("4") == "8"
    assert (ToInt() >> (Double() >> ToStr()))("4") == "8"
    assert (ToStr() >> Double() >> ToInt())(4) == 44
    assert (ToInt() >> (lambda data: data + 1))("4") == 5


def test_simple_cells():
    assert ToFloat()("0.5") == 0.5 and ToList()(3) == [3] and ToStr()(None) == "" and ToStr("-")(None) == "-"
    assert SequentialProcess(ToInt())(["1", "2"]) == [1, 2]


@pytest.mark.parametrize("operator, cell, kind", [(ToInt(), "x1", "integer"), (ToFloat(), None, "number")])
def test_bad_cells(operator, cell, kind):
    with pytest.raises(DataError, match=rf"{cell!r} is not an? {kind}; expected digits.*Correct the cell"):
        operator(cell)


def test_routes():
    route = RouteByType([(str, ToInt()), (list, SequentialProcess(ToInt()))])
    assert route("3") == 3 and route(["3"]) == [3]
    with pytest.raises(DataError, match=r"3\.5 is of type float; expected str, list"):
        route(3.5)
    route = RouteByExtensionName([(("jpg", ".PNG"), lambda data: "picture"), (("txt",), lambda data: "text")])
    assert route("a.b/c.JPG") == route("c.png") == "picture" and route("a.txt") == "text"
    with pytest.raises(DataError, match=r"a\.mp4 has the extension 'mp4'; expected one of jpg, png, txt"):
        route("a.mp4")
    assert RouteByExtensionName([(None, ToStr())])("a.mp4") == "a.mp4"


def test_absolute_path_stays_inside(tmp_path):
    base = tmp_path / "data"
    (base / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").touch()
    (base / "link.png").symlink_to(tmp_path / "secret.png")
    (base / "near.png").symlink_to(base / "a.png")
    to_path = ToAbsolutePath(str(base))
    assert to_path("a.png") == str(base / "a.png")
    assert to_path("near.png") == str(base / "near.png")
    for name in ("../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "link.png", "."):
        with pytest.raises(DataError, match=r"leaves the data folder.*leads to.*Move the file"):
            to_path(name)
    assert ToAbsolutePath(str(base), allow_outside_base=True)("link.png") == str(base / "link.png")
    for name in ("http://host/a.png", "file:///etc/passwd", "data:image/png;base64,AA"):
        with pytest.raises(DataError, match=r"is a URL; expected a file in the data folder\. Download it"):
            ToAbsolutePath(str(base), allow_outside_base=True)(name)
    for name in ("", "a\0.png", 3, None):
        with pytest.raises(DataError, match="is not a file name"):
            to_path(name)
    assert ToAbsolutePath()("a.png") == "a.png"


def test_load_image_modes(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(path)
    assert LoadImage()(path).getpixel((0, 0)) == (255, 255, 255)
    assert LoadImage(convert_RGBA=True)(path).getpixel((0, 0)) == (0, 0, 0, 0)
    assert LoadImage(convert_RGB=False)(path).mode == "RGBA"


@pytest.mark.parametrize("width, height, max_pixels, expected", [
    (70, 50, 64 * 64, (48, 64)),
    (50, 70, 64 * 64, (64, 48)),
    (640, 480, 64 * 64, (48, 64)),  # scale 8.66: 73 x 55, floored to 64 x 48
    (1920, 1080, 1920 * 1080, (1072, 1920)),
    (33, 17, None, (16, 32)),
])
def test_dynamic_size(width, height, max_pixels, expected):
    operator = ImageCropAndResize(max_pixels=max_pixels)
    assert operator.target_size(width, height) == expected
    assert operator(Image.new("RGB", (width, height))).size == expected[::-1]


def test_target_of_zero_is_refused():
    with pytest.raises(DataError, match=r"300x20 pixels becomes 61x4 under max_pixels=256.*16x16.*Raise max_pixels"):
        ImageCropAndResize(max_pixels=256)(Image.new("RGB", (300, 20)))


def test_fixed_size_covers_and_crops_the_centre():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    result = np.asarray(ImageCropAndResize(80, 80, height_division_factor=8, width_division_factor=8)(
        Image.fromarray(pixels)))
    assert result.shape == (80, 80, 3)
    assert (result[:, 1:-1] == 255).all()  # scale 2: the crop spans columns 60 to 140 of 200, which are white
    assert (np.asarray(ImageCropAndResize(48, 96)(Image.new("RGB", (31, 77), (1, 2, 3)))) == (1, 2, 3)).all()


def test_impossible_sizes():
    with pytest.raises(ConfigError, match=r"height=500: expected a positive multiple of 16. Did you mean 496"):
        ImageCropAndResize(500, 512)
    with pytest.raises(ConfigError, match="height=512 and width=None: expected both or neither"):
        ImageCropAndResize(512)


def test_an_operator_without_call_says_so():
    with pytest.raises(TypeError, match="DataProcessingOperator does not define __call__"):
        DataProcessingOperator()(1)
