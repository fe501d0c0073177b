"""What a run tells its launcher: each phase begins with a heartbeat, so that a hang is told from a long save."""
from __future__ import annotations

import numpy as np
from PIL import Image

from ms_diffsynth.registry import family
from ms_diffsynth.train import loop
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule


def test_steps_are_told_apart_from_what_may_take_longer(tmp_path, monkeypatch):
    beats = []
    monkeypatch.setattr(loop, "beat", lambda step, phase="step": beats.append((step, phase)))
    family("toy").write_tiny(tmp_path / "toy", 0)
    module = DiffusionTrainingModule()
    module.pipe = family("toy").pipeline.from_pretrained(str(tmp_path / "toy"))
    module.switch_pipe_to_training_mode(module.pipe, lora_base_model="dit", lora_rank=2)
    rows = [{"image": Image.fromarray(np.full((16, 16, 3), k, np.uint8)), "prompt": f"picture {k}"} for k in range(2)]
    loop.launch_training_task(Accelerator(1, "graph", "CPU"), rows, module, ModelLogger(tmp_path / "run"),
                              learning_rate=1e-2, max_train_steps=2, num_epochs=None)
    assert beats == [(0, "prepare"), (1, "step"), (1, "compile"), (1, "records"), (2, "step"), (2, "records")]
