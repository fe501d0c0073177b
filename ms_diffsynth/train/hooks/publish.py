"""Publishing while training: after every save a model card is written, and what the folder holds then is sent.

First saved, then sent: a hub that refuses, fails or is slow holds up no step and loses no file.
"""
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ms_diffsynth import __version__
from ms_diffsynth.errors import UserError
from ms_diffsynth.hub.card import Card, model_card
from ms_diffsynth.hub.download import parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.hub.publish import BackgroundUpload, connect
from ms_diffsynth.redact import redact
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.template.units import MODEL
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule

SECONDS_AT_THE_END = 600.0  # that what is under way is waited for
SECONDS_AFTER_AN_ERROR = 30.0


def check_token(accelerator: Accelerator, args: Any) -> None:
    """What a run that publishes lacks is told before its weights are loaded.

    Raises: HubError when there is no token, or the hub's client is not installed.
    """
    if _is_publishing(accelerator, args):
        connect(args.hub)


def _is_publishing(accelerator: Accelerator, args: Any) -> bool:
    return getattr(args, "push_to_hub", False) and accelerator.is_main_process


@contextlib.contextmanager
def publishing(accelerator: Accelerator, model: DiffusionTrainingModule, logger: ModelLogger, dataset: Any,
               args: Any) -> Iterator[None]:
    """Publish what ``logger`` saves inside the block, if ``args.push_to_hub`` asks for it; on the first rank only.

    Args:
        args: every setting, as ``training_parser(...).parse_args()`` returns them.
    """
    if not _is_publishing(accelerator, args):
        yield
        return
    publisher = Publisher(logger, lambda: run_card(model, logger, dataset, args), args.hub_model_id, hub=args.hub,
                          private=args.hub_private_repo)
    logger.after_save = publisher.publish
    seconds = SECONDS_AFTER_AN_ERROR
    try:
        yield
        publisher.publish()  # with the pictures made since the last save
        seconds = SECONDS_AT_THE_END
    finally:
        logger.after_save = None
        publisher.close(seconds)
        if publisher.published:
            sys.stderr.write(f"published {publisher.published}\n")


class Publisher(BackgroundUpload):
    """A `BackgroundUpload` of a run's folder that writes the model card first, and notes what happens in events.jsonl.

    Attributes:
        published: what was uploaded last, and where it is; an empty text before.
    """

    def __init__(self, logger: ModelLogger, card: Callable[[], str], model_id: str, *, hub: str = "huggingface",
                 private: bool = True, endpoint: str | None = None):
        super().__init__(model_id, hub=hub, private=private, endpoint=endpoint)
        self._hub, self._client = self._client, self  # every upload passes through `send`
        self.logger, self.card, self.published = logger, card, ""

    def publish(self) -> None:
        """Write README.md and hand over what the folder holds now. What fails is told, never raised."""
        try:
            write_file(self.logger.output_path / "README.md", self.card().encode())
        except Exception as error:  # of any library that a card needs: training goes on, the weights are sent
            self._failed(error)
        self.submit(self.logger.output_path, f"step {self.logger.num_steps}")

    def send(self, stage: Path, names: Sequence[str], model_id: str, private: bool, message: str,
             is_quiet: bool = False) -> str:
        """See `hub.publish.Client`; called by the thread of the upload."""
        self._tell("upload_begun", upload=message, files=len(names))
        url = self._hub.send(stage, names, model_id, private, message, is_quiet)
        self.published = f"{message}: {url}"
        self._tell("upload_finished", upload=message, url=url)
        return url

    def _failed(self, error: Exception) -> None:
        super()._failed(error)
        self._tell("upload_failed", reason=self.failures[-1])

    def _tell(self, event: str, **values: Any) -> None:
        with contextlib.suppress(UserError):  # a disk that is full stops training where that writes, not here
            self.logger.event(event, **values)


# -- the model card ------------------------------------------------------------------------------------------------


def run_card(model: DiffusionTrainingModule, logger: ModelLogger, dataset: Any, args: Any) -> str:
    """README.md of a run as it stands: the weights saved last, and the sample pictures made last."""
    pipe, prompts = model.pipe, tuple(getattr(args, "sample_prompts", ()))
    card = Card(
        model_id=args.hub_model_id, hub=args.hub, family=args.family, trained=_trained(model, logger),
        weights=logger.saved[-1].name, base_model=_base_model(model, args),
        pipeline_tag="text-to-image" if "prompt" in pipe.inputs else "unconditional-image-generation",
        instance_prompt=args.instance_prompt, prompts=prompts if logger.samples else (),
        samples=[f"samples/step-{max(logger.samples)}.png"] if logger.samples else (),
        dataset=_described(dataset, args.dataset_base_path), steps=logger.num_steps, seed=args.seed,
        settings=logger.settings, command=[redact(word) for word in _command()],
        versions={"ms_diffsynth": __version__} | {name: version(name) for name in ("mindspore", "mindone")})
    text = model_card(card)
    return text if MODEL not in _roots(model) else _with_template(text, card, model, args)


def _roots(model: DiffusionTrainingModule) -> list[str]:
    return [name.partition(".")[0] for name in model.trainable]


def _trained(model: DiffusionTrainingModule, logger: ModelLogger) -> str:
    """As `Card` has it: the network's LoRA, the network as diffusers names it, or what else it is in words."""
    network, names = model.pipe.network, list(model.trainable)
    if model.is_whole_pipeline:
        return "pipeline"
    if names == [model.lora_base_model]:
        return "lora" if names == [network] else f"A LoRA of {names[0]}"
    if names == [network] and logger.remove_prefix_in_ckpt == f"pipe.{network}.":
        return "transformer"
    return "A template" if MODEL in _roots(model) else f"Trained weights of {', '.join(names)}"


def _base_model(model: DiffusionTrainingModule, args: Any) -> str | None:
    """The repository the network came from; None for files of this machine."""
    if not args.model_id_with_origin_paths:
        return None
    given = [config.model_id for config in parse_model_id_with_origin_paths(args.model_id_with_origin_paths)]
    network = [key.partition(":")[0] for key, name in model.pipe.given_as.items() if name == model.pipe.network]
    found = network or [name for name in dict.fromkeys(given) if name]
    return found[0] if network or len(found) == 1 else None


def _described(dataset: Any, folder: str) -> str:
    rows = getattr(dataset, "rows", dataset)
    return f"{Path(folder).resolve().name} ({rows if isinstance(rows, int) else len(rows)} rows)"


def _command() -> list[str]:
    """The command that started this process, as one would type it."""
    if Path(sys.argv[0]).name == "ms-diffsynth":
        return ["ms-diffsynth", *sys.argv[1:]]
    return ["python", *sys.orig_argv[1:]]


def _with_template(text: str, card: Card, model: DiffusionTrainingModule, args: Any) -> str:
    """A card that says how to load the base model with the trained template in front of it."""
    template = parse_path_or_model_id(args.template_model_id_or_path)
    place = "path/to/the/template" if template.path is not None else str(template)
    base = '"path/to/the/base/model"'
    if args.model_id_with_origin_paths and not args.model_paths:
        files = [f"    ModelConfig(model_id={json.dumps(config.model_id)}, "
                 f"origin_file_pattern={json.dumps(config.origin_file_pattern)}),\n"
                 for config in parse_model_id_with_origin_paths(args.model_id_with_origin_paths)]
        base = f"[\n{''.join(files)}]"
    inputs = json.loads(args.sample_template_inputs or "{}")
    prompt = json.dumps(redact((*card.prompts, "a cat")[0]), ensure_ascii=False)
    is_there, cls = card.hub == "huggingface", type(model.pipe).__name__
    library, download = ("huggingface_hub", "hf_hub_download") if is_there else ("modelscope", "model_file_download")
    code = f"""\
from {library} import {download}
from ms_diffsynth import {cls}, ModelConfig, TemplatePipeline, pack_template

weights = {download}({json.dumps(card.model_id)}, {json.dumps(card.weights)})
pack_template({json.dumps(place)}, weights, "packed", trust_template_code=True)
templates = TemplatePipeline.from_pretrained(["packed"], trust_template_code=True)
pipe = {cls}.from_pretrained({base})
inputs = {inputs[0] if isinstance(inputs, list) else inputs}  # as the rows of the data set have them
templates(pipe, prompt={prompt}, seed=0, template_inputs=[inputs]).save("picture.png")"""
    loading = ("These are a template's weights. Its code, `model.py`, is not in this repository, and "
               "`trust_template_code=True` runs it: it may do all that you may do. `ms-diffsynth template show FOLDER` "
               f"prints it and runs nothing.\n\n```python\n{code}\n```\n\n")
    before, heading, rest = text.partition("## How to load it\n\n")  # no text of a user begins a line with ##
    return before + heading + redact(loading) + rest[rest.index("## How it was trained"):]
