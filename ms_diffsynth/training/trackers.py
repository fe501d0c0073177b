"""Services and formats that show runs: TensorBoard, Weights & Biases, SwanLab. Their packages are imported when used.

A tracker gets numbers, sample images with their prompts, and the settings. `hooks.tracking.Tracking` opens and closes
it; whether it works offline, and who it logs in as, is decided by its own environment variables.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ms_diffsynth.data.previews import gif_bytes, smaller, strip
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.registry import TRACKERS

Sample = Image.Image | np.ndarray  # an image, or a video, uint8 [F, H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A run as a tracker knows it.

    Attributes:
        folder: the output_path. name: its last part. project: what the run belongs to.
        id: the same when the run is resumed in its folder.
        settings: all of them, without secrets, as JSON has them.
        after: how many steps were made before.
        frame_rate: frames a second of sample videos.
    """

    folder: Path
    name: str
    project: str
    id: str
    settings: Mapping[str, Any]
    after: int = 0
    frame_rate: float = 16.0


class Tracker(Protocol):
    """What shows a run. It is made when the run begins, on the first rank."""

    package: str  # that is imported
    extra: str  # of this package, which installs it

    def __init__(self, run: Tracked): ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def images(self, images: Sequence[Sample], captions: Sequence[str], step: int) -> None:
        """Sample images or videos; ``captions``, their prompts, are as many, or none."""

    def close(self) -> None: ...


class TensorBoard:
    """Events in ``<output_path>/tensorboard``: curves, sample images by step, and the settings and prompts as text."""

    package, extra = "tensorboardX", "logging"

    def __init__(self, run: Tracked):
        from tensorboardX import SummaryWriter

        # what was written after the checkpoint from which the run is resumed is shown no more
        purge = {"purge_step": run.after + 1} if run.after else {}
        self.writer, self.told = SummaryWriter(str(run.folder / "tensorboard"), **purge), False
        self.frame_rate = run.frame_rate
        settings = json.dumps(dict(run.settings), indent=4, sort_keys=True, ensure_ascii=False, default=str)
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in settings.splitlines()), run.after)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, images: Sequence[Sample], captions: Sequence[str], step: int) -> None:
        for k, image in enumerate(images, 1):
            if isinstance(image, np.ndarray):
                self._video(f"samples/{k}", image, step)
            else:
                self.writer.add_image(f"samples/{k}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if captions and not self.told:
            self.writer.add_text("sample prompts", "\n".join(f"{k}. {' '.join(text.split())}" for k, text in
                                                             enumerate(captions, 1)), step)
            self.told = True
        self.writer.flush()

    def _video(self, name: str, video: np.ndarray, step: int) -> None:
        """As an image that is an animated GIF, which TensorBoard plays; its own way needs another package."""
        from tensorboardX.proto.summary_pb2 import Summary

        video = smaller(video)
        image = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3,
                              encoded_image_string=gif_bytes(video, self.frame_rate))
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; ``WANDB_MODE=offline`` writes to ``<output_path>/wandb`` alone."""

    package, extra = "wandb", "wandb"

    def __init__(self, run: Tracked):
        import wandb

        self.package_of_images = wandb
        self.run = wandb.init(project=run.project, name=run.name, id=run.id, resume="allow", dir=str(run.folder),
                              config=dict(run.settings), settings=wandb.Settings(console="off"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def images(self, images: Sequence[Sample], captions: Sequence[str], step: int) -> None:
        self.run.log({"samples": [self.package_of_images.Image(image, caption=text or None)
                                  for image, text in with_captions(images, captions)]}, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab(Wandb):
    """SwanLab, whose client logs and ends as wandb's does; ``SWANLAB_MODE=offline`` writes to ``<output_path>/swanlab``
    alone.
    """

    package, extra = "swanlab", "swanlab"

    def __init__(self, run: Tracked):
        import swanlab

        self.package_of_images = swanlab
        folder = run.folder / "swanlab"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = swanlab.init(project=run.project, experiment_name=run.name, id=run.id, resume="allow",
                                logdir=str(folder), config=dict(run.settings))


def tracker_class(name: str) -> type[Tracker]:
    """A tracker of `registry.TRACKERS`."""
    module, _, cls = TRACKERS[name].partition(":")
    return getattr(import_module(module), cls)


def with_captions(images: Sequence[Sample], captions: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """Each image, in RGB, and its caption, without captions an empty one; of a video some of its frames in a row."""
    return [(strip(image) if isinstance(image, np.ndarray) else image.convert("RGB"), text)
            for image, text in zip(images, captions or [""] * len(images))]


def check_installed(names: Sequence[str]) -> None:
    """Raises: ConfigError for a tracker whose package cannot be imported."""
    for name in names:
        cls = tracker_class(name)
        try:
            import_module(cls.package)
        except ImportError as error:
            raise ConfigError(f"trackers={name}, but {cls.package} cannot be imported ({error}): pip install "
                              f"'ms_diffsynth[{cls.extra}]', or leave it out (loss.csv and report.html are always "
                              "written).") from None
