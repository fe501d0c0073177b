"""Reference cases from end to end: texts, image files, noise and captions go in; ids, embeddings, latents, 8-bit images
and trained weights come out. The layout of a case is in docs/explanation/parity.md.

The weights are those that ``ms-diffsynth tiny`` writes, or lie in the case. Nothing here knows a family: what a case
holds is compared, through the same units, pipeline calls and training step that a user's job runs.
"""
from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.images import read_image
from ms_diffsynth.debug.compare import Quantity, relative_error, worst
from ms_diffsynth.debug.end_to_end_training import check_training
from ms_diffsynth.diffusion.schedule import last_steps
from ms_diffsynth.errors import DataError, listing
from ms_diffsynth.formats.json_text import read_json
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import read_config
from ms_diffsynth.nn.names import torch_parameters
from ms_diffsynth.pipeline import Pipeline, UnitSequence
from ms_diffsynth.pipelines.shared.image import scaled
from ms_diffsynth.program import Program, is_optional, slot
from ms_diffsynth.registry import family
from ms_diffsynth.training.prepared import in_bucket

EMBEDDING, LATENTS, SIGMAS = 3e-5, 1e-5, 1e-6  # largest relative error allowed, float32
IMAGE = 1  # of 255: the two sides may round another way


class EndToEndCase:
    """A case, loaded, and pipelines on its weights."""

    def __init__(self, folder: Path, info: dict[str, Any], scratch: Path):
        self.folder, self.info, self.scratch = folder, info, scratch
        self.inputs = load_state_dict(folder / "inputs.safetensors") if (folder / "inputs.safetensors").exists() else {}
        self.expected = load_state_dict(folder / "expected.safetensors")
        self.stride = info["row_stride"]  # of what is recorded of every matrix
        self.family = family(info["family"])
        self.model = folder
        if "model" in info:
            self.model = scratch / "model"
            self.family.write_tiny(self.model, info["model"]["tiny_seed"])
            recorded = info["model"]["digests"]
            changed = [name for name, wanted in recorded.items() if digest(self.model / name) != wanted]
            if changed:
                raise DataError(f"ms-diffsynth tiny {info['family']} writes other weights than this case was made "
                                f"with: {listing(changed)}. If it was meant to change, make the case again "
                                "(docs/explanation/parity.md); nothing that the case holds can be compared.")

    def pipeline(self, scheduler_config: dict[str, Any] | None = None) -> Pipeline:
        """A fresh pipeline in float32; with settings of its scheduler changed, on a folder that has them so."""
        folder = self.model
        if scheduler_config is not None:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            for path in self.model.iterdir():
                if path.name != "scheduler":
                    (folder / path.name).symlink_to(path.resolve())
            own = self.model / "scheduler" / "scheduler_config.json"
            config = (read_json(own, DataError, "Copy the case again.") if own.is_file() else {}) | scheduler_config
            (folder / "scheduler").mkdir()
            (folder / "scheduler" / own.name).write_text(json.dumps(config), encoding="utf-8")
        pipe = self.family.pipeline.from_pretrained(str(folder), mindspore_dtype=ms.float32)
        if self.info.get("max_sequence_length"):
            pipe.max_sequence_length = self.info["max_sequence_length"]
        return pipe

    def wanted(self, name: str) -> np.ndarray:
        """An expected value. Raises: DataError where the case does not hold it."""
        if name not in self.expected:
            raise DataError(f"{self.folder / 'expected.safetensors'} holds no '{name}': the case was made for other "
                            "names. Make it again (docs/explanation/parity.md).")
        return self.expected[name]

    def rows(self, array: np.ndarray) -> np.ndarray:
        """What the case records of a matrix: every fourth row."""
        return array[:: self.stride] if array.ndim > 1 else array

    def operator(self, height: int, width: int) -> Any:
        """What the data set does to an image file of the case."""
        factor = self.family.pipeline.division_factor
        return UnifiedDataset.default_image_operator(
            base_path=str(self.folder / "images"), height=height, width=width, height_division_factor=factor,
            width_division_factor=factor)


def digest(folder: Path) -> str:
    """SHA-256 over the settings and the tensors of a component, however its files are laid out."""
    found = hashlib.sha256(json.dumps(read_config(folder), sort_keys=True).encode())
    tensors = {name: array for file in folder.glob("*.safetensors") for name, array in load_state_dict(file).items()}
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode() + tensors[name].tobytes())
    return found.hexdigest()


def check_end_to_end(folder: Path, info: dict[str, Any], mode: str) -> list[Quantity]:
    """Run one case in ``mode`` and return every compared quantity."""
    with tempfile.TemporaryDirectory(prefix="ms_diffsynth-parity-") as scratch:
        case = EndToEndCase(folder, info, Path(scratch))
        pipe = case.pipeline()
        quantities = []
        if "encoded" in info:
            quantities += [*_texts(case, pipe, mode), *_buckets(case, pipe)]
        if "files" in info:
            quantities += _files(case, pipe, mode)
        quantities += _schedules(case)
        quantities += _samples(case, pipe)
        for run in info.get("training", []):
            pipe.forget_compiled()
            quantities += check_training(case, run, mode)
        return quantities


class Part:
    """The units that need nothing but ``given``: those of the host, then the others as one step in ``mode``."""

    def __init__(self, pipe: Pipeline, given: tuple[str, ...], mode: str):
        known, units = set(given), []
        for unit in pipe.units:
            if all(is_optional(param) or slot(param) in known for param in unit.input_params):
                units.append(unit)
                known |= set(unit.output_params)
        self.pipe, self.host, self.step = pipe, [unit for unit in units if unit.is_host], None
        encoders = [unit for unit in units if not unit.is_host]
        if encoders:
            self.outputs = tuple(name for unit in encoders for name in unit.output_params)
            self.cut = Program(units, given, ()).cut(self.outputs, fuse=[unit.name for unit in encoders])
            self.step = CompiledStep(UnitSequence(self.cut, pipe).positional, "the encoders", mode)

    def prepare(self, **given: Any) -> dict[str, np.ndarray]:
        """What the host's units make of one input, without the batch axis."""
        slots = self.pipe.run(self.host, given)
        return {n: slots[n].asnumpy()[0] for unit in self.host for n in unit.output_params}

    def encode(self, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The slots of a batch, on the host."""
        if self.step is None:
            return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        inputs = [Tensor(np.stack([row[name] for row in rows])) for name in self.cut.cache]
        return dict(zip(self.outputs, [value.asnumpy() for value in self.step(*inputs)]))


# -- text ------------------------------------------------------------------------------------------------------------


def _texts(case: EndToEndCase, pipe: Pipeline, mode: str) -> list[Quantity]:
    """Token ids of all texts; embeddings of some, of two as one batch, and of given ids."""
    texts = read_json(case.folder / "texts.json", DataError, "Copy the case again.")
    part = Part(pipe, ("prompt",), mode)
    tokens = {name: part.prepare(prompt=text) for name, text in texts.items()}
    quantities = list(_tokens(case, tokens))
    padded = {name: in_bucket(row, (0, 0), pipe).slots for name, row in tokens.items()}
    counts = {name: max((len(row[n]) for n in pipe.padded_slots if n in row), default=None)
              for name, row in tokens.items()}
    found = {f"encoded.{name}": (part.encode([padded[name]]), 0, counts[name]) for name in case.info["encoded"]}
    batch = part.encode([padded[name] for name in case.info["batch"]])
    found |= {f"batch.{name}": (batch, k, counts[name]) for k, name in enumerate(case.info["batch"])}
    for name in case.info.get("given", []):
        row = {n: case.inputs[f"{name}.{n}"][0] for n in part.cut.cache}
        found[f"given.{name}"] = (part.encode([row]), 0, None)
    for output in part.outputs:
        pairs = {name: (_some_rows(slots[output][row][:count]), case.wanted(f"{name}.{output}"))
                 for name, (slots, row, count) in found.items()}
        quantities.append(worst(output.replace("_", " "), pairs, EMBEDDING))
    return quantities


def _tokens(case: EndToEndCase, tokens: dict[str, dict[str, np.ndarray]]) -> Iterator[Quantity]:
    """How many texts have other ids, for every kind of ids that the case holds."""
    for name in sorted(n for n in case.expected if n.startswith("tokens.")):
        output = name.removeprefix("tokens.")
        wanted = np.split(case.expected[name], np.cumsum(case.wanted(f"lengths.{output}"))[:-1])
        differ = [text for (text, row), ids in zip(tokens.items(), wanted) if not np.array_equal(row[output], ids)
                  and text not in case.info["known_differences"].get(output, [])]
        yield Quantity(output.replace("_", " "), len(differ), 0, ", ".join(differ), f"of {len(tokens)} texts")


def _buckets(case: EndToEndCase, pipe: Pipeline) -> Iterator[Quantity]:
    """The bucket of every distance between two tokens of T5, by the bias that its attention adds for it."""
    if "t5.buckets" in case.expected:
        expected = case.wanted("t5.buckets")  # of the distances -n to n - 1
        n = len(expected) // 2
        cells = [cell for model in pipe.models.values() if isinstance(model, nn.Cell)
                 for _, cell in model.cells_and_names()]
        attention = next(cell for cell in cells if getattr(cell, "has_relative_attention_bias", False))
        bias = attention.compute_bias(n + 1, n + 1).asnumpy()[0]  # [heads, queries, keys]
        found = np.concatenate([bias[:, n, :n], bias[:, 0, :n]], 1).T
        table = torch_parameters(attention.relative_attention_bias)["weight"].asnumpy()
        differ = np.flatnonzero((found != table[expected]).any(1)) - n
        yield Quantity("buckets of distances", len(differ), 0, ", ".join(map(str, differ)), f"of {2 * n}")


def _some_rows(array: np.ndarray) -> np.ndarray:
    """What the case records of [L, D]: the first sixteen rows, then every sixteenth, and the last."""
    count = len(array)
    return array[sorted({*range(min(count, 16)), *range(0, count, 16), count - 1})] if array.ndim > 1 else array


# -- images ----------------------------------------------------------------------------------------------------------


def _files(case: EndToEndCase, pipe: Pipeline, mode: str) -> list[Quantity]:
    """Image files as the data set reads them, and their latents."""
    given, part = case.info["files"], Part(pipe, ("input_image",), mode)
    images = {name: case.operator(given["height"], given["width"])(name) for name in given["images"]}
    differ = {name: _levels(np.asarray(image)[:: case.stride], case.wanted(f"pixels.{name}"))
              for name, image in images.items()}
    name = max(differ, key=differ.get)
    pairs = {name: (part.encode([part.prepare(input_image=image)])["input_latents"], case.wanted(f"latents.{name}"))
             for name, image in images.items()}
    return [Quantity(f"pixels of {len(images)} files", differ[name], 0, name, "of 255"),
            worst("latents of files", pairs, LATENTS)]


def _levels(found: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference of two 8-bit images."""
    if found.shape != expected.shape:
        raise DataError(f"an image of {found.shape} was computed where the reference holds {expected.shape}: the case "
                        "and the pipeline disagree about a size.")
    return int(np.abs(found.astype(np.int16) - expected).max())


def _schedules(case: EndToEndCase) -> Iterator[Quantity]:
    """Sampling sigmas of model folders that have their own scheduler_config.json."""
    for given in case.info.get("schedules", []):
        pipe = case.pipeline(given["scheduler_config"])
        shape = pipe.latent_shape(given["height"], given["width"])
        sigmas = pipe.sampling_sigmas(given["num_inference_steps"], shape)
        error = relative_error(sigmas, case.wanted(f"sigmas.{given['name']}"))
        yield Quantity(f"sigmas, {given['name']} steps", error, SIGMAS)


def _samples(case: EndToEndCase, pipe: Pipeline) -> Iterator[Quantity]:
    """Whole images in 8 bits from a prompt and given noise."""
    for given in case.info.get("samples", []):
        name = given["name"]
        noise, expected = case.inputs[f"noise.{name}"], case.wanted(f"image.{name}")
        own = case.pipeline(given["scheduler_config"]) if "scheduler_config" in given else pipe
        if "sampler" in given:  # a family without prompts
            step_noise = case.inputs.get(f"step_noise.{name}")
            image = own.generate(noise, given["num_inference_steps"], given["sampler"], given["eta"],
                                 lambda k, step_noise=step_noise: step_noise[k])[0]
        else:
            sigmas = last_steps(own.sampling_sigmas(given["num_inference_steps"], noise.shape[1:]),
                                given.get("denoising_strength", 1.0))
            error = relative_error(sigmas, case.wanted(f"sigmas.{name}"))
            yield Quantity(f"sigmas of image {name}", error, SIGMAS)
            # what the call of the pipeline does once it has drawn its noise
            extra = {"guidance": Tensor(np.full(1, given.get("embedded_guidance", 1.0), np.float32)),
                     "height": given["height"], "width": given["width"]}
            if "edit_image" in given:
                extra["edit_image"] = Image.open(case.folder / "images" / given["edit_image"])
            negative = {"prompt": given["negative_prompt"], **extra} if given["cfg_scale"] != 1 else None
            conditions = own.conditions({"prompt": given["prompt"], **extra}, negative)
            start = None
            if "input_image" in given:
                start = read_image(str(case.folder / "images" / given["input_image"]))
                start = scaled(start, given["height"], given["width"])
            latents = own.integrate(*conditions, own.start(start, noise, sigmas), sigmas, given["cfg_scale"])
            if f"final.{name}" in case.expected:
                error = relative_error(latents.asnumpy(), case.wanted(f"final.{name}"))
                yield Quantity(f"latents of image {name}", error, LATENTS)
            image = own.decode(latents)[0]
        yield Quantity(f"image {name}, {given['width']}x{given['height']}", _levels(np.asarray(image), expected),
                       IMAGE, unit="of 255")
