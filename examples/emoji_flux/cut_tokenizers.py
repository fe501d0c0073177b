"""Cut FLUX.1's two tokenizers to the pieces that emoji-flux needs: its text encoders have a row for every piece.

    python examples/emoji_flux/cut_tokenizers.py models/emoji-flux data/emoji

Kept is what the captions of ``data/emoji``, those of DreamBooth, and the 4,000 words that CLIP's tokenizer learned
first are made of, and every single letter. These texts are then cut into the same pieces as by the whole tokenizers,
which is checked; any other falls into smaller ones. Needs protobuf, which MindSpore brings.
"""
from __future__ import annotations

import argparse
import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as sentencepiece

from ms_diffsynth.pipelines.shared.text import (
    CLIP_TOKENIZER,
    T5_TOKENIZER,
    build_clip_tokenizer,
    build_t5_tokenizer,
)

WORDS = 4000
SKS = ("a 3d render of sks cat", "an emoji of sks cat", "a photo of sks cat", "a picture of ohwx")
DREAMBOOTH = Path(__file__).parents[1] / "data/dreambooth_cat_fluent/metadata.csv"
END = "</w>"  # of a word, in CLIP's pieces


def captions(folder: Path) -> list[str]:
    """Every caption of the images, and of DreamBooth."""
    found = [*SKS, ""]
    for table in (*(folder / f"{name}.csv" for name in ("train", "held_out", "cats")), DREAMBOOTH):
        with table.open(encoding="utf-8", newline="") as file:
            found += [row[column] for row in csv.DictReader(file) for column in ("prompt", "caption") if column in row]
    return sorted(set(found))


def common_words() -> list[str]:
    """The words that CLIP's tokenizer learned first: its vocabulary is in this order."""
    vocabulary = json.loads((CLIP_TOKENIZER / "vocab.json").read_text(encoding="utf-8"))
    words = [piece.removesuffix(END) for piece in vocabulary if piece.endswith(END)]
    return [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()][:WORDS]


def merges_used(word: str, rank: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges by which byte-pair encoding makes the pieces of one word, given in CLIP's bytes."""
    pieces, used = [*word[:-1], word[-1] + END], set()
    while len(pieces) > 1:
        pair = min(pairwise(pieces), key=lambda p: rank.get(p, len(rank)))
        if pair not in rank:
            break
        used.add(pair)
        merged: list[str] = []
        for piece in pieces:  # from left to right, as `CLIPTokenizer.bpe` does
            if merged and (merged[-1], piece) == pair:
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return used


def cut_clip(folder: Path, texts: list[str]) -> None:
    """Write CLIP's tokenizer with the merges that ``texts`` need."""
    whole = build_clip_tokenizer(CLIP_TOKENIZER)
    shutil.copytree(CLIP_TOKENIZER, folder)
    version, *lines = (CLIP_TOKENIZER / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if len(line.split()) == 2]
    rank, used = {pair: k for k, pair in enumerate(merges)}, set()
    words = {"".join(whole.byte_encoder[b] for b in word.encode())
             for text in texts for word in whole.pat.findall(whole.fix_text(text).lower())}
    for word in words:
        used |= merges_used(word, rank)
    letters = whole.byte_encoder.values()
    kept = {*letters, *(letter + END for letter in letters), *(a + b for a, b in used), *whole.all_special_tokens}
    vocabulary = {piece: k for k, piece in enumerate(sorted(kept, key=whole.encoder.__getitem__))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    rows = [version, *(f"{a} {b}" for a, b in merges if (a, b) in used)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(vocabulary[token["content"]]): token
                                      for token in config["added_tokens_decoder"].values()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def cut_t5(folder: Path, texts: list[str]) -> None:
    """Write T5's tokenizer with the pieces that ``texts`` need, and without its 100 sentinels."""
    whole = build_t5_tokenizer(T5_TOKENIZER)
    needed = {piece for text in texts for piece in whole.tokenize(text)}
    model = sentencepiece.ModelProto()
    model.ParseFromString((T5_TOKENIZER / "spiece.model").read_bytes())
    normal = sentencepiece.ModelProto.SentencePiece.NORMAL
    pieces = [piece for piece in model.pieces
              if piece.type != normal or piece.piece in needed or len(piece.piece.removeprefix("▁")) <= 1]
    pieces = [sentencepiece.ModelProto.SentencePiece.FromString(piece.SerializeToString()) for piece in pieces]
    del model.pieces[:]
    model.pieces.extend(pieces)
    model.trainer_spec.vocab_size = len(pieces)
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [], "eos_token": "</s>",
              "pad_token": "<pad>", "unk_token": "<unk>", "legacy": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(model: Path, images: Path) -> None:
    texts, words = captions(images), common_words()
    for name, cut, build, source in (("tokenizer", cut_clip, build_clip_tokenizer, CLIP_TOKENIZER),
                                     ("tokenizer_2", cut_t5, build_t5_tokenizer, T5_TOKENIZER)):
        shutil.rmtree(model / name, ignore_errors=True)
        cut(model / name, [*texts, *words])
        whole, small = build(source), build(model / name)
        other = [text for text in [*texts, *words] if whole.tokenize(text) != small.tokenize(text)]
        longest = max(len(small(text).input_ids) for text in texts)
        size = sum(file.stat().st_size for file in (model / name).iterdir())
        print(f"{name}: {len(whole)} -> {len(small)} pieces, {size // 1024} KiB; {len(texts)} captions of at most "
              f"{longest} tokens, {len(other)} texts cut otherwise {other[:3]}; "
              f"'an iguana on a skateboard': {small.tokenize('an iguana on a skateboard')}")
        if other:
            raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the folder of the model: tokenizer/ and tokenizer_2/ are replaced")
    parser.add_argument("images", type=Path, help="the folder that make_images.py wrote")
    main(*vars(parser.parse_args()).values())
