"""Resume: runs in one folder are never mixed; when a state is saved, and after which signal; what loss.csv keeps."""
from __future__ import annotations

import logging
import shutil
import signal
from types import SimpleNamespace

import pytest
from toy_run import Module, digests, equal, rows, steps_in, table, toy_model, train

from ms_diffsynth.errors import CheckpointError, OutputError
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.training.logger import COLUMNS, ModelLogger
from ms_diffsynth.training.signals import Stopped
from ms_diffsynth.training.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield from toy_model(tmp_path_factory)


# -- nothing is mixed ------------------------------------------------------------------------------------------------


def damage(checkpoint):
    file = checkpoint / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


@pytest.mark.fault
def test_a_new_run_does_not_start_among_the_checkpoints_of_another(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    before = digests(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"another run, the last one step-00000003\. Resume it by --resume auto, "
                                              r"or choose another output_path"):
        train(tmp_path / "run", Module(folder), rows(3))
    train(tmp_path / "other", Module(folder), rows(4))
    with pytest.raises(CheckpointError, match=r"holds checkpoints of another run than .*step-00000004"):
        train(tmp_path / "run", Module(folder), rows(4), resume=str(tmp_path / "other/checkpoints/step-00000004"))
    assert digests(tmp_path / "run") == before


@pytest.mark.fault
def test_the_newest_checkpoint_is_damaged(folder, tmp_path, caplog):
    options = {"num_epochs": 2, "batch_size": 2, "checkpoint_steps": 2}
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    train(tmp_path / "run", Module(folder), rows(5), **options)
    damage(tmp_path / "run/checkpoints/step-00000006")
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "run", Module(folder), rows(5), **options, resume="auto")
    assert "has another SHA-256" in caplog.text and "aside-step-00000006" in caplog.text
    assert steps_in(tmp_path / "run") == ["aside-step-00000006", "step-00000004", "step-00000006"]
    assert equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.fault
def test_every_checkpoint_is_damaged(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3), save_steps=1)
    for name in steps_in(tmp_path / "run"):
        damage(tmp_path / "run/checkpoints" / name)
    before = digests(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used \(step-00000002, "):
        train(tmp_path / "run", Module(folder), rows(3), resume="auto")
    assert digests(tmp_path / "run") == before


@pytest.mark.fault
def test_going_back_keeps_later_checkpoints_but_never_uses_them(folder, tmp_path):
    options = {"num_epochs": 3, "save_steps": 1, "keep_checkpoints": 9}
    train(tmp_path / "whole", Module(folder), rows(3), **options)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for _ in range(2):
        train(run, Module(folder), rows(3), **options, resume=str(run / "checkpoints/step-00000007"))
        assert equal(tmp_path / "whole", run)
    aside = ["aside-step-00000008", "aside-step-00000008-2", "aside-step-00000009", "aside-step-00000009-2"]
    assert steps_in(run) == [*aside, *(f"step-{k:08d}" for k in range(1, 10))]


@pytest.mark.fault
@pytest.mark.parametrize("path, expected", [
    ("atuo", r"resume=atuo: there is no such folder. Did you mean 'auto'\? .*checkpoints/step-00000120"),
    (".", "is not a checkpoint, but something else")])
def test_no_checkpoint(folder, tmp_path, path, expected):
    with pytest.raises(CheckpointError, match=expected):
        train(tmp_path / "run", Module(folder), rows(3), resume=path)


@pytest.mark.fault
def test_two_runs_in_one_folder(folder, tmp_path):
    with lock_folder(tmp_path / "run"):
        before = digests(tmp_path / "run")
        with pytest.raises(OutputError, match="is in use by another run: process"):
            train(tmp_path / "run", Module(folder), rows(3))
        assert digests(tmp_path / "run") == before
    train(tmp_path / "run", Module(folder), rows(3))


@pytest.mark.fault
def test_what_a_killed_run_left_half_written_is_removed(folder, tmp_path):
    train(tmp_path / "run", Module(folder), rows(3))
    left = tmp_path / "run/checkpoints/.tmp-999999999-0123abcd"
    left.mkdir()
    train(tmp_path / "run", Module(folder), rows(3), num_epochs=2, resume="auto")
    assert not left.exists()


# -- when, and how many ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, expected", [
    ({}, [4, 6]), ({"save_steps": 5}, [5, 6]), ({"checkpoint_steps": 4}, [4, 6]), ({"checkpoint_steps": 0}, []),
    ({"save_steps": 2, "keep_checkpoints": 3}, [2, 4, 6])])
def test_when_a_state_is_saved(folder, tmp_path, options, expected):
    train(tmp_path / "run", Module(folder), rows(4), num_epochs=2, batch_size=2 if not options else 1,
          **{"max_train_steps": 6, **options})
    found = sorted(int(p.name[5:]) for p in (tmp_path / "run").glob("checkpoints/step-*"))
    assert found == (expected if options else [2, 4])


@pytest.mark.fault
def test_no_secret_is_in_a_checkpoint(folder, tmp_path):
    token = "hf_abcdefghijklmnop0123"
    args = SimpleNamespace(my_api_key="swordfish", note=f"a {token}", num_epochs=1)
    train(tmp_path / "run", Module(folder), rows(2), args=args, sample_captions=[token])
    text = (tmp_path / "run/checkpoints/step-00000002/state.json").read_text()
    assert token not in text and "swordfish" not in text and "[redacted]" in text


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_signal_ends_the_run_after_its_step_with_everything_saved(folder, tmp_path, monkeypatch, capfd):
    options = {"accumulation": 2, "num_epochs": 3, "use_ema": True}
    train(tmp_path / "whole", Module(folder), rows(5), **options)
    original, seen = Trainer.train_on, []

    def train_on(self, *batch):
        seen.append(batch)
        if len(seen) == 6:  # the first micro-step of step 4
            signal.raise_signal(signal.SIGTERM)
        return original(self, *batch)

    monkeypatch.setattr(Trainer, "train_on", train_on)
    with pytest.raises(Stopped) as error:
        train(tmp_path / "run", Module(folder), rows(5), **options)
    assert error.value.code == 143 and table(tmp_path / "run")[-1].startswith("4,1,")
    assert (tmp_path / "run/step-4.safetensors").exists() and (tmp_path / "run/step-4-ema.safetensors").exists()
    said = capfd.readouterr().err
    assert "stopped by SIGTERM after step 4 of 9: resume from" in said and "step-00000004 with --resume auto" in said
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(tmp_path / "run", Module(folder), rows(5), **options, resume="auto")
    assert equal(tmp_path / "whole", tmp_path / "run")


# -- loss.csv --------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_rows_after_the_checkpoint_and_torn_rows_are_cut(tmp_path, caplog):
    path = tmp_path / "run"
    path.mkdir()
    lines = [",".join(COLUMNS), "1,0,0.5,1e-4,1.5,0,0.25", "2,0,nan,1e-4,nan,1,0.25", "3,0,0.2", "4,0,0.3,1e-4,1,0,0.2"]
    (path / "loss.csv").write_text("\n".join(lines) + "\n5,0,")
    for after, count in ((2, 3), (4, 4)):
        copy = shutil.copytree(path, tmp_path / str(after))
        records = ModelLogger(copy)
        with caplog.at_level(logging.WARNING):
            records.start({}, after, copy)
        assert len((copy / "loss.csv").read_text().splitlines()) == count and records.num_steps == after
        assert records.losses == [(1, 0.5), (4, 0.3)][:count // 2]
    assert [r.message.partition("loss.csv ")[2] for r in caplog.records] == [
        "has the rows of 3 of 4 steps: the others are lost."]
