"""``ms-diffsynth convert``: a base model from its publisher's single file to diffusers' folder, and back.

Tensors are read when they are written, so one of them is in memory at a time.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import ConfigError, OutputError, WeightError, listing
from ms_diffsynth.formats.originals import in_one_file
from ms_diffsynth.formats.weights import Checkpoint, save_state_dict
from ms_diffsynth.hub.bundled import bundled
from ms_diffsynth.registry import family, family_of, interchange, interchange_tables
from ms_diffsynth.storage.files import stage_folder

KINDS = ("diffusers", "original")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where to where, and to what."""
    parser.add_argument("source", type=path_argument, metavar="IN",
                        help="single file of a model or of a whole pipeline, or a folder of diffusers'")
    parser.add_argument("output", type=path_argument, metavar="OUT", help="new folder, or with --to original new file")
    parser.add_argument("--to", required=True, choices=KINDS,
                        help="diffusers: a folder, in shards; original: one file in the publisher's names, which "
                             "ComfyUI reads")
    parser.add_argument("--family", help="where names and shapes leave it open; one of "
                                         f"{', '.join(sorted(interchange_tables()))}")


def execute(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    if args.output.exists() and not (args.to == "diffusers" and args.output.is_dir()):
        raise OutputError(f"{args.output} exists: expected a new {'folder' if args.to == 'diffusers' else 'file'}. "
                          "Choose another name, or remove it.")
    if args.to == "original" and args.output.suffix != ".safetensors":
        raise OutputError(f"{args.output}: expected a name that ends in .safetensors.")
    from ms_diffsynth.pipeline import SHARD

    pipe = _opened(args)
    store = pipe.store
    found = _models(pipe)
    lost = [c.folder for c in store.components
            if c.class_name and not c.part_of and c.name not in (*found, *store.absent)]
    _check(pipe, found, args.to)
    said = listing(found)
    if args.to == "original":
        whole = in_one_file({name: _marked(pipe, name) for name in found}, pipe.interchange)
        save_state_dict(args.output, whole)
    elif len(found) == 1:
        store.save(found[0], args.output, False, SHARD)
    elif not lost:
        pipe.save_pretrained(args.output)
        said = f"{said}, tokenizers, scheduler"
    else:
        with stage_folder(args.output) as stage:
            for name in found:
                store.save(name, Path(stage) / store.component(name).folder, False, SHARD)
        said = f"{said}; not a whole pipeline: {listing(lost)} are not in {args.source}"
    sys.stdout.write(f"{args.output}: {said}\n")
    return 0


def _opened(args: argparse.Namespace) -> Any:
    """A pipeline that knows the files, and loads none. Raises: ConfigError, WeightError."""
    path = bundled(args.source) or args.source
    if args.family and interchange(args.family) is None:
        raise ConfigError(f"family={args.family}: expected one of {', '.join(sorted(interchange_tables()))}.")
    if not path.exists():
        raise WeightError(f"{path} does not exist: expected a file or a folder of weights.")
    is_whole = path.is_dir() and (path / "model_index.json").is_file()
    names = [args.family] if args.family else [family_of(path)] if is_whole else sorted(interchange_tables())
    pipes, problems = {}, {}
    for name in names:
        try:
            pipes[name] = family(name).pipeline.from_pretrained(str(path))
        except WeightError as error:
            problems[name] = error
    if not pipes:
        raise next(iter(problems.values())) if len(names) == 1 else WeightError(
            f"{path} is a model of none of {listing(names)}. " + " ".join(f"{n}: {e}" for n, e in problems.items()))
    told = [{name: pipe.config(name) for name in _models(pipe)} for pipe in pipes.values()]
    if any(other != told[0] for other in told[1:]):
        raise ConfigError(f"{path} may be of {' or of '.join(pipes)}, which have the same names and shapes: say which, "
                          f"as in --family {next(iter(pipes))}.")
    return next(iter(pipes.values()))


def _check(pipe: Any, found: list[str], to: str) -> None:
    """Raises: WeightError for a model of which one cannot be made of the other."""
    for name in found:
        unlike = pipe.store.component(name).unlike
        if unlike and (to == "original" or unlike[0] in pipe.store.source(name).checkpoint()):
            raise WeightError(f"the {name} of {pipe.interchange.title} cannot be converted: {unlike[1]}. Give another "
                              "model, such as the transformer.")


def _marked(pipe: Any, name: str) -> Checkpoint:
    """A model's tensors, with those by which ComfyUI's files say what no other tensor tells."""
    config, marks = pipe.config(name), pipe.store.component(name).marks
    on = [mark for setting, mark in marks.items() if config.get(setting)]
    return pipe.store.source(name).checkpoint().with_arrays({mark: np.zeros(0, np.float32) for mark in on})


def _models(pipe: Any) -> list[str]:
    """The models that there are files of, in the pipeline's order; parts of others are in the files of those."""
    return [c.name for c in pipe.store.components
            if c.name in pipe.store.sources and not c.is_tokenizer and not c.part_of]
