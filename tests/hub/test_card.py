"""The model card: what hubs read of it, what it says, and that the text of users stays text."""
from __future__ import annotations

import ast
import re

import pytest
import yaml
from huggingface_hub import metadata_load

from ms_diffsynth import registry
from ms_diffsynth.hub.card import Card, Licence, model_card

DEV = "black-forest-labs/FLUX.1-dev"


def card(family="flux", **changes):
    values = {"model_id": "me/cat-lora", "trained": "lora", "weights": "step-72.safetensors",
              "base_model": DEV, "instance_prompt": "a 3d render of sks cat", "steps": 72, "seed": 42,
              "prompts": ("a cat", "a dog"), "samples": ("samples/a.png", "samples/b.png"),
              "dataset": "/data/me/pictures/cats", "settings": {"learning_rate": 1e-4, "unset": None},
              "command": ("ms-diffsynth", "train", "run.yaml", "--lora_rank", "16"),
              "versions": {"mindspore": "2.10.0"}}
    values |= changes
    about = registry.family(family)
    says = {"loader": about.loader(values["base_model"]), "licence": about.licences.get(values["base_model"])}
    return model_card(Card(**(says | values)))


def head(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    return metadata_load(tmp_path / "README.md")


def blocks(text, language):
    """Code blocks as a reader of CommonMark finds them."""
    found, fence = [], None
    for line in text.splitlines():
        opening = re.match(r"(`{3,})(\w*)$", line)
        if fence is None and opening:
            fence, body, kind = opening[1], [], opening[2]
        elif fence is not None and re.fullmatch(rf" {{0,3}}`{{{len(fence)},}} *", line):
            found += ["\n".join(body)] if kind == language else []
            fence = None
        elif fence is not None:
            body.append(line)
    assert fence is None
    return found


def test_the_head_is_read_back(tmp_path):
    got = head(card(), tmp_path)
    assert got["base_model"] == DEV and got["base_model_relation"] == "adapter" and got["library_name"] == "diffusers"
    assert (got["license"], got["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert got["license_link"] == "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    assert got["pipeline_tag"] == "text-to-image" and got["instance_prompt"] == "a 3d render of sks cat"
    assert {"lora", "flux", "mindspore", "template:sd-lora", "diffusers"} <= set(got["tags"])
    assert got["widget"] == [{"text": "a cat", "output": {"url": "samples/a.png"}},
                             {"text": "a dog", "output": {"url": "samples/b.png"}}]


@pytest.mark.parametrize("family, base, licence", [
    ("z_image", "Tongyi-MAI/Z-Image-Turbo", "apache-2.0"), ("wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "apache-2.0"),
    ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
    ("flux", "black-forest-labs/FLUX.1-schnell", "apache-2.0"), ("qwen_image", "Qwen/Qwen-Image", "apache-2.0"),
    ("flux2", "black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0"),
    ("flux2", "black-forest-labs/FLUX.2-dev", "other"),
    ("flux2", "black-forest-labs/FLUX.2-klein-9B", "other"), ("sd3", "stabilityai/stable-diffusion-3.5-large", "other"),
    ("flux", "someone/else", None), ("toy", None, None)])
def test_the_licence_is_the_base_models_or_none(family, base, licence, tmp_path):
    text = card(family, base_model=base)
    got = head(text, tmp_path)
    assert got.get("license") == licence
    assert ("is not known to ms\\_diffsynth, so none is stated here" in text) == (licence is None)
    assert (licence == "other") == bool(got.get("license_name")) == bool(got.get("license_link"))


def test_a_licence_that_is_given(tmp_path):
    assert head(card(base_model="someone/else", licence=Licence("mit")), tmp_path)["license"] == "mit"


@pytest.mark.parametrize("family, base, libraries", [
    ("flux", DEV, 3), ("qwen_image", "Qwen/Qwen-Image", 3), ("flux2", "black-forest-labs/FLUX.2-klein-base-4B", 2),
    ("flux2", "black-forest-labs/FLUX.2-dev", 3), ("sd3", "stabilityai/stable-diffusion-3.5-medium", 3),
    ("z_image", "Tongyi-MAI/Z-Image-Turbo", 2), ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 3),
    ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 3), ("wan", "Wan-AI/Wan2.2-I2V-A14B-Diffusers", 3)])
@pytest.mark.parametrize("trained", ["lora", "transformer"])
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_how_to_load_it(family, base, libraries, trained, hub):
    """The code of each library: it parses, defines what it uses, and names classes that exist."""
    import mindone.diffusers

    import ms_diffsynth

    text = card(family, base_model=base, trained=trained, hub=hub)
    code, network = blocks(text, "python"), "unet" if family == "sdxl" else "transformer"
    assert len(code) == libraries and ("has no pipeline for this model" in text) == (libraries == 2)
    for block in code:
        tree = ast.parse(block)
        known = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                 for a in node.names} | {"pipe", network, "ms"}
        assert {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} <= known
        assert ("load_lora" in block) == (trained == "lora")
        assert '("me/cat-lora", "step-72.safetensors")' in block and f'"{base}"' in block
        for module, names in re.findall(r"from (ms_diffsynth|mindone\.diffusers) import (.*)", block):
            place = ms_diffsynth if module == "ms_diffsynth" else mindone.diffusers
            assert all(name in dir(place) for name in names.split(", "))
    here = code[0]
    assert (f'origin_file_pattern="{network}/' in here) == (trained == "lora") and '="vae/' in here


@pytest.mark.parametrize("base", ["x) [evil](https://e.example", "/data/me/flux", "a/b/c", "flux-tiny"])
def test_a_base_model_that_is_no_name_is_not_told(base, tmp_path):
    text = card(base_model=base)
    assert base not in text and "base_model" not in head(text, tmp_path)


def test_how_it_was_trained():
    text = card()
    for row in ("| data | cats |", "| steps | 72 |", "| seed | 42 |", "| mindspore version | 2\\.10\\.0 |"):
        assert row in text
    assert blocks(text, "bash") == ["ms-diffsynth train run.yaml --lora_rank 16"]
    assert yaml.safe_load(blocks(text, "yaml")[0]) == {"learning_rate": 1e-4}
    assert "Nothing was recorded." in card(dataset=None, steps=None, seed=None, versions={}, settings={}, command=())


def test_folders_of_this_machine_are_not_told():
    text = card(settings={"output_path": "/data/alice/My Runs/x", "model_paths": '["/data/alice/flux", "~/b/vae"]',
                          "url": "https://host/a/b", "relative": "runs/x", "prompt": "either/or"},
                command=("/data/alice/.venv/bin/ms-diffsynth", "train", "--output_path=/data/alice/My Runs/x"))
    assert "alice" not in text and "My Runs" not in text and "~" not in text
    got = yaml.safe_load(blocks(text, "yaml")[0])
    assert got == {"output_path": "x", "model_paths": '["flux", "vae"]', "url": "https://host/a/b",
                   "relative": "runs/x", "prompt": "either/or"}
    assert blocks(text, "bash") == ["ms-diffsynth train --output_path=x"]


HOSTILE = [
    "x\n```\ny", "---\nlicense: mit\n---", "`" * 5 + "\n</code>", "<script>alert(1)</script>",
    "[x](javascript:alert(1))", "![x](https://tracker.example/a.png)", "| a | b |", "# heading", "- item", "1. item",
    "a: b # c", "'\"", "* x *", "yes",
    "\x00\x1b[31m", "{{ jinja }} {% raw %}", "www.evil.example", "@everyone", "!!python/object/apply:os.system", "&lt;",
    "\u202eabc", "猫 🐈",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_text_of_users_stays_text(text, tmp_path):
    made = card(prompts=(text,), samples=("samples/a.png",), instance_prompt=text, dataset=text, base_model=None,
                settings={"prompt": text, text: 1}, command=("x", text), versions={text: text},
                weights="a b`c.safetensors")
    got = head(made, tmp_path)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert got["instance_prompt"] == got["widget"][0]["text"] == line
    assert "license" not in got and made.count("\n---\n") == 1  # the end of the head
    outside = made.split("\n---\n", 1)[1]
    for block in blocks(made, "python") + blocks(made, "bash") + blocks(made, "yaml"):
        outside = outside.replace(block, "")
    for mark in ("<script", "](javascript", "![x]", "www.evil", "@everyone", "\x1b", "{{", "| a |"):
        assert not re.search(r"(?<!\\)" + re.escape(mark), outside)
    assert not re.search(r"^(# heading|- item|1\. item)", outside, re.MULTILINE)
    assert yaml.safe_load(blocks(made, "yaml")[0])["prompt"] == text
    for block in blocks(made, "python"):
        ast.parse(block)


@pytest.mark.parametrize("hub, library", [("huggingface", "huggingface_hub"), ("modelscope", "modelscope")])
def test_a_whole_pipeline_is_loaded_as_one(hub, library, tmp_path):
    text = card("ddpm_unet", model_id="me/faces", trained="pipeline", base_model=None, hub=hub,
                pipeline_tag="unconditional-image-generation", instance_prompt=None, prompts=())
    here, diffusers, mindone = blocks(text, "python")
    assert f"from {library} import snapshot_download" in here and 'snapshot_download("me/faces")' in here
    assert diffusers.startswith("from diffusers") and mindone.startswith("from mindone.diffusers")
    for code in (here, diffusers, mindone):
        compile(code, "card", "exec")
        assert "me/faces" in code
    assert "A diffusion model of images without prompts, trained with" in text
    got = head(text, tmp_path)
    assert got["library_name"] == "diffusers" and got["pipeline_tag"] == "unconditional-image-generation"
