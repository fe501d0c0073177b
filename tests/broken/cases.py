"""The cases: areas, and in each what is broken and which command meets it. Case k of a seed is always the same."""
from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from breaking import TEXTS, break_file, broken_bytes, broken_json, value

from ms_diffsynth.config.settings import SETTINGS

PYNATIVE = ["--mode", "pynative"]
SMALL = ["--height", "32", "--width", "32", "--num_inference_steps", "1", *PYNATIVE]


@dataclass
class Case:
    """One command on one broken thing.

    Attributes:
        names: one of these is in an error's message, which names so what is wrong.
        prepare: breaks files in the folder of the case, with the randomness it is given; returns what it did.
        environment: for the child. stdout: "file", "closed", "full", "pipe" (whose reader is gone), or an encoding.
    """

    area: str
    words: list[str]
    names: list[str]
    needs: tuple[str, ...] = ("models/toy", "data", "toy.yaml")
    prepare: Callable[[random.Random], str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = "file"


def text_for(random: random.Random, name: str) -> str:
    """A value for a setting: mostly one that cannot be meant, sometimes one near its range."""
    found = SETTINGS.get(name)
    if found is not None and found.metadata["choices"] and random.random() < 0.2:
        return random.choice(found.metadata["choices"])
    if found is not None and found.kind in (int, float) and random.random() < 0.3:
        bounds = [float(w) for w in found.metadata["range"].split() if re.fullmatch(r"-?[\d.e+-]+", w)] or [0]
        bound, beyond = random.choice(bounds), random.choice((-1, 0, 1))
        if name in ("max_train_steps", "num_epochs") and bound > 1:
            beyond = 1  # what is not refused is trained for that long
        bound += beyond
        return str(int(bound) if found.kind is int else bound)
    return random.choice(TEXTS)


def raw(text: str) -> bytes:
    """The bytes of a text, also of one that stands for bytes that are not UTF-8, or has half a pair."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def no_nul(words: list[str]) -> list[str]:
    """Arguments a shell can pass."""
    return [word.replace("\0", "") for word in words]


def settings_as_flags(random: random.Random) -> Case:
    names = random.sample(list(SETTINGS), random.choice((1, 1, 1, 2, 3)))
    words = [w for n in names for w in (f"--{n}", text_for(random, n))]
    said = [*names, "does not know"]  # a value that begins like a flag
    command = random.choice(["train"] * 5 + ["describe"] * 3 + ["launch"])
    if command == "launch":
        return Case("settings", no_nul(["launch", "--workers", "2", "train", "toy.yaml", *words]), [*said, "launch"])
    return Case("settings", no_nul([command, "toy.yaml", *words]), said)


YAML = ["{a: 1}", "[1, [2]]", "!!set {a, b}", "!!binary eA==", "!!python/name:os.system", "*a", "&a [*a]", "? x",
        "2026-01-01", "!!float x",
        '"\\U00110000"', '"\\ud800"', '"\\x00"', "'", "|\n      a\n      b", ">-\n      x", "[a, b", "{", "!x y",
        "!!int 5", "- a", "@", "%", "`", "yes", "0o17",
        "1:30", ".inf", ".nan", "<<: *x", "\t5", "\u00a05", "'5'", '"5"', "!!null", "!!bool maybe", "[null]", "[~, a]",
        "!!omap [a: 1]", "# nothing"]


def settings_in_yaml(random: random.Random) -> Case:
    name = random.choice(list(SETTINGS))
    text = random.choice(YAML) if random.random() < 0.6 else json.dumps(text_for(random, name))

    def prepare(random: random.Random) -> str:
        section = SETTINGS[name].section if random.random() < 0.9 else random.choice(["model", "x", "", "run", "[a]"])
        lines = [line for line in Path("toy.yaml").read_text().splitlines() if not line.strip().startswith(f"{name}:")]
        at = lines.index(f"{section}:") + 1 if f"{section}:" in lines else len(lines)
        added = [f"  {name}: {text}"] if at < len(lines) else [f"{section}:", f"  {name}: {text}"]
        lines[at:at] = added * random.choice((1, 1, 1, 2))
        Path("c.yaml").write_bytes(raw("\n".join(lines)))
        return f"{name}: {text[:60]}"

    return Case("settings", [random.choice(("train", "train", "describe")), "c.yaml"], [name, "c.yaml"],
                prepare=prepare)


def yaml_bytes(random: random.Random) -> Case:
    def prepare(random: random.Random) -> str:
        path = Path("toy.yaml")
        if random.random() < 0.3:
            return break_file(random, path, [Path("rows.csv"), Path("lora.safetensors")])
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(broken_bytes(random, data))
        return "bytes"

    names = ["toy.yaml", *SETTINGS, "section"]
    return Case("yaml bytes", [random.choice(("train", "describe")), "toy.yaml"], names, prepare=prepare,
                needs=("models/toy", "data", "toy.yaml", "rows.csv", "lora.safetensors"))


LOOK = ["init", "data", "--base", "flux1-dev"]  # reads what train reads, and more of it


def metadata(random: random.Random) -> Case:
    file = random.choice(("rows.csv", "rows.json", "rows.jsonl"))

    def prepare(random: random.Random) -> str:
        path = Path(file)
        if random.random() < 0.6 and file != "rows.csv":
            rows = [{"image": "000.png", "prompt": "a cat"}, {"image": "001.png", "prompt": "a dog"}]
            data = broken_json(random, rows if file == "rows.json" else rows[0])
            path.unlink()
            path.write_bytes(data)
            return "json"
        if random.random() < 0.5:
            cell = random.choice(TEXTS).replace("\n", " ")
            row = random.choice((f"{cell},a cat\n", f"000.png,{cell}\n", f'000.png,"{cell}\n', f"000.png,a,{cell}\n"))
            path = path.with_suffix(".csv")
            path.unlink(missing_ok=True)
            path.write_bytes(raw("image,prompt\n" + row))
            return "cell"
        return break_file(random, path, [Path("photo.jpg"), Path("toy.yaml")])

    words = [*random.choice((["train", "toy.yaml"],) * 3 + (LOOK,)), "--dataset_metadata_path", file]
    return Case("metadata, captions", words, [file, "dataset_metadata_path", "data", "rows."], prepare=prepare,
                needs=("models/toy", "data", "toy.yaml", "photo.jpg", "rows.csv", "rows.json", "rows.jsonl"))


def captions(random: random.Random) -> Case:
    def prepare(random: random.Random) -> str:
        path = Path("data/001.txt")
        if random.random() < 0.4:
            return break_file(random, path, [Path("photo.jpg")])
        path.unlink()
        text = random.choice(TEXTS)
        path.write_bytes(raw(text))
        return repr(text[:40])

    words = random.choice((["train", "toy.yaml"],) * 2 + (LOOK,))
    return Case("metadata, captions", words, ["001", "data"], prepare=prepare,
                needs=("models/toy", "data", "toy.yaml", "photo.jpg"))


def images(random: random.Random) -> Case:
    def prepare(random: random.Random) -> str:
        path = Path(random.choice(("data/001.png", "data/001.png", "photo.jpg")))
        if path.name == "photo.jpg":
            data = path.read_bytes()
            Path("data/001.jpg").write_bytes(broken_bytes(random, data))
            Path("data/001.png").unlink()
            return "jpg"
        if random.random() < 0.3:
            return break_file(random, path, [Path("photo.jpg"), Path("toy.yaml")])
        from io import BytesIO

        from PIL import Image
        path.unlink()
        stream = BytesIO()
        mode, size = random.choice(("1", "L", "P", "RGBA", "I;16", "CMYK", "F", "LA")), random.choice(
            ((1, 1), (1, 3000), (4000, 1), (40, 40), (9000, 9000)))
        suffix = random.choice(("png", "tiff", "gif", "webp", "bmp", "jpeg"))
        try:
            Image.new(mode, size).save(stream, suffix)
        except (OSError, ValueError, KeyError):
            Image.new("RGB", (3, 3)).save(stream, "png")
        path.write_bytes(stream.getvalue() if random.random() < 0.5 else broken_bytes(random, stream.getvalue()))
        return f"{mode} {size} {suffix}"

    train = ["train", "toy.yaml"]
    words = random.choice((train, train, [*train, "--validation_share", "0.3", "--validation_steps", "1"], LOOK))
    return Case("images", words, ["001", "data"], prepare=prepare,
                needs=("models/toy", "data", "toy.yaml", "photo.jpg"))


def _break_in(random: random.Random, folder: str, configs: float = 0.55) -> str:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    wanted = [path for path in files if path.suffix == ".json"] if random.random() < configs else files
    path = random.choice(wanted or files)
    if random.random() < 0.06:
        import shutil
        shutil.rmtree(path.parent)
        if random.random() < 0.5:
            path.parent.write_text("x")
        return f"{path.parent} gone"
    return f"{path}: {break_file(random, path, files)}"


PARTS = ["config.json", "model_index.json", "tokenizer", "text_encoder", "vae", "transformer", "unet", "scheduler",
         "models/",
         "model_paths", "diffusion_pytorch_model", "model.safetensors", "vocab", "merges"]


def toy_model(random: random.Random) -> Case:
    words = random.choice((["train", "toy.yaml"], ["sample", "toy", "models/toy", "--prompt", "x", *SMALL],
                           ["describe", "toy.yaml"],
                           ["train", "toy.yaml", "--model_paths",
                            '["models/toy/vae", "models/toy/transformer", "models/toy/text_encoder"]']))
    return Case("model folder (toy)", words, PARTS, prepare=lambda random: _break_in(random, "models/toy"))


def real_model(random: random.Random) -> Case:
    family = random.choice(("flux", "flux2", "qwen_image", "sd3", "sdxl", "wan", "z_image", "ddpm_unet", "ddpm_unet"))
    words = ["sample", family, f"models/{family}", "--num_inference_steps", "1", *PYNATIVE]
    if family == "ddpm_unet":
        words += ["--count", "1"] if random.random() < 0.7 else []
        if random.random() < 0.4:
            words = ["train", "toy.yaml", "--family", family, "--model_paths", f"models/{family}",
                     "--trainable_models", "unet"]
    elif random.random() < 0.25:
        words = ["describe", "toy.yaml", "--family", family, "--model_paths", f"models/{family}"]
    else:
        words += ["--prompt", "a cat", "--height", "32", "--width", "32"]
    return Case("model folders (real families)", words, PARTS, needs=(f"models/{family}", "data", "toy.yaml"),
                prepare=lambda random: _break_in(random, f"models/{family}", 0.7))


def base_file(random: random.Random) -> Case:
    """Models in their publisher's names, converted and sampled; and the pipeline that a run of a network leaves."""
    where, words = random.choice((
        ("single", ["convert", "single", "out", "--to", "diffusers"]),
        ("single", ["convert", "single", "out", "--to", "diffusers", "--family",
                    random.choice(("flux", "sd3", "toy"))]),
        ("models/flux/transformer", ["convert", "models/flux/transformer", "out.safetensors", "--to", "original"]),
        ("models/sd3", ["convert", "models/sd3", "out.safetensors", "--to", "original"]),
        ("models/flux2", ["convert", "models/flux2/vae", "out.safetensors", "--to", "original"]),
        ("whole.safetensors", ["convert", "whole.safetensors", "out", "--to", "diffusers", "--family", "flux"]),
        ("single", ["sample", "flux", "single", "--prompt", "x", *SMALL]),
        ("runs/whole/model", ["sample", "runs/whole/model", "--prompt", "x", "--height", "32", "--width", "32",
                              "--num_inference_steps", "1", *PYNATIVE])))

    def prepare(random: random.Random) -> str:
        if Path(where).is_file():  # it is of no published model: refused, broken or not
            return break_file(random, Path(where), [Path("toy.yaml")])
        return _break_in(random, where, 0.4)

    return Case("base files", words, [*PARTS, "single", "whole.safetensors", "runs/whole", "out", "family"],
                prepare=prepare, needs=("single", "whole.safetensors", "models/flux", "models/sd3", "models/flux2",
                                        "runs/whole", "toy.yaml"))


def lora(random: random.Random) -> Case:
    file = random.choice(("lora.safetensors", "lora.safetensors", "dora.safetensors", "full.safetensors"))
    words = random.choice((
        ["train", "toy.yaml", "--lora_checkpoint", file], ["sample", "toy", "models/toy", "--prompt", "x", *SMALL,
                                                           "--lora", file],
        ["sample", "toy", "models/toy", "--prompt", "x", *SMALL, "--weights", file],
        ["train", "toy.yaml", "--lora_checkpoint", file, "--adapter", "dora"]))
    others = [Path("full.safetensors"), Path("models/toy/vae/diffusion_pytorch_model.safetensors"), Path("toy.yaml")]
    return Case("LoRA files", words, [file, "lora_checkpoint"],
                prepare=lambda random: break_file(random, Path(file), others),
                needs=("models/toy", "data", "toy.yaml", "lora.safetensors", "dora.safetensors", "full.safetensors"))


def runs(random: random.Random) -> Case:
    resume = ["train", "toy.yaml", "--output_path", "runs/run", "--save_steps", "1", "--max_train_steps", "4"]
    kind = random.choice(("resume", "resume", "replay", "replay", "cache", "cache", "script", "folder"))
    if kind == "script":
        return _script(random)
    if kind == "resume":
        words, where = [*resume, "--resume", random.choice(("auto", "auto",
                                                            "runs/run/checkpoints/step-00000002"))], "runs/run"
    elif kind == "replay":
        words, where = ["replay", "runs/run", random.choice(("3", "3", "2", "1", "9", "0"))], "runs/run"
    elif kind == "cache":
        words, where = random.choice((["cache", "inspect", "cache"], ["cache", "prune", "cache"],
                                      ["train", "toy.yaml", "--cache_dir", "cache"],
                                      ["train", "toy.yaml", "--task", "sft:train", "--dataset_base_path",
                                       "cache"])), "cache"
    else:
        words, where = random.choice((["push", "runs/run", "--hub_model_id", "a/b", "--dry_run"],
                                      ["evaluate", "--generated", "runs/run", "--reference", "data"],
                                      resume)), "runs/run"

    def prepare(random: random.Random) -> str:
        if random.random() < 0.06:
            folder = Path(where)
            folder.chmod(random.choice((0, 0o444, 0o111)))
            return "permissions"
        return _break_in(random, where, 0.4)

    return Case("checkpoints, runs, caches", words,
                ["runs/run", "cache", "step-0", "generated", "config.yaml", "training_args.json", "loss.csv",
                 "events.jsonl", *SETTINGS],
                prepare=prepare, needs=("models/toy", "data", "toy.yaml", "runs/run", "cache"))


def _script(random: random.Random) -> Case:
    def prepare(random: random.Random) -> str:
        import numpy as np

        from ms_diffsynth.errors import UserError
        from ms_diffsynth.storage.checkpoint import save_checkpoint
        sound = Path("runs/run/checkpoints/step-00000003")
        state = json.loads((sound / "state.json").read_text())
        for _ in range(random.choice((1, 2, 3))):
            key = random.choice([*state, "x"])
            if random.random() < 0.2:
                state.pop(key, None)
            else:
                state[key] = value(random)
        groups = {}
        for name in ("weights", "moments", "pictures"):
            from ms_diffsynth.formats.weights import load_state_dict
            groups[name] = dict(load_state_dict(sound / f"{name}.safetensors"))
        if random.random() < 0.4:
            groups[random.choice(list(groups))] = random.choice(({}, {"a": np.zeros(2)},
                                                                 {"a": np.zeros((2, 2), np.int64)}))
        try:
            save_checkpoint("own", 3, groups, state)
        except (UserError, UnicodeEncodeError):
            save_checkpoint("own", 3, groups, {})
        return str(state)[:80]

    return Case("checkpoints, runs, caches",
                ["train", "toy.yaml", "--output_path", "runs/y", "--resume", "own/step-00000003", "--max_train_steps",
                 "4"],
                ["own/step-0", "state", "resume"], prepare=prepare,
                needs=("models/toy", "data", "toy.yaml", "runs/run"))


FLAGS = {
    "sample": ["prompt", "count", "weights", "negative_prompt", "lora", "lora_scale", "template", "template_inputs",
               "negative_template_inputs",
               "trust_template_sha256", "height", "width", "seed", "num_inference_steps", "sampler", "cfg_scale",
               "embedded_guidance",
               "max_sequence_length", "mode", "device", "output"],
    "launch": ["workers", "log_dir", "hang_seconds", "compile_seconds", "grace_seconds", "start_seconds", "nodes",
               "node_rank", "master_address",
               "master_port"],
    "evaluate": ["generated", "reference", "output", "seed"], "push": ["hub_model_id", "hub", "files", "message"],
    "parity": ["mode", "device", "dtype", "report"], "tiny": ["seed"], "replay": [], "cache": [],
    "template": ["trust_template_sha256"], "convert": ["to", "family"],
    "train": ["x"], "describe": ["x"]}
POSITIONAL = {
    "sample": ["FAMILY", "family", "MODEL"], "tiny": ["FAMILY", "family", "DIR"], "replay": ["RUN", "step"],
    "cache": ["action", "DIR"], "push": ["FOLDER"], "convert": ["IN", "OUT", "--to", "output", "family"],
    "parity": ["DIR"], "template": ["ACTION", "TEMPLATE", "CHECKPOINT", "OUTPUT"]}
SOUND = {
    "sample": ["toy", "models/toy"], "tiny": ["toy", "new"], "replay": ["runs/run", "3"], "cache": ["inspect", "cache"],
    "push": ["runs/run"], "parity": ["cases/flux"], "template": ["pack", "template", "full.safetensors", "packed"],
    "evaluate": [], "launch": [], "convert": ["models/flux/vae", "out.safetensors"],
    "train": ["toy.yaml"], "describe": ["toy.yaml"]}
ALWAYS = {"sample": SMALL, "parity": PYNATIVE, "push": ["--dry_run", "--hub_model_id", "a/b"],
          "convert": ["--to", "original"], "evaluate": ["--generated", "data", "--reference", "classes"],
          "launch": ["--workers", "2"], "template": ["--trust_template_code"]}


def commands(random: random.Random) -> Case:
    command = random.choice(["sample"] * 6 + [c for c in FLAGS if c != "parity"] + ["launch"] * 2 + ["parity"])
    given, words = list(SOUND[command]), list(ALWAYS.get(command, []))
    names = [*FLAGS[command], *POSITIONAL.get(command, []), "ms-diffsynth"]
    if command == "sample":
        family = random.choice(("toy", "toy", "toy", "ddpm_unet"))
        given = [family, f"models/{family}"]
        words += ["--prompt", "x"] if family == "toy" else ["--count", "1"]
    broken = []
    if given and random.random() < 0.35:
        k = random.randrange(len(given))
        given[k] = random.choice(TEXTS)
        broken.append(given[k][:30])
    for _ in range(random.choice((0, 1, 1, 2)) if given != SOUND[command] else random.choice((1, 1, 2))):
        if FLAGS[command]:
            name = random.choice(FLAGS[command])
            words += [f"--{name}", random.choice(TEXTS) if random.random() < 0.8
                      else str(random.choice((-1, 0, 1, 7, 16384, 65536, 10**9)))]
    needs = ("models/toy", "models/ddpm_unet", "models/flux", "data", "classes", "toy.yaml", "runs/run", "cache",
             "template", "full.safetensors", "lora.safetensors",
             "cases/flux")
    tail = ["train", "toy.yaml"] if command == "launch" else []
    names += [*[b for b in broken if b.strip()], "models/", "full.safetensors"]  # the last is no template's
    return Case("commands", no_nul([command, *given, *words, *tail]), names, needs=needs)


def streams(random: random.Random) -> Case:
    name = random.choice(("猫", "caf\udce9", "caf\u00e9", "x y", "\u202ex", "out"))
    words = random.choice((["describe", "toy.yaml"], ["cache", "inspect", "cache"], ["template", "show", "template"],
                           ["push", "runs/run", "--hub_model_id", "a/b", "--dry_run"],
                           ["sample", "toy", "models/toy", "--prompt", "x", *SMALL, "--output", name],
                           ["tiny", "toy", name],
                           ["train", "toy.yaml", "--output_path", name], ["replay", "runs/run", "3"],
                           ["train", "toy.yaml", "--instance_prompt", name],
                           ["train", f"{name}.yaml"], ["--help"], ["sample", "--help"], []))
    environment = {}
    for _ in range(random.choice((0, 0, 1))):
        variable = random.choice(("RANK_SIZE", "MS_WORKER_NUM", "DEVICE_ID", "LOCAL_WORLD_SIZE", "HF_TOKEN",
                                  "HF_ENDPOINT", "HF_HOME", "TMPDIR",
                                  "COLUMNS", "LANG", "MS_DIFFSYNTH_MODEL_BASE_PATH", "MY_PASSWORD", "RANK_ID",
                                  "MS_ROLE"))
        environment[variable] = random.choice(("", "x", "0", "1", "-1", "1.5", "99999999999999999999", " 1", "1 ", "٣",
                                               "\udce9" * 9, "/dev/null", "a\nb", "x" * 5000))
        if variable in ("RANK_SIZE", "MS_WORKER_NUM") and environment[variable].strip() in ("٣",):
            environment[variable] = "x"
    stdout = random.choice(("file", "closed", "full", "pipe", "ascii", "latin-1", "utf-16", "cp037"))
    return Case("streams, environment", no_nul(words), [*environment, "output", "usage", "ms-diffsynth", name,
                                                        ascii(name)[1:-1]], environment=environment, stdout=stdout,
                needs=("models/toy", "data", "toy.yaml", "runs/run", "cache", "template"))


def prompts(random: random.Random) -> Case:
    text = random.choice(TEXTS) if random.random() < 0.7 else "".join(
        random.choice("a \u0301猫\U0001f600\u200d\u202e\x00\x07\udce9<>|{}\n'\"")
        for _ in range(random.choice((1, 5, 200, 12_000))))
    family = random.choice(("toy", "toy", "toy", "flux", "sd3", "qwen_image", "flux2", "sdxl", "wan", "z_image"))
    words, names = random.choice((
        (["sample", family, f"models/{family}", "--prompt", text, *SMALL], ["prompt"]),
        (["sample", family, f"models/{family}", "--prompt", "a", "--negative_prompt", text, "--cfg_scale", "2",
          *SMALL], ["negative_prompt"]),
        (["train", "toy.yaml", "--instance_prompt", text, "--dataset_metadata_path", "bare.csv"],
         ["instance_prompt", "prompt"]),
        (["train", "toy.yaml", "--sample_prompts", text, "--sample_steps", "1"], ["sample_prompts"]),
        (["train", "toy.yaml", "--sample_prompts", json.dumps([text, "b"])], ["sample_prompts"])))

    def prepare(random: random.Random) -> str:
        Path("bare.csv").write_text("image\n000.png\n001.png\n")
        return ascii(text[:40])

    return Case("prompts", no_nul(words), names, prepare=prepare,
                needs=(f"models/{family}", "models/toy", "data", "toy.yaml"))


CODE = ["raise SystemExit(0)", "raise GeneratorExit", "class Stop(BaseException): pass\nraise Stop('x')", "1/0",
        "import nothing_of_this_name", "(", "\x00",
        "TEMPLATE_MODEL = 5", "TEMPLATE_MODEL = None", "TEMPLATE_MODEL = print",
        "def TEMPLATE_MODEL(): raise BaseException('x')",
        "TEMPLATE_MODEL = lambda: 1", "x = [" * 300, "", "# -*- coding: nothing -*-", "\ufeffx = 1",
        "raise MemoryError", "raise RecursionError",
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "def f(): f()\nf()",
        "raise StopIteration", "raise OSError(5, 'x', 'y')",
        "del __builtins__", "import sys\nsys.exit(70)", "raise KeyError", "import sys\nsys.stdout = None",
        "TEMPLATE_MODEL_PATH = 5",
        "TEMPLATE_MODEL_PATH = '../x.safetensors'", "TEMPLATE_MODEL_PATH = ['a\\0b.safetensors']",
        "TEMPLATE_MODEL_PATH = 'x' * 5000 + '.safetensors'"]


def templates(random: random.Random) -> Case:
    words = random.choice((
        ["template", "show", "template"], ["template", "pack", "template", "full.safetensors", "packed",
                                           "--trust_template_code"],
        ["template", "pack", "template", "full.safetensors", "packed", "--trust_template_code",
         "--trust_template_sha256", random.choice(TEXTS)],
        ["train", "toy.yaml", "--template_model_id_or_path", "template", "--extra_inputs", "template_inputs",
         "--trust_template_code"],
        ["sample", "flux2", "models/flux2", "--prompt", "x", *SMALL, "--template", "template", "--trust_template_code",
         "--template_inputs",
         random.choice(('[{"scale": 1}]', "[{}]", '[{"scale": "x"}]', random.choice(TEXTS)))]))

    def prepare(random: random.Random) -> str:
        path = Path("template/model.py")
        if random.random() < 0.3:
            return break_file(random, path, [Path("toy.yaml")])
        text, code = path.read_text(), random.choice(CODE)
        path.unlink()
        places = (code + "\n" + text, text + "\n" + code, code,
                  text.replace("return {\"scale\": scale}", "return " + random.choice(
            ("None", "{}", "{'scale': None}", "{'scale': 2**70}", "{'scale': 'x'}", "{'scale': float('nan')}",
             "{'x': 1}", "{1: 2}", "[1]"))))
        path.write_bytes(random.choice(places).encode("utf-8", "surrogatepass"))
        return code[:40]

    family = "flux2" if words[0] == "sample" else "toy"
    return Case("templates", no_nul(words), ["template", "full.safetensors", "model.py", "extra_inputs"],
                prepare=prepare,
                needs=(f"models/{family}", "data", "toy.yaml", "template", "full.safetensors"))


def parity(random: random.Random) -> Case:
    case = random.choice(("flux", "ddpm_unet", "ddpm_unet"))

    def prepare(random: random.Random) -> str:
        return _break_in(random, f"cases/{case}", 0.8)

    return Case("parity cases", ["parity", f"cases/{case}", *PYNATIVE], [f"cases/{case}"], prepare=prepare,
                needs=(f"cases/{case}",))


AREAS: dict[Callable[[random.Random], Case], int] = {  # weights
    settings_as_flags: 26, settings_in_yaml: 10, yaml_bytes: 4, metadata: 4, captions: 2, images: 6, toy_model: 8,
    real_model: 10, base_file: 5, lora: 5, runs: 8,
    commands: 9, streams: 4, prompts: 5, templates: 3, parity: 2}


def case_of(seed: int, number: int) -> tuple[Case, random.Random]:
    """Case ``number`` of a seed, and the randomness that breaks its files."""
    source = random.Random(f"{seed}/{number}")
    make = source.choices(list(AREAS), AREAS.values())[0]
    return make(source), random.Random(f"{seed}/{number}/files")
