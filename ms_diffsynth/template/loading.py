"""From a template's folder, or its name on a hub, to its model."""
from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, TemplateError, UserError, is_mistake, listing, nearest, said
from ms_diffsynth.formats.weights import asked_dtype, match, open_checkpoint
from ms_diffsynth.hub.download import ModelConfig, parse_path_or_model_id
from ms_diffsynth.nn.names import assign, torch_shapes
from ms_diffsynth.template.code import TemplateCode, check_trust, line_in, read_code, run_code, weight_files

_seeds = import_module("mindspore.common.seed")  # no public function reads how often each was used (MindSpore 2.10)

FLOATS = (ms.float64, ms.float32, ms.float16, ms.bfloat16)
RESERVED = ("pipe", "use_gradient_checkpointing", "use_gradient_checkpointing_offload")


def no_grad() -> Callable[[Callable[..., dict[str, Any]]], Callable[..., dict[str, Any]]]:
    """``@no_grad()`` before ``process_inputs``, where DiffSynth-Studio has ``@torch.no_grad()``.

    No gradient flows through the Tensors of the returned dict. `process_inputs` runs outside of the differentiated step
    anyway; the decorator says so to the reader, and holds wherever else the method is called.
    """
    def decorate(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(method)
        def without_gradient(*args: Any, **kwargs: Any) -> dict[str, Any]:
            result = method(*args, **kwargs)
            if not isinstance(result, dict):
                return result
            return {k: ops.stop_gradient(v) if isinstance(v, Tensor) else v for k, v in result.items()}
        return without_gradient
    return decorate


@dataclass(frozen=True)
class Template:
    """A template whose code has run.

    Attributes:
        files: what its identity is made of: model.py and the weights TEMPLATE_MODEL_PATH names.
    """

    code: TemplateCode
    module: types.ModuleType
    weights: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.code.path, *self.weights)

    def build(self, dtype: ms.Type = ms.float32) -> nn.Cell:
        """The model with its weights, or with random ones, always the same; frozen, in evaluation mode.

        Raises: TemplateError for a model that is not of the documented form; WeightError for weights that do not fit.
        """
        with _seeded(0):
            model = self.call(self.module.TEMPLATE_MODEL, "TEMPLATE_MODEL()")
        path, kind = self.code.path, type(model).__name__
        if not isinstance(model, nn.Cell):
            raise TemplateError(f"{path}: TEMPLATE_MODEL() is a {kind}: expected an nn.Cell. Let the class inherit "
                                "from mindspore.nn.Cell.")
        lost = [name for name in ("process_inputs", "forward") if not callable(getattr(model, name, None))]
        if lost:
            raise TemplateError(f"{path}: {kind} has no {' and no '.join(lost)}: expected both process_inputs (without "
                                "gradient) and forward. Add it.")
        if not forward_arguments(model):
            raise TemplateError(f"{path}: {kind}.forward{inspect.signature(model.forward)} names no input: expected "
                                "the keys that process_inputs returns, e.g. forward(self, emb, **kwargs).")
        for parameter in model.get_parameters():
            if parameter.dtype in FLOATS and parameter.dtype != dtype:
                parameter.set_dtype(dtype)
            parameter.name = f"template_model.{parameter.name}"  # none of its names may equal one of the base model
            parameter.requires_grad = False
        if self.weights:
            checkpoint = open_checkpoint(list(self.weights))
            match(torch_shapes(model), checkpoint.shapes, where=str(self.code.folder))
            assign(model, checkpoint.tensors())
        return model.set_train(False)

    def processor(self) -> Callable[..., dict[str, Any]]:
        """TEMPLATE_DATA_PROCESSOR, or one that changes nothing."""
        cls = getattr(self.module, "TEMPLATE_DATA_PROCESSOR", None)
        return (lambda **inputs: inputs) if cls is None else self.call(cls, "TEMPLATE_DATA_PROCESSOR()")

    def call(self, function: Callable[..., Any], name: str, /, **arguments: Any) -> Any:
        """Call code of the template. Raises: TemplateError saying where it failed, and on what."""
        try:
            return function(**arguments)
        except UserError:
            raise
        except BaseException as error:
            if not is_mistake(error):
                raise
            given = {k: v for k, v in arguments.items() if k not in RESERVED and not isinstance(v, Tensor)}
            on = f" on {given!r:.200}" if given else ""
            raise TemplateError(f"{self.code.path}{line_in(error, self.module)}: {name} failed{on} "
                                f"({said(error)}). Correct the input, or the template.") from error


def open_template(path: str | Path | ModelConfig, trust_template_code: bool = False,
                  trust_template_sha256: str | None = None) -> Template:
    """Find a template, check that its code is trusted, and run it.

    Args:
        path: a folder, ``owner/name:`` on a hub, or a ModelConfig. Of a hub, ``model.py`` alone is loaded before the
            question is answered; the rest then comes from the same commit. ``owner/name:folder/`` is a template in a
            folder of the repository.
        trust_template_code, trust_template_sha256: see `template.code.check_trust`.

    Raises: UntrustedCodeError, TemplateError, HubError, ConfigError.
    """
    config = path if isinstance(path, ModelConfig) else parse_path_or_model_id(str(path), ModelConfig())
    if config.path is None:
        inside, base = config.origin_file_pattern or "", runtime.model_base_path()
        if inside and not inside.endswith("/"):
            raise ConfigError(f"'{config}' names files: expected the whole template, '{config.model_id}:', or a folder "
                              f"of the repository, '{config.model_id}:folder/'.")
        only_code = replace(config, origin_file_pattern=f"{inside}model.py")  # its revision becomes the commit
        found = only_code.resolve(base)[0].parent
        code = read_code(found, f"{config.model_id} at {only_code.revision or 'a local copy'}")
    else:
        code = read_code(config.resolve()[0])
    check_trust(code, trust_template_code, trust_template_sha256)
    if config.path is None:
        replace(only_code, origin_file_pattern=inside).resolve(base)
    module = run_code(code)
    return Template(code, module, tuple(weight_files(code, module)))


def load_template_model(path: str | Path | ModelConfig, mindspore_dtype: ms.Type | None = None,
                        device: str | None = None, *, torch_dtype: Any = None, trust_template_code: bool = False,
                        trust_template_sha256: str | None = None) -> nn.Cell:
    """The model of a template; see `open_template` and `Template.build`.

    Args:
        mindspore_dtype, torch_dtype: of its weights, by either name; None is float32.
        device: ``"CPU"`` or ``"Ascend"``; None is the present one.
    """
    runtime.use_device(device)
    template = open_template(path, trust_template_code, trust_template_sha256)
    asked = asked_dtype(mindspore_dtype, torch_dtype) or "float32"
    if asked not in runtime.DTYPES:
        raise ConfigError(f"dtype='{asked}': expected one of {listing(runtime.DTYPES)}."
                          f"{nearest(asked, runtime.DTYPES)}")
    return template.build(runtime.DTYPES[asked])


def forward_arguments(model: nn.Cell) -> tuple[str, ...]:
    """Names of what ``forward`` takes from ``process_inputs``: its parameters without a default, and what is written
    there as a key of the returned dict and fits one with a default, or ``**kwargs``.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name: p.default is p.empty for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [name for name, is_needed in named.items() if is_needed]
    names += [key for key in returned_keys(model.process_inputs) if key in named or takes_all]
    return tuple(name for name in dict.fromkeys(names) if name not in RESERVED)


def returned_keys(function: Callable[..., Any]) -> list[str]:
    """Keys, written as texts, of the dict that a function returns, made where it is returned or under a name before."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    names = {value.id for value in returned if isinstance(value, ast.Name)}
    keys: list[ast.AST | None] = []
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id in names:
                returned.append(node.value)
            elif isinstance(target, ast.Subscript) and getattr(target.value, "id", None) in names:
                keys.append(target.slice)
    keys += [key for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    return [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]


def forward_options(model: nn.Cell, **options: bool) -> dict[str, bool]:
    """Those of ``use_gradient_checkpointing`` and ``use_gradient_checkpointing_offload`` that ``forward`` names."""
    return {name: value for name, value in options.items() if takes(model.forward, name)}


def takes(method: Callable[..., Any], name: str) -> bool:
    """Whether a method names a reserved parameter."""
    return name in inspect.signature(method).parameters


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from a seed, no other generator is changed (``ms.set_seed`` would reset it)."""
    numpy_state, generator_state = np.random.get_state(), ms.get_rng_state()
    operators = _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED
    np.random.seed(seed)
    ms.manual_seed(seed)
    _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED = seed, {}
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        ms.set_rng_state(generator_state)
        _seeds._GLOBAL_SEED, _seeds._KERNEL_SEED = operators


def processed(template: Template, model: nn.Cell, pipe: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Call ``process_inputs``; its values as Tensors [1, ...] under the names ``forward`` takes.

    A number becomes a Tensor [1], float32 or int32; an array must have the batch axis already. Raises: TemplateError.
    """
    extra = {"pipe": pipe} if takes(model.process_inputs, "pipe") else {}
    result = template.call(model.process_inputs, "process_inputs", **(inputs | extra))
    place, names = f"{template.code.path}: process_inputs", forward_arguments(model)
    if not isinstance(result, dict):
        raise TemplateError(f"{place} returned a {type(result).__name__}: expected a dict, the arguments of forward.")
    lost, odd = [n for n in names if n not in result], [n for n in result if n not in names]
    if lost or odd:
        raise TemplateError(f"{place} returned {listing(result) or 'nothing'}, and forward takes {listing(names)}: "
                            f"expected the same names.{nearest((lost + odd)[0], [*names, *result])} Name in forward "
                            "exactly what process_inputs returns.")
    batch = {}
    for name in names:
        value, which = result[name], f"{place}: {name}"
        if isinstance(value, (bool, int, float, np.number, np.bool_)):
            value = np.array([value])
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and (value != value.astype(np.int32)).any():
            raise TemplateError(f"{which} is {value.flat[np.abs(value).argmax()]}: expected a number that int32 holds.")
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = Tensor(value.astype({"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int32)))
        if not isinstance(value, Tensor):
            raise TemplateError(f"{which} is a {type(value).__name__}: expected a Tensor, an array or a number, which "
                                "can be cached and compiled. Turn it into one in process_inputs.")
        if value.ndim == 0 or value.shape[0] != 1:
            raise TemplateError(f"{which} has the shape {list(value.shape)}: expected a batch axis of 1 in front, e.g. "
                                f"{[1, *value.shape]}. Add it with expand_dims(0).")
        batch[name] = value
    return batch
