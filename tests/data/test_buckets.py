"""Buckets: sizes near the shapes that are there, few of them, and what is said of what they cost."""
from __future__ import annotations

import random
import re

import pytest
from PIL import Image

from ms_diffsynth.data import (
    Bucket,
    BucketCropAndResize,
    ImageCropAndResize,
    choose_buckets,
    nearest_bucket,
    own_bucket,
)
from ms_diffsynth.data.buckets import MOST, TOLERANCE, describe_fit, losses
from ms_diffsynth.errors import ConfigError


@pytest.mark.parametrize("width, height, max_pixels, factor, expected", [
    (1024, 1024, 1 << 20, 16, (1024, 1024)),
    (4000, 3000, 1 << 20, 16, (880, 1168)),  # 1182.4 x 886.8 pixels, rounded down
    (256, 512, 65536, 8, (360, 176)),
    (48, 64, 65536, 8, (64, 48)),  # never enlarged
    (50, 70, 65536, 8, (64, 48)),
    (32, 480, 65536, 8, (480, 32)),
    (100, 2000, 4096, 16, (256, 16)),  # 14 x 286 pixels: as thin as the factor, and shorter
    (2000, 100, 4096, 16, (16, 256)),
])
def test_an_image_keeps_its_shape(width, height, max_pixels, factor, expected):
    assert own_bucket(width, height, max_pixels, factor).size == expected
    if 16 not in expected:  # elsewhere the operator of DiffSynth-Studio refuses
        operator = ImageCropAndResize(None, None, max_pixels, factor, factor)
        assert operator.target_size(width, height) == expected


@pytest.mark.parametrize("max_pixels, factor, near", [(255, 16, 240), (1, 8, 8), (100, 16, 96)])
def test_max_pixels_below_one_bucket(max_pixels, factor, near):
    with pytest.raises(ConfigError, match=rf"max_pixels={max_pixels}: expected at least {factor**2}.*mean {near**2}\?"):
        own_bucket(100, 100, max_pixels, factor)


def test_losses_by_hand():
    cut, scale, loss = losses([(200, 100), (50, 100)], [Bucket(100, 100), Bucket(50, 100), Bucket(200, 100)])
    assert cut[0].tolist() == pytest.approx([1 / 2, 0, 3 / 4]) and scale[0].tolist() == [1, 0.5, 2]
    assert loss[0].tolist() == pytest.approx([1 - 0.5 * 0.5**0.5, 0.5, 1 - 1 / 4 / 16])  # sides of 1, 1/2; doubled
    assert cut[1].tolist() == pytest.approx([1 / 2, 3 / 4, 0]) and scale[1].tolist() == [2, 2, 2]


SHAPES = [(256, 512), (48, 64), (32, 480), (512, 256)]


def test_few_shapes_have_each_their_own():
    assert choose_buckets(SHAPES, 65536, 8) == sorted(own_bucket(*size, 65536, 8) for size in SHAPES)
    assert choose_buckets([(64, 64)] * 3, 1 << 20, 8, most=5) == [Bucket(64, 64)]


def test_one_bucket_for_tall_and_wide_is_square():
    assert choose_buckets([(256, 512), (512, 256)] * 3, 65536, 8, most=1) == [Bucket(248, 248)]
    for tall in (1, 9):  # with two the square, which is the best of one, is given up
        sizes = [(256, 512)] * tall + [(512, 256)]
        assert choose_buckets(sizes, 65536, 8, most=2) == [Bucket(176, 360), Bucket(360, 176)]


def test_near_shapes_share_one():
    sizes = [(1024, 1024), (1040, 1024), (1024, 1040), (2000, 2040)]
    assert len(choose_buckets(sizes, 1 << 20)) == 1
    assert len(choose_buckets(sizes, 1 << 20, most=9)) == len({own_bucket(*size, 1 << 20) for size in sizes}) == 3


@pytest.mark.parametrize("most", [None, 1, 3, 12])
def test_many_shapes_are_within_the_limit_and_the_order_does_not_matter(most):
    draw = random.Random(1)
    sizes = [(draw.randint(300, 2000), draw.randint(300, 2000)) for _ in range(300)]
    buckets = choose_buckets(sizes, 512 * 512, 16, most)
    assert len(buckets) == (MOST if most is None else most)
    assert all(b.height * b.width <= 512 * 512 and b.height % 16 == b.width % 16 == 0 for b in buckets)
    draw.shuffle(sizes)
    assert choose_buckets(sizes, 512 * 512, 16, most) == buckets


def test_more_buckets_lose_less_and_enough_lose_nothing():
    draw = random.Random(2)
    sizes = [(draw.choice((512, 640, 768, 1024)), draw.choice((512, 640, 768, 1024))) for _ in range(100)]
    lost = [losses(sizes, choose_buckets(sizes, 512 * 512, 16, most))[0].min(axis=1).mean() for most in (1, 2, 4, 8)]
    assert lost == sorted(lost, reverse=True) and lost[0] > 2 * lost[-1]
    own = {own_bucket(*size, 512 * 512) for size in sizes}
    assert set(choose_buckets(sizes, 512 * 512, 16, most=100)) == own


def test_a_small_image_among_large_ones_is_not_enlarged_and_shrinks_no_other():
    buckets = choose_buckets([(1024, 768)] * 50 + [(100, 80)], 1 << 20, 16)
    assert buckets == [Bucket(80, 96), Bucket(768, 1024)]


def test_what_the_number_left_open_promises():
    """Within the tolerance of its own bucket, unless there are as many as may be."""
    draw = random.Random(3)
    sizes = [(int(900 * draw.uniform(1, 1.6)), 900) for _ in range(200)]
    buckets = choose_buckets(sizes, 1 << 20, 16)
    assert 1 < len(buckets) < MOST
    own = [losses([size], [own_bucket(*size, 1 << 20)])[0][0, 0] for size in sizes]
    assert all(losses([size], [nearest_bucket(*size, buckets)])[0][0, 0] < floor + TOLERANCE + 0.01
               for size, floor in zip(sizes, own))


def test_nearest():
    buckets = [Bucket(72, 32), Bucket(48, 48), Bucket(32, 72)]  # of one area
    assert nearest_bucket(100, 100, buckets) == Bucket(48, 48)
    assert nearest_bucket(152, 100, buckets) == Bucket(32, 72)  # 1.52 > sqrt(72 / 32); by difference 1 would be nearer
    assert nearest_bucket(100, 152, buckets) == Bucket(72, 32)
    assert nearest_bucket(148, 100, buckets) == Bucket(48, 48)
    assert nearest_bucket(20, 20, [Bucket(16, 16), Bucket(32, 32)]) == Bucket(16, 16)  # rather than enlarged
    with pytest.raises(ConfigError, match="list of buckets is empty"):
        nearest_bucket(1, 1, [])


def test_crop_to_bucket():
    operator = BucketCropAndResize([Bucket(64, 32), Bucket(48, 48)])
    assert operator(Image.new("RGB", (100, 210))).size == (32, 64)
    assert operator(Image.new("RGB", (100, 100))).size == (48, 48)


def test_what_is_said():
    names = ["portrait.png", "small.png", "strip.png", "wide.png"]
    line, warnings = describe_fit(SHAPES, names, choose_buckets(SHAPES, 65536, 8), "Do.")
    assert "4 sizes" in line and "360x176 (1 image)" in line and "none is enlarged" in line and warnings == []
    assert re.search(r"at most 2\.2% \((portrait|wide)\.png\)", line)
    line, warnings = describe_fit(SHAPES, names, [Bucket(256, 256)], "Do.")
    assert "256x256 (4 images)" in line and "93.3% (strip.png)" in line
    assert "2 enlarged, by up to 8.00x (strip.png)" in line
    assert "strip.png 93%, portrait.png 50%, wide.png 50%, small.png 25%. Do." in warnings[0]
    assert "strip.png 8.00x, small.png 5.33x. Do." in warnings[1] and len(warnings) == 2
    line, warnings = describe_fit([(64, 64)], ["a"], [Bucket(64, 64)], "")
    assert "nothing is cut off; none is enlarged" in line and warnings == []
