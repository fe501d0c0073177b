"""How good generated images are, and whether they are copies. docs/how_to/evaluation.md says what the numbers mean."""
from __future__ import annotations

from ms_diffsynth.evaluate.kid import Estimate
from ms_diffsynth.evaluate.report import Evaluation, Evaluator, evaluate

__all__ = ["Estimate", "Evaluation", "Evaluator", "evaluate"]
