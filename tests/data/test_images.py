"""Pictures mean what they show: pixels by hand, of every kind of file that a data set may hold."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from gemoe_ds.data.images import as_shown, decode_image, display_size, has_more_frames, read_image
from gemoe_ds.data.sample import of_turns
from gemoe_ds.errors import ImageError

WHITE = [255, 255, 255]
ORIENTATION = 0x0112
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'


def stored(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(pixels, dtype=np.uint8, mode=None) -> Image.Image:
    """A row of pixels, or several rows of grey ones."""
    pixels = np.array(pixels, dtype)
    image = Image.fromarray(pixels[None] if mode or pixels.ndim == 1 else pixels)
    return image if mode is None else Image.frombytes(mode, image.size, pixels.tobytes())


def png(width, depth, colour_type, row, *chunks, behind=(), height=1) -> bytes:
    """One row of pixels, packed by hand; `behind`: chunks after the pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), *behind]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


def exif(orientation) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def pixels(encoded: bytes) -> list[list[int]]:
    """Of all rows, one after the other; the header alone gives the same size."""
    image = read_image(encoded)
    assert image.mode == "RGB" and image.size == display_size(encoded)
    for _ in range(2):
        assert as_shown(opened := Image.open(io.BytesIO(encoded))).tobytes() == image.tobytes()
        assert as_shown(opened).tobytes() == image.tobytes(), "its pixels are read already"
    return np.asarray(image).reshape(-1, 3).tolist()


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_in_memory_that_is_none(size):
    with pytest.raises(ImageError, match=f"it has {size[0]} x {size[1]} pixels"):
        as_shown(Image.new("RGB", size))
    with pytest.raises(ImageError, match="it is a picture in memory of grey values in mode I;16"):
        as_shown(Image.new("I;16", (2, 2)))


def greys(encoded: bytes) -> list[int]:
    found = pixels(encoded)
    assert all(len(set(pixel)) == 1 for pixel in found)
    return [pixel[0] for pixel in found]


UPRIGHT = {  # of [[0, 1, 2], [3, 4, 5]], row by row
    1: [0, 1, 2, 3, 4, 5],
    2: [2, 1, 0, 5, 4, 3],
    3: [5, 4, 3, 2, 1, 0],
    4: [3, 4, 5, 0, 1, 2],
    5: [0, 3, 1, 4, 2, 5],
    6: [3, 0, 4, 1, 5, 2],
    7: [5, 2, 4, 1, 3, 0],
    8: [2, 5, 1, 4, 0, 3],
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(form, orientation):
    lossless = {"lossless": True} if form == "WEBP" else {}
    encoded = stored(picture([[0, 1, 2], [3, 4, 5]]), form, exif=exif(orientation), **lossless)
    assert greys(encoded) == UPRIGHT[orientation if 1 <= orientation <= 8 else 1]
    assert display_size(encoded) == ((2, 3) if 5 <= orientation <= 8 else (3, 2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_orientation_wherever_a_file_can_name_it():
    turned = (b"eXIf", exif(6).tobytes()[len(b"Exif\0\0") :])
    assert display_size(png(2, 8, 0, b"\1\2")) == (2, 1)
    for encoded in (
        png(2, 8, 0, b"\1\2", turned),
        png(2, 8, 0, b"\1\2", behind=[turned]),
        png(2, 8, 0, b"\1\2", (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        stored(picture([1, 2]), "TIFF", tiffinfo={700: XMP}),
    ):
        assert greys(encoded) == [1, 2] and display_size(encoded) == (1, 2)
    wide = Image.new("RGB", (16, 8))
    for options in ({"exif": exif(6)}, {"xmp": XMP}):
        assert read_image(stored(wide, "JPEG", **options)).size == (8, 16)
    for damaged in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage"):
        assert len(pixels(stored(wide, "JPEG", exif=damaged))) == 128


PALETTE = (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
NOTHING_RED = Image.new("RGBA", (16, 16), (255, 0, 0, 0))


@pytest.mark.parametrize(
    "encoded, expected",
    [
        # 128 of 255 parts of it, 127 of white
        (stored(picture([[100, 50, 0, 128]], mode="RGBA"), "PNG"), [[177, 152, 127]]),
        (stored(picture([[1, 2, 3, 255]], mode="RGBA"), "PNG"), [[1, 2, 3]]),
        (stored(picture([[100, 128], [50, 0]], mode="LA"), "PNG"), [[177] * 3, WHITE]),
        (png(2, 16, 4, struct.pack(">4H", 0, 32768, 1000, 0)), [[127] * 3, WHITE]),
        (png(3, 8, 3, b"\0\1\2", PALETTE), [[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        (png(2, 8, 3, b"\0\1", PALETTE, (b"tRNS", b"\0\x80")), [WHITE, [127, 255, 127]]),
        (png(3, 8, 3, b"\0\1\2", PALETTE, (b"tRNS", b"\xff\0")), [[255, 0, 0], WHITE, [0, 0, 255]]),
        # one colour is transparent, named in the file's own depth
        (png(2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), (b"tRNS", b"\0\1\0\2\0\3")), [WHITE, [4, 5, 6]]),
        (png(2, 16, 2, bytes(range(12)), (b"tRNS", bytes(range(6)))), [WHITE, [6, 8, 10]]),
        (png(2, 16, 0, b"\x03\xe8\x80\0", (b"tRNS", b"\x03\xe8")), [WHITE, [128] * 3]),
        (png(2, 8, 0, b"\x07\x09", (b"tRNS", b"\0\x07")), [WHITE, [9] * 3]),
        (png(2, 4, 0, b"\x35", (b"tRNS", b"\0\x03")), [WHITE, [85] * 3]),
        (png(2, 2, 0, b"\x60", (b"tRNS", b"\0\x01")), [WHITE, [170] * 3]),
        (png(2, 1, 0, b"\x40", (b"tRNS", b"\0\x01")), [[0] * 3, WHITE]),
        (png(2, 1, 0, b"\x40"), [[0] * 3, WHITE]),
        # premultiplied, as TIFF's extra samples can say
        (
            stored(picture([[100, 128]], mode="LA"), "TIFF").replace(
                struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)
            ),
            [[227] * 3],
        ),
    ],
)  # fmt: skip
def test_what_is_transparent_shows_white(encoded, expected):
    assert pixels(encoded) == expected


@pytest.mark.parametrize("form", ["GIF", "WEBP", "AVIF", "ICO", "TGA", "TIFF", "JPEG2000"])
def test_white_shows_through_in_every_format(form):
    assert set(greys(stored(NOTHING_RED, form))) == {255}


GREY16 = picture([0, 65535, 32768], np.uint16)


@pytest.mark.parametrize(
    "encoded, expected",
    [
        (png(3, 16, 0, struct.pack(">3H", 0, 65535, 32768)), [0, 255, 128]),
        (png(4, 16, 0, struct.pack(">4H", 128, 129, 257, 65406)), [0, 1, 1, 254]),
        (stored(GREY16, "TIFF"), [0, 255, 128]),
        (stored(GREY16, "TIFF", compression="tiff_lzw"), [0, 255, 128]),
        (stored(GREY16, "TIFF", tiffinfo={262: 0}), [255, 0, 127]),  # 0 is white
        (stored(picture([0, 0.5, 1], np.float32), "TIFF"), [0, 128, 255]),
        (stored(picture([0, 0.5, 1], np.float32), "PPM"), [0, 128, 255]),
        (b"P5 3 1 65535\n" + struct.pack(">3H", 0, 65535, 32768), [0, 255, 128]),
        (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 4095, 2048), [0, 255, 128]),
        (b"P2 3 1 1000\n0 1000 500\n", [0, 255, 128]),
        (stored(Image.fromarray(np.full((16, 16), 32768, np.uint16)), "JPEG2000"), [128] * 256),
        (stored(picture([7, 9]), "PNG"), [7, 9]),
    ],
)  # fmt: skip
def test_grey_is_scaled_from_its_own_black_and_white(encoded, expected):
    assert greys(encoded) == expected


@pytest.mark.parametrize(
    "image, words",
    [
        (picture([-1, 0, 1], np.float32), "go from -1 to 1, and only 0 (black) to 1 (white)"),
        (picture([0, 100, 255], np.float32), "go from 0 to 255"),
        (picture([0, np.nan, 1], np.float32), "go from nan to nan"),
        (picture([0, np.inf], np.float32), "go from 0 to inf"),
        (picture([0, 70000], np.int32), "a TIFF of grey values in mode I, whose black and white"),
    ],
)
def test_grey_without_a_known_white_is_refused(image, words):
    with pytest.raises(ImageError) as error:
        read_image(stored(image, "TIFF"))
    assert words in str(error.value) and "store it with 8 bits" in str(error.value)


def grey_cyan_profile() -> bytes:
    """An ICC profile of a press whose cyan ink is a grey of L* = 50."""
    table = b"mft1" + bytes([0, 0, 0, 0, 4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += bytes(range(256)) * 4  # inks as they are; then L, a, b of the 16 corners
    table += b"".join(
        bytes([0 if corner & 1 else 128 if corner & 8 else 255, 128, 128]) for corner in range(16)
    )
    table += bytes(range(256)) * 3
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    header = struct.pack(">I4s", 144 + len(table), b"test") + b"\x02\0\0\0prtrCMYKLab "
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return header.ljust(128, b"\0") + tags + table


def test_printing_inks():
    cyan, black = (
        Image.new("CMYK", (8, 8), (255, 0, 0, 0)),
        Image.new("CMYK", (8, 8), (0, 0, 0, 204)),
    )
    for form in ("JPEG", "TIFF"):  # an Adobe JPEG holds them inverted
        assert pixels(stored(cyan, form))[0] == [0, 255, 255]
        assert pixels(stored(black, form))[0] == [51, 51, 51]
        (grey,) = set(greys(stored(cyan, form, icc_profile=grey_cyan_profile())))
        assert grey == pytest.approx(119, abs=2)  # L* = 50 in sRGB
        assert pixels(stored(cyan, form, icc_profile=b"damaged"))[0] == [0, 255, 255]


def test_the_first_of_several_frames():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for form, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        several = stored(red, form, save_all=True, append_images=[blue], **options)
        assert pixels(several)[0] == [255, 0, 0] and has_more_frames(several)
        assert not has_more_frames(stored(red, form, **options))
    phone = stored(red, "MPO", save_all=True, append_images=[blue])
    assert pixels(phone)[0] == [254, 0, 0] and not has_more_frames(phone)


PHOTO = stored(Image.effect_noise((64, 64), 80), "JPEG")


@pytest.mark.parametrize(
    "encoded, reason",
    [
        (b"", "it has no header of a format that Pillow reads (it is empty)"),
        (b"<!DOCTYPE html>", "(it begins b'<!DOCTYPE html>')"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "(it begins b\"<svg xmlns='http\")"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "ftypheic"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "(it begins b'%!PS"),
        (png(0, 8, 0, b""), "it has no header of a format that Pillow reads (it begins b'\\x89PNG"),
        (png(20_000, 1, 0, b"", height=20_000), "it has more than 178,956,970 pixels"),
        (PHOTO[: len(PHOTO) // 2], "image file is truncated"),
        (png(2, 8, 0, b"\1"), "image file is truncated"),
    ],
)  # fmt: skip
def test_what_cannot_be_decoded_has_one_reason_the_same_in_every_run(encoded, reason):
    said = set()
    for _ in range(2):
        with pytest.raises(ImageError) as error:
            decode_image(of_turns("x", encoded, ()))
        said.add(str(error.value))
    (text,) = said
    assert text.startswith("sample x: its image cannot be decoded: ")
    assert reason in text and " at 0x" not in text and "\n" not in text
