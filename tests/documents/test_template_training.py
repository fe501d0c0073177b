"""Document 002, DiffSynth-Studio's "Template Model Training": its model.py files and its commands, as they stand there.

But for `nn.Cell` (torch.nn.Module), `@no_grad()` (@torch.no_grad()), `python` (accelerate launch) and the flag that
trusts the code. Names such as xxx are the document's. The models are tiny ones where the document's names lead to.
"""
# ruff: noqa: E501  (the document's own lines)
from __future__ import annotations

import json
import runpy
import shlex
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from PIL import Image
from published_run import without_a_login
from records import column
from upload_server import ModelScopeServer

from ms_diffsynth import (
    DiffusionTrainingModule,
    Flux2ImagePipeline,
    ModelConfig,
    TemplatePipeline,
    UnifiedDataset,
    load_state_dict,
    load_template_model,
    runtime,
    save_state_dict,
)
from ms_diffsynth.hub.publish import publish
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.pipelines.flux2.published import PUBLISHED
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.template.loading import open_template
from ms_diffsynth.template.package import pack_template
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger

ROOT = Path(__file__).parents[2]
TRUST = {"trust_template_code": True}
TINY_BRIGHTNESS = ROOT / "examples/flux2/templates/brightness"
IMPORTS = """import numpy as np
from mindspore import Tensor, mint, nn, ops
from PIL import Image
from ms_diffsynth import no_grad
"""


@pytest.fixture(autouse=True)
def eager():
    runtime.configure("pynative", DEVICE)
    yield
    runtime.configure("graph", DEVICE)


@pytest.fixture
def template(tmp_path):
    """Writes a model.py: its folder."""
    def write(source, name="template"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model.py").write_text(IMPORTS + source)
        return tmp_path / name
    return write


def module_of(folder, template, what="template_model"):
    module = DiffusionTrainingModule()
    module.pipe = Flux2ImagePipeline.from_pretrained(str(folder))
    module.load_training_template_model(module.pipe, str(template), **TRUST)
    module.switch_pipe_to_training_mode(module.pipe, trainable_models=what, extra_inputs="template_inputs")
    return module


# -- Template Model Component Format -----------------------------------------------------------------------------------

SKELETON = '''
class CustomizedTemplateModel(nn.Cell):
    def __init__(self):
        super().__init__()

    @no_grad()
    def process_inputs(self, xxx, **kwargs):
        yyy = xxx
        return {"yyy": yyy}

    def forward(self, yyy, **kwargs):
        zzz = yyy
        return {"zzz": zzz}

class DataProcessor:
    def __call__(self, www, **kwargs):
        xxx = www
        return {"xxx": xxx}

TEMPLATE_MODEL = CustomizedTemplateModel
TEMPLATE_MODEL_PATH = PATH
TEMPLATE_DATA_PROCESSOR = DataProcessor
'''


def test_the_skeleton(template):
    opened = open_template(template(SKELETON.replace("= PATH", "= None")), True)
    model = opened.build()
    arguments = opened.processor()(www=3)
    assert arguments == {"xxx": 3} and model.process_inputs(**arguments, more=1) == {"yyy": 3}
    assert model.forward(yyy=3, more=1) == {"zzz": 3}


ONE_LAYER = SKELETON.replace("super().__init__()\n", "super().__init__()\n        self.mlp = mint.nn.Linear(2, 3)\n", 1)
SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


@pytest.mark.parametrize("path", [None, "model.safetensors", SHARDS])
def test_template_model_path(path, template):
    folder = template(ONE_LAYER.replace("= PATH", f"= {path!r}"))
    weights = {"mlp.weight": np.full((3, 2), 7, np.float32), "mlp.bias": np.full(3, 5, np.float32)}
    if path == SHARDS:
        save_state_dict(folder / SHARDS[0], {"mlp.weight": weights["mlp.weight"]})
        save_state_dict(folder / SHARDS[2], {"mlp.bias": weights["mlp.bias"]})
        save_state_dict(folder / SHARDS[1], {})
    elif path:
        save_state_dict(folder / path, weights)
    one, two = (state_dict(load_template_model(folder, **TRUST)) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in weights)  # also where they are random
    assert all(np.array_equal(one[name], weights[name]) == (path is not None) for name in weights)


PROCESSORS = {"scale": '''
class DataProcessor:
    def __call__(self, scale, **kwargs):
        return {"scale": scale}
''', "image": '''
class DataProcessor:
    def __call__(self, image, **kwargs):
        image = Image.open(image)
        image = np.array(image)
        return {"scale": image.astype(np.float32).mean() / 255}
'''}
BRIGHTNESS = '''
class Brightness(nn.Cell):
    def __init__(self):
        super().__init__()
        self.mlp = mint.nn.Linear(1, 2 * 3 * 32)

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"value": scale}

    def forward(self, value, use_gradient_checkpointing, use_gradient_checkpointing_offload, **kwargs):
        vectors = self.mlp(value.reshape(-1, 1)).reshape(-1, 2, 3, 32)
        return {"kv_cache": {"double_0": (vectors, ops.sin(vectors))}}

TEMPLATE_MODEL = Brightness
'''


@pytest.fixture
def data(tmp_path):
    """The document's data set: images/image_1.jpg of brightness 0.2, images/image_2.jpg of 0.6."""
    (tmp_path / "images").mkdir()
    for k, scale in ((1, 0.2), (2, 0.6)):
        Image.new("RGB", (32, 32), (int(255 * scale),) * 3).save(tmp_path / f"images/image_{k}.jpg")
    return tmp_path


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.few(1)
def test_template_data_processor(kind, data, template, tiny_model):
    """metadata.json is a list, as in the document; what process_inputs gets is the number."""
    inputs = {"scale": [{"scale": 0.2}, {"scale": 0.6}],
              "image": [{"image": str(data / f"images/image_{k}.jpg")} for k in (1, 2)]}[kind]
    rows = [{"image": "images/image_1.jpg", "prompt": "a cat", "template_inputs": inputs[0]},
            {"image": "images/image_2.jpg", "prompt": "a dog", "template_inputs": inputs[1]}]
    (data / "metadata.json").write_text(json.dumps(rows))
    dataset = UnifiedDataset(str(data), str(data / "metadata.json"), data_file_keys="image",
                             main_data_operator=UnifiedDataset.default_image_operator(str(data), height=32, width=32))
    module = module_of(tiny_model("flux2"),
                       template(BRIGHTNESS + PROCESSORS[kind] + "TEMPLATE_DATA_PROCESSOR = DataProcessor\n"))
    cut = module.training_cut()
    found = [float(module.prepare(dataset[k], cut)["template.value"]) for k in range(2)]
    assert found == pytest.approx([0.2, 0.6], abs=0.01)


# -- Interacting with Base Model Pipeline Components -------------------------------------------------------------------

INTERACTION = '''
class xxx(nn.Cell):
    def __init__(self):
        super().__init__()
        self.linear = mint.nn.Linear(96, 2 * 3 * 32)

    def construct(self, text_emb):
        vectors = self.linear(text_emb.mean(1)).reshape(-1, 2, 3, 32)
        return {"double_0": (vectors, ops.sin(vectors))}

class CustomizedTemplateModel(nn.Cell):
    def __init__(self):
        super().__init__()
        self.xxx = xxx()

    @no_grad()
    def process_inputs(self, text, pipe, **kwargs):
        input_ids = pipe.tokenizer(text)
        text_emb = pipe.text_encoder(input_ids)
        return {"text_emb": text_emb}

    def forward(self, text_emb, pipe, **kwargs):
        kv_cache = self.xxx(text_emb)
        return {"kv_cache": kv_cache}

TEMPLATE_MODEL = CustomizedTemplateModel
'''


def test_the_pipelines_text_encoder_in_training_and_sampling(template, tiny_model, tmp_path):
    folder = template(INTERACTION)
    rows = [{"image": Image.new("RGB", (32, 32), (90 * k,) * 3), "prompt": "a", "template_inputs": {"text": text}}
            for k, text in enumerate(("dark", "light"))]
    module = module_of(tiny_model("flux2"), folder)
    launch_training_task(Accelerator(1, "pynative", DEVICE), rows, module, ModelLogger(tmp_path / "out"),
                         learning_rate=1e-2, num_epochs=1)
    assert (column(tmp_path / "out", "grad_norm") > 0).all() and len(column(tmp_path / "out")) == 2
    templates = TemplatePipeline.from_pretrained([folder], torch_dtype=ms.bfloat16, **TRUST)
    one, two = (np.asarray(templates(module.pipe, prompt="a", seed=0, height=32, width=32, num_inference_steps=1,
                                     template_inputs=[{"text": text}])).astype(int)
                for text in ("dark", "light"))
    assert (one != two).any()


# -- Training Template Models ------------------------------------------------------------------------------------------

ONE_STAGE = '''
accelerate launch examples/flux2/model_training/train.py \
  --dataset_base_path data/diffsynth_example_dataset/flux2/Template-KleinBase4B-Brightness \
  --dataset_metadata_path data/diffsynth_example_dataset/flux2/Template-KleinBase4B-Brightness/metadata.jsonl \
  --extra_inputs "template_inputs" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors,black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors,black-forest-labs/FLUX.2-klein-4B:vae/diffusion_pytorch_model.safetensors" \
  --template_model_id_or_path "examples/flux2/model_training/scripts/brightness" \
  --tokenizer_path "black-forest-labs/FLUX.2-klein-4B:tokenizer/" \
  --learning_rate 1e-4 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.template_model." \
  --output_path "./models/train/Template-KleinBase4B-Brightness_example" \
  --trainable_models "template_model" \
  --use_gradient_checkpointing \
  --find_unused_parameters
'''
STAGE_ONE = '''
accelerate launch examples/flux2/model_training/train.py \
  --dataset_base_path data/diffsynth_example_dataset/flux2/Template-KleinBase4B-Brightness \
  --dataset_metadata_path data/diffsynth_example_dataset/flux2/Template-KleinBase4B-Brightness/metadata.jsonl \
  --extra_inputs "template_inputs" \
  --max_pixels 1048576 \
  --dataset_repeat 1 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors,black-forest-labs/FLUX.2-klein-4B:vae/diffusion_pytorch_model.safetensors" \
  --template_model_id_or_path "DiffSynth-Studio/Template-KleinBase4B-Brightness:" \
  --tokenizer_path "black-forest-labs/FLUX.2-klein-4B:tokenizer/" \
  --learning_rate 1e-4 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.template_model." \
  --output_path "./models/train/Template-KleinBase4B-Brightness_full_cache" \
  --trainable_models "template_model" \
  --use_gradient_checkpointing \
  --find_unused_parameters \
  --task "sft:data_process"
'''
STAGE_TWO = '''
accelerate launch examples/flux2/model_training/train.py \
  --dataset_base_path "./models/train/Template-KleinBase4B-Brightness_full_cache" \
  --extra_inputs "template_inputs" \
  --max_pixels 1048576 \
  --dataset_repeat 50 \
  --model_id_with_origin_paths "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors" \
  --template_model_id_or_path "DiffSynth-Studio/Template-KleinBase4B-Brightness:" \
  --tokenizer_path "black-forest-labs/FLUX.2-klein-4B:tokenizer/" \
  --learning_rate 1e-4 \
  --num_epochs 2 \
  --remove_prefix_in_ckpt "pipe.template_model." \
  --output_path "./models/train/Template-KleinBase4B-Brightness_full" \
  --trainable_models "template_model" \
  --use_gradient_checkpointing \
  --find_unused_parameters \
  --task "sft:train"
'''
FP8_ONE = ('--fp8_models "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors,'
           'black-forest-labs/FLUX.2-klein-4B:vae/diffusion_pytorch_model.safetensors"')
FP8_TWO = '--fp8_models "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors"'


@pytest.fixture
def command(tmp_path, tiny_model, monkeypatch):
    """``command(text)`` runs a command of the document, where its names lead to tiny models and two images."""
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "hub"))
    for place, target in {"hub/black-forest-labs/FLUX.2-klein-4B": tiny_model("flux2"),
                          "hub/black-forest-labs/FLUX.2-klein-base-4B": tiny_model("flux2"),
                          "hub/DiffSynth-Studio/Template-KleinBase4B-Brightness": TINY_BRIGHTNESS,
                          "examples/flux2/model_training/scripts/brightness": TINY_BRIGHTNESS}.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(target)
    data = tmp_path / "data/diffsynth_example_dataset/flux2/Template-KleinBase4B-Brightness"
    data.mkdir(parents=True)
    rows = []
    for k in range(2):
        Image.new("RGB", (32, 32), (100 * k,) * 3).save(data / f"{k}.png")
        rows.append({"image": f"{k}.png", "prompt": "a", "template_inputs": {"scale": 100 * k / 255}})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(text, *more):
        for size, smaller in (("--dataset_repeat 50", "--dataset_repeat 1"), ("--max_pixels 1048576", "--max_pixels 1024")):
            text = text.replace(size, smaller)
        launcher, launch, script, *words = shlex.split(text)
        assert (launcher, launch) == ("accelerate", "launch")
        words += ["--trust_template_code", "--mode", "pynative", "--max_sequence_length", "16", *more]
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not end.value.code

    return run


def trained(name):
    return Path("models/train", f"Template-KleinBase4B-Brightness_{name}", "epoch-1.safetensors").read_bytes()


def test_the_command_of_one_stage(command):
    command(ONE_STAGE)
    assert len(trained("example")) > 1000


@pytest.mark.slow
def test_split_training_is_lossless(command):
    command(ONE_STAGE)
    command(STAGE_ONE)
    command(STAGE_TWO)
    assert trained("full") == trained("example")  # to the bit


@pytest.mark.slow
def test_split_training_in_eight_bits_has_minor_errors(command):
    command(ONE_STAGE)
    command(STAGE_ONE, *shlex.split(FP8_ONE))
    command(STAGE_TWO, *shlex.split(FP8_TWO))
    full, example = (load_state_dict(f"models/train/Template-KleinBase4B-Brightness_{name}/epoch-1.safetensors")
                     for name in ("full", "example"))
    apart = max(np.abs(full[name] - example[name]).max() for name in example)
    assert 0 < apart < 1e-3  # two epochs of two steps at 1e-4 each


def test_the_template_of_full_size_fits_klein_base_4b():
    """What the command names, at its real size: each block's keys and values are those of the published network."""
    model = load_template_model(ROOT / "examples/flux2/model_training/scripts/brightness", **TRUST)
    config = PUBLISHED["FLUX.2-klein-4B"]["dit"]
    cache = model.forward(**model.process_inputs(scale=0.5))["kv_cache"]
    assert set(cache) == ({f"double_{k}" for k in range(config["num_layers"])}
                          | {f"single_{k}" for k in range(config["num_single_layers"])})
    shape = (1, 16, config["num_attention_heads"], config["attention_head_dim"])
    assert all(tensor.shape == shape for pair in cache.values() for tensor in pair)


# -- Uploading Template Models -----------------------------------------------------------------------------------------


def test_from_training_to_modelscope_and_back(command, monkeypatch, tmp_path, tiny_model):
    """Train, pack, upload, and sample by the document's last script, which names the repository alone."""
    command(ONE_STAGE)
    checkpoint = "models/train/Template-KleinBase4B-Brightness_example/epoch-1.safetensors"
    packed = pack_template(TINY_BRIGHTNESS, checkpoint, "packed", **TRUST)
    without_a_login(monkeypatch, tmp_path)
    with ModelScopeServer() as hub:
        for name, value in {"MODELSCOPE_ENDPOINT": hub.endpoint, "MODELSCOPE_CACHE": str(tmp_path / "cache"),
                            "MS_DIFFSYNTH_DOWNLOAD_SOURCE": "modelscope"}.items():
            monkeypatch.setenv(name, value)
        publish(packed, "user_name/your_model_id", hub="modelscope")
        pipe = Flux2ImagePipeline.from_pretrained(
            torch_dtype=ms.bfloat16,
            device=DEVICE,
            model_configs=[
                ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="text_encoder/*.safetensors"),
                ModelConfig(model_id="black-forest-labs/FLUX.2-klein-base-4B", origin_file_pattern="transformer/*.safetensors"),
                ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
            ],
            tokenizer_config=ModelConfig(model_id="black-forest-labs/FLUX.2-klein-4B", origin_file_pattern="tokenizer/"),
        )
        template_pipeline = TemplatePipeline.from_pretrained(
            torch_dtype=ms.bfloat16,
            device=DEVICE,
            model_configs=[
                ModelConfig(model_id="user_name/your_model_id")
            ],
            trust_template_code=True,
        )
    image = template_pipeline(pipe, prompt="a cat", seed=0, cfg_scale=4, height=32, width=32, num_inference_steps=1,
                              template_inputs=[{"scale": 0.5}])
    assert image.size == (32, 32)
    loaded, sent = state_dict(template_pipeline.fetch_model(0)), load_state_dict(checkpoint)
    assert sent and all(np.array_equal(loaded[name], array) for name, array in sent.items())
