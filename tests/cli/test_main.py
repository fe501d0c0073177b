"""Commands, flags and exit codes."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth import __version__
from ms_diffsynth.cli.main import COMMANDS, main
from ms_diffsynth.cli.run_main import run_main
from ms_diffsynth.config.flags import training_parser
from ms_diffsynth.errors import ConfigError, WeightError


@pytest.mark.parametrize("words, expected", [
    (["trian"], f"'trian' is an unknown command: expected one of {', '.join(COMMANDS)}. Did you mean 'train'?"),
    (["train", "--learning_rat", "1"],
     "train does not know --learning_rat. Did you mean '--learning_rate'? See ms-diffsynth train --help."),
    (["train", "--learning_rat=1"], "Did you mean '--learning_rate'?"),
    (["train", "--learning"], "Did you mean '--learning_rate'?"),
    (["describe", "--lora_ranks", "4"], "describe does not know --lora_ranks. Did you mean '--lora_rank'?"),
    (["sample", "toy", "m", "--prompt", "a", "--promt", "b"], "does not know --promt b. Did you mean '--prompt'?"),
    (["sample", "toy"], "toy is a family: expected a model too, as in: ms-diffsynth sample toy FOLDER."),
    (["sample", "toy", "m", "--prompt", "a", "--height", "tall"], "argument --height: invalid int value: 'tall'."),
    (["tiny", "flx", "m"], "family='flx' is unknown: expected one of ddpm_unet, flux, flux2, qwen_image, sd3, sdxl, "
                         "toy, wan, z_image. Did you mean 'flux'?"),
    (["tiny", "toy"], "the following arguments are required: DIR."),
    (["parity", "x", "--mode", "eager"], "argument --mode: invalid choice: 'eager'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_meant(run, words, expected):
    code, out, err = run(*words)
    assert code == 64 and out == "" and err.startswith("ConfigError: ") and expected in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(capsys):
    for words in (["train", "--learning_rate", "20", "--debug"], ["--debug", "train", "--learning_rate", "20"]):
        assert main(words) == 64
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and "ms_diffsynth.errors.ConfigError: 3 settings are wrong:" in lines


def test_a_help_text_and_a_config_error_import_no_framework(python):
    code = ("import sys\nfrom ms_diffsynth.cli.main import main\n"
            "assert main(['train', '--learning_rate', '1']) == 64\n"
            "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "sys.exit(int('mindspore' in sys.modules))")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert all(f"    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_help_text(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"ms-diffsynth {command}" in capsys.readouterr().out


def test_run_main(capsys):
    def fail(error):
        def function():
            raise error
        return function

    assert run_main(lambda: None) == 0 and run_main(lambda: 3) == 3
    assert run_main(fail(WeightError("w"))) == 66 and capsys.readouterr().err == "WeightError: w\n"
    assert run_main(fail(KeyboardInterrupt())) == 130
    assert run_main(fail(WeightError("w")), debug=True) == 66 and ", in function\n" in capsys.readouterr().err
    assert run_main(fail(ZeroDivisionError())) == 70 and "Error\nThis is an internal" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_main(fail(SystemExit(3)))


def test_the_parser_of_training_scripts():
    parser = training_parser("flux", num_epochs="1", output_path="./models")
    parser.add_argument("--mine", type=int, default=3)
    args = parser.parse_args(["--dataset_base_path", "pictures", "--learning_rate", "1e-3", "--mine", "4"])
    assert (args.family, args.num_epochs, args.output_path, args.mine) == ("flux", 1, "./models", 4)
    assert args.learning_rate == 1e-3 and args.lora_rank == 16 and args.sample_prompts == ()
    assert parser.parse_args(["--dataset_base_path", "p", "--num_epochs", "7"]).num_epochs == 7
    for words, expected in (["--dataset_base_path", "p", "--family", "toy"], "does not know --family"), \
                           (["--dataset_base_path", "p", "--lora_rank", "0"], "lora_rank=0 from the flag"), \
                           ([], "dataset_base_path is not set"), (["--learning_rat", "1"], "'--learning_rate'"):
        with pytest.raises(ConfigError, match=expected):
            parser.parse_args(words)
    assert "--num_epochs INT" in parser.format_help() and "(default: 1)" in parser.format_help()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_by_the_shell_itself(shell, run, tmp_path):
    code, script, err = run("completion", shell)
    assert code == 0 and err == ""
    (tmp_path / "script").write_text(script)
    if shutil.which(shell) is None:
        pytest.skip(f"NOT TESTED, {shell} is not installed here")

    def completed(*words):
        if shell == "fish":
            command = f"source ./script; complete -C '{' '.join(('ms-diffsynth', *words))}'"
        elif shell == "bash":
            command = (f"source ./script; COMP_WORDS=(ms-diffsynth {' '.join(map(repr, words))}); "
                       f"COMP_CWORD={len(words)}; _ms_diffsynth; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
        else:  # what zsh would offer; its widgets need a terminal
            command = ("compdef() { :; }; _files() { :; }; _describe() { print -l -- ${(P)@[-1]}; }; "
                       "compadd() { shift; print -l -- $@; }; source ./script; "
                       f"words=(ms-diffsynth {' '.join(map(repr, words))}); CURRENT={len(words) + 1}; _ms_diffsynth")
        done = subprocess.run([shell, *(["-f"] if shell == "zsh" else []), "-c", command], capture_output=True,
                              text=True, cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return {line.partition("\t")[0].partition(":")[0] for line in done.stdout.splitlines()}

    assert {"train", "cache"} <= completed("") if shell != "fish" else completed("tr") == {"train"}
    assert {"--optimizer", "--optimizer_args"} <= completed("train", "--optimizer"[:8])
    assert {"adamw", "prodigy"} <= completed("train", "--optimizer", "")
    assert {"inspect", "prune"} <= completed("cache", "")
    assert "--lora_rank" in completed("launch", "--workers", "2", "train", "--lora_r") or shell == "fish"


def test_examples_are_copied_and_nothing_is_overwritten(run):
    code, out, _ = run("examples")
    assert code == 0 and out.endswith("such as examples/flux/emoji_dreambooth.yaml\n")
    assert Path("examples/flux/emoji_dreambooth.yaml").is_file() and Path("examples/data").is_dir()
    assert run("examples")[0] == 74 and run("examples", "again")[0] == 0


def test_without_arguments_the_help_is_printed(run):
    code, out, _ = run()
    assert code == 0 and all(f"    {name} " in out for name in COMMANDS) and "--version" in out


def test_the_version_by_command_and_by_module(run, tmp_path):
    expected = f"ms-diffsynth {__version__}\n"
    module = subprocess.run([sys.executable, "-m", "ms_diffsynth", "--version"], capture_output=True, text=True)
    assert (module.returncode, module.stdout) == (0, expected)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
