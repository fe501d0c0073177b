"""`plan` on any machine: every configuration that comes with the package, what it says, and that its remedies hold."""
from __future__ import annotations

import json
import re
import shlex
import socket
from itertools import zip_longest
from pathlib import Path

import pytest
from hub_server import HubServer, only_this_machine
from PIL import Image

from ms_diffsynth.cli.main import main
from ms_diffsynth.config import load_config
from ms_diffsynth.config.bases import BASES
from ms_diffsynth.data import UnifiedDataset, fonts, pairs as pairs_module
from ms_diffsynth.registry import FAMILIES, family
from ms_diffsynth.run import plan as planning
from ms_diffsynth.run.build import build_datasets
from ms_diffsynth.run.memory import GIB

ROOT = Path(__file__).parents[2]
FOLDERS = [sorted(folder.glob("*.yaml")) for folder in sorted((ROOT / "examples").rglob("*")) if folder.is_dir()]
FILES = [file for files in zip_longest(*FOLDERS) for file in files if file]  # the first of each folder, the second, ...
QWEN = "examples/qwen_image/lora_910b.yaml"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def checkout(tmp_path, monkeypatch, tiny_model):
    """The examples with their data; models that a command makes are tiny ones, made when they are asked for."""
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)

    def give(config):
        paths = config.model.model_paths
        if paths and "/" in paths:
            target, model = tmp_path / paths, tiny_model(config.model.family)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(model / "vae" if target.name == "vae" else model)
        folder = tmp_path / config.data.dataset_base_path
        if not folder.exists():
            folder.mkdir(parents=True)
            for number in range(16):
                Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
            further = config.data.extra_inputs  # None, edit_image or control_image
            rows = f"image,prompt{f',{further}' if further else ''}\n"
            rows += "".join(f"{n}.png,a face{f',{n}.png' if further else ''}\n" for n in range(16))
            for metadata in (config.data.dataset_metadata_path, config.data.validation_metadata_path):
                if metadata:
                    (tmp_path / metadata).write_text(rows)

    return give


@pytest.fixture
def plan(capsys):
    """``plan(word, ...)`` -> exit code, and what was said."""

    def run(*words):
        code = main(["plan", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.few(2)
@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_example_is_planned_without_device_network_or_a_file_written(path, checkout, plan, no_network, tmp_path):
    config = load_config(path)
    checkout(config)
    before = snapshot(tmp_path)
    code, said, err = plan(name(path), "--offline")
    assert code == 0, said + err
    pictures = {str(tmp_path / "pairs.png")} if config.data.extra_inputs == "edit_image" else set()
    assert snapshot(tmp_path) == before | pictures
    assert max(map(len, said.splitlines())) <= 80, "wider than a terminal"
    assert re.search(r"(?m)^fits.*: [\d.]+ of [\d.]+ GiB$", said)
    is_counted = config.model.template_model_id_or_path is None  # its code is run only when that has been allowed
    medium = family(config.model.family).pipeline.medium
    for label in (f"{medium}s", "duplicates", "trained at", "download", "learns", "steps", "memory", "  train",
                  *(["disk"] if is_counted else [])):
        assert re.search(f"(?m)^{label} ", said), f"{label} is not told"
    if config.run.device == "Ascend":
        assert "57.6 GiB can be used" in said and "2 are left to CANN and workspaces, an estimate" in " ".join(
            said.split())


PRESETS = [(base, job, memory) for base, preset in BASES.items() for job in ("lora", "edit")
           for memory in preset.fits.get(job, ())]


@pytest.mark.parametrize("base, job, memory", PRESETS)
@pytest.mark.few(1)
def test_every_preset_fits_its_card_and_is_as_large_as_was_measured(base, job, memory, plan, no_network, tmp_path,
                                                                    capsys):
    data, words = ROOT / "examples/data/dreambooth_cat_fluent", ["--caption_column", "caption"]
    if job == "edit":
        data = tmp_path / "large"
        for place in (data, data / "before"):
            place.mkdir()
            Image.new("RGB", (1024, 1024)).save(place / "a.png")
        (data / "a.txt").write_text("word " * 1200)  # the longest prompt
        words = ["--edit_folders", "before"]
    words = ["init", str(data), "--base", base, "--device-memory", str(memory), *words, "--height", "1024", "--width",
             "1024", "--output", "run.yaml"]
    assert main(words) == 0
    capsys.readouterr()
    code, said, _ = plan("run.yaml", "--offline", "--card", memory)
    assert code == 0, said
    config = load_config("run.yaml")
    found = planning.plan_run(config, build_datasets(config), memory)
    train = next(stage for stage in found.stages if stage.name == "train")
    beside = sum(size for model, size in train.models.items() if model != found.pipe.network)
    assert (train.peak - beside) / GIB == pytest.approx(BASES[base].fits[job][memory].peak, rel=0.1)


# -- memory ----------------------------------------------------------------------------------------------------------


def rows_of_the_table() -> list[list[str]]:
    """Of the peaks at full size, by MindSpore's own allocator on the stand-in."""
    page = (ROOT / "docs/reference/memory.md").read_text()
    table = page.partition("## Peaks at full size")[2].partition("\n\n2 images")[0]
    lines = [line for line in table.splitlines() if re.search(r"\| \d+ \|", line)]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.few(12)
@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: "-".join(row[:3]).replace(" ", "_"))
def test_a_peak_from_shapes_is_that_of_the_allocator(row):
    model, side, recompute, held, peak = row[0].partition(" (")[0], row[1], row[2], float(row[3]), float(row[4])
    size = (side, side) if side.isdecimal() else side.split(" x ")
    title, *how = (part.strip() for part in model.split(","))
    name = next(f for f in FAMILIES if title in family(f).published)
    repository = next(r for r, known in family(name).repositories.items() if known == title)
    network, folder = ("unet", "unet") if name == "sdxl" else ("dit", "transformer")
    settings = {"family": name, "lora_base_model": network,
                "model_id_with_origin_paths": f"{repository}:{folder}/*.safetensors,"
                f"{repository}:vae/*.safetensors", "dataset_base_path": "images", "height": size[-2], "width": size[-1],
                "use_gradient_checkpointing": recompute == "yes", "device": "Ascend", "num_epochs": 1,
                "cache_dir": "cache", "batch_size": 2 if "2 images" in how else 1}
    settings |= {"num_frames": size[0]} if len(size) == 3 else {}
    settings |= {"fp8_models": "dit"} if "8 bits" in how else {}
    settings |= {"trainable_models": "dit", "lora_base_model": None} if "whole network" in how else {}
    settings |= {"extra_inputs": "edit_image"} if "reference" in row[0] else {}
    settings |= {"extra_inputs": "template_inputs", "template_model_id_or_path": "t", "lora_base_model": None,
                 "trainable_models": "template_model"} if "template" in how else {}
    found = planning.plan_run(load_config(None, **settings))
    if settings.get("extra_inputs") == "edit_image":  # references as large as the image
        seen = ((int(side), int(side)),) * int(how[-1].split()[0])
        data = planning.Data(rows=1, references={seen: 1}, batches=1)
        work = planning._work(found.config, found.pipe, data, "Ascend")
        stages = planning.stages_of(found.config, found.pipe, found.cut, work)
    else:
        stages = found.stages
    train = stages[-1]
    assert train.peak / GIB == pytest.approx(peak, rel=0.1 if "template" in how else 0.05)
    weights = train.models[network] + train.parts.get("what learns", 0) + train.parts.get("the optimizer", 0)
    assert weights / GIB == pytest.approx(held, rel=0.1 if "template" in how else 0.02)


NOT_FITTING = {
    "no recompute, a small card": ("--card", 32, "--fp8_models", "null", "--use_gradient_checkpointing", "false"),
    "sample images": ("--card", 36, "--fp8_models", "dit", "--sample_prompts", "a cat", "--cache_dir", "null"),
    "no cache": ("--card", 32, "--fp8_models", "dit", "--cache_dir", "null"),
    "a large batch": ("--batch_size", 16),
    "large images": ("--height", 2048, "--width", 2048, "--fp8_models", "dit", "--card", 32),
    "all weights": ("--trainable_models", "dit"),
    "all of that": ("--card", 32, "--cache_dir", "null", "--use_gradient_checkpointing", "false", "--batch_size", 8,
                    "--sample_prompts", "a cat"),
}


@pytest.mark.parametrize("words", NOT_FITTING.values(), ids=NOT_FITTING)
@pytest.mark.few(1)
def test_every_remedy_makes_it_fit(words, plan, checkout):
    code, said, _ = plan(QWEN, "--offline", *words)
    assert code == 69 and "DOES NOT FIT" in said
    remedies = re.findall(r"(?m)^  (--.+?)  +([\d.]+) GiB$", said)
    assert remedies and ("Together" not in said or len(remedies) == 1)
    for flags, peak in remedies:
        code, said, err = plan(QWEN, "--offline", *words, *shlex.split(flags))
        assert code == 0, flags + said + err
        assert float(re.search(r"(?m)^fits: ([\d.]+)", said)[1]) <= float(peak) + 0.05


def test_where_nothing_helps_none_is_named(plan, checkout):
    code, said, _ = plan(QWEN, "--offline", "--card", 8)
    assert code == 69 and said.endswith("makes it fit: choose a smaller model or a larger device.\n")


def test_sample_images_of_split_training_load_no_encoder(plan, checkout):
    _, said, _ = plan(QWEN, "--offline", "--sample_prompts", "a cat")
    train, samples = re.split(r"(?m)^  samples ", re.split(r"(?m)^  train ", said)[1])
    assert "vae" in train and "text_encoder" not in train + samples
    _, said, _ = plan(QWEN, "--offline", "--sample_prompts", "a cat", "--cache_dir", "null")
    assert "text_encoder 13.2 GiB" in re.split(r"(?m)^  samples ", said)[1]


@pytest.mark.parametrize("example, encoders", [
    ("examples/qwen_image/edit_2511_910b.yaml", ("text_encoder", "vae", "vision_tower")),
    ("examples/flux/kontext_910b.yaml", ("vae",))])
def test_references_of_sample_images_are_encoded_in_stage_two(plan, checkout, example, encoders):
    _, said, _ = plan(example, "--offline", "--sample_prompts", "a cat", "--cache_dir", "cache")
    train = re.split(r"(?m)^  samples ", re.split(r"(?m)^  train ", said)[1])[0]
    assert all(name in train for name in encoders) and ("text_encoder" in train) == ("text_encoder" in encoders)


def test_most_of_a_device_may_be_set(plan, checkout):
    code, said, _ = plan(QWEN, "--offline", "--device_memory", 20)
    assert code == 69 and "20.0 GiB can be used" in said


def test_a_card_of_no_memory_is_refused(plan, checkout):
    code, _, err = plan(QWEN, "--card", 0)
    assert code == 64 and "card=0: expected GB" in err


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (64, 64), (96, 64), (64, 96)]):
        Image.new("RGB", size, (number, 9, 9)).save(folder / f"{number}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "0.txt").write_text("word " * 100)
    (folder / "1.txt").write_text("a short caption")
    return folder


def test_the_data_are_told(plan, images, tiny_model):
    code, said, _ = plan("--family", "flux", "--model_paths", tiny_model("flux"), "--dataset_base_path", images,
                         "--instance_prompt", "a photo of sks", "--num_epochs", 2, "--buckets", 3, "--device", "CPU",
                         "--max_sequence_length", 32)
    assert code == 0, said
    text = " ".join(said.split())
    assert "captions 2 of 5 beside the images; 3 without one use \"a photo of sks\"" in text
    assert "duplicates 1, trained on like the others: copy.png is 0.png" in text
    assert re.search(r"1 prompt longer than 32 T5 tokens, and cut there, such as \"word word", text)
    assert "trained at 64x64 (3), " in text and "compiled 3 times, once for each shape of a batch" in text
    assert "steps 10 of 1 image, 2 epochs" in text


def test_what_is_wrong_with_the_data_is_told_and_the_rest_too(plan, images, tiny_model):
    code, said, _ = plan("--family", "flux", "--model_paths", tiny_model("flux"), "--dataset_base_path", images,
                         "--max_train_steps", 7, "--device", "CPU")
    assert code == 65
    assert "data " in said and "has no caption file" in " ".join(said.split())
    assert re.search(r"(?m)^steps +7 of 1 image$", said) and "GiB, fits" in said
    assert re.search(r"(?m)^ +row 3 \(2\.png\): the image 2\.png has no caption", said)
    assert re.search(r"(?m)^ +Correct or remove these rows, then start again\.$", said)
    assert re.search(r"caption\.\s+row 4 \(3\.png\): ", said)
    assert said.splitlines()[-1] == "NOT READY: the data have the problems above. Correct them, then plan again."


# -- reference images ------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """Rows with one reference, with none, and with two; the last is larger than what a reference may have."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number, (size, colour) in enumerate([((64, 64), "red"), ((64, 96), "green"), ((128, 64), "blue"),
                                             ((512, 256), "black")]):
        Image.new("RGB", size, colour).save(folder / f"{number}.png")
    rows = [{"image": "0.png", "edit_image": "1.png"}, {"image": "0.png"}, {"image": "0.png", "edit_image": "1.png"},
            {"image": "0.png", "edit_image": ["2.png", "3.png"]}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row | {"prompt": f"make it {k}"}) + "\n"
                                            for k, row in enumerate(rows)))
    return ("--dataset_base_path", folder, "--dataset_metadata_path", folder / "m.jsonl", "--extra_inputs",
            "edit_image", "--edit_max_pixels", 64 * 64, "--num_epochs", 1, "--device", "CPU")


def test_three_pairs_are_shown_as_an_image(plan, pairs, tiny_model):
    words = ("--family", "flux", "--model_paths", tiny_model("flux"), *pairs)
    code, said, err = plan(*words)
    text = " ".join(said.split())
    assert code == 0, err
    assert "references 3 of 4 rows have references, 1 or 2 each; these for example 1.png -> 0.png" in text
    assert "2.png + 3.png -> 0.png look at pairs.png" in text
    with Image.open("pairs.png") as image:  # references on the left, the image to learn on the right
        colours = [colour for _, colour in sorted(image.convert("RGB").getcolors(1 << 24), reverse=True)]
        assert {(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)} <= set(colours[:5])
        row = [image.getpixel((x, image.height // 6)) for x in range(image.width)]
        assert row.index((0, 128, 0)) < row.index((255, 0, 0))
    first = Path("pairs.png").read_bytes()
    Path("pairs.png").write_bytes(first + b" ")
    assert plan(*words)[0] == 0 and Path("pairs.png").read_bytes() == first, "its own picture is drawn again"
    Path("pairs.png").write_bytes(b"mine")
    code, said, _ = plan(*words)
    assert code == 0 and "pairs.png exists already, and is kept" in said and Path("pairs.png").read_bytes() == b"mine"
    assert plan(*words, "--pairs", "other.png")[0] == 0 and Path("other.png").read_bytes() == first


def test_prompts_that_no_font_can_write_are_the_names_of_their_images(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_FOLDERS", ())
    monkeypatch.setattr(fonts, "_PACKAGE", "no_such_package")
    captions, shown = ["a cat", "\u4e00\u53ea\u732b", "a \U0001f98b"], []
    for name in ("0.png", "1.png", "\u732b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    rows = [{"image": name, "edit_image": "0.png", "prompt": caption}
            for name, caption in zip(("0.png", "1.png", "\u732b.png"), captions)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = UnifiedDataset.default_image_operator(base_path=str(tmp_path), resize=False)
    dataset = UnifiedDataset(str(tmp_path), str(tmp_path / "m.jsonl"), data_file_keys="image,edit_image",
                             main_data_operator=read)
    monkeypatch.setattr(pairs_module, "grid", lambda rows, captions: shown.extend(captions))
    pairs_module.pairs_sheet(dataset)
    assert [text.partition(": ")[2] for text in shown] == ["a cat", "1.png", "row 3"]
    assert "no font of this system has the letters of the prompts of 1.png, \u732b.png:" in caplog.text


@pytest.mark.parametrize("words, says", [
    (("--sample_edit_images", "absent.png"), "sample_edit_images: absent.png does not exist. Put the file there, or"),
    (("--sample_control_masks", "absent.png"), "sample_control_masks: absent.png does not exist."),
    (("--expert", "high_noise"), "expert=high_noise: the family flux has one network for all noise levels"),
    (("--edit_template", "first"), "edit_template=first: the text encoder of the family flux sees no images")])
def test_settings_that_training_refuses_are_refused(plan, pairs, tiny_model, words, says):
    code, _, err = plan("--family", "flux", "--model_paths", tiny_model("flux"), *pairs, *words)
    assert code == 64 and says in err, err


def test_the_other_expert_is_refused(plan, checkout):
    base = ROOT / "examples/wan"
    file = next(file for file in sorted(base.glob("*.yaml")) if "transformer_2" in file.read_text())
    checkout(load_config(file))
    code, _, err = plan(file, "--offline", "--lora_base_model", "dit2", "--expert", "high_noise")
    assert code == 64 and "dit2 is to be trained, which is the expert low_noise" in err, err


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
@pytest.mark.few(1)
def test_references_are_counted_as_they_are_trained(plan, pairs, name, tmp_path):
    """Their tokens, the prompts of text encoders that see them, and compilations: as the prepared rows have them."""
    from ms_diffsynth.run.build import build_module
    from ms_diffsynth.run.pipeline import build_pipeline
    from ms_diffsynth.training.prepared import PreparedRows

    variant = ["--variant", "edit-2511"] if name == "qwen_image" else []
    assert main(["tiny", name, "model", *variant]) == 0
    given = dict(zip(pairs[::2], pairs[1::2], strict=True))
    config = load_config(None, {key.removeprefix("--"): str(value) for key, value in given.items()} | {
        "family": name, "model_paths": "model", "mode": "pynative"})
    sets = build_datasets(config)
    found = planning.plan_run(config, sets)
    pipe = build_pipeline(config)
    module = build_module(config, pipe)
    rows = PreparedRows(sets.instance, module, module.training_cut())
    shapes = [{slot: array.shape for slot, array in rows[row].slots.items()} for row in range(4)]
    assert found.work.further == max(shape["edit_latents"][0] for shape in shapes) == 2 * 10
    assert found.data.compilations == len({str(shape) for shape in shapes}) == 3
    if name == "qwen_image":
        assert found.work.text == max(shape["prompt_embeds"][0] for shape in shapes) == 512


def test_smaller_references_are_a_remedy(plan, pairs, checkout):
    flags = {"--edit_max_pixels": 4096 * 4096, "--device": "Ascend"}
    words = [word for pair in zip(pairs[::2], pairs[1::2]) for word in (pair[0], flags.get(*pair))]
    Image.new("RGB", (4096, 4096)).save(Path("pairs/3.png"))
    words = ("examples/flux/kontext_910b.yaml", "--offline", *words, "--card", 32)
    code, said, _ = plan(*words)
    remedy, peak = re.search(r"(?m)^  (--edit_max_pixels \d+) +([\d.]+) GiB$", said).groups()
    assert code == 69
    code, said, _ = plan(*words, *remedy.split())
    assert code == 0 and float(re.search(r"(?m)^fits: ([\d.]+)", said)[1]) <= float(peak) + 0.05


# -- downloads -------------------------------------------------------------------------------------------------------


def test_files_and_bytes_are_those_of_the_hub_and_nothing_is_downloaded(plan, checkout, monkeypatch, tmp_path):
    files = {"transformer/a.safetensors": b"x" * 300_000, "text_encoder/a.safetensors": b"x" * 200_000,
             "vae/a.safetensors": b"x" * 100_000, "README.md": b"x" * 50}
    with HubServer() as hub:
        hub.add("Qwen/Qwen-Image", files)
        only_this_machine(monkeypatch)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        code, said, err = plan(QWEN)
        assert code == 0, said + err
        assert "Qwen/Qwen-Image: 3 files, 0.6 MB; 0.6 MB of it are not here yet" in " ".join(said.split())
        assert not hub.downloads() and not (tmp_path / "cache").exists()


def test_the_settings_of_another_model_are_read_from_the_hub(plan, checkout, monkeypatch, tmp_path, tiny_model):
    folder = tiny_model("qwen_image")
    files = {f"{part}/{file}": (folder / part / file).read_bytes() for part, file in (
        ("transformer", "config.json"), ("transformer", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "config.json"), ("text_encoder", "model.safetensors"), ("vae", "config.json"),
        ("vae", "diffusion_pytorch_model.safetensors"))}
    with HubServer() as hub:
        hub.add("me/own", files)
        only_this_machine(monkeypatch)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        patterns = ",".join(f"me/own:{part}/*.safetensors" for part in ("transformer", "text_encoder", "vae"))
        code, said, err = plan(QWEN, "--model_id_with_origin_paths", patterns)
        assert code == 0, said + err
        assert sorted(hub.downloads()) == sorted(name for name in files if name.endswith("config.json"))
        weights = json.loads(files["transformer/config.json"])["num_layers"]
        assert weights == 2 and "LoRA of rank 16 of own" in said and "not counted" not in said


def test_what_is_not_known_is_not_hidden(plan, checkout):
    code, said, _ = plan(QWEN, "--offline", "--model_id_with_origin_paths",
                         "me/own:transformer/*.safetensors,Qwen/Qwen-Image:text_encoder/*.safetensors,"
                         "Qwen/Qwen-Image:vae/*.safetensors")
    text = " ".join(said.split())
    assert code == 0 and "me/own:transformer/*.safetensors: which model that is" in text
    assert "at least" in text and "fits as far as it is known" in text


# -- the page, the short form, and a run -----------------------------------------------------------------------------


def test_the_commands_of_the_page_run(plan, checkout):
    page = (ROOT / "docs/how_to/plan.md").read_text()
    commands = re.findall(r"(?m)^    ms-diffsynth plan (.+)$", page)
    assert len(commands) >= 4
    for command in commands:
        if "--measure" not in command:  # takes minutes: tests/debug/test_skeleton.py
            code, said, err = plan(*shlex.split(command))
            assert code in (0, 69) and not err, said + err
            if code == 69:  # as it is quoted
                quoted = re.search(r"(?m)^    (DOES NOT FIT.*\n(?:      --.*\n)+)", page)[1].replace("\n    ", "\n")
                assert said.endswith(quoted)


@pytest.mark.slow
def test_a_run_takes_what_was_planned(python, tiny_model, tmp_path):
    """Memory of the process, the cache, saved weights and checkpoints, each within 10 %."""
    data = ROOT / "examples/data/dreambooth_cat_fluent"
    words = {"family": "flux", "model_paths": tiny_model("flux"), "dataset_base_path": data, "dataset_metadata_path":
             data / "metadata.csv", "height": 128, "width": 128, "max_sequence_length": 32, "batch_size": 3,
             "max_train_steps": 4, "save_steps": 2, "output_path": "out", "cache_dir": "cache", "device": "CPU"}
    config = load_config(None, **{name: str(value) if isinstance(value, Path) else value for name, value in
                                  words.items()})
    found = planning.plan_run(config, build_datasets(config))
    done = python("-m", "ms_diffsynth.cli.main", "train", *(str(w) for name, value in words.items()
                                                           for w in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    assert planning.short_form(found) in done.stderr
    peak = re.findall(r"peak memory ([\d.]+) GiB", done.stderr)[-1]
    assert found.peak / GIB == pytest.approx(float(peak), rel=0.1)
    disk = {item.what.lstrip("0123456789 "): item.bytes for item in found.disk}
    written = {"cache": size_of(tmp_path / "cache/entries"),
               "files of weights": sum(f.stat().st_size for f in (tmp_path / "out").glob("step-*.safetensors")),
               "checkpoints": size_of(tmp_path / "out/checkpoints")}
    for what, size in written.items():
        assert disk[what] == pytest.approx(size, rel=0.1), what


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
