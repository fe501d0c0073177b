"""Optimizers under one contract (`contract.Optimizer`), and learning rates. See docs/reference/optimizers.md."""
from ms_diffsynth.training.optim.adamw import AdamW
from ms_diffsynth.training.optim.build import build_optimizer, optimizer_arguments
from ms_diffsynth.training.optim.contract import Optimizer, OptimizerCell
from ms_diffsynth.training.optim.foreign import Guarded, guarded
from ms_diffsynth.training.optim.rate import LearningRate
from ms_diffsynth.training.optim.sharded import Float32Weights, Sharded, ShardedAdamW, needs_float32

__all__ = ["AdamW", "Float32Weights", "Guarded", "LearningRate", "Optimizer", "OptimizerCell", "Sharded",
           "ShardedAdamW", "build_optimizer", "guarded", "needs_float32", "optimizer_arguments"]
