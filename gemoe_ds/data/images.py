"""Encoded bytes -> the picture that a viewer shows, in RGB; its size from the header alone.

A picture is turned upright by its EXIF orientation (as Molmo's loader and transformers'
`load_image` do), laid on white where it is transparent (as Qwen's loader does) and, if it has more
than 8 bits, scaled from its own black and white to 0 and 255. Of an animation or a file of several
pages it is the first. Colour profiles count for printing inks only; RGB is taken as it is stored,
as the models' loaders take it. Whatever has no one meaning is an ImageError, never a guess.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from gemoe_ds.data.turn import Sample
from gemoe_ds.errors import ImageError

# All formats now: two threads that meet their first WebP at once could otherwise miss the plugin.
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]  # a program, which Ghostscript would run

ORIENTATION = 0x0112  # EXIF and TIFF tags
BITS_PER_SAMPLE = 258
PHOTOMETRIC = 262

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Where a PNG can name an orientation: before its pixels, or behind them.
_PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def decode_image(sample: Sample, place: int = 0) -> Image.Image:
    """A picture of a sample in RGB; ImageError naming the sample if it is broken, or of another
    size than is known of it."""
    picture = sample.images[place]
    with _named_after(sample, place):
        image = read_image(picture.data)
        known = picture.width, picture.height
        if known not in ((0, 0), image.size):
            had, has = (f"{width} x {height}" for width, height in (known, image.size))
            raise ImageError(f"it has {has} pixels, and {had} are listed")
        return image


def shown_size(sample: Sample, place: int) -> tuple[int, int]:
    """Width and height of `decode_image`, from what is known or from the header; ImageError."""
    picture = sample.images[place]
    if picture.width:
        return picture.width, picture.height
    with _named_after(sample, place):
        return display_size(picture.data)


@contextmanager
def _named_after(sample: Sample, place: int) -> Iterator[None]:
    """An ImageError of the block names the sample."""
    try:
        yield
    except ImageError as error:
        which = "image" if len(sample.images) == 1 else f"picture {place + 1}"
        raise ImageError(
            f"sample {sample.id}: its {which} cannot be decoded: {error}; convert the data again"
        ) from error


def read_image(encoded: bytes) -> Image.Image:
    """The picture in RGB; ImageError with one reason, the same in every run, if there is none."""
    with _opened(encoded) as image:
        _scale_transparent_colour(image)
        orientation = 1 if image.format == "TIFF" else _orientation(image, encoded)
        image.load()  # Pillow turns a TIFF upright here
        rgb = _in_rgb(image)
        return rgb if orientation == 1 else rgb.transpose(_UPRIGHT[orientation])


def as_shown(picture: Image.Image) -> Image.Image:
    """The same of a picture that is open already, or was never in a file."""
    with _reasons():
        if 0 in picture.size:
            raise ImageError(f"it has {picture.width} x {picture.height} pixels")
        _scale_transparent_colour(picture)
        picture.load()
        orientation = 1 if picture.format == "TIFF" else _orientation(picture)
        rgb = _in_rgb(picture)
        return rgb if orientation == 1 else rgb.transpose(_UPRIGHT[orientation])


def display_size(encoded: bytes) -> tuple[int, int]:
    """Width and height of `read_image(encoded)`, without its pixels."""
    with _opened(encoded) as image:
        width, height = image.size
        by_pillow = isinstance(image, TiffImageFile) and ORIENTATION in image.tag_v2
        if not by_pillow and _orientation(image, encoded) >= 5:
            return height, width
        return width, height


def has_more_frames(encoded: bytes) -> bool:
    """Whether this is an animation or has several pages, of which the first is read."""
    if encoded.startswith(b"\xff\xd8"):  # a second picture in a JPEG is a small or depth copy
        return False
    with _opened(encoded) as image:
        return bool(getattr(image, "is_animated", False))


@contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """Its header, read. Whatever goes wrong then or in the block is an ImageError."""
    with _reasons():
        try:
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except UnidentifiedImageError:
            begins = f"it begins {encoded[:16]!r}" if encoded else "it is empty"
            raise ImageError(f"it has no header of a format that Pillow reads ({begins})") from None
        with image:
            yield image


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever goes wrong in the block is an ImageError with one reason."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(f"it has more than {limit:,} pixels; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise almost anything on broken files
        said = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", " ".join(str(error).split()))
        raise ImageError(said or type(error).__name__) from error


def _orientation(image: Image.Image, encoded: bytes = b"") -> int:
    """1 to 8, as the file says it; 1 if it says none or something that cannot be read.

    `encoded`: of a picture whose pixels have not been decoded.
    """
    behind = encoded.find(b"IDAT") if image.format == "PNG" else -1
    decodes = behind >= 0 and any(encoded.find(mark, behind) >= 0 for mark in _PNG_ORIENTATION)
    try:  # Pillow's own way with a PNG always decodes it, to see what stands behind the pixels
        exif = image.getexif() if decodes else Image.Image.getexif(image)
        found = exif.get(ORIENTATION)
    except Exception:  # damaged EXIF: viewers, and Molmo's loader, show the picture as it is stored
        return 1
    return found if found in _UPRIGHT else 1


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode[0] in "IF":
        image = _in_8_bits(image)
    if image.mode == "CMYK":
        return _without_inks(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow would drop its alpha on the way to RGBA
        image = image.convert("LA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba := image.convert("RGBA"), mask=rgba)
    return white


def _scale_transparent_colour(image: Image.Image) -> None:
    """A PNG gives its transparent colour in its own depth, Pillow its pixels in 8 bits.

    The depth is known until the pixels are read.
    """
    key = image.info.get("transparency")
    if key is None or not isinstance(image, PngImageFile) or not image.tile:
        return
    raw_mode = image.tile[0].args
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits, in modes I, I;16 and F, from its own black and white to 0 and 255."""
    white = _white(image)
    grey = np.asarray(image).astype(np.float64)
    if not (grey.min() >= 0 and grey.max() <= white):  # nor if one is not a number
        raise ImageError(
            f"its grey values go from {grey.min():g} to {grey.max():g}, and only 0 (black) to "
            f"{white:g} (white) has a meaning; store it with 8 bits"
        )
    scaled = np.rint(grey * (255 / white)).astype(np.uint8)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0:
        scaled = 255 - scaled  # white is 0: Pillow heeds it for 8 bits and less
    levels = Image.fromarray(scaled)
    if (key := image.info.get("transparency")) is not None:
        levels.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    return levels


def _white(image: Image.Image) -> float:
    """The value of white where the format has one: its highest number, or 1.0."""
    if image.mode.startswith("I;16") and image.format in ("PNG", "JPEG2000"):
        return 65535
    if image.mode.startswith("I;16") and isinstance(image, TiffImageFile):
        return 2.0 ** image.tag_v2[BITS_PER_SAMPLE][0] - 1
    if image.mode == "I" and image.format == "PPM":  # Pillow scales any maximum to this one
        return 65535
    if image.mode == "F" and image.format in ("TIFF", "PPM"):
        return 1.0
    raise ImageError(
        f"it is a {image.format or 'picture in memory'} of grey values in mode {image.mode}, "
        "whose black and white are unknown; store it with 8 bits"
    )


def _without_inks(image: Image.Image) -> Image.Image:
    """CMYK -> RGB by the profile of its inks, if it brings one."""
    if profile := image.info.get("icc_profile"):
        try:
            inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            screen = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, inks, screen, outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # damaged, or of other colours: as if there were none
    return image.convert("RGB")
