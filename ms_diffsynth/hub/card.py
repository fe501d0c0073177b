"""The README.md of a published model: what a hub reads at its head, and below it what a reader wants to know.

The text is card.md.jinja. Prompts, names and settings are written by users: they are data in YAML, escaped in Markdown,
and without secrets and without folders of this machine everywhere.
"""
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ms_diffsynth.redact import redact, without_secrets

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_PATH = re.compile(r"""(?<![\w.:/])~?/(?:[^\s"',;:=/]+/)+([^\s"',;:=/]*)""")  # absolute, with a folder; not an address


@dataclass(frozen=True)
class Licence:
    """What a hub calls it. ``name`` and ``link`` say more where ``id`` is "other"."""

    id: str
    name: str | None = None
    link: str | None = None


APACHE = Licence("apache-2.0")


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The names by which a model of a family is loaded, in this package, in diffusers and in mindone.

    Attributes:
        here: the pipeline's class here.
        files: patterns of those of a base model's repository that it needs, those of the trained network first.
        diffusers: the pipeline's class there.
        mindone: the pipeline's class there; empty when it has none.
        transformer: the trained network's class in both.
        folder: of the network in a checkpoint of diffusers, and the argument by which pipelines take it.
        tags: of the model card, by which a hub finds it.
    """

    here: str
    diffusers: str
    mindone: str
    files: tuple[str, ...] = ()
    transformer: str = ""
    folder: str = "transformer"
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card tells.

    Args:
        model_id: "owner/name" of the repository it is for.
        trained: "lora", "transformer" (all of it), "pipeline" (the repository is one), or what else was trained, in
            words.
        weights: name of the file with the trained weights.
        base_model: "owner/name" on the Hub; None, or anything else, for a model that is not there.
        loader: what the family says of the base model; None when only this package can load it.
        licence: of the base model; None when it is not known.
        samples: names of sample images in the repository.
        dataset: what it was trained on; of a path, only the last part is told.
        settings: the training configuration; None values are left out.
        command: the command line, as a list.
        versions: package -> version.
        how_to_load: Markdown in place of the usual code.
    """

    model_id: str
    trained: str
    weights: str
    hub: str = "huggingface"
    base_model: str | None = None
    loader: Loader | None = None
    licence: Licence | None = None
    pipeline_tag: str = "text-to-image"
    instance_prompt: str | None = None
    prompts: Sequence[str] = ()
    samples: Sequence[str] = ()
    dataset: str | None = None
    steps: int | None = None
    seed: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    command: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    how_to_load: str | None = None


def model_card(card: Card) -> str:
    """The text of README.md."""
    base = card.base_model if re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_model or "") else None
    loader, licence = card.loader, card.licence
    facts = {"data": card.dataset and PurePath(card.dataset).name, "steps": card.steps, "seed": card.seed,
             **{f"{package} version": version for package, version in card.versions.items()}}
    settings = _plain({key: value for key, value in without_secrets(card.settings).items() if value is not None})
    fence = "`" * max([3, *(1 + len(run) for run in re.findall("`+", repr(card)))])  # longer than any run inside
    text = ModelCard.from_template(
        _head(card, base), template_path=str(_TEMPLATE),
        name=card.model_id.rpartition("/")[2], base=base, trained=card.trained, hub=card.hub, licence=licence,
        weights=_line(card.weights).replace("`", "'"), taught=card.instance_prompt, prompts=card.prompts,
        samples=[re.sub(r"[^\w./-]", "_", name) for name in card.samples], how_to_load=card.how_to_load,
        what={"lora": "A LoRA", "transformer": "A trained transformer"}.get(card.trained, _inline(card.trained)),
        is_loaded_whole=loader is not None and card.trained in ("lora", "transformer", "pipeline"),
        loader=loader and vars(loader) | {"mindone.diffusers": loader.mindone},
        dtypes={"diffusers": "torch_dtype=torch.bfloat16", "mindone.diffusers": "mindspore_dtype=ms.bfloat16"},
        first={"diffusers": ".images[0]", "mindone.diffusers": "[0][0]"},
        repository=json.dumps(card.model_id), file=json.dumps(card.weights),
        base_path=json.dumps(base or "path/to/the/base/model"),
        prompt=json.dumps(_line(card.instance_prompt or (*card.prompts, "a cat")[0]), ensure_ascii=False),
        facts=[(name, value) for name, value in facts.items() if value is not None],
        command=shlex.join(_without_folders(word) for word in without_secrets(card.command)),
        settings=settings and yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000),
        inline=_inline, fence=fence)
    return redact(str(text).rstrip()) + "\n"


def _head(card: Card, base: str | None) -> ModelCardData:
    licence, loader = card.licence, card.loader
    library = "diffusers" if loader else "ms_diffsynth"
    data = ModelCardData(
        base_model=base, library_name=library, license=licence and licence.id, license_name=licence and licence.name,
        license_link=licence and licence.link, pipeline_tag=card.pipeline_tag,
        tags=[card.pipeline_tag, "ms_diffsynth", "mindspore", "diffusers-training", *(loader.tags if loader else ()),
              *(("diffusers",) if loader else ()), *(("lora", "template:sd-lora") if card.trained == "lora" else ())])
    if base:
        data.base_model_relation = "adapter" if card.trained == "lora" else "finetune"
    if card.instance_prompt:
        data.instance_prompt = _line(card.instance_prompt)
    if card.samples and len(card.samples) == len(card.prompts):
        data.widget = [{"text": _line(text), "output": {"url": url}} for text, url in zip(card.prompts, card.samples)]
    return data


# -- text of users -------------------------------------------------------------------------------------------------


def _line(text: object) -> str:
    """One line of printable characters, without secrets."""
    return redact(" ".join("".join(c if c.isprintable() else " " for c in str(text)).split()))


def _inline(text: object) -> str:
    """Text that Markdown and HTML show as it is: every mark that could mean something is escaped."""
    return re.sub(r"(^-|[!#$%&()*+./:;<=>?@\[\\\]^_`{|}~])", r"\\\1", _line(text))


def _plain(value: object) -> object:
    """A setting as YAML has it, without folders of this machine."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float)) or value is None else _without_folders(str(value))


def _without_folders(text: str) -> str:
    """Absolute paths cut to their last part: the whole text, what follows ``--flag=``, or a word inside."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if value.startswith(("/", "~/")):
        return flag + equals + PurePath(value).name
    return _PATH.sub(r"\1", text)
