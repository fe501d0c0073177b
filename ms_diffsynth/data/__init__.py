"""Data sets: metadata, images, buckets and batches. NumPy and Pillow only; nothing here knows MindSpore."""
from __future__ import annotations

from .buckets import Bucket, BucketCropAndResize, choose_buckets, nearest_bucket, own_bucket
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

__all__ = ["Batch", "Bucket", "BucketCropAndResize", "DataProcessingOperator", "ImageCropAndResize", "LoadImage",
           "Loader", "RouteByExtensionName", "RouteByType", "SequentialProcess", "ToAbsolutePath", "ToFloat", "ToInt",
           "ToList", "ToStr", "UnifiedDataset", "choose_buckets", "collate", "grid", "image_size", "loss_curve",
           "nearest_bucket", "own_bucket", "read_image", "to_pil", "to_pixels"]
