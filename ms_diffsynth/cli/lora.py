"""``ms-diffsynth lora``: look at LoRA files, and make others of them. Needs neither MindSpore nor the base model."""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from ms_diffsynth.config.flags import path_and_factor, path_argument
from ms_diffsynth.errors import ConfigError, OutputError, WeightError, listing, nearest
from ms_diffsynth.formats.adapters import MAGNITUDE, READ
from ms_diffsynth.formats.interchange import LAYOUTS, Table
from ms_diffsynth.formats.lora import (
    AdapterFile,
    families_of,
    load_adapters,
    metadata_of,
    models_in,
    save_adapters,
    unmatched,
)
from ms_diffsynth.formats.low_rank import extracted, merge_into, merged, norm_of, resized
from ms_diffsynth.formats.weights import open_checkpoint
from ms_diffsynth.registry import FAMILIES, interchange, interchange_tables

KEPT = re.compile(r"(ms_diffsynth|modelspec|ss|sshs)[._]")  # of a header, what is still true in another layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Five actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    family = argparse.ArgumentParser(add_help=False)
    family.add_argument("--family", help="where names leave it open; one of "
                                         f"{', '.join(name for name in sorted(FAMILIES) if interchange(name))}")
    layout = argparse.ArgumentParser(add_help=False)
    layout.add_argument("--to", metavar="LAYOUT", help=f"layout of the names: {', '.join(LAYOUTS)} (default: the "
                                                       "family's, which most programs read)")

    convert = actions.add_parser("convert", parents=[family, layout], help="write a LoRA with other names")
    convert.add_argument("file", type=path_argument, metavar="IN", help="LoRA of any layout, or a folder of peft's")
    convert.add_argument("output", type=path_argument, metavar="OUT",
                         help="new file, or a folder: it is named after the run there")
    inspect = actions.add_parser("inspect", parents=[family], help="print family, layout, ranks, scales and norms")
    inspect.add_argument("file", type=path_argument, metavar="FILE")
    inspect.add_argument("--model", type=path_argument, help="folder of the base model: are its layers those?")
    merge = actions.add_parser("merge", parents=[family, layout], help="several LoRAs into one, or into a base")
    merge.add_argument("files", nargs="+", type=path_and_factor, metavar="FILE[:FACTOR]")
    merge.add_argument("--output", required=True, type=path_argument, metavar="OUT",
                       help="new file; with --base a folder")
    merge.add_argument("--base", type=path_argument, help="folder of a diffusers-format model, which gets them")
    merge.add_argument("--rank", type=int, help="of the result (default: the sum of all ranks, exact)")
    extract = actions.add_parser("extract", parents=[family, layout], help="the difference of two models as a LoRA")
    extract.add_argument("base", type=path_argument, metavar="BASE", help="weights before: a folder or a file")
    extract.add_argument("tuned", type=path_argument, metavar="TUNED", help="weights after")
    extract.add_argument("output", type=path_argument, metavar="OUT")
    extract.add_argument("--rank", type=int, default=32, help="(default: 32)")
    resize = actions.add_parser("resize", parents=[family, layout], help="a LoRA of another rank")
    resize.add_argument("file", type=path_argument, metavar="IN", help="also a LoKr, a LoHa or a weight change")
    resize.add_argument("output", type=path_argument, metavar="OUT")
    resize.add_argument("--rank", type=int, required=True)


def execute(args: argparse.Namespace) -> int:
    """Run one action."""
    if (rank := getattr(args, "rank", None)) is not None and not 1 <= rank <= 65536:
        raise ConfigError(f"rank={rank}: expected 1 <= rank <= 65536.")
    if (to := getattr(args, "to", None)) is not None and to not in LAYOUTS:
        raise ConfigError(f"to={to}: expected one of {', '.join(LAYOUTS)}.{nearest(to, LAYOUTS)}")
    return {"convert": _convert, "inspect": _inspect, "merge": _merge, "extract": _extract,
            "resize": _resize}[args.action](args)


def _convert(args: argparse.Namespace) -> int:
    table, files = _read(args.file, args.family)
    return _write(args, files, table, args.file)


def _inspect(args: argparse.Namespace) -> int:
    name, table = _family(args.file, args.family)
    header, models = metadata_of(args.file), models_in(args.file, table)
    known = dict.fromkeys(models)
    if args.model:
        known = {model: _layers(args.model, table, model) for model in models}
    files = load_adapters(args.file, known, READ, table)
    out = [f"{args.file}: {table.title} ({name})"]
    for model, file in files.items():
        ranks = Counter(kind.rank(parts) for parts, kind in
                        ((file.modules[m], file.formats[m]) for m in file.modules) if kind.gathered is None)
        out.append(f"{model}: {len(file.modules)} layers, {file.name}, layout {file.layout}")
        if ranks:
            out.append(f"  ranks {_counted(ranks)}; alpha / rank {_counted(Counter(file.scales.values()))}")
        if args.model:
            out.append(f"  {len(file.modules)} layers of the file and {len(known[model])} of {args.model}: all of the "
                       f"file's are there")
        for module, parts in file.modules.items():
            extra = " with magnitudes" if MAGNITUDE in parts else ""
            norm = norm_of(file.formats[module], parts, file.scales[module])
            out.append(f"  {norm:10.4g}  {module}{extra}")
        out += [f"  bias        {module}" for module in file.biases]
    out += [f"{key} = {value}" for key, value in sorted(header.items()) if KEPT.match(key)]
    sys.stdout.write("\n".join(out) + "\n")
    return 0


def _counted(values: Counter) -> str:
    return listing(f"{value:g}" + (f" ({count})" if len(values) > 1 else "") for value, count in values.most_common())


def _merge(args: argparse.Namespace) -> int:
    paths, factors = zip(*args.files)
    table, first = _read(paths[0], args.family)
    every = [first, *(_read(path, args.family, table)[1] for path in paths[1:])]
    models = list(dict.fromkeys(model for files in every for model in files))
    own = {model: [(files[model], factor) for files, factor in zip(every, factors) if model in files]
           for model in models}
    if not args.base:
        files = {model: merged(*zip(*pairs)) for model, pairs in own.items()}
        if args.rank:
            files = {model: resized(file, args.rank)[0] for model, file in files.items()}
        return _write(args, files, table, paths[0])
    if args.rank or args.to:
        raise ConfigError("--base with --rank or --to, which say how a LoRA is written: expected one or the other.")
    folders = {model: _component(args.base, table, model) for model in models}
    if len(models) > 1 and args.output.exists():
        raise OutputError(f"{args.output} exists: expected a new folder. Choose another one.")
    for model, pairs in own.items():
        target = args.output / folders[model].name if len(models) > 1 else args.output
        count = merge_into(folders[model], target, *zip(*pairs))
        sys.stdout.write(f"{target}: {count} layers changed\n")
    return 0


def _extract(args: argparse.Namespace) -> int:
    base, tuned = (open_checkpoint(path) for path in (args.base, args.tuned))
    modules = [name.removesuffix(".weight") for name in base.shapes if name.endswith(".weight")]
    fitting = {name: sum(table.models[table.network].place(m, "diffusers") is not None for m in modules)
               for name, table in interchange_tables().items()}
    name = args.family or max(fitting, key=fitting.get)
    table = _table(name)
    if not fitting.get(name):
        raise WeightError(f"{args.base} has no layers of {table.title}: expected its network, in diffusers' names.")
    names = table.models[table.network]
    file, lost, others = extracted(base, tuned, args.rank, lambda m: names.place(m, "diffusers") is not None)
    if others:
        sys.stderr.write(f"{len(others)} tensors that differ are of no linear layer, and are left out: "
                         f"{listing(others)}\n")
    sys.stderr.write(_lost(lost))
    return _write(args, {table.network: file}, table, None)


def _resize(args: argparse.Namespace) -> int:
    table, files = _read(args.file, args.family)
    small, lost = {}, {}
    for model, file in files.items():
        small[model], own = resized(file, args.rank)
        lost |= own
    sys.stderr.write(_lost(lost))
    return _write(args, small, table, args.file)


def _lost(lost: dict[str, float]) -> str:
    worst = sorted(lost, key=lost.get, reverse=True)[:3]
    return f"{len(lost)} layers; lost of the change, at most: {listing(f'{lost[m]:.2g} of {m}' for m in worst)}\n"


# -- files -------------------------------------------------------------------------------------------------------------


def _table(name: str) -> Table:
    table = interchange(name)
    if table is None:
        known = sorted(interchange_tables())
        raise ConfigError(f"family={name}: expected one of {', '.join(known)}, whose names others know."
                          f"{nearest(name, known)}")
    return table


def _family(path: Path, given: str | None) -> tuple[str, Table]:
    """The family that a file is of: as said, or that which knows all of its names. Raises: ConfigError, WeightError."""
    if given:
        return given, _table(given)
    tables = interchange_tables()
    found = families_of(path, tables)
    if not found:
        best = min(tables.values(), key=lambda table: len(unmatched(path, table)))
        load_adapters(path, dict.fromkeys(models_in(path, best)), READ, best)  # says what is wrong
    if len(found) > 1:
        raise ConfigError(f"{path}: its names are those of {' and of '.join(found)}: say which, as in --family "
                          f"{found[0]}.")
    return found[0], tables[found[0]]


def _read(path: Path, family: str | None, table: Table | None = None) -> tuple[Table, dict[str, AdapterFile]]:
    table = table or _family(path, family)[1]
    return table, load_adapters(path, dict.fromkeys(models_in(path, table)), READ, table)


def _component(base: Path, table: Table, model: str) -> Path:
    """The folder of a model in one of diffusers' format, or the folder itself."""
    name = table.models[model].prefixes["diffusers"].rstrip(".")
    return base / name if (base / name).is_dir() else base


def _layers(base: Path, table: Table, model: str) -> list[str]:
    shapes = open_checkpoint(_component(base, table, model)).shapes
    return [name.removesuffix(".weight") for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2]


def _write(args: argparse.Namespace, files: dict[str, AdapterFile], table: Table, source: Path | None) -> int:
    header = {k: v for k, v in (metadata_of(source) if source else {}).items() if KEPT.match(k)}
    layout = args.to or table.default
    if layout == "kohya" and table.kohya_module:
        header["ss_network_module"] = table.kohya_module
    path = args.output
    if path.is_dir():
        path = path / f"{_name(source, header)}.safetensors"
    if path.exists():
        raise OutputError(f"{path} exists: expected a new file. Choose another name, or remove it.")
    if path.suffix != ".safetensors":
        raise OutputError(f"{path}: expected a name that ends in .safetensors.")
    save_adapters(path, files, table, layout, header)
    layers = sum(len(file.modules) for file in files.values())
    sys.stdout.write(f"{path}: {layers} layers, layout {layout}: {LAYOUTS[layout]}\n")
    return 0


def _name(source: Path | None, header: dict[str, str]) -> str:
    """``<run>-step-000072``: a file that leaves its run's folder says which it is from."""
    stem = source.stem if source else "extracted"
    run = re.sub(r"[^\w.-]+", "-", header.get("ss_output_name", ""))
    found = re.fullmatch(r"(step|epoch)-(\d+)(-ema)?", stem)
    return f"{run}-{found[1]}-{int(found[2]):06d}{found[3] or ''}" if run and found else stem
