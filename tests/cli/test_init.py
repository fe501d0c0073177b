"""init: what it says of a folder, and that what it writes trains as it is."""
from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from odd_images import deep_png, saved
from PIL import Image

from ms_diffsynth import load_config
from ms_diffsynth.cli import init as init_command, look
from ms_diffsynth.config.bases import BASES, DEVICES
from ms_diffsynth.data import dataset
from ms_diffsynth.pipelines.flux2.prompt import klein_ids
from ms_diffsynth.pipelines.shared.text import CLIP_TOKENS
from ms_diffsynth.registry import family

ROOT = Path(__file__).parents[2]
TURNED = Image.Exif()
TURNED[0x0112] = 6
ODD = {  # name -> what the file holds
    "a.png": lambda: saved(shape(96, 96, 0)), "again.bmp": lambda: saved(shape(96, 96, 0), "BMP"),
    "b.jpg": lambda: saved(shape(96, 64, 1), "JPEG"),
    "turned.jpg": lambda: saved(shape(96, 64, 2), "JPEG", exif=TURNED),
    "ink.jpg": lambda: saved(shape(64, 96, 3).convert("CMYK"), "JPEG"),
    "c.webp": lambda: saved(shape(80, 80, 4), "WEBP"), "d.gif": lambda: saved(shape(64, 64, 5).quantize(16), "GIF"),
    "e.bmp": lambda: saved(shape(72, 100, 6), "BMP"), "f.tiff": lambda: saved(shape(120, 80, 7), "TIFF"),
    "grey.png": lambda: saved(shape(90, 90, 8).convert("L")), "clear.png": lambda: saved(clear(shape(96, 96, 9))),
    "deep.png": lambda: deep_png(np.arange(80 * 80, dtype=np.uint16).reshape(80, 80, 1) * 10)}
CAPTIONED = ("a", "b", "turned", "c", "d", "e", "grey")


def shape(width, height, seed):
    """A disc of one colour on another."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3), np.uint8)
    y, x = np.indices((height, width))
    disc = (x - width / 2) ** 2 + (y - height / 2) ** 2 < min(height, width) ** 2 / 9
    return Image.fromarray(colours[disc.astype(int)])


def clear(image):
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.fixture
def odd(tmp_path):
    """Twelve images, two of them the same, five without a caption."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, make in ODD.items():
        (folder / name).write_bytes(make())
    for name in CAPTIONED:
        (folder / f"{name}.txt").write_text(f"a drawing of {name}")
    return folder


@pytest.fixture
def init(run, emoji_flux):
    """``init(word, ...)``: the report, its spaces made one."""
    def call(*words, code=0):
        found, out, err = run("init", *words)
        assert found == code, out + err
        return " ".join((out + err).split())

    return call


def folder_of(path, count=2, caption="a thing", size=(64, 64)):
    path.mkdir(parents=True)
    for k in range(count):
        shape(*size, seed=hash(str(path)) % 1000 + k).save(path / f"{k}.png")
        if caption:
            (path / f"{k}.txt").write_text(f"{caption} {k}")
    return path


# -- the twelve odd images ---------------------------------------------------------------------------------------------


def test_three_commands_and_no_edit_from_twelve_odd_images_to_a_lora(init, run, odd):
    said = init("odd")
    page = (ROOT / "docs/get_started/your_images.md").read_text()
    shown = " ".join(re.search(r"```text\n(images .*?)```", page, re.DOTALL)[1].split())
    assert said.startswith(shown) and "duplicates 1, trained on like the others: again.bmp is a.png" in shown
    train, sample = (shlex.split(line) for line in re.findall(r"ms-diffsynth (.*?)(?= ms-diffsynth|$)", said))
    assert train == ["train", "odd.yaml"] and sample[:2] == ["sample", "emoji-flux"]
    short = ["--max_train_steps", 4, "--save_steps", 4, "--mode", "pynative", "--num_inference_steps", 1]
    assert run(*train, *short)[0] == 0 and Path("runs/odd/samples/before_after.png").is_file()
    sample[sample.index("--lora") + 1] = "runs/odd/step-4.safetensors"
    code, out, _ = run(*sample, "--mode", "pynative", "--num_inference_steps", 1)
    assert code == 0 and Image.open(out.split()[0]).size == (64, 64)


def test_three_commands_from_pairs_to_a_lora_that_edits(init, run, tmp_path, tiny_model):
    """By folders; the model is a tiny one instead of the hub's."""
    folder_of(tmp_path / "pairs")
    folder_of(tmp_path / "pairs/before", caption="")
    said = init("pairs", "--base", "flux1-kontext", "--edit_folders", "before")
    assert "references 2 of 2 rows have references, 1 each; these for example before/0.png -> 0.png" in said
    assert "training LoRA for editing of rank 16" in said
    login, train, sample = (shlex.split(line, comments=True) for line in
                            re.findall(r"(?:ms-diffsynth|hf) (.*?)(?= ms-diffsynth|$)", said.partition("Next: ")[2]))
    assert login == ["auth", "login"] and train == ["train", "pairs-flux1-kontext.yaml"]
    assert sample[:3] == ["sample", "--run", "runs/pairs-flux1-kontext"]
    assert sample[-2:] == ["--edit_image", "pairs/before/0.png"]
    here = ["--model_id_with_origin_paths", "null", "--model_paths", tiny_model("flux"), "--device", "CPU",
            "--max_train_steps", 2, "--save_steps", 2, "--mode", "pynative", "--max_sequence_length", 8]
    code, _, err = run(*train, *here)
    assert code == 0 and "2 of 2 rows have references" in err, err
    code, out, err = run(*sample, "--mode", "pynative", "--device", "CPU", "--num_inference_steps", 1)
    assert code == 0 and Image.open(out.split()[0]).size == (64, 64), err


def test_a_base_that_edits_needs_references_and_another_does_not_use_them(init, odd, tmp_path):
    said = init("odd", "--base", "qwen-image-edit", code=64)
    assert "Qwen-Image-Edit-2511 learns to edit, and there are no reference images: expected metadata with" in said
    folder_of(tmp_path / "pairs", caption="")
    rows_for(tmp_path / "pairs", "edit")
    said = init("pairs", "--base", "flux1-dev")
    assert "edit_image is not used: the bases that are trained to edit are flux2-klein, flux1-kontext, qwen-" in said


def test_a_note_is_said_once_and_the_folders_of_the_page_are_read(init, tmp_path):
    words = re.search(r"ms-diffsynth init (.*)", (ROOT / "docs/how_to/editing.md").read_text())[1].split()
    folder_of(tmp_path / "pairs/after")
    for name, count in (("before", 3), ("style", 2)):
        folder_of(tmp_path / "pairs" / name, count, caption="")
    assert init(*words).count("references without an image of that name, and not used: 'before/2.png'.") == 1


@pytest.mark.slow
def test_the_three_commands_as_they_are_typed(init, run, odd):
    commands = [shlex.split(line) for line in re.findall(r"ms-diffsynth (.*?)(?= ms-diffsynth|$)", init("odd"))]
    for command in commands:
        assert run(*command)[0] == 0, command
    assert len(list(Path("samples").iterdir())) == 1


def test_sizes_that_are_said_are_those_that_are_trained(init, run, odd, caplog):
    said = re.search(r"trained at (.*?) base", init("odd"))[1]
    caplog.set_level(logging.INFO)
    code, _, _ = run("train", "odd.yaml", "--max_train_steps", 1, "--mode", "pynative", "--sample_prompts", "[]")
    found = re.search(r"images: \d sizes in pixels, height x width: (.*)\.", caplog.text)
    assert code == 0 and " ".join(found[1].split()) == said


def test_a_damaged_image_is_named_and_nothing_is_written(init, odd, monkeypatch):
    content = bytearray((odd / "grey.png").read_bytes())
    content[len(content) // 2] ^= 255  # inside the compressed pixels
    (odd / "grey.png").write_bytes(content)
    first = init("odd", code=65)
    monkeypatch.setattr(dataset, "DECODED_AT_ONCE", 0)  # as of many images, whose pixels init alone looks at
    assert first == init("odd", code=65) and "row 10 (grey.png): image='grey.png': odd/grey.png cannot be d" in first
    assert not Path("odd.yaml").exists()


def test_of_very_many_images_the_files_are_compared(init, odd, monkeypatch):
    monkeypatch.setattr(look, "MOST_DECODED", 0)
    (odd / "copy.jpg").write_bytes((odd / "b.jpg").read_bytes())
    said = init("odd")
    assert "duplicates 1, trained on like the others: copy.jpg is b.jpg, by the bytes of their files" in said
    assert "formats" not in said and "sizes 8" in said


# -- captions, triggers, folders --------------------------------------------------------------------------------------


def test_a_trigger_word(init, odd):
    (odd / "a.txt").write_text("a drawing of SKS")
    said = init("odd", "--trigger", "sks")
    assert '"sks", put in front of 6 prompts' in said and "sks, a drawing of turned" in said
    config = load_config("odd.yaml")
    assert (config.data.trigger_word, config.data.instance_prompt) == ("sks", "a 3d render of sks")
    assert all("sks" in prompt.lower() for prompt in config.run.sample_prompts)


def test_images_without_any_caption_get_the_trigger(init, tmp_path):
    folder_of(tmp_path / "cats", caption="")
    init("cats", "--trigger", "sks cat")
    data = load_config("cats.yaml").data
    assert data.instance_prompt == "a 3d render of sks cat" and data.trigger_word is None


def test_a_peak_is_not_that_of_other_settings(init, odd):
    assert "more or less with --batch_size, --lora_rank" in init("odd", "--base", "flux1-dev", "--batch_size", 4,
                                                                 "--lora_rank", 64, "--height", 1024, "--width", 1024)
    assert load_config("odd-flux1-dev.yaml").run.max_train_steps == 800  # twelve images in fours, a hundred times: 300


def test_captions_that_are_cut_are_told(init, tmp_path):
    folder_of(tmp_path / "cats", caption="a cat " * 10)
    assert "2 of 2 prompts are longer than the 16 tokens that emoji-flux reads, and lose their end" in init("cats")


def test_several_folders_with_repeats(init, tmp_path, run):
    for name, count in (("x/cats", 2), ("x/dogs", 3), ("x/other", 1)):
        folder_of(tmp_path / name, count)
    said = init("x/cats=10", "x/dogs")
    assert "folders cats: 2 images, shown 10 times an epoch; dogs: 3 images, shown once an epoch" in said
    data = load_config("cats-dogs.yaml").data
    assert (data.dataset_base_path, data.dataset_folders) == ("x", ("cats=10", "dogs=1"))
    assert "DIR has '.=1': expected a folder inside" in init("x", "x/cats", code=64)
    assert "absent is not a folder: expected a folder of images. Correct the path." in init("absent", code=65)


def test_names_of_folders_as_kohyas_scripts_have_them(init, tmp_path):
    for name, caption in (("set/10_sks cat", ""), ("set/1_cat", "a cat")):
        folder_of(tmp_path / name, caption=caption)
    assert '2 without one use "a 3d render of sks"' in init("set")
    data = load_config("set.yaml").data
    assert data.dataset_folders == ("10_sks cat=10", "1_cat=1") and data.dataset_base_path == "set"
    assert 'use "sks cat"' in init("set/10_sks cat", "--output", "one.yaml")
    assert load_config("one.yaml").data.dataset_folders == ("10_sks cat=10",)


def test_metadata_and_settings_of_train(init, tmp_path):
    folder = folder_of(tmp_path / "cats", caption="")
    (folder / "metadata.csv").write_text("file_name,text,caption\n0.png,one,a\n1.png,two,b\n")
    assert "caption_column=text" in init("cats", code=65)
    said = init("cats", "--caption_column", "caption", "--lora_rank", 4, "--max_train_steps", 70)
    assert "captions 2 of 2 in cats/metadata.csv" in said and "rank 4, 70 steps" in said
    config = load_config("cats.yaml")
    assert (config.data.caption_column, config.model.lora_rank, config.run.max_train_steps) == ("caption", 4, 70)
    assert "3 epochs of 3 images a step" in init("cats", "--caption_column", "text", "--num_epochs", 3, "--output", "e")
    assert (load_config("e").run.max_train_steps, load_config("e").run.save_steps) == (None, None)
    assert "--lora_rank" in init("cats", "--lora_rnk", 4, code=64)
    assert "lora_rank=0" in init("cats", "--lora_rank", 0, "--caption_column", "caption", "--output", "b", code=64)


# -- what is written ------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(init, odd):
    Path("odd.yaml").write_text("mine")
    said = init("odd", code=74)
    assert said == "OutputError: odd.yaml exists already, and is kept. Choose another name by --output, or remove it."
    assert Path("odd.yaml").read_text() == "mine"
    Path("runs/b").mkdir(parents=True)
    init("odd", "--output", "b.yaml")
    assert load_config("b.yaml").run.output_path == "runs/b-2"


CASES = [(name, job, memory) for name, base in BASES.items() for job, fits in base.fits.items() for memory in fits]
CASES += [("emoji-flux", "lora", None), ("emoji-flux", "dreambooth", None)]


def rows_for(folder, job):
    """What a job is told: class images, edit images or template inputs."""
    if job == "dreambooth":
        folder_of(folder.parent / "classes", caption="a cat")
        return ["--class_base_path", "classes"]
    if job in ("edit", "template"):
        further = {"edit": {"edit_image": "0.png"}, "template": {"template_inputs": {"scale": 0.5}}}[job]
        (folder / "metadata.jsonl").write_text("".join(
            json.dumps({"image": f"{k}.png", "prompt": "a", **further}) + "\n" for k in range(2)))
    return ["--template_model_id_or_path", "template"] if job == "template" else []


@pytest.mark.parametrize("name, job, memory", CASES)
@pytest.mark.few(10)
def test_every_file_loads_and_fits_its_device_by_the_table_of_peaks(init, tmp_path, name, job, memory):
    folder = folder_of(tmp_path / "cats", caption="" if job in ("edit", "template") else "a thing", size=(1024, 1024))
    words = rows_for(folder, job) + (["--device-memory", memory] if memory else [])
    said = init("cats", "--base", name, *words, "--output", "c.yaml")
    text, config = Path("c.yaml").read_text(), load_config("c.yaml")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert 15 <= len(lines) <= 25 and max(map(len, text.splitlines())) <= 120
    assert config.objective.with_prior_preservation == (job == "dreambooth")
    assert config.data.extra_inputs == {"edit": "edit_image", "template": "template_inputs"}.get(job)
    base = BASES[name]
    if memory is None:
        return
    kind = (", 8 bits" if config.model.fp8_models else "") + {
        "edit": ", 1 reference", "template": ", template", "dreambooth": ", 2 images"}.get(job, "")
    recompute = "yes" if config.model.use_gradient_checkpointing else "no"
    row = re.search(rf"^\| {re.escape(base.title + kind)}[ *(][^|]*\| 1024 \| {recompute} \| [\d.]+ \| \**([\d.]+)",
                    (ROOT / "docs/reference/memory.md").read_text(), re.MULTILINE)
    peak = base.fits[job][memory].peak
    assert float(row[1]) == peak and f"{peak:.1f} GiB in a step" in text and f"{peak:.1f} GiB in a" in said
    assert peak + (0 if config.data.cache_dir else base.encoders) < DEVICES[memory] - 2  # of which CANN takes some


def test_the_page_has_the_table():
    page = (ROOT / "docs/get_started/your_images.md").read_text()
    for name, base in BASES.items():
        for job, fits in base.fits.items():
            cells = []
            for fit in filter(None, (fits[64], fits.get(32))):
                how = ", ".join(["8 bits"] * fit.is_8bit + ["recompute"] * fit.recompute)
                cells.append(f"{fit.peak:.1f}" + (f" ({how})" if how else ""))
            assert f"| `{name}` | {init_command.JOBS[job]} | {' | '.join([*cells, 'does not fit'][:2])} |" in page


@pytest.mark.parametrize("words, expected", [
    (["--base", "flux1"], "base=flux1: expected one of emoji-flux, flux1-dev,"),
    (["--device-memory", "32"], "device-memory=32: emoji-flux fits every device. Remove it."),
    (["--base", "qwen-image", "--device_memory", "48"], "device-memory=48: expected 64 or 32, GB of an Ascend 910B."),
    (["--base", "flux2-dev", "--device-memory", "32"], "a LoRA of FLUX.2-dev takes 37.0 GiB, expected"),
    (["--base", "flux2-dev", "--class_base_path", "odd", "--class_prompt", "a"], "no preset for a DreamBooth LoRA"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_meant(init, odd, words, expected):
    assert expected in init("odd", *words, code=64) and not list(Path().glob("*.yaml"))


def test_class_images_without_captions(init, odd, tmp_path):
    folder_of(tmp_path / "classes", caption="")
    assert "or set class_prompt" in init("odd", "--class_base_path", "classes", code=65)
    init("odd", "--class_base_path", "classes", "--trigger", "sks cat")
    assert load_config("odd.yaml").data.class_prompt == "a 3d render of cat"


def test_it_imports_no_framework(python, odd, emoji_flux):
    code = ("import sys\nfrom pathlib import Path\nfrom ms_diffsynth.hub import bundled\n"
            f"bundled.FOLDER = Path({str(emoji_flux.parent)!r})\nfrom ms_diffsynth.cli.main import main\n"
            "code = main(['init', 'odd'])\nsys.exit(code or int('mindspore' in sys.modules))")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "wrote odd.yaml" in done.stdout


# -- the table of bases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_what_the_table_says_of_a_family_is_so(name):
    base, pipeline = BASES[name], family(BASES[name].family).pipeline
    assert pipeline.division_factor == base.division_factor
    assert base.tokens == 16 or base.tokens == getattr(pipeline, "max_sequence_length", CLIP_TOKENS)
    assert base.settings.keys() <= load_config(family="toy", dataset_base_path=".", num_epochs=1).flat().keys()


def test_what_the_bundled_model_says_is_what_the_table_says():
    from ms_diffsynth.hub import bundled

    if "emoji-flux" not in bundled.names():
        pytest.skip("this checkout has no emoji-flux")
    says = json.loads((bundled.FOLDER / "emoji-flux/sampling_config.json").read_text())
    base = BASES["emoji-flux"]
    assert (says["height"], says["width"], says["max_sequence_length"]) == (base.side, base.side, base.tokens)


@pytest.mark.parametrize("name", ["flux1-dev", "sd3.5-medium", "qwen-image", "flux2-klein", "sdxl", "z-image",
                                  "flux1-kontext", "qwen-image-edit"])
@pytest.mark.few(1)
def test_tokens_are_counted_as_the_pipeline_reads_them(tiny_model, name):
    base = BASES[name]
    pipe = family(base.family).pipeline.from_pretrained(str(tiny_model(base.family)))
    for prompt in ("a photo of sks", "a cat, \u201cquoted\u201d", "猫", "<think> a", ""):
        counted = look.count_tokens([prompt], base)[prompt]
        if base.tokenizer == "t5":
            tokenizer = pipe.tokenizer_2 if base.family == "flux" else pipe.tokenizer_3
            assert counted == len(tokenizer(prompt).input_ids)
        elif base.tokenizer == "clip":
            assert counted == len(pipe.tokenizer_1(prompt).input_ids)
        elif base.family == "flux2":
            assert abs(counted - len(klein_ids(pipe.tokenizer, prompt))) <= ("think" in prompt) * 2
        else:
            ids = pipe.run(pipe.build_units()[:1], {"prompt": prompt})["prompt_ids"]
            is_counted_apart = name == "z-image" and "<think>" in prompt  # one token of Qwen3's
            assert abs(counted - ids.shape[1]) <= 2 * is_counted_apart
