"""What happens between two steps of a run: see `train.hooks.contract.Hook`."""
from ms_diffsynth.train.hooks.checkpoints import Checkpoints
from ms_diffsynth.train.hooks.contract import Hook
from ms_diffsynth.train.hooks.evaluation import Evaluation
from ms_diffsynth.train.hooks.publish import Publishing, check_token
from ms_diffsynth.train.hooks.samples import Samples
from ms_diffsynth.train.hooks.validation import Validation

__all__ = ["Checkpoints", "Evaluation", "Hook", "Publishing", "Samples", "Validation", "check_token"]
