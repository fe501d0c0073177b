"""The README.md of a published model: what a hub reads at its head, and below it what a reader wants to know.

Prompts, names and settings are anybody's text: they are data in YAML, escaped in Markdown, and without secrets and
without folders of this machine everywhere.
"""
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath

import yaml
from huggingface_hub import ModelCardData

from ms_diffsynth.redact import redact

_PATH = re.compile(r"""(?<![\w.:/])~?/(?:[^\s"',;:=/]+/)+([^\s"',;:=/]*)""")  # absolute, with a folder; no address


@dataclass(frozen=True)
class Licence:
    """What a hub calls it. ``name`` and ``link`` say more where ``id`` is "other"."""

    id: str
    name: str | None = None
    link: str | None = None


_BFL = "https://huggingface.co/black-forest-labs"
APACHE = Licence("apache-2.0")
LICENCES = {  # of what is trained from a base model
    "black-forest-labs/FLUX.1-dev": Licence("other", "flux-1-dev-non-commercial-license",
                                            f"{_BFL}/FLUX.1-dev/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.1-schnell": APACHE,
    "black-forest-labs/FLUX.2-dev": Licence("other", "flux-dev-non-commercial-license",
                                            f"{_BFL}/FLUX.2-dev/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.2-klein-4B": APACHE,
    "black-forest-labs/FLUX.2-klein-base-4B": APACHE,
    "black-forest-labs/FLUX.2-klein-9B": Licence("other", "flux-non-commercial-license",
                                                 f"{_BFL}/FLUX.2-klein-9B/blob/main/LICENSE.md"),
    "black-forest-labs/FLUX.2-klein-base-9B": Licence("other", "flux-non-commercial-license",
                                                      f"{_BFL}/FLUX.2-klein-base-9B/blob/main/LICENSE.md"),
    "Qwen/Qwen-Image": APACHE,
}


@dataclass(frozen=True)
class _Loader:
    """How a family is loaded. An empty name: that library cannot."""

    here: str
    folders: tuple[str, ...]
    diffusers: str
    mindone: str
    transformer: str
    tags: tuple[str, ...]


_FLUX2 = ("Flux2ImagePipeline", ("transformer", "text_encoder", "vae"))
_LOADERS = {
    "flux": _Loader("FluxImagePipeline", ("transformer", "text_encoder", "text_encoder_2", "vae"), "FluxPipeline",
                    "FluxPipeline", "FluxTransformer2DModel", ("flux", "flux-diffusers")),
    "flux2-klein": _Loader(*_FLUX2, "Flux2KleinPipeline", "", "Flux2Transformer2DModel",
                           ("flux2-klein", "flux2-klein-diffusers")),
    "flux2": _Loader(*_FLUX2, "Flux2Pipeline", "Flux2Pipeline", "Flux2Transformer2DModel", ("flux2",
                                                                                              "flux2-diffusers")),
    "qwen_image": _Loader("QwenImagePipeline", ("transformer", "text_encoder", "vae"), "QwenImagePipeline",
                          "QwenImagePipeline", "QwenImageTransformer2DModel", ("qwen-image", "qwen-image-diffusers")),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card tells.

    Args:
        model_id: "owner/name" of the repository it is for.
        family: as in `registry.FAMILIES`.
        trained: "lora", "transformer" (all of it), "pipeline" (the repository is one), or what else was trained, in
            words.
        weights: name of the file with the trained weights.
        base_model: "owner/name" on the Hub; None, or anything else, for a model that is not there.
        licence: None takes the base model's, from LICENCES.
        samples: names of sample pictures in the repository.
        dataset: what it was trained on; of a path, only the last part is told.
        settings: the training configuration; None values are left out.
        command: the command line, as a list.
        versions: package -> version.
    """

    model_id: str
    family: str
    trained: str
    weights: str
    hub: str = "huggingface"
    base_model: str | None = None
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


def model_card(card: Card) -> str:
    """The text of README.md."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_model or ""):
        card = replace(card, base_model=None)
    licence = card.licence or LICENCES.get(card.base_model or "")
    parts = [f"---\n{_head(card, licence)}\n---", f"# {_inline(card.model_id.rpartition('/')[2])}", _summary(card),
             *_pictures(card), "## How to load it", *_loading(card), "## How it was trained", *_training(card),
             "## Licence", _licence_text(card, licence)]
    return redact("\n\n".join(parts)) + "\n"


_PIPELINE = """\
With ms_diffsynth:

```python
from huggingface_hub import snapshot_download
from ms_diffsynth import UnconditionalImagePipeline

pipe = UnconditionalImagePipeline.from_pretrained(snapshot_download(REPOSITORY))
pipe(batch_size=4, seed=0)[0].save("picture.png")
```

With diffusers (PyTorch):

```python
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained(REPOSITORY)
pipe(batch_size=4, num_inference_steps=1000).images[0].save("picture.png")
```

With mindone (MindSpore):

```python
from mindone.diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained(REPOSITORY)
pipe(batch_size=4, num_inference_steps=1000)[0][0].save("picture.png")
```"""


def _loader(card: Card) -> _Loader | None:
    is_klein = card.family == "flux2" and "klein" in (card.base_model or "klein").lower()
    return _LOADERS.get("flux2-klein" if is_klein else card.family)


def _head(card: Card, licence: Licence | None) -> str:
    loader = _loader(card)
    is_for_diffusers = loader is not None or card.trained == "pipeline"
    data = ModelCardData(
        base_model=card.base_model, library_name="diffusers" if is_for_diffusers else "ms_diffsynth",
        license=licence and licence.id, license_name=licence and licence.name, license_link=licence and licence.link,
        pipeline_tag=card.pipeline_tag,
        tags=[card.pipeline_tag, "ms_diffsynth", "mindspore", "diffusers-training", *(loader.tags if loader else ()),
              *(("diffusers",) if is_for_diffusers else ()),
              *(("lora", "template:sd-lora") if card.trained == "lora" else ())])
    if card.base_model:
        data.base_model_relation = "adapter" if card.trained == "lora" else "finetune"
    if card.instance_prompt:
        data.instance_prompt = _line(card.instance_prompt)
    if card.samples and len(card.samples) == len(card.prompts):
        data.widget = [{"text": _line(text), "output": {"url": url}} for text, url in zip(card.prompts, card.samples)]
    return data.to_yaml()


def _summary(card: Card) -> str:
    what = {"lora": "A LoRA", "transformer": "A trained transformer"}.get(card.trained, _inline(card.trained))
    base = f"[{_inline(card.base_model)}](https://huggingface.co/{card.base_model})" if card.base_model else (
        "a model that is not on a hub")
    if card.trained == "pipeline":
        origin = f", trained on from {base}" if card.base_model else ""
        return (f"A diffusion model of pictures without prompts{origin}, trained with ms\\_diffsynth on MindSpore. The "
                f"repository is a whole pipeline; `{_code(card.weights)}` holds its weights alone.")
    text = f"{what} for {base}, trained with ms\\_diffsynth on MindSpore. The weights are in `{_code(card.weights)}`."
    if card.instance_prompt:
        text += f"\n\nIt was taught the prompt: {_inline(card.instance_prompt)}"
    return text


def _pictures(card: Card) -> list[str]:
    if not card.prompts and not card.samples:
        return []
    prompts = "\n".join(f"{k}. {_inline(text)}" for k, text in enumerate(card.prompts, 1))
    pictures = "\n".join(f"![sample pictures]({_url(name)})" for name in card.samples)
    return ["## Prompts and sample pictures", *filter(None, (prompts, pictures))]


def _loading(card: Card) -> list[str]:
    loader = _loader(card)
    if card.trained == "pipeline":
        text = _PIPELINE.replace("REPOSITORY", json.dumps(card.model_id))
        there = "from huggingface_hub import snapshot_download"
        return [text if card.hub != "modelscope" else text.replace(there, there.replace("huggingface_hub", card.hub))]
    if loader is None or card.trained not in ("lora", "transformer"):
        return [f"`ms_diffsynth.load_state_dict(\"{_code(card.weights)}\")` reads the weights by name."]
    base = json.dumps(card.base_model or "path/to/the/base/model")
    download, name = _download(card)
    prompt = json.dumps(_line(card.instance_prompt or (card.prompts or ["a cat"])[0]), ensure_ascii=False)
    blocks = ["With ms_diffsynth:", _block("python", _here(card, loader, download, name, base, prompt))]
    for library, cls, dtype in (("diffusers", loader.diffusers, "torch.bfloat16"),
                                ("mindone.diffusers", loader.mindone, "ms.bfloat16")):
        is_torch = library == "diffusers"
        title = "With diffusers (PyTorch):" if is_torch else "With mindone (MindSpore):"
        if not cls:
            blocks.append(f"{title[:-1]}: mindone 0.5.0 has no pipeline for this model.")
            continue
        lines = ["import torch" if is_torch else "import mindspore as ms", *download]
        kind = "torch_dtype" if is_torch else "mindspore_dtype"
        if card.trained == "lora":
            lines += [f"from {library} import {cls}", "", f"pipe = {cls}.from_pretrained({base}, {kind}={dtype})",
                      f"pipe.load_lora_weights({name})"]
        else:
            lines += [f"from {library} import {cls}, {loader.transformer}", "", *_folder(card, name),
                      f'transformer = {loader.transformer}.from_pretrained("transformer", {kind}={dtype})',
                      f"pipe = {cls}.from_pretrained({base}, transformer=transformer, {kind}={dtype})"]
        picture = f"pipe(prompt={prompt})" + (".images[0]" if is_torch else "[0][0]")
        blocks += [title, _block("python", [*lines, f'{picture}.save("picture.png")'])]
    return blocks


def _here(card: Card, loader: _Loader, download: list[str], name: str, base: str, prompt: str) -> list[str]:
    folders = loader.folders if card.trained == "lora" else loader.folders[1:]  # the transformer is the trained one
    files = [f"    ModelConfig(model_id={base}, origin_file_pattern={json.dumps(f'{folder}/*.safetensors')}),"
             for folder in folders]
    if card.base_model is None:
        files = [f"    ModelConfig({json.dumps(f'path/to/the/base/model/{folder}')})," for folder in folders]
    lines = [*download, f"from ms_diffsynth import {loader.here}, ModelConfig", ""]
    if card.trained == "transformer":
        lines += _folder(card, name)
        files.insert(0, '    ModelConfig("transformer"),')
    lines += [f"pipe = {loader.here}.from_pretrained([", *files, "])"]
    if card.trained == "lora":
        lines.append(f"pipe.load_lora(pipe.dit, {name})")
    return [*lines, f'pipe(prompt={prompt}, seed=0).save("picture.png")']


def _download(card: Card) -> tuple[list[str], str]:
    """Lines that import what is needed for it, and the expression that gives the file of weights."""
    place = f"{json.dumps(card.model_id)}, {json.dumps(card.weights)}"
    lines = ["import shutil", "from pathlib import Path"] if card.trained == "transformer" else []
    if card.hub != "modelscope" or card.trained == "transformer":
        lines.append("from huggingface_hub import hf_hub_download")
    if card.hub != "modelscope":
        return lines, f"hf_hub_download({place})"
    return [*lines, "from modelscope import model_file_download"], f"model_file_download({place})"


def _folder(card: Card, name: str) -> list[str]:
    """Lines that put the trained weights beside the base model's config.json, which all three libraries read."""
    config = '"path/to/the/base/model/transformer/config.json"'
    if card.base_model:
        config = f'hf_hub_download({json.dumps(card.base_model)}, "transformer/config.json")'
    return ['Path("transformer").mkdir(exist_ok=True)', f'shutil.copy({config}, "transformer")',
            f'shutil.copy({name}, "transformer/diffusion_pytorch_model.safetensors")']


def _training(card: Card) -> list[str]:
    facts = {"data": card.dataset and PurePath(card.dataset).name, "steps": card.steps, "seed": card.seed,
             **{f"{package} version": version for package, version in card.versions.items()}}
    rows = "\n".join(f"| {_inline(name)} | {_inline(value)} |" for name, value in facts.items() if value is not None)
    blocks = [f"| | |\n|---|---|\n{rows}"] if rows else []
    if card.command:
        blocks += ["The command:", _block("bash", [shlex.join([_without_folders(w) for w in card.command])])]
    if card.settings:
        told = {key: _plain(value) for key, value in card.settings.items() if value is not None}
        text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)
        blocks += ["The configuration; paths are cut to their last part:", _block("yaml", text.splitlines())]
    return blocks or ["Nothing was recorded."]


def _licence_text(card: Card, licence: Licence | None) -> str:
    if licence is None:
        base = _inline(card.base_model) if card.base_model else "the base model"
        return (f"The licence of {base} is not known to ms\\_diffsynth, so none is stated here. It binds these weights "
                "too.")
    name = _inline(licence.name or licence.id)
    return f"Of these weights, and of the base model: {f'[{name}]({licence.link})' if licence.link else name}."


# -- anybody's text ------------------------------------------------------------------------------------------------


def _line(text: object) -> str:
    """One line of printable characters, without secrets."""
    return redact(" ".join("".join(c if c.isprintable() else " " for c in str(text)).split()))


def _inline(text: object) -> str:
    """Text that Markdown and HTML show as it is: every mark that could mean something is escaped."""
    return re.sub(r"(^-|[!#$%&()*+./:;<=>?@\[\\\]^_`{|}~])", r"\\\1", _line(text))


def _code(text: str) -> str:
    return _line(text).replace("`", "'")


def _url(name: str) -> str:
    return re.sub(r"[^\w./-]", "_", name)


def _block(language: str, lines: Sequence[str]) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(value: object) -> object:
    """A setting as YAML has it, without folders of this machine."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float)) or value is None else _without_folders(str(value))


def _without_folders(text: str) -> str:
    """Absolute paths cut to their last part: a whole text, what follows ``--flag=``, or a word inside."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if value.startswith(("/", "~/")):
        return flag + equals + PurePath(value).name
    return _PATH.sub(r"\1", text)
