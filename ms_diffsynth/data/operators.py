"""Operators turn a cell of metadata into what the pipeline takes. They compose: ``ToAbsolutePath(b) >> LoadImage()``.

Source: the operators of DiffSynth-Studio 2.1.12 (``diffsynth.core.data.operators``), those for text and images.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..errors import ConfigError, DataError
from .images import read_image
from .paths import resolve

_FRAMING = "ms_diffsynth framing"  # of a Pillow image's ``info``, which its copies keep


class DataProcessingOperator:
    """A function of one cell. Subclasses define ``__call__``; ``a >> b`` does a, then b.

    ``not_described``: its settings that do not shape what it gives; see `describe`.
    """

    not_described: tuple[str, ...] = ()

    def __call__(self, data: Any) -> Any:
        raise TypeError(f"{type(self).__name__} does not define __call__(self, data): implement it.")

    def __rshift__(self, other: Callable[[Any], Any]) -> DataProcessingPipeline:
        return DataProcessingPipeline([*_steps(self), *_steps(other)])


class DataProcessingPipeline(DataProcessingOperator):
    """Several operators, one after the other."""

    def __init__(self, operators: Sequence[Callable[[Any], Any]] = ()):
        self.operators = list(operators)

    def __call__(self, data: Any) -> Any:
        for operator in self.operators:
            data = operator(data)
        return data


def _steps(operator: Callable[[Any], Any]) -> list[Callable[[Any], Any]]:
    return operator.operators if isinstance(operator, DataProcessingPipeline) else [operator]


class ToInt(DataProcessingOperator):
    """The cell as an integer."""

    def __call__(self, data: Any) -> int:
        try:
            return int(data)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{data!r} is not an integer; expected digits such as 12. Correct the cell") from None


class ToFloat(DataProcessingOperator):
    """The cell as a number."""

    def __call__(self, data: Any) -> float:
        try:
            return float(data)
        except (TypeError, ValueError, OverflowError):
            raise DataError(f"{data!r} is not a number; expected digits such as 0.5. Correct the cell") from None


class ToStr(DataProcessingOperator):
    """The cell as text; None becomes ``none_value``."""

    def __init__(self, none_value: str = ""):
        self.none_value = none_value

    def __call__(self, data: Any) -> str:
        return self.none_value if data is None else str(data)


class ToList(DataProcessingOperator):
    """The cell as a list of one."""

    def __call__(self, data: Any) -> list:
        return [data]


class ToAbsolutePath(DataProcessingOperator):
    """The path of a file below ``base_path``. Raises: DataError when it leaves that folder; see ``paths.resolve``."""

    not_described = ("base_path", "allow_outside_base")

    def __init__(self, base_path: str = "", allow_outside_base: bool = False):
        self.base_path = os.fspath(base_path)
        self.allow_outside_base = allow_outside_base

    def __call__(self, data: str) -> str:
        return resolve(self.base_path, data, self.allow_outside_base)


class LoadImage(DataProcessingOperator):
    """The upright image of a file; what is refused, and how modes are converted: :func:`images.read_image`.

    ``convert_RGBA`` keeps transparency and goes before ``convert_RGB``; with neither the mode of the file stays.
    """

    def __init__(self, convert_RGB: bool = True, convert_RGBA: bool = False):
        self.mode = "RGBA" if convert_RGBA else "RGB" if convert_RGB else None

    def __call__(self, data: str) -> Image.Image:
        return read_image(data, self.mode)


class Framing(NamedTuple):
    """What of an image was kept: its own size, and where the kept part begins in what it was scaled to; pixels."""

    height: int
    width: int
    top: int
    left: int


def framing(image: Image.Image) -> Framing:
    """Of an image that `crop_and_resize` made how that was done; any other image is all of itself."""
    found = image.info.get(_FRAMING)
    return found if isinstance(found, Framing) else Framing(image.height, image.width, 0, 0)


def crop_and_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bilinear, keeping the aspect ratio) until the image covers height x width, and crop its centre.

    The result knows its `framing`.
    """
    own = image.size
    scale = max(width / image.width, height / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    image.info[_FRAMING] = Framing(own[1], own[0], top, left)
    return image


class ImageCropAndResize(DataProcessingOperator):
    """Bring an image to height x width pixels; without them, to its own size.

    Its own size is scaled down to at most ``max_pixels`` and then rounded down to multiples of the two factors.
    """

    def __init__(
        self,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | None = 1920 * 1080,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
    ):
        if (height is None) != (width is None):
            raise ConfigError(f"height={height} and width={width}: expected both or neither. Set the other one too")
        for name, size, factor in (
            ("height", height, height_division_factor), ("width", width, width_division_factor),
        ):
            if size is not None and (size <= 0 or size % factor):
                near = max(factor, round(size / factor) * factor)
                raise ConfigError(f"{name}={size}: expected a positive multiple of {factor}. Did you mean {near}?")
        self.height, self.width, self.max_pixels = height, width, max_pixels
        self.height_division_factor, self.width_division_factor = height_division_factor, width_division_factor

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels that an image of width x height is brought to."""
        if self.height is not None:
            return self.height, self.width
        goal = width, height
        if self.max_pixels is not None and width * height > self.max_pixels:
            scale = (width * height / self.max_pixels) ** 0.5
            goal = int(width / scale), int(height / scale)
        down, across = self.height_division_factor, self.width_division_factor
        target = goal[1] // down * down, goal[0] // across * across
        if not all(target):
            raise DataError(
                f"an image of {width}x{height} pixels becomes {goal[0]}x{goal[1]} under max_pixels={self.max_pixels}, "
                f"less than the division factors {across}x{down}. "
                "Raise max_pixels, or remove the image"
            )
        return target

    def __call__(self, data: Image.Image) -> Image.Image:
        return crop_and_resize(data, *self.target_size(*data.size))


class SequentialProcess(DataProcessingOperator):
    """Apply one operator to every element of a list."""

    def __init__(self, operator: Callable[[Any], Any]):
        self.operator = operator

    def __call__(self, data: Sequence) -> list:
        return [self.operator(element) for element in data]


class RouteByType(DataProcessingOperator):
    """The first operator of ``operator_map`` whose type fits the cell; the type None fits everything."""

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable[[Any], Any]]]):
        self.operator_map = list(operator_map)

    def __call__(self, data: Any) -> Any:
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator(data)
        known = ", ".join(kind.__name__ for kind, _ in self.operator_map)
        raise DataError(f"{data!r} is of type {type(data).__name__}; expected {known}. Correct the cell")


class RouteByExtensionName(DataProcessingOperator):
    """The first operator of ``operator_map`` whose extensions, such as ("jpg", "png"), hold that of the file name."""

    def __init__(self, operator_map: Sequence[tuple[Sequence[str] | None, Callable[[Any], Any]]]):
        self.operator_map = [
            (None if names is None else tuple(n.lower().lstrip(".") for n in names), operator)
            for names, operator in operator_map
        ]

    def __call__(self, data: str) -> Any:
        extension = os.path.splitext(data)[1].lower().lstrip(".")
        for names, operator in self.operator_map:
            if names is None or extension in names:
                return operator(data)
        known = ", ".join(name for names, _ in self.operator_map for name in names)
        raise DataError(f"{data} has the extension '{extension}'; expected one of {known}. Convert or rename the file")


def size_after(operator: Callable[[Any], Any], cell: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """(height, width) of the image that an operator makes of a cell, which names one of ``size``, the same way round.

    None where only the operator knows: one of your own without ``target_size(width, height)``.
    """
    if isinstance(operator, RouteByType):
        operator = next((route for kind, route in operator.operator_map if kind is None or isinstance(cell, kind)),
                        None)
    is_loaded = False
    for step in _steps(operator):
        if isinstance(step, (ToAbsolutePath, LoadImage)):
            is_loaded |= isinstance(step, LoadImage)
        elif is_loaded and hasattr(step, "target_size"):
            size = step.target_size(size[1], size[0])
        else:
            return None
    return size if is_loaded else None


def describe(value: Any) -> Any:
    """An operator as a JSON value: its settings by the name of its class, so that equal ones are described the same.

    Steps of a pipeline stand beside each other; a function is its qualified name. What is ``not_described``, such
    as where the data lie, is left out, and so is the route of lists when it does to each element what is done to a
    single one.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(element) for element in value]
    if isinstance(value, dict):
        return {str(key): describe(element) for key, element in value.items()}
    if hasattr(value, "__qualname__"):  # a class or a function
        return value.__qualname__
    if isinstance(value, DataProcessingPipeline):
        steps = [describe(operator) for operator in value.operators]
        names = [name for step in steps if isinstance(step, dict) for name in step]
        is_plain = len(set(names)) == len(steps) == len(names)
        return {name: settings for step in steps for name, settings in step.items()} if is_plain else steps
    if isinstance(value, RouteByType):
        first = value.operator_map[0][1] if value.operator_map else None
        routes = [(kind, operator) for kind, operator in value.operator_map
                  if not (kind is list and isinstance(operator, SequentialProcess) and operator.operator is first)]
        return describe(first) if len(routes) == 1 else [[describe(kind), describe(op)] for kind, op in routes]
    hidden = ("not_described", *getattr(value, "not_described", ()))
    settings = {key: describe(element) for key, element in sorted(vars(value).items()) if key not in hidden}
    return {type(value).__qualname__: settings}
