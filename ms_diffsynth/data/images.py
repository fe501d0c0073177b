"""Reading images strictly, and converting between Pillow images and pixels in [-1, 1].

Pillow alone would turn a 16-bit gray image white (``convert`` saturates), show the hidden colour below transparent
pixels, not rotate photographs, take the first frame of an animation, show gray where the rest of a JPEG
is missing, and unpack 30000 x 30000 pixels from a file of 100 KB. Everything read here is a defined 8-bit RGB image,
or an error that says what to do.
"""
from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, PngImagePlugin

from ..errors import DataError
from .fonts import font_for
from .paths import open_regular

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 64_000_000  # below Pillow's own warning (89 million) and error (179 million)
MAX_BYTES = 8 * MAX_PIXELS  # 16-bit RGBA, not compressed
MIN_SIDE = 16
MAX_ASPECT = 20

_WIDE = "\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # each is a word of its own
_BREAKS = re.compile(f" ?(?:[{_WIDE}]|[^ {_WIDE}]+)")
_BITS, _PHOTOMETRIC, _ORIENTATION = 0x0102, 0x0106, 0x0112  # tags of TIFF and EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_size(path: str) -> tuple[int, int]:
    """Width and height in pixels of the upright image. JPEG, PNG and WebP are not decoded for it.

    Raises: DataError when the file breaks a rule of :func:`read_image` or its end is missing; what is damaged in the
    middle of it shows only when the image is decoded.
    """
    with _opened(path) as (image, orientation):
        return image.size if orientation < 5 else image.size[::-1]


def read_image(path: str, mode: str | None = "RGB") -> Image.Image:
    """Read one still image, upright, in 8 bits.

    Transparent pixels are laid over white; 16-bit gray is divided by 257; CMYK goes to sRGB through its colour profile
    when it has one. Colour profiles of RGB images are ignored, as by the reference trainers.

    Args: ``mode`` "RGB", "RGBA" (keeps transparency), or None (the mode of the file, for masks and palettes).

    Raises: DataError for a file that is not regular, not one of ``FORMATS``, damaged, cut short, animated, of more than
    ``MAX_PIXELS`` pixels, with a side below ``MIN_SIDE``, longer than ``MAX_ASPECT`` to 1, or with pixels whose range
    is not defined (float, 32-bit, Lab and the like).
    """
    with _opened(path) as (image, orientation):
        image.load()
        if image.mode.startswith("I;16") and mode is not None:
            image = _eight_bits(image)
        if mode == "RGB":
            result = to_rgb(image, path)
        elif mode == "RGBA":
            result = image.convert("RGBA") if image.has_transparency_data else to_rgb(image, path).convert("RGBA")
        else:
            result = image.copy()
        if orientation in _UPRIGHT:
            result = result.transpose(_UPRIGHT[orientation])
        # Otherwise the next reader would rotate the image again.
        result.info = {key: value for key, value in result.info.items() if key == "transparency" and mode is None}
        return result


class Look(NamedTuple):
    """What an image file is: its format and upright size, whether it was turned by its EXIF orientation and has pixels
    that are not opaque, and a digest of the pixels that `read_image` gives.
    """

    format: str
    width: int
    height: int
    is_turned: bool
    is_transparent: bool
    pixels: str


def look_at(path: str) -> Look:
    """Read an image and say what it is. Raises: as `read_image`."""
    image = read_image(path)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=b"%dx%d" % image.size).hexdigest()
    with open_regular(path) as file, Image.open(file, formats=FORMATS) as raw:
        try:
            turned = raw.getexif().get(_ORIENTATION) in _UPRIGHT
        except Exception:  # damaged EXIF raises many kinds; read_image has told of it
            turned = False
        has_alpha, kind = raw.has_transparency_data, "JPEG" if raw.format == "MPO" else raw.format
    is_transparent = has_alpha and read_image(path, "RGBA").getextrema()[3][0] < 255
    return Look(kind, *image.size, turned, is_transparent, digest)


@contextmanager
def _opened(path: str) -> Iterator[tuple[Image.Image, int]]:
    """The image, its header and its end checked, and its orientation 1 to 8."""
    with open_regular(path) as file:
        try:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise DataError(f"{path} has {size} bytes; expected at most {MAX_BYTES}. Make the image smaller")
            image = Image.open(file, formats=FORMATS)
            _check_header(image, path)
            _check_end(image, file, path)
            yield image, _orientation(image, file, path)
        except DataError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large(path, "", int(re.search(r"\d+", str(error)).group())) from None
        except Image.UnidentifiedImageError:
            file.seek(0)
            raise DataError(
                f"{path} is not an image (it begins with {file.read(12)!r}); expected {', '.join(FORMATS)}. "
                "Convert it, or replace it"
            ) from None
        except Exception as error:  # Pillow's parsers raise a dozen kinds of exception on damaged bytes
            if "MAX_TEXT" in str(error):
                raise DataError(f"{path} holds text or a colour profile that is too large when unpacked ({error}); "
                                "expected at most a megabyte. Save the image again without metadata") from error
            raise _damaged(path, error) from error


def _damaged(path: str, reason: object) -> DataError:
    return DataError(
        f"{path} cannot be decoded ({reason}); the file is damaged or cut short. Replace it, or remove its row"
    )


def _too_large(path: str, size: str, pixels: int) -> DataError:
    return DataError(
        f"{path} has {size}{pixels / 1e6:.0f} million pixels; expected at most {MAX_PIXELS / 1e6:.0f} million. "
        "Make the image smaller"
    )


def check_sides(path: str, width: int, height: int) -> None:
    """Raises: DataError for an image of too many pixels, too small, or too long for its width."""
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} = ", width * height)
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"{path} is {width}x{height} pixels; expected at least {MIN_SIDE} on each side. Replace it, or remove it"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"{path} is {width}x{height} pixels, longer than {MAX_ASPECT}:1. Crop it, or remove it"
        )


def _check_header(image: Image.Image, path: str) -> None:
    check_sides(path, *image.size)
    if reason := _odd_pixels(image):
        raise DataError(
            f"{path} has mode {image.mode} ({reason}); expected 8 or 16 bits of a known range, gray or RGB. Convert it "
            "to 8-bit PNG"
        )
    if image.format == "MPO":  # a photograph of a telephone: the others are previews or depth, the first is the image
        _warn_once(f"{path} holds several images (MPO); its main image is used")
    elif getattr(image, "is_animated", False):
        raise DataError(
            f"{path} has {image.n_frames} frames or pages; expected one still image. Save the frame you mean as PNG"
        )


def _odd_pixels(image: Image.Image) -> str:
    """Why the meaning of the pixels is unknown although Pillow gives a mode; usually an empty string."""
    if image.mode in ("I", "F"):
        return "32 bits per pixel"
    if image.mode == "LAB":
        return "Lab colour"
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return "without the Adobe marker that says whether 0 is ink or paper"
    if image.mode == "RGB" and "transparency" in image.info and image.tile and image.tile[0].args == "RGB;16B":
        return "16 bits with a transparent colour"
    if image.mode.startswith("I;16") and image.format == "TIFF":
        if image.tag_v2.get(_BITS) == (12,):
            return "12 bits per pixel"
        if image.tag_v2.get(_PHOTOMETRIC) == 0:
            return "16 bits with 0 for white"
    return ""


def _check_end(image: Image.Image, file: BinaryIO, path: str) -> None:
    """Refuse an image that is cut short, or whose rest was never copied and is zeros.

    `Image.verify` does not see that of a JPEG. Pillow looks at the end of a WebP when it opens it; rare formats are
    decoded.
    """
    here, is_whole = file.tell(), True
    if image.format in ("JPEG", "MPO"):
        is_whole = _has_jpeg_end(file, here)  # Pillow has read up to the pixels; an MPO's preview may hide what is cut
    elif image.format == "PNG":
        is_whole = b"IEND" in _png_chunks(file)
    elif image.format != "WEBP":
        image.load()
    file.seek(here)
    if not is_whole:
        raise _damaged(path, "its end is missing")


def _has_jpeg_end(file: BinaryIO, start: int) -> bool:
    """Whether the end marker is somewhere behind ``start``: the last bytes are read first, and mostly hold it."""
    size = file.seek(0, io.SEEK_END)
    for place in (max(start, size - (1 << 16)), start):
        file.seek(place)
        before = b""
        while block := file.read(1 << 20):
            if b"\xff\xd9" in before + block:
                return True
            before = block[-1:]
    return False


def _png_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The kind of every chunk of a PNG: goes from header to header."""
    file.seek(8)
    while len(header := file.read(8)) == 8 and header[4:].isalpha():
        yield header[4:]
        file.seek(int.from_bytes(header[:4], "big") + 4, io.SEEK_CUR)


@lru_cache(maxsize=4096)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _orientation(image: Image.Image, file: BinaryIO, path: str) -> int:
    """The EXIF orientation; 1 of a TIFF, which Pillow itself turned when `_check_end` loaded it."""
    if image.format == "PNG" and "exif" not in image.info:
        here = file.tell()
        has_late_exif = b"eXIf" in _png_chunks(file)  # behind the pixels, as exiftool writes it
        file.seek(here)
        if has_late_exif:
            image.load()
    try:
        # PngImageFile.getexif decodes the whole image to look for EXIF behind the pixels; its base class does not.
        tags = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        value = tags.get(_ORIENTATION, 1)
        if value in range(1, 9) and (tags or not image.info.get("exif")):
            return value
        reason = f"orientation {value}" if tags else "no readable tags"
    except Exception as error:  # damaged EXIF raises many kinds of exception and must not reject an image
        reason = str(error)
    _warn_once(f"{path} has broken EXIF data ({reason}); it is ignored and the image is not rotated")
    return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit gray image in 8 bits; 65535 / 257 = 255."""
    values = np.asarray(image, np.float32)
    result = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result


def to_rgb(image: Image.Image, path: str = "the image") -> Image.Image:
    """An image in RGB by the rules of `read_image`: transparency over white, 16-bit gray divided by 257.

    Raises: DataError, which calls the image ``path``, for a mode whose range is not defined.
    """
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
            return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            _warn_once(f"{path} has a broken colour profile ({error}); its CMYK is converted without it")
    if image.mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    raise DataError(f"{path} has mode {image.mode}; expected gray, palette, RGB or CMYK. Convert it to 8-bit PNG")


def to_pixels(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image. Returns: float32 [3, H, W] in [-1, 1], computed as x / 127.5 - 1."""
    if image.mode != "RGB":
        raise DataError(f"an image of mode {image.mode} was given; expected RGB. Use convert_RGB=True, or convert it")
    pixels = np.asarray(image).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_pil(pixels: np.ndarray) -> Image.Image:
    """The RGB image of an array [3, H, W] in [-1, 1]; values beyond are clipped. The inverse of :func:`to_pixels`."""
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise DataError(f"an array of shape {pixels.shape} was given; expected [3, H, W]. Pass one image at a time")
    pixels = pixels.astype(np.float32)
    broken = int(np.size(pixels) - np.isfinite(pixels).sum())
    if broken:
        raise DataError(
            f"{broken} of {pixels.size} pixel values are not finite; expected numbers in [-1, 1]. "
            "Decode in float32, or use an earlier checkpoint: the weights may have diverged"
        )
    bytes_ = np.clip(np.rint((pixels + 1) * np.float32(127.5)), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(bytes_.transpose(1, 2, 0)))


def png_bytes(image: Image.Image, optimize: bool = False, text: Mapping[str, str] | None = None) -> bytes:
    """The content of a PNG file; ``optimize`` takes time and makes it smaller, ``text`` is what it says of itself."""
    file, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, content in (text or {}).items():
        chunks.add_itxt(name, content)
    image.save(file, format="PNG", optimize=optimize, pnginfo=chunks)
    return file.getvalue()


READABLE = 128  # pixels: below images narrower than this there is no room for a title


def grid(
    rows: Sequence[Image.Image] | Sequence[Sequence[Image.Image]],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> Image.Image:
    """A contact sheet on white: images in rows, each row below its caption (such as "before", "after"). Images that
    are all narrower than READABLE pixels are shown a whole number of times as large.

    Args:
        rows: rows of images; or one list of images, which is broken into rows of ``columns``.
        captions: one for each row, above it. One that has letters of no font of this system is "row 2".
        columns: only for one list of images; as many as there are by default.
        titles: one for each column (such as the prompts), below the last row, in at most three lines. One that has
            letters of no font of this system (`fonts.font_for`) is its number instead: "prompt 2".
    """
    if rows and isinstance(rows[0], Image.Image):
        columns = columns or len(rows)
        rows = [rows[i:i + columns] for i in range(0, len(rows), columns)]
    if not rows or not all(rows):
        raise DataError("a grid was asked for with an empty row; expected at least one image in every row. Add some")
    across = max(len(row) for row in rows)
    for name, texts, count in (("captions", captions, len(rows)), ("titles", titles, across)):
        if texts is not None and len(texts) != count:
            raise DataError(f"{len(texts)} {name} were given for a grid of {count}; expected one each. Correct {name}")
    scale = max(1, READABLE // max(image.width for row in rows for image in row))
    rows = [[image.resize((scale * image.width, scale * image.height), Image.Resampling.LANCZOS) if scale > 1 else image
             for image in row] for row in rows]
    cell_width = max(image.width for row in rows for image in row)
    cell_height = max(image.height for row in rows for image in row)
    text = min(28, max(11, cell_width // 14))  # pixels, the height of the letters
    margin, gap, font = text, max(4, text // 2), ImageFont.load_default(text)
    band = text + gap if captions else 0
    step = band + cell_height + (2 * gap if captions else gap)
    found = [(title, own) if (own := font_for(title, text)) else (f"prompt {number}", font)
             for number, title in enumerate(titles or (), 1)]
    feet = [(_wrapped(title, cell_width, own), own) for title, own in found]
    foot = max((foot.count("\n") + 1 for foot, _ in feet), default=0) * (text + gap // 2)
    bottom = margin + (len(rows) - 1) * step + band + cell_height
    size = 2 * margin + across * (cell_width + gap) - gap, bottom + (foot and foot + gap) + margin
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = margin + i * step + band
        if captions:
            own = font_for(captions[i], text)
            caption = _wrapped(captions[i] if own else f"row {i + 1}", sheet.width - 2 * margin, own or font, lines=1)
            draw.text((margin, top - gap), caption, (60, 60, 60), own or font, anchor="ls")
        for j, image in enumerate(row):
            left = margin + j * (cell_width + gap)
            sheet.paste(image.convert("RGB"), (
                left + (cell_width - image.width) // 2, top + (cell_height - image.height) // 2))
    for j, (title, own) in enumerate(feet):
        centre = margin + j * (cell_width + gap) + cell_width // 2
        draw.text((centre, bottom + gap), title, (110, 110, 110), own, "ma", spacing=gap // 2, align="center")
    return sheet


def side_by_side(images: Sequence[Image.Image], height: int) -> Image.Image:
    """Images in one, from left to right, each scaled to ``height`` pixels."""
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
              for image in images]
    gap = max(1, height // 32)
    sheet = Image.new("RGB", (sum(image.width + gap for image in scaled) - gap, height), "white")
    left = 0
    for image in scaled:
        sheet.paste(image.convert("RGB"), (left, 0))
        left += image.width + gap
    return sheet


def _wrapped(text: str, room: int, font: ImageFont.FreeTypeFont, lines: int = 3) -> str:
    """The text in at most ``lines`` lines of ``room`` pixels; what does not fit ends in three dots.

    Lines break at spaces, and between Chinese, Japanese or Korean letters.
    """
    result, words = [""], _BREAKS.findall(" ".join(text.split()))
    while words:
        longer = f"{result[-1]}{words[0]}".strip()
        if font.getlength(longer) <= room or (not result[-1] and len(result) < lines):
            result[-1] = longer
            words.pop(0)
        elif len(result) < lines:
            result.append("")
        else:
            result[-1] = f"{longer}..."
            break
    for i, line in enumerate(result):
        if font.getlength(line) > room:  # a word that is wider than a line: as many of its letters as there is room for
            line = line.removesuffix("...")
            fitting = bisect_right(range(len(line)), room, key=lambda n: font.getlength(line[:n].rstrip() + "..."))
            result[i] = line[:max(fitting - 1, 1)].rstrip() + "..."
    return "\n".join(result)
