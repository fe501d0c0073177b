"""Brightness for FLUX.2-klein-base-4B: one number, the mean of the image in [0, 1], as keys and values of every block.

Its place is that of DiffSynth-Studio's script; its architecture is smaller: 41 million parameters, an embedding of the
number that all blocks share, and for each block a projection of it onto 16 keys and values. `examples/flux2/templates`
has one of the size of the tiny base model.
"""
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from PIL import Image

from ms_diffsynth import no_grad

BLOCKS = tuple([f"double_{k}" for k in range(5)] + [f"single_{k}" for k in range(20)])
HEADS, HEAD_DIM = 24, 128
LENGTH = 16  # keys in each block
CHANNELS = 256  # of the embedding


class Tokens(nn.Cell):
    """The embedding as LENGTH vectors: its projection, plus a learned vector for each place."""

    def __init__(self):
        super().__init__()
        self.projection = mint.nn.Linear(CHANNELS, HEADS * HEAD_DIM)
        start = np.random.standard_normal((LENGTH, HEADS * HEAD_DIM)).astype(np.float32)
        self.place = Parameter(Tensor(start))

    def construct(self, embedding):
        vectors = self.projection(embedding).expand_dims(1) + self.place  # [B, LENGTH, HEADS * HEAD_DIM]
        return vectors.reshape(vectors.shape[0], LENGTH, HEADS, HEAD_DIM)


class BrightnessTemplate(nn.Cell):
    """scale -> kv_cache."""

    def __init__(self):
        super().__init__()
        half = CHANNELS // 2
        self.frequencies = Tensor((1000 * 10000 ** (-np.arange(half) / half)).astype(np.float32))
        self.embedder = nn.SequentialCell(mint.nn.Linear(CHANNELS, CHANNELS), mint.nn.SiLU(),
                                          mint.nn.Linear(CHANNELS, CHANNELS), mint.nn.SiLU())
        self.keys = nn.CellList([Tokens() for _ in BLOCKS])
        self.values = nn.CellList([Tokens() for _ in BLOCKS])

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        return {"value": Tensor(np.array([scale], np.float32))}

    def forward(self, value, **kwargs):
        angles = value.expand_dims(1) * self.frequencies
        embedding = self.embedder(ops.cat((ops.cos(angles), ops.sin(angles)), 1))
        kv_cache = {}
        for k in range(len(BLOCKS)):
            kv_cache[BLOCKS[k]] = (self.keys[k](embedding), self.values[k](embedding))
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
