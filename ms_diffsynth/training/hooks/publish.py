"""Publishing while training: after every save a model card is written, and what the folder holds then is sent.

First saved, then sent: a hub that refuses, fails or is slow holds up no step and loses no file.
"""
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ms_diffsynth import __version__, registry
from ms_diffsynth.config import flat, prompts_of
from ms_diffsynth.errors import UserError
from ms_diffsynth.hub.card import Card, model_card
from ms_diffsynth.hub.download import parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.hub.publish import BackgroundUpload, connect
from ms_diffsynth.redact import redact
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.template.units import MODEL
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.trainer import Trainer

SECONDS_AT_THE_END = 600.0  # that what is under way is waited for
SECONDS_AFTER_AN_ERROR = 30.0


class Publishing(Hook):
    """Publishes what the logger saves, if ``args.push_to_hub`` asks for it; on the first rank only.

    Args:
        dataset: what the model card says of the data.
        args: every setting, as `TrainConfig` or a parsed command line has them.
    """

    def __init__(self, dataset: Any, args: Any):
        self.dataset, self.args = dataset, SimpleNamespace(**flat(args))

    def start(self, trainer: Trainer) -> None:
        trainer.at_exit.enter_context(publishing(trainer.accelerator, trainer.module, trainer.logger, self.dataset,
                                                 self.args))


def check_token(accelerator: Accelerator, args: Any) -> None:
    """What a run that publishes lacks is told before its weights are loaded.

    Raises: HubError when there is no token, or the hub's client is not installed.
    """
    if _is_publishing(accelerator, args := SimpleNamespace(**flat(args))):
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
    def tell(event: str, **values: Any) -> None:
        with contextlib.suppress(UserError):  # a disk that is full stops training where that writes, not here
            logger.event(event, **values)

    def send() -> None:
        """Write README.md and hand over what the folder holds now. What fails is told, never raised."""
        try:
            write_file(logger.output_path / "README.md", run_card(model, logger, dataset, args).encode())
        except Exception as error:  # of any library that a card needs: training continues, the weights are sent
            upload.failed(error)
        upload.submit(logger.output_path, f"step {logger.num_steps}")

    upload = BackgroundUpload(args.hub_model_id, hub=args.hub, private=args.hub_private_repo, tell=tell)
    logger.after_save = send
    seconds = SECONDS_AFTER_AN_ERROR
    try:
        yield
        send()  # with the images made since the last save
        seconds = SECONDS_AT_THE_END
    finally:
        logger.after_save = None
        upload.close(seconds)
        if upload.published:
            sys.stderr.write(f"published {upload.published}\n")


# -- the model card ------------------------------------------------------------------------------------------------


def run_card(model: DiffusionTrainingModule, logger: ModelLogger, dataset: Any, args: Any) -> str:
    """README.md of a run as it stands: the weights saved last, and the sample images made last."""
    pipe, prompts, base = model.pipe, tuple(prompts_of(getattr(args, "sample_prompts", ()))), _base_model(model, args)
    family = registry.family(args.family)
    rows = getattr(dataset, "rows", dataset)
    count = rows if isinstance(rows, int) else len(rows)
    is_ours = Path(sys.argv[0]).name == "ms-diffsynth"
    return model_card(Card(
        model_id=args.hub_model_id, hub=args.hub, trained=_trained(model, logger), weights=logger.saved[-1].name,
        base_model=base, loader=family.loader(base), licence=family.licences.get(base),
        pipeline_tag=f"text-to-{pipe.medium}" if "prompt" in pipe.inputs else "unconditional-image-generation",
        instance_prompt=args.instance_prompt, prompts=prompts if logger.samples else (),
        samples=[f"samples/step-{max(logger.samples)}.{'png' if pipe.medium == 'image' else 'webp'}"]
        if logger.samples else (),
        dataset=f"{Path(args.dataset_base_path).resolve().name} ({count} rows)", steps=logger.num_steps,
        seed=args.seed, settings=logger.settings,
        command=["ms-diffsynth", *sys.argv[1:]] if is_ours else ["python", *sys.orig_argv[1:]],
        versions={"ms_diffsynth": __version__} | {name: version(name) for name in ("mindspore", "mindone")},
        how_to_load=_with_template(model, logger, args) if MODEL in _roots(model) else None))


def _roots(model: DiffusionTrainingModule) -> list[str]:
    return [name.partition(".")[0] for name in model.trainable]


def _trained(model: DiffusionTrainingModule, logger: ModelLogger) -> str:
    """As `Card` has it: the network's LoRA, the network as diffusers names it, or what else it is in words."""
    network, names = model.pipe.network, list(model.trainable)
    if model.is_whole_pipeline:
        return "pipeline"
    if names == list(model.lora_base_models):
        return "lora" if network in names else f"A LoRA of {' and '.join(names)}"
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


def _with_template(model: DiffusionTrainingModule, logger: ModelLogger, args: Any) -> str:
    """How to load the base model with the trained template in front of it."""
    template = parse_path_or_model_id(args.template_model_id_or_path)
    place = "path/to/the/template" if template.path is not None else str(template)
    base = '"path/to/the/base/model"'
    if args.model_id_with_origin_paths and not args.model_paths:
        files = [f"    ModelConfig(model_id={json.dumps(config.model_id)}, "
                 f"origin_file_pattern={json.dumps(config.origin_file_pattern)}),\n"
                 for config in parse_model_id_with_origin_paths(args.model_id_with_origin_paths)]
        base = f"[\n{''.join(files)}]"
    inputs = json.loads(args.sample_template_inputs or "{}")
    prompt = json.dumps(redact((*prompts_of(getattr(args, "sample_prompts", ())), "a cat")[0]), ensure_ascii=False)
    is_there, cls = args.hub == "huggingface", type(model.pipe).__name__
    library, download = ("huggingface_hub", "hf_hub_download") if is_there else ("modelscope", "model_file_download")
    return f"""\
These are a template's weights. Its code, `model.py`, is not in this repository, and `trust_template_code=True` runs \
it: it may do all that you may do. `ms-diffsynth template show FOLDER` prints it and runs nothing.

```python
from {library} import {download}
from ms_diffsynth import {cls}, ModelConfig, TemplatePipeline, pack_template

weights = {download}({json.dumps(args.hub_model_id)}, {json.dumps(logger.saved[-1].name)})
pack_template({json.dumps(place)}, weights, "packed", trust_template_code=True)
templates = TemplatePipeline.from_pretrained(["packed"], trust_template_code=True)
pipe = {cls}.from_pretrained({base})
inputs = {inputs[0] if isinstance(inputs, list) else inputs}  # as the rows of the data set have them
templates(pipe, prompt={prompt}, seed=0, template_inputs=[inputs]).save("image.png")
```"""
