"""Brightness: one number, the mean of the image in [0, 1], as keys and values of every block.

The architecture of DiffSynth-Studio's Template-KleinBase4B-Brightness, in the size of the tiny base model.
"""
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from PIL import Image

from ms_diffsynth import no_grad

BLOCKS = ("double_0", "double_1", "single_0", "single_1")  # FLUX.2-klein-base-4B: double_0 to 4, single_0 to 19
HEADS, HEAD_DIM = 3, 32  # FLUX.2-klein-base-4B: 24, 128
LENGTH = 4  # keys in each block; DiffSynth-Studio's model has 512
WIDTH = HEADS * HEAD_DIM


class ValueEncoder(nn.Cell):
    """A number as LENGTH vectors: sinusoids through a small network, plus a learned vector for each place."""

    def __init__(self):
        super().__init__()
        self.frequencies = Tensor(1000 * 10000 ** (-np.arange(128) / 128), dtype=None).astype("float32")
        self.embedder = nn.SequentialCell(mint.nn.Linear(256, WIDTH), mint.nn.SiLU(), mint.nn.Linear(WIDTH, WIDTH))
        self.place = Parameter(Tensor(np.random.standard_normal((LENGTH, WIDTH)).astype(np.float32)))

    def construct(self, value):
        angles = value.expand_dims(1) * self.frequencies
        embedding = self.embedder(ops.cat((ops.cos(angles), ops.sin(angles)), 1))
        vectors = embedding.expand_dims(1) + self.place  # [B, LENGTH, WIDTH]
        return vectors.reshape(vectors.shape[0], LENGTH, HEADS, HEAD_DIM)


class BrightnessTemplate(nn.Cell):
    """scale -> kv_cache."""

    def __init__(self):
        super().__init__()
        self.keys = nn.CellList([ValueEncoder() for _ in BLOCKS])
        self.values = nn.CellList([ValueEncoder() for _ in BLOCKS])

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"value": Tensor(np.array([scale], np.float32))}

    def forward(self, value, **kwargs):
        kv_cache = {}
        for k in range(len(BLOCKS)):
            kv_cache[BLOCKS[k]] = (self.keys[k](value), self.values[k](value))
        return {"kv_cache": kv_cache}


class DataProcessor:
    """``scale`` as it is given, or the brightness of ``image``."""

    def __call__(self, scale=None, image=None, **kwargs):
        if scale is None:
            scale = float(np.asarray(Image.open(image).convert("RGB"), np.float32).mean() / 255)
        return {"scale": scale}


TEMPLATE_MODEL = BrightnessTemplate
TEMPLATE_MODEL_PATH = None  # random weights: this is what training starts from
TEMPLATE_DATA_PROCESSOR = DataProcessor
