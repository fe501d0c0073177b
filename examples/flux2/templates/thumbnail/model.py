"""Thumbnail: an image, made small and seen by a frozen image encoder, as keys and values of every block.

``--trainable_models template_model.mlp`` trains what follows the encoder. The encoder's filters are random, and
model.safetensors holds them: frozen weights are not part of a checkpoint. Fits the tiny base model.
"""
import numpy as np
from mindspore import Parameter, Tensor, mint, nn
from PIL import Image

from ms_diffsynth import no_grad

BLOCKS = ("double_0", "double_1", "single_0", "single_1")
HEADS, HEAD_DIM = 3, 32
LENGTH = 4  # keys in each block
WIDTH = HEADS * HEAD_DIM
SIDE = 64  # of the thumbnail, pixels
FILTERS = 32
FEATURES = 4 * FILTERS


class ImageEncoder(nn.Cell):
    """What filters find in the four quarters of an image: float32 [B, 3, SIDE, SIDE] in [-1, 1] -> [B, FEATURES]."""

    def __init__(self):
        super().__init__()
        self.conv_1 = mint.nn.Conv2d(3, FILTERS, 8, stride=4, padding=2)  # 16 x 16
        self.conv_2 = mint.nn.Conv2d(FILTERS, FILTERS, 4, stride=2, padding=1)  # 8 x 8
        self.norm = mint.nn.LayerNorm(FEATURES, elementwise_affine=False)

    def construct(self, pixels):
        x = mint.nn.functional.relu(self.conv_2(mint.nn.functional.relu(self.conv_1(pixels))))
        quarters = x.reshape(x.shape[0], FILTERS, 2, 4, 2, 4).mean((3, 5))
        return self.norm(quarters.reshape(x.shape[0], FEATURES))


class Tokens(nn.Cell):
    """A vector as LENGTH vectors: a small network, plus a learned vector for each place."""

    def __init__(self):
        super().__init__()
        self.net = nn.SequentialCell(mint.nn.Linear(FEATURES, 48), mint.nn.SiLU(), mint.nn.Linear(48, WIDTH))
        self.place = Parameter(Tensor(np.random.standard_normal((LENGTH, WIDTH)).astype(np.float32)))

    def construct(self, vector):
        vectors = self.net(vector).expand_dims(1) + self.place  # [B, LENGTH, WIDTH]
        return vectors.reshape(vectors.shape[0], LENGTH, HEADS, HEAD_DIM)


class Head(nn.Cell):
    """Keys and values of every block: [B, FEATURES] -> kv_cache."""

    def __init__(self):
        super().__init__()
        self.keys = nn.CellList([Tokens() for _ in BLOCKS])
        self.values = nn.CellList([Tokens() for _ in BLOCKS])

    def construct(self, vector):
        kv_cache = {}
        for k in range(len(BLOCKS)):
            kv_cache[BLOCKS[k]] = (self.keys[k](vector), self.values[k](vector))
        return kv_cache


class ThumbnailTemplate(nn.Cell):
    """image -> kv_cache."""

    def __init__(self):
        super().__init__()
        self.image_encoder = ImageEncoder()
        self.mlp = Head()

    @no_grad()
    def process_inputs(self, image, **kwargs):
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32) / 127.5 - 1
        return {"emb": self.image_encoder(Tensor(pixels.transpose(2, 0, 1)[None]))}

    def forward(self, emb, **kwargs):
        return {"kv_cache": self.mlp(emb)}


class DataProcessor:
    """The image of a path; sampling gives the image itself."""

    def __call__(self, image, **kwargs):
        return {"image": Image.open(image)}


TEMPLATE_MODEL = ThumbnailTemplate
TEMPLATE_MODEL_PATH = "model.safetensors"
TEMPLATE_DATA_PROCESSOR = DataProcessor
