"""Caption: a second text beside the prompt, as keys and values of every block.

It is read by the base model's own text encoder, which stays frozen and is not part of the template's weights. Fits the
tiny base model.
"""
import numpy as np
from mindspore import Parameter, Tensor, mint, nn

from ms_diffsynth import no_grad

BLOCKS = ("double_0", "double_1", "single_0", "single_1")
HEADS, HEAD_DIM = 3, 32
LENGTH = 4  # keys in each block
WIDTH = HEADS * HEAD_DIM
TEXT_WIDTH = 96  # of prompt_embeds: three layers of the text encoder side by side


class Tokens(nn.Cell):
    """A vector as LENGTH vectors: a small network, plus a learned vector for each place."""

    def __init__(self):
        super().__init__()
        self.net = nn.SequentialCell(mint.nn.Linear(TEXT_WIDTH, 48), mint.nn.SiLU(), mint.nn.Linear(48, WIDTH))
        self.place = Parameter(Tensor(np.random.standard_normal((LENGTH, WIDTH)).astype(np.float32)))

    def construct(self, vector):
        vectors = self.net(vector).expand_dims(1) + self.place  # [B, LENGTH, WIDTH]
        return vectors.reshape(vectors.shape[0], LENGTH, HEADS, HEAD_DIM)


class CaptionTemplate(nn.Cell):
    """text -> kv_cache."""

    def __init__(self):
        super().__init__()
        self.norm = mint.nn.LayerNorm(TEXT_WIDTH, elementwise_affine=False)
        self.keys = nn.CellList([Tokens() for _ in BLOCKS])
        self.values = nn.CellList([Tokens() for _ in BLOCKS])

    @no_grad()
    def process_inputs(self, text, pipe, **kwargs):
        return {"text_emb": self.norm(pipe.encode_prompt(text).mean(1))}  # the mean over the tokens, [1, TEXT_WIDTH]

    def forward(self, text_emb, **kwargs):
        kv_cache = {}
        for k in range(len(BLOCKS)):
            kv_cache[BLOCKS[k]] = (self.keys[k](text_emb), self.values[k](text_emb))
        return {"kv_cache": kv_cache}


TEMPLATE_MODEL = CaptionTemplate
TEMPLATE_MODEL_PATH = None  # random weights: this is what training starts from
