"""report.html: what is read of a run, whatever state its files are in; and a page that needs nothing else."""
from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import DataError
from ms_diffsynth.report import reading
from ms_diffsynth.report.page import PAGE, page, write_report
from ms_diffsynth.report.reading import read_run
from ms_diffsynth.training.logger import COLUMNS, ModelLogger

SETTINGS = {"batch_size": 2, "learning_rate": 1e-3, "max_train_steps": 9, "sample_prompts": ["</script><b>&"],
            "output_path": "runs/x", "mode": "graph", "gradient_accumulation_steps": 3}


@pytest.fixture
def run_of(tmp_path):
    """``run_of(name, steps)`` is the folder of a run of so many steps, half a second each."""
    def make(name="first", steps=4, **settings):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        rows = [",".join(COLUMNS), *(f"{s},0,{1 / s},0.001,{2 / s},0,0.5" for s in range(1, steps + 1))]
        (folder / "loss.csv").write_text("\n".join(rows) + "\n")
        (folder / "validation.csv").write_text("step,loss,sigma_0.9380,psnr\n0,2,2.1,7\n4,1,1.1,nan\n")
        (folder / "training_args.json").write_text(json.dumps(SETTINGS | settings))
        events = [{"event": "start", "time": 1.0, "step": 0}, {"event": "saved", "time": 2.0, "step": 4, "file": "a"},
                  {"event": "end", "time": 3.0, "step": steps, "peak_memory_gib": 1.5}]
        (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        for step in (0, 4):
            Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"samples/step-{step}.png")
        return folder
    return make


def data_of(html):
    """What is put into the page."""
    return json.loads(re.search(r"const DATA = (.*);\n", html)[1])


def test_what_is_read(run_of):
    run = read_run(run_of())
    assert [run[key] for key in ("name", "status", "steps", "planned", "seconds")] == ["first", "finished", 4, 9, 2.0]
    assert run["curves"]["loss"] == [[1, 1], [2, 0.5], [3, 0.333333], [4, 0.25]]
    assert run["curves"]["images per second"] == [[s, 12.0] for s in range(1, 5)]  # batch_size times accumulation
    prior = read_run(run_of("prior", with_prior_preservation=True))["curves"]["images per second"]
    assert prior == [[s, 24.0] for s in range(1, 5)]  # and as many class images
    assert run["validation"] == {"loss": [[0, 2], [4, 1]], "sigma_0.9380": [[0, 2.1], [4, 1.1]], "psnr": [[0, 7]]}
    assert [sheet["step"] for sheet in run["samples"]] == [0, 4] and run["peak_memory_gib"] == 1.5
    assert run["changed"] == ["batch_size", "gradient_accumulation_steps", "learning_rate", "max_train_steps",
                              "sample_prompts"]  # not mode, which is the default, and not where it is
    assert [event["event"] for event in run["events"]] == ["start", "end"]


def test_a_run_that_is_being_written(run_of):
    folder = run_of()
    (folder / "events.jsonl").write_text('{"event": "start", "time": 1, "step": 0}\n{"event": "sa')
    with (folder / "loss.csv").open("a") as file:
        file.write("5,0,0.2,0.0")  # torn
    run = read_run(folder)
    assert run["status"] == "no end yet: it goes on, or was killed" and run["curves"]["loss"][-1] == [5, 0.2]
    assert run["curves"]["gradient norm"][-1][0] == 4 and run["seconds"] == 2.0
    for name in ("validation.csv", "events.jsonl", "training_args.json"):
        (folder / name).unlink()
    assert read_run(folder)["validation"] == {} and page([read_run(folder)])
    (folder / "training_args.json").write_text('{"batch_s')
    assert read_run(folder)["settings"] == {}


def test_losses_that_are_not_finite_are_left_out(run_of):
    folder = run_of()
    with (folder / "loss.csv").open("a") as file:
        file.write("5,0,nan,0.001,inf,1,0.5\n")
    run = read_run(folder)
    assert run["skipped"] == 1 and run["curves"]["loss"][-1][0] == 4
    assert data_of(page([run]))["runs"][0]["steps"] == 5


def test_a_long_run_becomes_a_small_page(run_of, monkeypatch):
    run = read_run(run_of(steps=10 * reading.MOST_POINTS))
    points = run["curves"]["learning rate"]
    assert len(points) == reading.MOST_POINTS and points[-1] == [10 * reading.MOST_POINTS, 0.001]
    folder = run_of("many")
    for step in range(1, 200):
        Image.new("RGB", (8, 8)).save(folder / f"samples/step-{step}.png")
    steps = [sheet["step"] for sheet in read_run(folder)["samples"]]
    assert len(steps) <= reading.MOST_SHEETS and steps[0] == 0 and steps[-1] == 199


def test_the_page_asks_for_nothing_and_nothing_in_it_ends_its_script(run_of):
    html = page([read_run(run_of())])
    assert html.count("</script>") == 1
    assert data_of(html)["runs"][0]["settings"]["sample_prompts"] == '["</script><b>&"]'
    addresses = set(re.findall(r"https?://[^\"' ]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches
    assert not re.search(r"fetch\(|XMLHttpRequest|@import|\bsrc=\"(?!data:)|url\(", PAGE.read_text())


def test_the_command_compares_runs_of_the_same_name(run_of, capsys, tmp_path):
    runs = [run_of("a/run"), run_of("b/run", learning_rate=2e-3)]
    assert main(["report", *map(str, runs), "--output", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    found = data_of((tmp_path / "both.html").read_text())["runs"]
    assert [run["name"] for run in found] == [str(run) for run in runs]
    assert main(["report", str(runs[0])]) == 0 and (runs[0] / "report.html").is_file()


def test_a_folder_of_no_run(tmp_path):
    (tmp_path / "cat.png").touch()
    with pytest.raises(DataError, match="which every run writes; it holds cat"):
        write_report([tmp_path])


def test_a_run_writes_it_while_it_goes_on(tmp_path):
    logger = ModelLogger(tmp_path)
    logger.start(SETTINGS)
    logger.refresh_report()
    assert not (tmp_path / "report.html").exists()  # there is nothing to see yet
    for step in range(1, 201):
        logger.num_steps = step
        logger.log_step(dict(zip(COLUMNS, (step, 0, 1.0, 1e-3, 1.0, 0, 0.5))))
        logger.event("saved", file="x")
        logger.refresh_report()
    told = data_of((tmp_path / "report.html").read_text())["runs"][0]
    assert 196 <= told["steps"] <= 200 and told["status"].startswith("no end yet")  # not at every step of a long run
    logger.event("end", peak_memory_gib=1.0)
    told = data_of((tmp_path / "report.html").read_text())["runs"][0]
    assert (told["steps"], told["status"]) == (200, "finished")


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(folders):
        raise OSError("disk full")

    monkeypatch.setattr("ms_diffsynth.training.logger.write_report", fails)
    logger = ModelLogger(tmp_path)
    logger.start(SETTINGS)
    logger.event("end")
    assert "report.html is not written: disk full. Training goes on; ms-diffsynth report" in caplog.text
