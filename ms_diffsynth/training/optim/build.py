"""The optimizer of a run, by its name and settings: `registry.OPTIMIZERS` says where each is."""
from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from mindspore import Parameter

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, nearest
from ms_diffsynth.registry import OPTIMIZERS, entry
from ms_diffsynth.training.optim.contract import Optimizer
from ms_diffsynth.training.optim.sharded import Float32Weights, Sharded, needs_float32

# settings that are documented under these names, and what optimizers call them
ADAM = {"adam_beta1": ("beta1", 0.9), "adam_beta2": ("beta2", 0.999), "adam_epsilon": ("epsilon", 1e-8)}


def optimizer_class(name: str) -> Any:
    """The class called ``name`` in the registry. Raises: ConfigError naming the nearest one and all of them."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer='{name}' is unknown: expected one of {', '.join(sorted(OPTIMIZERS))}."
                          f"{nearest(name, OPTIMIZERS)}")
    return entry(OPTIMIZERS[name].where)


def arguments_of(name: str) -> dict[str, Any]:
    """What ``optimizer_args`` may set for this optimizer, with the defaults: numbers, true or false."""
    parameters = inspect.signature(optimizer_class(name).from_settings).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def optimizer_arguments(options: Any) -> dict[str, Any]:
    """The arguments that ``optimizer_args`` and the settings called ``adam_...`` give the optimizer.

    Args:
        options: has ``optimizer``, ``optimizer_args`` (texts such as ``d_coef=2``) and the names in `ADAM`.

    Raises: ConfigError listing what the optimizer does not have, what is not a value, and what is set twice.
    """
    known, values, wrong = arguments_of(options.optimizer), {}, []
    for text in options.optimizer_args:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in known:
            wrong.append(f"optimizer_args: '{name}' is none of optimizer={options.optimizer}: it has "
                         f"{', '.join(known)}.{nearest(name, known)}")
        elif name in values:
            wrong.append(f"optimizer_args: '{name}' is set twice: remove one.")
        else:
            try:
                values[name] = _parsed(value, type(known[name]))
            except ValueError as error:
                wrong.append(f"optimizer_args: {name}={value}: expected {error}, such as {name}={known[name]}.")
    for setting, (name, default) in ADAM.items():
        value = getattr(options, setting)
        if value != default and name not in known:
            wrong.append(f"{setting}={value} would not be used: optimizer={options.optimizer} has no {name}.")
        elif value != default and name in values:
            wrong.append(f"{setting}={value} and {name} in optimizer_args are the same setting: remove one.")
        elif name in known:
            values.setdefault(name, value)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return values


def build_optimizer(options: Any, parameters: Sequence[Parameter]) -> Optimizer:
    """The optimizer that the options ask for, divided among the ranks or with float32 weights where that is needed.

    Args:
        options: has ``learning_rate``, ``weight_decay``, ``zero_stage``, and what `optimizer_arguments` reads.

    Raises: ConfigError for impossible settings, and for zero_stage with an optimizer that needs weights whole.
    """
    kind, parameters = optimizer_class(options.optimizer), list(parameters)
    build = partial(kind.from_settings, learning_rate=options.learning_rate, weight_decay=options.weight_decay,
                    **optimizer_arguments(options))
    is_rounded = needs_float32(parameters)
    if (options.zero_stage and runtime.current().world_size > 1) or (is_rounded and kind.is_elementwise):
        return Sharded(build, parameters, max(options.zero_stage, 1))
    return Float32Weights(build, parameters) if is_rounded else build(parameters)


def _parsed(text: str, kind: type) -> float | bool:
    """A number, true or false. Raises: ValueError saying what was expected."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        value = kind(text)
        is_number = abs(value) < (1 << 31 if kind is int else 1e38)  # NaN is not below
    except ValueError:
        is_number = False
    if not is_number:
        raise ValueError("a number")
    return value
