"""Data sets: metadata, images, films, buckets and batches. NumPy and Pillow, and PyAV for video files; nothing here
knows MindSpore.

Names are imported when they are used: settings need `data.paths`, and no NumPy.
"""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buckets import Bucket, BucketCropAndResize, choose_buckets, nearest_bucket, own_bucket
    from .clips import Clip, Clips
    from .dataset import UnifiedDataset
    from .images import grid, image_size, read_image, to_pil, to_pixels
    from .loader import Batch, Loader, collate
    from .operators import (
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
    from .plots import loss_curve

__all__ = ["Batch", "Bucket", "BucketCropAndResize", "Clip", "Clips", "DataProcessingOperator", "ImageCropAndResize",
           "LoadImage", "Loader", "RouteByExtensionName", "RouteByType", "SequentialProcess", "ToAbsolutePath",
           "ToFloat", "ToInt", "ToList", "ToStr", "UnifiedDataset", "choose_buckets", "collate", "grid", "image_size",
           "loss_curve", "nearest_bucket", "own_bucket", "read_image", "to_pil", "to_pixels"]
_ELSEWHERE = {
    "buckets": ("Bucket", "BucketCropAndResize", "choose_buckets", "nearest_bucket", "own_bucket"),
    "clips": ("Clip", "Clips"),
    "dataset": ("UnifiedDataset",),
    "images": ("grid", "image_size", "read_image", "to_pil", "to_pixels"),
    "loader": ("Batch", "Loader", "collate"),
    "plots": ("loss_curve",),
}
_MODULE = dict.fromkeys(__all__, "operators") | {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
