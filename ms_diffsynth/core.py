"""What DiffSynth-Studio's pipelines import from their ``core``: ``from ..core import gradient_checkpoint_forward``."""
from ms_diffsynth.data.dataset import UnifiedDataset as UnifiedDataset
from ms_diffsynth.formats.weights import load_state_dict as load_state_dict
from ms_diffsynth.hub.download import ModelConfig as ModelConfig
from ms_diffsynth.nn.recompute import gradient_checkpoint_forward as gradient_checkpoint_forward
