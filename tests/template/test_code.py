"""The code of a template: nothing of it runs without trust, and what was hashed is what runs."""
from __future__ import annotations

import hashlib
import importlib.util
import inspect
import linecache
import os
import pickle
import py_compile
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import DiffusionTrainingModule, TemplatePipeline, attach_template, load_template_model
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.errors import TemplateError, UntrustedCodeError, UserError, WeightError
from ms_diffsynth.io.weights import save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.template import loading
from ms_diffsynth.template.code import LARGEST, read_code, run_code, with_weight_path
from ms_diffsynth.template.package import pack_template
from ms_diffsynth.template.units import ReadTemplateInputs
from ms_diffsynth.train.compile import CompiledStep

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


def test_the_error_shows_path_size_and_sha256(template, plain_source):
    folder, sha = template(), hashlib.sha256(plain_source.encode()).hexdigest()
    with pytest.raises(UntrustedCodeError) as error:
        load_template_model(folder)
    for part in (str(folder / "model.py"), f"{len(plain_source)} bytes", sha, "--trust_template_code"):
        assert part in str(error.value)


def test_of_a_hub_only_the_code_is_loaded_before_trust_and_the_rest_from_its_commit(hub, plain_source, monkeypatch):
    first = hub.add("team/t", {"model.py": plain_source.encode(), "a.txt": b"first", "sub/b.txt": b"-"})
    config = hub.config("team/t")
    with pytest.raises(UntrustedCodeError, match=f"team/t at {first}"):
        load_template_model(config)
    assert hub.downloads() == ["model.py"] and config.revision is None
    check = loading.check_trust

    def push(*arguments):
        hub.add("team/t", {"model.py": b"raise RuntimeError", "a.txt": b"second"})
        check(*arguments)

    monkeypatch.setattr(loading, "check_trust", push)
    template = loading.open_template(config, True)
    assert template.code.folder.name == first and (template.code.folder / "a.txt").read_bytes() == b"first"
    assert sorted(set(hub.downloads())) == ["a.txt", "model.py", "sub/b.txt"]


def test_a_template_in_a_folder_of_a_repository(hub, plain_source):
    hub.add("team/t", {"model.py": b"raise RuntimeError", "b/model.py": plain_source.encode(), "b/a.txt": b"-"})
    template = loading.open_template(hub.config("team/t", "b/"), True)
    assert template.code.folder.name == "b" and hub.downloads() == ["b/model.py", "b/a.txt"]
    with pytest.raises(UserError, match="names files: expected the whole template"):
        loading.open_template(hub.config("team/t", "b/*.py"), True)


def test_a_local_copy_of_a_repository_asks_no_hub(hub, tmp_path, template, monkeypatch):
    (tmp_path / "base/team").mkdir(parents=True)
    template(name="base/team/t")
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "base"))
    opened = loading.open_template(hub.config("team/t", revision="v1"), True)
    assert opened.code.folder == tmp_path / "base/team/t" and not hub.requests


def test_the_text_that_was_hashed_is_what_the_compiler_reads(template, head):
    """MindSpore compiles a method from its source, which it asks for long after the code ran."""
    source = head + '''
FORM = """\f a page, and a line that is none: \u2028"""


class Doubles(nn.Cell):
    def process_inputs(self, x, **kwargs):
        return {"x": x}

    def forward(self, x, **kwargs):
        return x * 2


TEMPLATE_MODEL = Doubles
'''
    folder = template(source)
    model = load_template_model(folder, **TRUST)
    (folder / "model.py").write_text(source.replace("x * 2", "x * 3"))
    linecache.checkcache()
    assert "x * 2" in inspect.getsource(type(model).forward) and "x * 2" in inspect.getsource(type(model))
    assert "def process_inputs" not in inspect.getsource(type(model).forward)
    compiled = CompiledStep(model.forward, "forward", "graph")
    assert float(compiled(Tensor(np.float32([1]))).asnumpy()[0]) == 2 and compiled.compilations == 1
    assert float(load_template_model(folder, **TRUST).forward(Tensor(np.float32([1]))).asnumpy()[0]) == 3


def test_templates_of_one_name_do_not_collide(tmp_path, plain_source):
    models = []
    for k in (1, 2):
        folder = tmp_path / str(k) / "same"
        folder.mkdir(parents=True)
        (folder / "model.py").write_text(plain_source + f"\nNUMBER = {k}\n")
        models.append(load_template_model(folder, **TRUST))
    modules = [sys.modules[type(model).__module__] for model in models]
    assert [m.NUMBER for m in modules] == [1, 2] and modules[0] is not modules[1]
    assert "model" not in sys.modules and "template_model" not in sys.modules
    again = run_code(read_code(tmp_path / "1/same"))
    assert again is modules[0], "the same code runs once"


@pytest.mark.parametrize("source, message", [
    ("x = 1\nimport sys\nsys.exit('bye')", r"model\.py line 3: SystemExit: bye"),
    ("x = 1\n\ndef f(:\n  pass", r"model\.py line 3: SyntaxError"),
    ("x = 1\0", r"model\.py( line 1)?: (SyntaxError|ValueError)"),
    ("def f():\n    return 1 / 0\n\nf()", r"model\.py line 2: ZeroDivisionError"),
    ("# -*- coding: no_such -*-\n", r"model\.py: SyntaxError: .*no_such"),
    ("MODEL = 1", "defines no TEMPLATE_MODEL: expected TEMPLATE_MODEL = <class of the model>"),
    ("TEMPLATE_MODEL = None", "defines no TEMPLATE_MODEL"),
])
def test_code_that_cannot_be_used_is_named_with_its_line(template, source, message):
    folder, modules = template(source), set(sys.modules)
    with pytest.raises(TemplateError, match=message):
        load_template_model(folder, **TRUST)
    assert not {name for name in set(sys.modules) - modules if name.startswith("ms_diffsynth_template")} or \
        "TEMPLATE_MODEL" in message


def test_an_interruption_is_no_error_of_the_template(template):
    with pytest.raises(KeyboardInterrupt):
        load_template_model(template("raise KeyboardInterrupt"), **TRUST)


def test_code_in_another_encoding(template, plain_source, tmp_path):
    folder = template()
    (folder / "model.py").write_bytes(("# -*- coding: latin-1 -*-\nNAME = 'é'\n" + plain_source).encode("latin-1"))
    assert sys.modules[type(load_template_model(folder, **TRUST)).__module__].NAME == "é"
    packed = with_weight_path(read_code(folder), "w.safetensors")
    assert packed.startswith("# -*- coding: latin-1 -*-\nNAME = 'é'\n".encode("latin-1"))


@pytest.mark.parametrize("make, message", [
    (lambda p: (p / "t").mkdir(), "is no template: expected a folder with a model.py"),
    (lambda p: (p / "t").write_text("x"), "is no template"),
    (lambda p: ((p / "t").mkdir(), (p / "t/model.py").touch()), "zero bytes"),
    (lambda p: None, "neither a path that exists nor a model"),
])
def test_no_template(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        load_template_model(tmp_path / "t", **TRUST)


def test_no_name():
    with pytest.raises(UserError, match="names nothing"):
        load_template_model("", **TRUST)


@pytest.mark.parametrize("path, message", [
    ("3", "TEMPLATE_MODEL_PATH=3: expected None, a file name or a list of file names"),
    ("[]", r"TEMPLATE_MODEL_PATH=\[\]: expected"),
    ("{'a': 1}", "expected None, a file name or a list"),
    ("['a.safetensors', None]", "expected None, a file name or a list"),
    ("'a.ckpt'", "expected a .safetensors file"),
    ("'sub/../../a.safetensors'", "leads out of the template's folder"),
    ("['a.safetensors', 'b.safetensors']", "names a.safetensors, b.safetensors, which .* does not hold"),
])
def test_weights_that_cannot_be(template, plain_source, path, message):
    with pytest.raises((TemplateError, WeightError), match=message):
        load_template_model(template(plain_source + f"\nTEMPLATE_MODEL_PATH = {path}\n"), **TRUST)


def test_links_may_lead_through_the_folder_but_not_out_of_it(template, plain_source, tmp_path):
    folder, weights = template(plain_source + '\nTEMPLATE_MODEL_PATH = "model.safetensors"\n'), template(name="outside")
    model = state_dict(load_template_model(weights, **TRUST))
    for place in (folder / "inside.safetensors", weights / "outside.safetensors"):
        save_state_dict(place, model)
    link = folder / "model.safetensors"
    link.symlink_to(folder / "inside.safetensors")
    assert state_dict(load_template_model(folder, **TRUST)).keys() == model.keys()
    link.unlink()
    link.symlink_to(weights / "outside.safetensors")
    with pytest.raises(TemplateError, match="leads out of the template's folder"):
        load_template_model(folder, **TRUST)
    (folder / "linked").symlink_to(weights)
    (folder / "model.py").write_text(plain_source + '\nTEMPLATE_MODEL_PATH = "linked/outside.safetensors"\n')
    with pytest.raises(TemplateError, match="leads out of the template's folder"):
        load_template_model(folder, **TRUST)
