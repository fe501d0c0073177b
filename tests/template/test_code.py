"""The code of a template: nothing of it runs without trust, and what was hashed is what runs."""
from __future__ import annotations

import hashlib
import inspect
import linecache
import sys

import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth import load_template_model
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.errors import TemplateError, UntrustedCodeError, UserError, WeightError
from ms_diffsynth.formats.weights import save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.template import loading
from ms_diffsynth.template.code import read_code, run_code, with_weight_path

TRUST = {"trust_template_code": True}


@pytest.mark.fault
def test_the_error_shows_path_size_and_sha256(template, plain_source):
    folder, sha = template(), hashlib.sha256(plain_source.encode()).hexdigest()
    with pytest.raises(UntrustedCodeError) as error:
        load_template_model(folder)
    for part in (str(folder / "model.py"), f"{len(plain_source)} bytes", sha, "--trust_template_code"):
        assert part in str(error.value)


@pytest.mark.fault
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


@pytest.mark.fault
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


@pytest.mark.fault
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
    (lambda p: (p / "t").mkdir(), "is not a template: expected a folder with a model.py"),
    (lambda p: (p / "t").write_text("x"), "is not a template"),
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


@pytest.mark.fault
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


@pytest.mark.fault
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
