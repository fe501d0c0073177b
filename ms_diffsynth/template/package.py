"""A trained template as a folder to share: its code, all its weights in one file, and TEMPLATE_MODEL_PATH set."""
from __future__ import annotations

from pathlib import Path

from ms_diffsynth.errors import WeightError, listing, nearest
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.storage.files import stage_folder, write_file
from ms_diffsynth.template.code import is_inside, with_weight_path
from ms_diffsynth.template.loading import open_template

WEIGHTS = "model.safetensors"


def pack_template(template: str | Path | ModelConfig, checkpoint: str | Path, output: str | Path, *,
                  trust_template_code: bool = False, trust_template_sha256: str | None = None) -> Path:
    """Write ``output`` with ``model.py`` and ``model.safetensors``, which `load_template_model` then loads.

    The json, txt, md and yaml files beside the code, which it may read, are copied too; nothing hidden is.

    The weights are those training began with, and over them the trained ones of ``checkpoint``, which may hold a part
    of them only (``template_model.mlp``). The documents' snippet merges in the opposite order and ships the untrained
    weights.

    Args:
        checkpoint: written by training with ``remove_prefix_in_ckpt="pipe.template_model."``, or without.

    Raises: WeightError for trained weights the template does not have; OutputError when ``output`` exists;
        UntrustedCodeError.
    """
    opened = open_template(template, trust_template_code, trust_template_sha256)
    weights = state_dict(opened.build())
    trained = {name.removeprefix("pipe.template_model."): array for name, array in load_state_dict(checkpoint).items()}
    odd = [name for name in trained if name not in weights]
    shapes = [f"{name} {list(array.shape)}, expected {list(weights[name].shape)}" for name, array in trained.items()
              if name in weights and array.shape != weights[name].shape]
    if odd or shapes or not trained:
        raise WeightError(f"{checkpoint} holds {listing(odd + shapes) or 'no weights'}: the template has "
                          f"{listing(weights)}.{nearest(odd[0], weights) if odd else ''} Expected a checkpoint of this "
                          "template, saved with --remove_prefix_in_ckpt pipe.template_model.")
    output, folder = Path(output), opened.code.folder
    with stage_folder(output) as stage:
        for file in sorted(folder.iterdir()):
            is_readable = file.suffix in (".json", ".txt", ".md", ".yaml") and not file.name.startswith(".")
            if is_readable and file.is_file() and is_inside(file, folder):
                stage.write(file.name, file.read_bytes())
        write_file(Path(stage) / "model.py", with_weight_path(opened.code, WEIGHTS))
        save_state_dict(Path(stage) / WEIGHTS, weights | trained)
    return output
