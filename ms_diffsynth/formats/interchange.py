"""How other programs call the layers of a model: one table for each family, read in both directions.

A table is ``interchange.yaml`` beside a family's pipeline. It says what each model's names begin with in files of
adapters, and what its layers are called, in columns: ``diffusers`` (the names of this package), ``original`` (the
publisher's, which ComfyUI and kohya's scripts use), and others where a program has its own. Where one layer of theirs
is several of diffusers', a row names them in the order of their rows. ``N`` stands for a number.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ms_diffsynth.errors import ConfigError, WeightError, listing, nearest

DIFFUSERS, ORIGINAL = "diffusers", "original"
LAYOUTS = {  # what a file can be written as -> in words
    "diffusers": "diffusers and peft", "comfy": "ComfyUI and ai-toolkit",
    "kohya": "kohya's sd-scripts and musubi-tuner", "diffsynth": "DiffSynth-Studio",
}
# what the names of a network begin with, whoever wrote them; a name may also begin with nothing
DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")  # dots are underscores behind these
FACTS = ("rows", "each", "swap", "weight", "bias", "ratio", "convolution")  # what a row of a table says besides names


@dataclass(frozen=True, eq=False)
class Row:
    """One layer of somebody's that is one of diffusers', or several.

    Attributes:
        members: diffusers' names, in the order of their rows.
        names: column -> the name there.
        shares: of each member, in rows.
        is_swapped: its two halves are in the other order in the other columns (a scale and a shift).
        is_of_two: that holds where its weight is two squares; in other blocks it has more, in one order everywhere.
        weight, bias: what these are called in the other columns.
        is_same: its name is that of diffusers everywhere.
        ratio: rows to columns of its weight, where that tells the family from another of the same names.
        is_convolution: it is a convolution of 1 x 1 in the other columns.
    """

    members: tuple[str, ...]
    names: Mapping[str, str]
    shares: tuple[int, ...]
    is_swapped: bool = False
    weight: str = "weight"
    bias: str = "bias"
    is_same: bool = False
    ratio: int | None = None
    is_convolution: bool = False
    is_of_two: bool = False

    def part(self, name: str) -> str:
        """The weight or bias of this package that is called ``name`` in the other columns, and the other way round."""
        names = {self.weight: "weight", self.bias: "bias", "weight": self.weight, "bias": self.bias}
        return names.get(name, name)

    def swaps(self, shape: Sequence[int] | None) -> bool:
        """Whether the halves of a layer are in the other order there; ``shape`` is that of its weight, if it is known.

        Raises: WeightError where that depends on a weight that is not there.
        """
        if self.is_swapped and self.is_of_two and shape is None:
            raise WeightError(f"{self.members[0]} without its weight, whose shape tells the order of its halves: "
                              "expected both")
        return self.is_swapped and (not self.is_of_two or shape[0] == 2 * shape[1])

    def sizes(self, rows: int) -> list[int] | None:
        """Rows of each member of a layer with so many; None when they cannot be divided like this."""
        unit, rest = divmod(rows, sum(self.shares))
        return None if rest else [unit * share for share in self.shares]


class Found(NamedTuple):
    """What a name means: modules, as diffusers calls them; the row of another name; the column of that."""

    modules: tuple[str, ...]
    row: Row | None
    column: str


@dataclass(frozen=True)
class Model:
    """The names of one model.

    Attributes:
        prefixes: layout -> what its names begin with: ``transformer.`` or, where dots are underscores, ``lora_unet_``.
        also: further beginnings of its names.
        rows: of its layers; without any, modules keep the names they have.
        tensors: diffusers' names of tensors that are in no layer -> the publisher's; patterns with N too.
        transposed: those of them that the publisher has transposed.
        column: that of the publisher's names in its files of models.
        versions: other columns of them -> a tensor, in diffusers' names, that models with names of that column alone
            have; what that column does not name is as in ``column``.
        alone, whole: what its names begin with in the publisher's file of this model, and in one of a whole pipeline;
            None where there are no such files.
    """

    prefixes: Mapping[str, str]
    also: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    column: str = ORIGINAL
    versions: Mapping[str, str] = field(default_factory=dict)
    alone: str = ""
    whole: str | None = None

    def find(self, name: str, is_flat: bool) -> list[Found]:
        """What ``name``, without its beginning, can mean."""
        found: dict[tuple[str, ...], Found] = {}
        for row in self.rows:
            for member in row.members:
                if numbers := _numbers(member, name, is_flat):
                    found.setdefault(one := (fill(member, numbers),), Found(one, None, DIFFUSERS))
            for column, pattern in row.names.items():
                if numbers := _numbers(pattern, name, is_flat):
                    modules = tuple(fill(member, numbers) for member in row.members)
                    found.setdefault(modules, Found(modules, row, column))
        return list(found.values())

    def tensor(self, name: str, is_ours: bool) -> str | None:
        """The publisher's name of a tensor that is in no layer, from diffusers' (``is_ours``) or the reverse; None for
        others."""
        for ours, theirs in self.tensors.items():
            pattern, other = (ours, theirs) if is_ours else (theirs, ours)
            if numbers := _numbers(pattern, name, False):
                return fill(other, numbers)
        return None

    def columns_of(self, tensors: Collection[str]) -> tuple[str, ...]:
        """The columns of the publisher's names for a model with these tensors, the first that has a name counts."""
        return (*(column for column, told_by in self.versions.items() if told_by in tensors), self.column)

    def place(self, module: str, column: str) -> tuple[str, Row | None, tuple[str, ...]] | None:
        """Where a module is in a column: the name there, its row, and all modules of the row; None for nowhere."""
        known = None if self.rows else module
        for row in self.rows:
            for member in row.members:
                if numbers := _numbers(member, module, False):
                    if column in row.names:
                        modules = tuple(fill(m, numbers) for m in row.members)
                        return fill(row.names[column], numbers), row, modules
                    known = known or (module if column == DIFFUSERS or row.is_same else None)
        return (known, None, (module,)) if known else None


@dataclass(frozen=True)
class Table:
    """The names of a family's models, its network first.

    Attributes:
        title: of the family, for messages.
        default: the layout that its files are saved in: that which most programs read (docs/reference/interchange.md).
        columns: layout -> the column of its names.
        with_alpha: layouts whose files have lora_down, lora_up and alpha; others have A and B, with the scale in B.
        architecture, base_version, kohya_module: what modelspec and kohya call the family in headers.
    """

    models: Mapping[str, Model] = field(default_factory=lambda: {"": Model({DIFFUSERS: ""})})
    title: str = "this model"
    default: str = DIFFUSERS
    columns: Mapping[str, str] = field(default_factory=lambda: {DIFFUSERS: DIFFUSERS})
    with_alpha: tuple[str, ...] = ("kohya",)
    architecture: str = ""
    base_version: str = ""
    kohya_module: str = ""

    @property
    def network(self) -> str:
        """The model whose names may begin with nothing."""
        return next(iter(self.models))

    @cached_property
    def beginnings(self) -> list[tuple[str, str, bool]]:
        """Each beginning of a name, its model, and whether dots are underscores behind it; the longest first."""
        found = {(prefix, name) for name, model in self.models.items() for prefix in (*model.prefixes.values(),
                                                                                     *model.also)}
        found |= {(prefix, self.network) for prefix in (*DOTTED, *FLAT)}
        others = {prefix for prefix, name in found if name != self.network}
        found -= {(prefix, self.network) for prefix in others}
        return [(prefix, name, prefix.endswith("_")) for prefix, name in sorted(found, key=lambda f: (-len(f[0]), f))]

    def split(self, stem: str) -> tuple[str, str, str, bool]:
        """A name as its model, its beginning, the rest, and whether dots are underscores in it."""
        return next((model, prefix, stem.removeprefix(prefix), is_flat) for prefix, model, is_flat in self.beginnings
                    if stem.startswith(prefix))

    @classmethod
    def of(cls, prefixes: Mapping[str, str]) -> Table:
        """Of a family without other names: model -> what its names begin with."""
        return cls({name: Model({DIFFUSERS: f"{prefix}."}) for name, prefix in prefixes.items()})


@lru_cache
def read_table(file: Path) -> Table:
    """The table in a file ``interchange.yaml``.

    Raises: ConfigError for a row that says nothing about names, which it names with its file.
    """
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    models = {}
    for name, model in data["models"].items():
        column, versions = model.get("column", ORIGINAL), model.get("versions", {})
        columns = {DIFFUSERS, column, *versions, *data["layouts"].values(), *data.get("only_read", ())}
        rows = _rows_of(file, f"models.{name}.layers", model.get("layers", ()), columns)
        if "shared" in model:  # what several families have
            shared = file.parent / model["shared"]
            rows += _rows_of(shared.resolve(), "it", yaml.safe_load(shared.read_text(encoding="utf-8")), columns)
        models[name] = Model(dict(model["begins"]), tuple(model.get("also", ())), tuple(rows), model.get("tensors", {}),
                             tuple(model.get("transposed", ())), column, versions, model.get("alone", ""),
                             model.get("whole"))
    return Table(models, data["title"], data["default"], data["layouts"], tuple(data.get("with_alpha", ("kohya",))),
                 data["architecture"], data["base_version"], data.get("kohya_module", ""))


def _rows_of(file: Path, place: str, layers: Any, columns: Collection[str]) -> list[Row]:
    """Raises: ConfigError, which says where."""
    if not isinstance(layers, (list, tuple)):
        raise ConfigError(f"{file}: {place} is {layers!r}: expected a list of rows.")
    rows: list[Row] = []
    for k, item in enumerate(layers, 1):
        try:
            rows += _rows(item, columns)
        except ConfigError as error:
            raise ConfigError(f"{file}: row {k} of {place}, {item!r}: {error}") from None
    return rows


def _rows(item: Any, columns: Collection[str]) -> Iterator[Row]:
    """The rows of one item of a table. Raises: ConfigError."""
    if isinstance(item, str):  # the same everywhere
        yield from (Row((name,), {}, (1,), is_same=True) for name in _names(item))
        return
    if not isinstance(item, dict):
        raise ConfigError("expected a name, or names by column.")
    if "within" in item:  # the same layers in several places: diffusers' name of each, and that of all others
        if not isinstance(item["within"], dict) or not isinstance(item.get("layers"), list):
            raise ConfigError("expected within, diffusers' name of each place: that of all others, and layers, a list.")
        for here, there in item["within"].items():
            for layer in item["layers"]:
                names = layer if isinstance(layer, dict) else {"each": True, DIFFUSERS: layer, ORIGINAL: layer}
                yield from _rows({key: f"{here if key.startswith(DIFFUSERS) else there}.{name}"
                                  if isinstance(name, str) else name for key, name in names.items()}, columns)
        return
    if unknown := item.keys() - {*columns, *FACTS}:
        word = min(unknown)
        raise ConfigError(f"'{word}' is no column of this table: expected one of {listing(sorted(columns))}, or of "
                          f"{listing(FACTS)}.{nearest(word, [*columns, *FACTS])}")
    if len(item.keys() & columns) < 2 or DIFFUSERS not in item:
        raise ConfigError(f"expected a name in the column {DIFFUSERS}, and one in another.")
    if item.get("swap", False) not in (True, False, "two squares"):
        raise ConfigError(f"swap is {item['swap']!r}: expected true, or 'two squares'.")
    members = _names(item[DIFFUSERS])
    facts = {"is_swapped": bool(item.get("swap")), "is_of_two": item.get("swap") == "two squares",
             "weight": item.get("weight", "weight"), "bias": item.get("bias", "bias"),
             "ratio": item.get("ratio"), "is_convolution": item.get("convolution", False)}
    others = {column: _names(text) for column, text in item.items() if column not in (DIFFUSERS, *FACTS)}
    expected = len(members) if item.get("each") else 1
    shares = tuple(item.get("rows", (1,) * len(members)))
    for column, names in others.items():
        if len(names) != expected:
            raise ConfigError(f"{column} has {len(names)} names: expected {expected}, "
                              f"{'one for each' if item.get('each') else 'one for all'} of diffusers' {len(members)}.")
    if len(shares) != len(members):
        raise ConfigError(f"rows has {len(shares)} numbers: expected one for each of diffusers' {len(members)} names.")
    if odd := {n for n in (*members, *itertools.chain(*others.values())) if _count(n) != _count(members[0])}:
        raise ConfigError(f"{listing(sorted(odd))}: expected {_count(members[0])} N, as in {members[0]}.")
    if item.get("each"):  # one row a member
        for k, member in enumerate(members):
            yield Row((member,), {column: names[k] for column, names in others.items()}, (1,), **facts)
        return
    yield Row(tuple(members), {column: names[0] for column, names in others.items()}, shares, **facts)


def _names(template: Any) -> list[str]:
    """The names that a template stands for. Raises: ConfigError for one that is none."""
    is_text = isinstance(template, str) and re.fullmatch(r"(?:[\w.-]|\{[\w.-]+(?:,[\w.-]+)*\})+", template)
    names = list(expand(template)) if is_text else []
    if not names or not all(re.fullmatch(r"[\w-]+(?:\.[\w-]+)*", name) for name in names):
        raise ConfigError(f"{template!r} is no template: expected words with dots between them, N for a number, and "
                          "{a,b} for one of several, such as blocks.N.attn.{to_q,to_k}.")
    return names


def _count(name: str) -> int:
    return name.split(".").count("N")


def expand(text: str) -> Iterable[str]:
    """``a.{b,c}`` as ``a.b`` and ``a.c``."""
    parts = [part.split(",") for part in re.split(r"[{}]", text)]
    return map("".join, itertools.product(*parts))


def fill(pattern: str, numbers: Sequence[str]) -> str:
    """A pattern with numbers in place of its N."""
    left = iter(numbers)
    return ".".join(next(left) if part == "N" else part for part in pattern.split("."))


def _numbers(pattern: str, name: str, is_flat: bool) -> tuple[str, ...] | None:
    """The numbers for which ``pattern`` is ``name``, at least an empty text; None when it is not."""
    found = _regex(pattern, is_flat).fullmatch(name)
    return None if found is None else found.groups() or ("",)


@cache
def _regex(pattern: str, is_flat: bool) -> re.Pattern[str]:
    return re.compile(("_" if is_flat else r"\.").join(r"(\d+)" if part == "N" else re.escape(part)
                                                        for part in pattern.split(".")))
