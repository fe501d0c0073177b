"""Ways of getting code of a template to run although nobody vouched for it, or outside of what was vouched for."""
from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import py_compile
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth import DiffusionTrainingModule, TemplatePipeline, attach_template, load_template_model
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.errors import UntrustedCodeError, UserError
from ms_diffsynth.formats.weights import save_state_dict
from ms_diffsynth.template import loading
from ms_diffsynth.template.code import LARGEST, read_code
from ms_diffsynth.template.package import pack_template
from ms_diffsynth.template.units import ReadTemplateInputs

pytestmark = pytest.mark.fault

TRUST = {"trust_template_code": True}


class Opens:
    """An object whose pickle, read, makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def canary(tmp_path):
    """The file that code makes when it runs."""
    return tmp_path / "canary"


@pytest.fixture
def evil(canary, plain_source):
    """Code that makes the canary when it is imported, and is a template otherwise."""
    return f"open({str(canary)!r}, 'w').close()\n{plain_source}"


@pytest.fixture
def world(tmp_path, canary, evil, template, plain_source, hub, toy, monkeypatch):
    """What an attack below has at hand; ``evil`` and ``plain`` are folders of templates."""
    weights = template(plain_source + '\nTEMPLATE_MODEL_PATH = "model.safetensors"\n', "weights")
    hub.add("team/evil", {"model.py": evil.encode(), "README.md": b"-"})
    return SimpleNamespace(
        tmp=tmp_path, canary=canary, source=evil, hub=hub, toy=toy, monkeypatch=monkeypatch, weights=weights,
        evil=template(evil, "evil"), plain=template(plain_source, "plain"), plain_source=plain_source,
        sha=hashlib.sha256(evil.encode()).hexdigest())


def trained(world):
    save_state_dict(world.tmp / "trained.safetensors", {"mlp.bias": np.zeros(32, np.float32)})
    return world.tmp / "trained.safetensors"


def with_weights(world, name, content=None):
    """The harmless template, its weights called ``name``."""
    source = world.plain_source + f"\nTEMPLATE_MODEL_PATH = {str(name)!r}\n"
    (world.weights / "model.py").write_text(source)
    path = Path(world.weights, name)
    if content is not None:
        path.write_bytes(content)
    return load_template_model(world.weights, **TRUST)


def linked_weights(world):
    (world.tmp / "outside.safetensors").write_bytes(pickle.dumps(Opens(world.canary)))
    (world.weights / "model.safetensors").symlink_to(world.tmp / "outside.safetensors")
    return load_template_model(world.weights, **TRUST)


def swapped(world):
    """The file changes after it was read, before it runs."""
    def check(*arguments):
        (world.plain / "model.py").write_text(world.source)
        return loading_check(*arguments)

    loading_check = loading.check_trust
    world.monkeypatch.setattr(loading, "check_trust", check)
    load_template_model(world.plain, **TRUST)
    assert (world.plain / "model.py").read_text() == world.source


def swapped_on_the_hub(world):
    """A new commit is pushed after the code was read and trusted."""
    def check(*arguments):
        world.hub.add("team/plain", {"model.py": world.source.encode()})
        return loading_check(*arguments)

    world.hub.add("team/plain", {"model.py": world.plain_source.encode(), "a.txt": b"-"})
    loading_check = loading.check_trust
    world.monkeypatch.setattr(loading, "check_trust", check)
    load_template_model(world.hub.config("team/plain"), **TRUST)


def package(world):
    (world.tmp / "package/model").mkdir(parents=True)
    (world.tmp / "package/model/__init__.py").write_text(world.source)
    load_template_model(world.tmp / "package", **TRUST)


def planted_bytecode(world):
    """Bytecode that claims to be that of model.py, as `import` would take it."""
    harmless, stamp = world.plain / "model.py", os.stat(world.plain / "model.py")
    harmless.write_text(world.source.ljust(5000))
    os.utime(harmless, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    py_compile.compile(str(harmless), importlib.util.cache_from_source(str(harmless)))
    harmless.write_text(world.plain_source.ljust(5000))
    os.utime(harmless, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    load_template_model(world.plain, **TRUST)


def sibling(world):
    (world.plain / "model.py").write_text("import sibling\n" + world.plain_source)
    (world.plain / "sibling.py").write_text(world.source)
    load_template_model(world.plain, **TRUST)


def neighbours(world):
    for name in ("__init__.py", "conftest.py", "setup.py", "sitecustomize.py", "configuration.py"):
        (world.plain / name).write_text(world.source)
    load_template_model(world.plain, **TRUST)


def yaml_in_inputs(world):
    text = f"!!python/object/apply:builtins.open [{world.canary}, w]"
    ReadTemplateInputs(loading.open_template(world.plain, True)).process(None, {"scale": text, "eval": text})


def yaml_in_metadata(world):
    Image.new("RGB", (8, 8)).save(world.tmp / "0.png")
    metadata = world.tmp / "metadata.yaml"
    metadata.write_text(f"- image: 0.png\n  prompt: !!python/object/apply:open [{world.canary}, w]")
    UnifiedDataset(str(world.tmp), str(metadata))[0]


def link_to_code(world):
    (world.tmp / "linked").mkdir()
    (world.tmp / "linked/model.py").symlink_to(world.evil / "model.py")
    load_template_model(world.tmp / "linked")


def huge(world):
    (world.evil / "model.py").write_text(world.source + "#" * LARGEST)
    load_template_model(world.evil, **TRUST)


def pipe_file(world):
    (world.evil / "model.py").unlink()
    os.mkfifo(world.evil / "model.py")
    load_template_model(world.evil, **TRUST)


def folder_called_model_py(world):
    (world.tmp / "odd/model.py").mkdir(parents=True)
    (world.tmp / "odd/model.py/__init__.py").write_text(world.source)
    load_template_model(world.tmp / "odd", **TRUST)


NOT_TRUSTED = {
    "local": lambda w: load_template_model(w.evil),
    "local, relative": lambda w: load_template_model("evil"),
    "local, as a ModelConfig": lambda w: load_template_model(loading.ModelConfig(str(w.evil))),
    "the pipeline": lambda w: TemplatePipeline.from_pretrained([w.evil]),
    "the pipeline, lazily": lambda w: TemplatePipeline.from_pretrained([w.evil], lazy_loading=True),
    "training": lambda w: attach_template(w.toy(), w.evil),
    "the training module": lambda w: DiffusionTrainingModule().load_training_template_model(w.toy(), str(w.evil)),
    "packing": lambda w: pack_template(w.evil, trained(w), w.tmp / "packed"),
    "a hub": lambda w: load_template_model(w.hub.config("team/evil")),
    "a hub, through the pipeline": lambda w: TemplatePipeline.from_pretrained([w.hub.config("team/evil")]),
    "the text true": lambda w: load_template_model(w.evil, trust_template_code="true"),
    "the number 1": lambda w: load_template_model(w.evil, trust_template_code=1),
    "NumPy's true": lambda w: load_template_model(w.evil, trust_template_code=np.True_),
    "the right sha256, no flag": lambda w: load_template_model(w.evil, trust_template_sha256=w.sha),
    "a wrong sha256": lambda w: load_template_model(w.evil, **TRUST, trust_template_sha256="0" * 64),
    "a part of the sha256": lambda w: load_template_model(w.evil, **TRUST, trust_template_sha256=w.sha[:12]),
    "an empty sha256": lambda w: load_template_model(w.evil, **TRUST, trust_template_sha256=""),
    "a sha256 of two templates": lambda w: TemplatePipeline.from_pretrained(
        [w.plain, w.evil], **TRUST, trust_template_sha256=[read_code(w.plain).sha256] * 2),
    "a link to code": link_to_code,
}
REFUSED = {
    "no sha256 for the pipeline": lambda w: TemplatePipeline.from_pretrained([w.evil], **TRUST,
                                                                             trust_template_sha256=[]),
    "pickled weights .bin": lambda w: with_weights(w, "model.bin", pickle.dumps(Opens(w.canary))),
    "pickled weights .pt": lambda w: with_weights(w, "model.pt", pickle.dumps(Opens(w.canary))),
    "a pickle called safetensors": lambda w: with_weights(w, "a.safetensors", pickle.dumps(Opens(w.canary))),
    "weights in the parent": lambda w: with_weights(w, "../a.safetensors", pickle.dumps(Opens(w.canary))),
    "weights by an absolute path": lambda w: with_weights(w, w.tmp / "b.safetensors", pickle.dumps(Opens(w.canary))),
    "linked weights": linked_weights,
    "a package": package,
    "a sibling": sibling,
    "a huge file": huge,
    "a named pipe": pipe_file,
    "a folder called model.py": folder_called_model_py,
    "YAML metadata": yaml_in_metadata,
}
HARMLESS = {
    "swapped while it is read": swapped,
    "swapped on the hub": swapped_on_the_hub,
    "planted bytecode": planted_bytecode,
    "other files of code": neighbours,
    "YAML in template_inputs": yaml_in_inputs,
}


@pytest.mark.parametrize("attack", NOT_TRUSTED.values(), ids=NOT_TRUSTED)
def test_no_code_runs_without_trust(world, attack):
    with pytest.raises(UntrustedCodeError, match="sha256"):
        attack(world)
    assert not world.canary.exists()


@pytest.mark.parametrize("attack", REFUSED.values(), ids=REFUSED)
def test_what_trust_does_not_cover_is_refused(world, attack):
    with pytest.raises(UserError):
        attack(world)
    assert not world.canary.exists()


@pytest.mark.parametrize("attack", HARMLESS.values(), ids=HARMLESS)
def test_what_trust_does_not_cover_is_not_run(world, attack):
    before = list(sys.path)
    attack(world)
    assert not world.canary.exists() and sys.path == before


def test_the_canary_sings(world):
    """Otherwise none of the above says anything."""
    load_template_model(world.evil, **TRUST, trust_template_sha256=world.sha.upper())
    assert world.canary.exists()
    world.canary.unlink()
    pickle.loads(pickle.dumps(Opens(world.canary))).close()
    assert world.canary.exists()
