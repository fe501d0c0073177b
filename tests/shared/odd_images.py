"""Picture files that Pillow does not write: cut short, huge when unpacked, of 16 bits, with a tag or marker changed.

Also a data set of two rows, the second of which is one of these.
"""
from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

from ms_diffsynth.data import LoadImage, ToAbsolutePath, UnifiedDataset

NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
GRAY, ALPHA = NOISE[..., 0], NOISE[..., 1]
COLOURS = np.random.default_rng(3).integers(0, 256, (256, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (40, 56, 4), dtype=np.uint16)


def saved(pixels, kind="PNG", mode=None, **options):
    """The bytes of a picture file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(folder, name, make):
    """Write good.png, the odd picture (``make`` is its bytes, or makes it at a path) and the metadata of both."""
    folder.mkdir(exist_ok=True)
    content = make if isinstance(make, bytes) else make(folder / name)
    if content is not None:
        (folder / name).write_bytes(content)
    (folder / "good.png").write_bytes(saved(NOISE))
    (folder / "metadata.csv").write_text(f"image,prompt\ngood.png,a\n{name},b\n")


def opened(folder):
    """The data set; its pictures keep their size."""
    return UnifiedDataset(str(folder), str(folder / "metadata.csv"), data_file_keys="image",
                          main_data_operator=ToAbsolutePath(str(folder)) >> LoadImage())


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits, kind, data, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deep_png(values, *chunks):
    """16 bits a channel, which Pillow does not write: gray, gray and alpha, RGB or RGBA."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    return png(values.shape[1], values.shape[0], 16, kind, zlib.compress(rows), *chunks)


def zipped_zeros(size):
    """A zlib stream of ``size`` zeros, made without having them: a block that does not look back, again and again."""
    squeeze = zlib.compressobj(9, wbits=-15)
    block, rest = squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH), zlib.compressobj(9, wbits=-15)
    end = rest.compress(bytes(size % (1 << 20))) + rest.flush()
    return b"\x78\xda" + block * (size >> 20) + end + struct.pack(">HH", size % 65521, 1)  # Adler-32 of zeros


def black_png(side):
    """One bit a pixel."""
    return png(side, side, 1, 0, zipped_zeros(side * (1 + (side + 7) // 8)))


def png_with(*chunks):
    content = saved(NOISE)
    return content[:33] + b"".join(chunks) + content[33:]  # behind IHDR


def changed(content, old, new):
    assert content.count(old) == 1
    return content.replace(old, new)


def with_tag(content, tag, old, new):
    """A TIFF with one short tag changed."""
    return changed(content, struct.pack("<HHI", tag, 3, 1) + struct.pack("<H", old),
                   struct.pack("<HHI", tag, 3, 1) + struct.pack("<H", new))


def without_adobe(content):
    start = content.index(b"\xff\xee")
    return content[:start] + content[start + 2 + int.from_bytes(content[start + 2:start + 4], "big"):]


def cut(kind, share=0.5, **options):
    content = saved(NOISE, kind, **options)
    return content[:int(len(content) * share)]


def zeros_from_half(kind):
    content = saved(NOISE, kind)
    return content[:len(content) // 2] + bytes(len(content) - len(content) // 2)


def sparse(path, content, size):
    """A file of ``size`` bytes that takes none of them from the disk."""
    path.write_bytes(content)
    os.truncate(path, size)


def frames(kind, count=2):
    others = [Image.fromarray(np.roll(NOISE, k, 0)) for k in range(1, count)]
    return saved(NOISE, kind, save_all=True, append_images=others)


def huge_webp(side):
    body = b"\x2f" + struct.pack("<I", side - 1 | side - 1 << 14) + bytes(43)
    body = b"WEBPVP8L" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(body)) + body


def huge_jpeg():
    return changed(saved(NOISE, "JPEG"), struct.pack(">HH", 40, 56), struct.pack(">HH", 65000, 65000))


def huge_bmp():
    return changed(saved(NOISE, "BMP"), struct.pack("<ii", 56, 40), struct.pack("<ii", 50000, 50000))


def huge_gif():
    return b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(3) + b"\x2c" + saved(GRAY, "GIF").split(b"\x2c", 1)[1]


def blocks(channels):
    """Squares of one colour each, which JPEG keeps."""
    colours = np.random.default_rng(2).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return colours.repeat(16, 0).repeat(16, 1)


def palette(bits=8, **options):
    """A PNG with a palette, its colours, and its indices."""
    indices = GRAY >> 8 - bits
    image = Image.fromarray(indices, "P")
    image.putpalette(COLOURS[:1 << bits].tobytes())
    return saved(image, bits=bits, **options), COLOURS[indices].astype(float), indices
