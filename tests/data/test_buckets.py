"""Buckets: a finite list, the nearest aspect ratio, cropping to it."""
from __future__ import annotations

import pytest
from PIL import Image

from ms_diffsynth.data import Bucket, BucketCropAndResize, describe_buckets, make_buckets, nearest_bucket
from ms_diffsynth.errors import ConfigError


@pytest.mark.parametrize("side, factor", [(64, 16), (256, 16), (512, 32), (1024, 16), (1000, 8)])
def test_buckets_keep_their_promises(side, factor):
    buckets = make_buckets(side * side, factor)
    assert len(set(buckets)) == len(buckets) <= 25
    for bucket in buckets:
        assert bucket.height % factor == bucket.width % factor == 0
        assert 0.6 * side * side < bucket.height * bucket.width <= side * side
        assert 0.5 <= bucket.width / bucket.height <= 2
        assert Bucket(bucket.width, bucket.height) in buckets
    assert any(b.width == b.height for b in buckets)
    assert [b.width / b.height for b in buckets] == sorted(b.width / b.height for b in buckets)


def test_known_list():
    assert describe_buckets(make_buckets(512 * 512, step=64)) == (
        "5 buckets (height x width): 640x384, 576x448, 512x512, 448x576, 384x640")


def test_impossible_buckets():
    with pytest.raises(ConfigError, match=r"max_pixels=100, factor=16.*at least step x step"):
        make_buckets(100)
    with pytest.raises(ConfigError, match=r"step=24.*multiple of factor"):
        make_buckets(512 * 512, step=24)
    with pytest.raises(ConfigError, match="list of buckets is empty"):
        nearest_bucket(1, 1, [])


def test_nearest_is_symmetric_in_the_logarithm():
    buckets = [Bucket(64, 32), Bucket(48, 48), Bucket(32, 64)]
    assert nearest_bucket(100, 100, buckets) == Bucket(48, 48)
    assert nearest_bucket(142, 100, buckets) == Bucket(32, 64)  # 1.42 > sqrt(2); by difference 1 would be nearer
    assert nearest_bucket(100, 142, buckets) == Bucket(64, 32)
    assert nearest_bucket(140, 100, buckets) == Bucket(48, 48)
    assert nearest_bucket(10, 10, [Bucket(16, 16), Bucket(32, 32)]) == Bucket(32, 32)


def test_crop_to_bucket():
    operator = BucketCropAndResize([Bucket(64, 32), Bucket(48, 48)])
    assert operator(Image.new("RGB", (100, 190))).size == (32, 64)
    assert operator(Image.new("RGB", (100, 90))).size == (48, 48)
