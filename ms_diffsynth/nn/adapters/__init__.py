"""Adapters: a few trained tensors beside frozen linear layers. One contract (`contract.Adapter`), one registry.

A new adapter is one file here, which derives from `linear.LinearAdapter`, and one line in ``ADAPTERS``; how it is
injected, trained, saved, read, resumed and fused then follows: docs/contributing/extending.md has an example.
"""
from __future__ import annotations

from ms_diffsynth.errors import ConfigError, nearest
from ms_diffsynth.nn.adapters.contract import Adapter
from ms_diffsynth.nn.adapters.dora import DoRA
from ms_diffsynth.nn.adapters.lora import LoRA

ADAPTERS: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "dora": DoRA,
}


def adapter(name: str) -> Adapter:
    """The adapter called ``name``.

    Raises: ConfigError naming the nearest and all of them.
    """
    if name not in ADAPTERS:
        raise ConfigError(f"adapter='{name}' is unknown: expected one of {', '.join(ADAPTERS)}."
                          f"{nearest(name, ADAPTERS)}")
    return ADAPTERS[name]()


def adapter_of(file_format: object) -> Adapter:
    """The adapter whose files have ``file_format``, one of those `formats` gives."""
    return next(kind() for kind in ADAPTERS.values() if kind.format is file_format)


def formats() -> list[object]:
    """The file formats of all adapters, for `formats.lora.load_adapter`."""
    return [kind.format for kind in ADAPTERS.values()]
