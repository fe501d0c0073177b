"""What a run leaves behind: loss.csv, events.jsonl, checkpoints, samples, the loss curve, report.html."""
from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ms_diffsynth.data.fonts import INSTALL, font_for
from ms_diffsynth.data.images import grid, png_bytes, side_by_side
from ms_diffsynth.data.plots import loss_curve
from ms_diffsynth.data.previews import CELL, has_mp4, mp4_bytes, smaller, video_grid, webp_bytes
from ms_diffsynth.errors import ConfigError, OutputError, listing
from ms_diffsynth.launch.worker import beat
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.redact import redact, without_secrets
from ms_diffsynth.report.page import write_report
from ms_diffsynth.storage.files import append_line, write_file

logger = logging.getLogger(__name__)

NEWS = ("saved", "samples", "validation", "evaluation")  # events after which there is more to see in a report
Sample = Image.Image | np.ndarray  # an image, or a video, uint8 [F, H, W, 3]
COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "is_skipped", "seconds")


class ModelLogger:
    """Writes a run's records and checkpoints into ``output_path``; no token and no password is in any of them.

    Args:
        remove_prefix_in_ckpt: taken off the names of trained weights (``"pipe.dit."``); LoRA files have names of
            their own.
        enable_tensorboard_log: also write TensorBoard events (``pip install 'ms_diffsynth[logging]'``); the same as
            the setting ``trackers=tensorboard``.

    Attributes:
        is_writing: False on every rank but the first; the training loop sets it.
        settings: what training_args.json holds.
        files: further files, written by `start`: name -> content.
        saved: files of weights, in the order they were written. saved_at: the step of the last one; -1 before.
        keep_saved: how many saves of weights stay; None for all. The loop sets it.
        samples: step -> sample images, or small copies of sample videos: the first and the latest, which the
            before/after grid needs.
        frame_rate: frames a second of videos.
        references: of each sample image the reference images it is made of, which are shown above it; empty for none.
        reference_title: what these are, beside their row.
        checkpoint: folder of the newest checkpoint; None before the first.
        ema: the moving average of what is trained; the loop sets it.
        after_save: called when a checkpoint is in place; `training.hooks.publish` sets it.
        listeners: what also gets numbers and sample images, as a `training.trackers.Tracker` does.
    """

    def __init__(self, output_path: str | Path, remove_prefix_in_ckpt: str | None = None,
                 enable_tensorboard_log: bool = False):
        if not str(output_path).strip():  # which would be the current folder
            raise ConfigError("output_path is empty: expected the name of a folder.")
        self.output_path = Path(output_path)
        self.remove_prefix_in_ckpt = remove_prefix_in_ckpt
        self.num_steps = 0
        self.metadata: dict[str, str] = {}
        self.settings: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.losses: list[tuple[int, float]] = []
        self.samples: dict[int, list[Sample]] = {}
        self.frame_rate = 16.0
        self.references: list[list[Image.Image]] = []
        self.reference_title = "reference"
        self.saved: list[Path] = []
        self.saved_at = -1
        self.keep_saved: int | None = None
        self.is_writing = True
        self.checkpoint: Path | None = None
        self.after_save: Callable[[], None] | None = None
        self.ema: EMA | None = None
        self._has_news, self._report_from = False, 0  # of report.html, and the step from which it is written anew
        self._events = threading.Lock()  # an upload tells of itself from a thread of its own
        self.listeners: list[Any] = []
        self.enable_tensorboard_log = enable_tensorboard_log

    # -- records -------------------------------------------------------------------------------------------------

    def start(self, settings: dict[str, Any], after: int = 0, run_folder: Path | None = None) -> None:
        """Write training_args.json, and the head of loss.csv.

        Args:
            after: continue after this step of the run in ``run_folder``, which may be this one. loss.csv then holds
                that run's rows up to the step; events.jsonl is continued.
        """
        self.settings, self.num_steps = without_secrets(settings), after
        if not self.is_writing:
            return
        self.output_path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        for name, content in {**self.files, "training_args.json": text.encode()}.items():
            write_file(self.output_path / name, content)
        rows = []
        if after:
            with contextlib.suppress(FileNotFoundError):
                for line in (run_folder / "loss.csv").read_text(errors="replace").splitlines():
                    if _is_row(line) and int(line.partition(",")[0]) <= after:
                        rows.append(line)
            if len(rows) != after:
                logger.warning("%s has the rows of %d of %d steps: the others are lost.", run_folder / "loss.csv",
                               len(rows), after)
        write_file(self.output_path / "loss.csv", "".join(f"{row}\n" for row in (",".join(COLUMNS), *rows)).encode())
        self.losses = [(int(step), float(loss)) for step, _, loss, *_ in (row.split(",") for row in rows)
                       if math.isfinite(float(loss))]
        if not after:
            write_file(self.output_path / "events.jsonl", b"")
            self.event("start")

    def event(self, event: str, **values: Any) -> None:
        """Append one line to events.jsonl. JSON has no NaN and no infinity: they become the strings "nan" and "inf"."""
        if not self.is_writing:
            return
        record = {"event": event, "time": round(time.time(), 3), "step": self.num_steps} | values
        record = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._events:
            append_line(self.output_path / "events.jsonl", json.dumps(without_secrets(record), allow_nan=False))
        self._has_news |= event in NEWS
        if event in ("end", "stopped"):
            self.write_report()

    def refresh_report(self) -> None:
        """Write report.html anew when there is something new to see, at most once in 2 % more steps."""
        if self._has_news and self.num_steps >= self._report_from:
            self.write_report()

    def write_report(self) -> None:
        """Write report.html. A run is never ended by that: what goes wrong is a warning."""
        self._has_news, self._report_from = False, self.num_steps + max(1, self.num_steps // 50)
        try:
            write_report([self.output_path])
        except Exception as error:
            logger.warning("report.html is not written: %s. Training goes on; ms-diffsynth report %s writes it later.",
                           error, self.output_path)

    def log_step(self, record: dict[str, Any]) -> None:
        """Append one optimizer step to loss.csv, and tell the listeners; ``record`` has the keys of COLUMNS."""
        if not self.is_writing:
            return
        append_line(self.output_path / "loss.csv", ",".join(_text(record[c]) for c in COLUMNS))
        if math.isfinite(record["loss"]):
            self.losses.append((record["step"], record["loss"]))
        self.scalars({key: record[key] for key in ("loss", "learning_rate", "grad_norm")}, record["step"])

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Tell the listeners numbers."""
        for listener in self.listeners:
            listener.scalars(values, step)

    def state(self) -> dict[str, Any]:
        """Which weights are in files, as JSON."""
        return {"saved": [path.relative_to(self.output_path).as_posix() for path in self.saved],
                "saved_at": self.saved_at}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` gave; files that are not there any more are forgotten."""
        self.saved = [path for name in state["saved"] if (path := self.output_path / name).is_file()]
        self.saved_at = state["saved_at"] if self.saved else -1

    def sync(self) -> None:
        """Make loss.csv outlive a loss of power, so that no checkpoint is ahead of it. Raises: OutputError."""
        try:
            with open(self.output_path / "loss.csv", "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.output_path / 'loss.csv'} cannot be synced: {error.strerror}. Check the disk, or "
                              "choose another output folder.") from error

    # -- checkpoints (the documents' names) ------------------------------------------------------------------------

    def on_step_end(self, accelerator: Any, model: Any, save_steps: int | None = None, **_: Any) -> None:
        """Count a step; save ``step-N.safetensors`` every ``save_steps`` steps."""
        self.num_steps += 1
        if save_steps and self.num_steps % save_steps == 0:
            self.save_model(accelerator, model, f"step-{self.num_steps}.safetensors")

    def on_epoch_end(self, accelerator: Any, model: Any, epoch_id: int) -> None:
        """Save ``epoch-N.safetensors``; the first epoch is 0."""
        self.save_model(accelerator, model, f"epoch-{epoch_id}.safetensors")

    def on_training_end(self, accelerator: Any, model: Any, save_steps: int | None = None) -> None:
        """Save the last step when no file holds it yet, and draw the loss curve."""
        if self.saved_at != self.num_steps:
            self.save_model(accelerator, model, f"step-{self.num_steps}.safetensors")
        if accelerator.is_main_process and len(self.losses) > 1:
            steps, losses = zip(*self.losses)
            self.write_image("loss.png", loss_curve(np.array(steps), np.array(losses)))

    def save_model(self, accelerator: Any, model: Any, file_name: str) -> None:
        """Save what was trained, on the first rank only; with a moving average also ``<name>-ema.safetensors``.

        What diffusers loads from a folder is also written as one, with the moving average if there is one.
        """
        self.saved_at = self.num_steps
        beat(self.num_steps + 1, "save")
        if accelerator.is_main_process:
            self._save(model, file_name)
            with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
                if self.ema is not None:
                    self._save(model, file_name.replace(".safetensors", "-ema.safetensors"))
                model.save_models(self.output_path)
            self._remove_old_saves()
            if self.after_save is not None:
                self.after_save()

    def _remove_old_saves(self) -> None:
        """Keep the newest ``keep_saved`` saves; a moving average goes with its weights."""
        plain = [path for path in self.saved if not path.stem.endswith("-ema")]
        for path in plain[: -self.keep_saved] if self.keep_saved else ():
            for old in (path, path.with_name(f"{path.stem}-ema.safetensors")):
                old.unlink(missing_ok=True)
                self.saved = [kept for kept in self.saved if kept != old]

    def _save(self, model: Any, file_name: str) -> None:
        path = self.output_path / file_name
        counts = ["step"] + ["ss_steps"] * ("ss_output_name" in self.metadata)
        metadata = without_secrets({**self.metadata, **dict.fromkeys(counts, str(self.num_steps))})
        model.save(path, self.remove_prefix_in_ckpt, metadata)
        self.saved.append(path)
        self.event("saved", file=file_name, bytes=path.stat().st_size)

    # -- images ----------------------------------------------------------------------------------------------------

    def log_samples(self, step: int, images: list[Sample], captions: list[str]) -> Path:
        """Write ``samples/step-N.png`` and keep the images for the before/after grid.

        Of videos it is ``step-N.webp``, a sheet that moves, and with PyAV the same as ``step-N.mp4``; videos that are
        larger than their place in it are also written whole, ``step-N/1.mp4`` (without PyAV .webp) and so on.
        """
        if isinstance(images[0], np.ndarray):
            for k, video in enumerate(images, 1):
                if max(video.shape[1:3]) > CELL:
                    self._write_whole(f"samples/step-{step}/{k}", video, captions[k - 1] if captions else "")
            images = [smaller(video) for video in images]
        first = min(self.samples, default=step)
        self.samples = {first: self.samples.get(first, images), step: images}
        columns = len(images) if captions else math.ceil(math.sqrt(len(images)))
        self._write_prompts(captions)
        above = self._references(images)
        rows = [images] if above else [images[k : k + columns] for k in range(0, len(images), columns)]
        names = [self.reference_title, f"step {step}"] if above else None
        path = self._write_sheet(f"samples/step-{step}", [*above, *rows], names, _titles(captions))
        self.event("samples", file=path.relative_to(self.output_path).as_posix())
        for listener in self.listeners:
            listener.images(images, _titles(captions) or (), step)
        return path

    def _write_sheet(self, name: str, rows: list[list[Sample]], captions: list[str] | None,
                     titles: list[str] | None) -> Path:
        """A grid of images, or of videos, whose place is as high as those of its row."""
        if not isinstance(rows[-1][0], np.ndarray):
            return self.write_image(f"{name}.png", grid(rows, captions=captions, titles=titles))
        still = [[np.asarray(x)[None] if isinstance(x, Image.Image) else x for x in row] for row in rows]
        sheet, text = video_grid(still, captions, titles), "\n".join(titles or ())
        write_file(self.output_path / f"{name}.webp", webp_bytes(sheet, self.frame_rate, text))
        if has_mp4():
            write_file(self.output_path / f"{name}.mp4", mp4_bytes(sheet, self.frame_rate, text))
        return self.output_path / f"{name}.webp"

    def _write_whole(self, name: str, video: np.ndarray, text: str) -> None:
        to_bytes, suffix = (mp4_bytes, "mp4") if has_mp4() else (webp_bytes, "webp")
        write_file(self.output_path / f"{name}.{suffix}", to_bytes(video, self.frame_rate, redact(text)))

    def _references(self, images: list[Sample]) -> list[list[Image.Image]]:
        """A row of a grid: the references of each sample image, as high as it is; no row where there are none."""
        if len(self.references) != len(images) or not all(self.references):
            return []
        heights = [x.shape[1] if isinstance(x, np.ndarray) else x.height for x in images]
        return [[side_by_side(given, height) for given, height in zip(self.references, heights)]]

    def _write_prompts(self, captions: list[str]) -> None:
        """``samples/prompts.txt`` when an image has its number under it, because no font has the letters."""
        titles = _titles(captions) or []
        odd = [k for k, title in enumerate(titles, 1) if font_for(title, 16) is None]
        text = "".join(f"prompt {k}: {' '.join(title.split())}\n" for k, title in enumerate(titles, 1)).encode()
        path = self.output_path / "samples/prompts.txt"
        if odd and not (path.is_file() and path.read_bytes() == text):
            write_file(path, text)
            logger.warning("no font of this system has the letters of prompt %s: its number is under the images, its "
                           "text is in %s. %s", listing(odd), path, INSTALL)

    def first_and_last(self) -> dict[str, np.ndarray]:
        """The first and the last samples, which `write_comparison` needs, by ``STEP.NUMBER``."""
        return {f"{step}.{k}": np.asarray(image) for step in {*list(self.samples)[:1], *list(self.samples)[-1:]}
                for k, image in enumerate(self.samples[step])}

    def restore_images(self, images: dict[str, np.ndarray], captions: list[str]) -> None:
        """Keep, and write again, what `first_and_last` gave."""
        found: dict[int, dict[int, Sample]] = {}
        for name, array in images.items():
            step, k = map(int, name.split("."))
            found.setdefault(step, {})[k] = Image.fromarray(array) if array.ndim == 3 else array
        for step, made in sorted(found.items()):
            self.log_samples(step, [made[k] for k in range(len(made))], captions)

    def write_comparison(self, captions: list[str]) -> Path | None:
        """Write ``samples/before_after.png`` (of videos .webp) from the first and the last samples; None when there is
        only one.
        """
        if len(self.samples) < 2:
            return None
        first, last = min(self.samples), max(self.samples)
        above = self._references(self.samples[last])
        rows = [*above, self.samples[first], self.samples[last]]
        names = [*([self.reference_title] if above else []), f"before (step {first})", f"after (step {last})"]
        return self._write_sheet("samples/before_after", rows, names, _titles(captions))

    def write_image(self, name: str, image: Image.Image) -> Path:
        """Write a PNG below ``output_path``."""
        path = self.output_path / name
        write_file(path, png_bytes(image))
        return path


def _titles(captions: list[str]) -> list[str] | None:
    return [redact(caption) for caption in captions] or None


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)  # nine digits give a float32 back exactly


def _is_row(line: str) -> bool:
    """Whether a line of loss.csv is whole: one that was torn or damaged has other values."""
    try:
        number, *values = line.split(",")
        return number.isascii() and number.isdigit() and len(list(map(float, values))) == len(COLUMNS) - 1
    except ValueError:
        return False
