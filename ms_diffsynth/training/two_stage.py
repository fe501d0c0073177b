"""Split training: stage one writes what crosses the cut, stage two reads it and runs the step alone.

Stage one loads exactly the models `prepare` names, stage two exactly those `step` names. What the cache holds is the
cut's own list of slots, so it follows whatever is trained: with a trained text encoder it holds token ids.
"""
from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.config import flat
from ms_diffsynth.errors import CacheError, ConfigError, listing, shortened
from ms_diffsynth.formats.weights import dtype_name
from ms_diffsynth.launch.worker import beat, still
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.pipelines.shared.cuts import Cuts
from ms_diffsynth.program import Cut
from ms_diffsynth.progress import Progress
from ms_diffsynth.storage.cache import Cache, Entry, PlannedRow, digest_of
from ms_diffsynth.storage.files import sha256_of
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.prepared import CachedRows, label_of, prepare_row

logger = logging.getLogger(__name__)


def fingerprint(module: DiffusionTrainingModule, cut: Cut, pictures: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that shapes what `prepare` writes, as a JSON value. Two equal ones give equal caches.

    Args:
        pictures: data set name -> what is done to its images; left out where it is not known.
    Models without files here (in stage two) are left out. Nothing of the optimizer or of memory saving is in it.
    """
    pipe = module.pipe
    models = {name: pipe.weights_digest(name) for name in cut.models("prepare")}
    libraries = {package for name in models for package in pipe.store.component(name).libraries}
    found = {
        "pipeline": type(pipe).__name__,
        "slots": list(cut.cache),
        "units": {unit.name: _code_digest(type(unit)) for unit in cut.prepare},
        "models": {name: digest for name, digest in models.items() if digest is not None},
        "libraries": {package: version(package) for package in sorted(libraries)},
        "dtype": dtype_name(pipe.dtype),
        "settings": {name: getattr(pipe, name) for name in pipe.prepare_settings},
        "row_fields": module.row_fields,
    }
    return found if pictures is None else found | {"pictures": dict(pictures)}


def launch_data_process_task(accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule,
                             model_logger: ModelLogger, class_dataset: Any = None, cache_dir: str | Path | None = None,
                             args: Any = None, validation_dataset: Any = None, prompts: Iterable[str] = (),
                             **options: Any) -> Cache:
    """Stage one: prepare every row of the data sets and write it to a cache; what is there already is kept.

    Args:
        validation_dataset: rows that are held out for the validation loss.
        prompts: those of sample images of stage two, negative ones too.
        cache_dir: where; None takes ``args.cache_dir``, else the folder of ``model_logger``.
        options: those of `launch_training_task`; none of them shapes the cache.

    In a job of several ranks each prepares its share of the rows, and all return when the cache is complete.

    Returns: the complete cache. Raises: DataError for a row that cannot be prepared, OutputError; running it again
        continues where it stopped.
    """
    folder = cache_dir or flat(args).get("cache_dir") or model_logger.output_path
    cut, pipe = model.training_cut(), model.pipe
    tell_unneeded(pipe, cut, "prepare")
    sets = {name: data for name, data in (("instance", dataset), ("class", class_dataset),
                                          ("validation", validation_dataset)) if data is not None}
    shaped_by = fingerprint(model, cut, {name: images_of(data) for name, data in sets.items()})
    stamp = digest_of(shaped_by)
    rows = {name: [_plan(stamp, data, index, model.row_fields)
                   for index in range(min(len(getattr(data, "rows", data)), len(data)))] for name, data in sets.items()}
    configs = {name: pipe.config(name) for name in cut.models("prepare") if pipe.store.component(name).class_name}
    progress = Progress(accelerator.is_main_process)
    cache, changed = None, []
    if accelerator.is_main_process:
        cache = Cache(folder)
        texts = CachedTexts(cache, stamp)
        changed = cache.begin(shaped_by, configs, rows, {p: texts.key(model.sample_key(p)) for p in prompts})
    keys = {name: [row.key for row in planned] for name, planned in rows.items()}
    if len(set(accelerator.gather_text(digest_of([shaped_by, keys])))) > 1:
        raise CacheError(f"the ranks would not write the same cache into {folder}. Expected the same code, settings, "
                         "images and weights on every machine: copy them, or use storage that all see.")
    cache = cache or Cache(folder)  # as the first rank has begun it
    if changed:
        progress.say(f"{folder} held the cache of another configuration ({listing(changed, 3)}); its entries stay "
                     f"until ms-diffsynth cache prune {folder}")
    began, written, size = time.perf_counter(), 0, 0
    todo = {row.key: (name, index) for name, planned in rows.items() for index, row in enumerate(planned)}
    own = list(todo.items())[accelerator.process_index::accelerator.num_processes]
    pipe.announce = progress.announce
    pipe.compile_to_prepare(cut.prepare, len(todo))
    progress.begin(len(own), "caching", "row")
    beat(0, "prepare")
    cuts, model.texts = Cuts(), CachedTexts(cache, stamp)
    for key, (name, index) in own:
        still()
        if not cache.holds(key):
            with cuts.of(label_of(sets[name], index)):
                slots, size_of_image = prepare_row(sets[name], index, model, cut)
            text, shared = slots.text
            own_slots = {name: array for name, array in slots.items() if name not in shared}
            cache.write(key, own_slots, size_of_image, model.texts.key(text))
            written += 1
            size += sum(array.nbytes for array in own_slots.values())
        progress.advance()
    progress.end()
    for prompt in cache.prompts if accelerator.is_main_process else ():
        still()
        with cuts.of(f"the sample prompt {shortened(prompt)!r}"):
            model.prepare_to_sample(prompt)
    cuts.tell()
    size, model.texts = size + model.texts.written, None
    done = [json.loads(text) for text in accelerator.gather_text(json.dumps([written, size]))]
    if accelerator.is_main_process:
        cache.finish()
    accelerator.wait_for_everyone()
    seconds, (written, size) = time.perf_counter() - began, map(sum, zip(*done))
    each = f" ({seconds / written:.2f} s and {size / written / 1e3:,.0f} kB a row)" if written else ""
    sampled = f"; {len(cache.prompts)} sample prompts" if cache.prompts else ""
    progress.say(f"cache in {cache.folder}: {sum(map(len, rows.values()))} rows, {written} prepared{each}, "
                 f"{len(todo) - written} there already{sampled}{f'; {len(done)} ranks' if len(done) > 1 else ''}")
    progress.say(f"loaded: {describe_loaded(pipe)}; peak memory {runtime.memory_text(runtime.peak_memory_bytes())}")
    return Cache(folder)


class CachedTexts:
    """What is prepared of texts, an entry of the cache each; see `training.module.Texts`.

    Args:
        stamp: digest of all that shapes what is prepared.

    Attributes:
        written: bytes.
    """

    def __init__(self, cache: Cache, stamp: str):
        self.cache, self.stamp, self.written = cache, stamp, 0
        self._last: tuple[str, Entry | None] = ("", None)

    def key(self, key: str) -> str:
        """The name of the entry; empty for none."""
        return digest_of([self.stamp, key]) if key else ""

    def get(self, key: str) -> Entry | None:
        if self._last[0] != key:
            try:
                self._last = key, self.cache.entry(self.key(key))
            except CacheError:
                return None
        return self._last[1]

    def put(self, key: str, slots: dict[str, np.ndarray]) -> None:
        self.cache.write(self.key(key), slots)
        self._last = key, Entry(slots)
        self.written += sum(array.nbytes for array in slots.values())


def open_cache(folder: str | Path, module: DiffusionTrainingModule, cut: Cut,
               pictures: Mapping[str, Any] | None = None,
               repeat: int | Sequence[int] = 1) -> tuple[CachedRows, CachedRows | None, CachedRows | None]:
    """Stage two's data: the rows of a complete cache that this job may train on, its class images and its held-out rows
    if it has any.

    The pipeline then has the prompts of the cache, for sample images; see `Pipeline.prepared_prompts`.

    Raises: CacheError naming every field in which the cache was made otherwise, or what is missing or damaged.
    """
    cache = Cache(folder)
    cache.check(fingerprint(module, cut, pictures))
    module.pipe.prepared_prompts = {prompt: cache.entry(key, f"the sample prompt {shortened(prompt)!r}").slots
                                    for prompt, key in cache.prompts.items()}
    module.pipe.known_configs.update(cache.manifest["configs"])
    tell_unneeded(module.pipe, cut, "step")
    classes, held_out = (CachedRows(cache, name, module) if cache.rows(name) else None
                         for name in ("class", "validation"))
    return CachedRows(cache, "instance", module, repeat), classes, held_out


def images_of(dataset: Any) -> Any:
    """What a data set does to its images, as a JSON value."""
    return dataset.operators() if hasattr(dataset, "operators") else type(dataset).__qualname__


def tell_unneeded(pipe: Pipeline, cut: Cut, stage: str) -> None:
    """Say which models were given, but are not loaded by this stage."""
    unneeded = sorted(set(pipe.sources) - set(cut.models(stage)))
    if unneeded:
        logger.info("this stage does not need %s: not loaded.", listing(unneeded))


def loaded_bytes(pipe: Pipeline) -> dict[str, int]:
    """Bytes of the weights of every model in memory, by name."""
    return {name: sum(p.size * p.itemsize for p in model.get_parameters())
            for name, model in sorted(pipe.models.items()) if isinstance(model, nn.Cell)}


def describe_loaded(pipe: Pipeline) -> str:
    """``dit 4.2 MB, vae 0.3 MB``."""
    return ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in loaded_bytes(pipe).items()) or "nothing"


def stage_of(task: str) -> str:
    """``"data_process"`` or ``"train"`` for a stage of split training, else an empty string.

    Raises: ConfigError for another stage.
    """
    kind, _, stage = task.partition(":")
    if stage not in ("", "data_process", "train"):
        raise ConfigError(f"task='{task}': expected '{kind}', '{kind}:data_process' or '{kind}:train'.")
    return stage


def _plan(stamp: str, dataset: Any, index: int, fields: list[str] | None) -> PlannedRow:
    if hasattr(dataset, "content"):
        content, label = dataset.content(index, fields), dataset.label(index)
    else:
        item = dataset[index]
        content = {key: _content(item[key]) for key in (item if fields is None else [f for f in fields if f in item])}
        label = f"row {index + 1}"
    return PlannedRow(digest_of([stamp, content]), label)


def _content(value: Any) -> Any:
    """A loaded cell as a JSON value that tells it from every other."""
    if isinstance(value, Image.Image):
        return [value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()]
    if isinstance(value, (list, tuple)):
        return [_content(element) for element in value]
    if isinstance(value, dict):
        return {str(key): _content(element) for key, element in value.items()}
    return value


@functools.cache  # what a process runs is what it imported, whatever the files hold later
def _code_digest(cls: type) -> str:
    """A digest of the code a unit runs: its file and those of its bases; of a family or of templates, the whole folder.

    A unit calls helpers and networks beside it, and constants such as a chat template stand outside its class.
    """
    files: set[Path] = set()
    for base in cls.__mro__:
        file = Path(getattr(sys.modules.get(base.__module__), "__file__", None) or "")
        if file.suffix == ".py" and base.__module__.split(".")[0] not in ("mindspore", "builtins"):
            is_folder = base.__module__.startswith(("ms_diffsynth.pipelines.", "ms_diffsynth.template."))
            files |= set(file.parent.glob("*.py")) if is_folder else {file}
            if is_folder and file.parent.parent.name == "pipelines":  # what several families share
                files |= set((file.parent.parent / "shared").glob("*.py"))
    digest = hashlib.sha256(cls.__qualname__.encode())
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()[:16]
