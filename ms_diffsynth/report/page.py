"""The page: page.html beside this file, with the runs put in as JSON."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ms_diffsynth import __version__
from ms_diffsynth.redact import redact
from ms_diffsynth.report.reading import read_run
from ms_diffsynth.storage.files import write_file

PAGE = Path(__file__).with_name("page.html")
DATA, NAME = "/*DATA*/null", "report.html"


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The whole page. Nothing that a run says can end the script it stands in."""
    data = json.dumps({"version": __version__, "runs": list(runs)}, allow_nan=False, ensure_ascii=True)
    return PAGE.read_text(encoding="utf-8").replace(DATA, data.replace("<", "\\u003c"))


def write_report(folders: Sequence[Path], file: Path | None = None) -> Path:
    """Write the report of runs, ``report.html`` in the folder of the first by default; never half a file.

    Raises: DataError for a folder of no run, OutputError.
    """
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders):
        if names.count(run["name"]) > 1:
            run["name"] = redact(str(folder))
    file = file or folders[0] / NAME
    write_file(file, page(runs).encode())
    return file
