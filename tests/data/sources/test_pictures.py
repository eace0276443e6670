"""Pictures as rows name them: files, bytes, base64, data URLs; what is none is refused by name."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from gemoe_ds.data.sources.pictures import PictureReader
from gemoe_ds.data.sources.unusable import Unusable
from gemoe_ds.data.turn import Picture


def encoded(size=(9, 6), form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, form, **options)
    return buffer.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()
LARGE = encoded((64, 64), "BMP")


@pytest.mark.parametrize(
    "named",
    [
        "a.png",
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"},
        {"path": "a.png"},
        TEXT,
        TEXT.rstrip("="),
        {"bytes": TEXT},
        {"url": f"data:image/png;base64,{TEXT}", "detail": "low"},
        f"data:image/png;base64,{TEXT}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    ],
)
def test_all_ways_to_give_one(tmp_path, named):
    (tmp_path / "a.png").write_bytes(PNG)
    assert PictureReader((tmp_path,))(named) == Picture(PNG, 9, 6)


def test_long_base64_and_a_file_url_and_the_size_as_shown(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "b c.jpg").write_bytes(encoded((9, 3), "JPEG", exif=turned))
    read = PictureReader((tmp_path,))
    assert read(f"file://{tmp_path}/b%20c.jpg") == Picture(
        (tmp_path / "b c.jpg").read_bytes(), 3, 9
    )
    assert read(base64.urlsafe_b64encode(LARGE).decode()) == Picture(LARGE, 64, 64)


@pytest.mark.parametrize(
    "image, group, words",
    [
        ({"bytes": b"x", "height": 3}, "not a picture", "give bytes or a path"),
        ({"bytes": None, "path": None}, "not a picture", "without bytes or a path"),
        (float("nan"), "not a picture", "image is nan"),
        ([PNG], "not a picture", "not a file name, bytes or base64"),
        ("", "not a picture", "image is '', not a file name"),
        ("data:image/png;base64,A$" + "A" * 9999, "not a picture", "no file name and no base64"),
        ("data:image/png;base64", "not a picture", "a data URL without data"),
        ("data:image/png;base64,AAAA", "picture broken", "image (a data URL) cannot be decoded"),
        ("iVBORw0KGgo" * 500, "picture broken", "image (base64) cannot be decoded"),
        (b"", "picture broken", "it is empty"),
        ("https://example.com/a.png", "URL", "nothing is fetched; download the pictures"),
        ("s3://bucket/a.png", "URL", "image is a URL"),
        ("none.png", "picture missing", "image none.png: No such file or directory"),
        (f"file:///{'x' * 90}", "picture missing", "No such file"),
        ("x" * 300, "picture missing", "File name too long"),
        ("text.png", "picture broken", "image text.png cannot be decoded: it has no header"),
        ("flat.jpg", "picture too small", "image flat.jpg is 3x9, smaller than 4"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_used_are_named(tmp_path, image, group, words):
    (tmp_path / "text.png").write_text("<html>")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 3)).save(tmp_path / "flat.jpg", exif=turned)
    with pytest.raises(Unusable) as why:
        PictureReader((tmp_path,), 4)(image)
    assert words in str(why.value) and why.value.group == group
    assert len(str(why.value)) < 500
