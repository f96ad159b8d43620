"""Decoding of encoded images: deep grey, orientation, transparency, colour spaces, size; and damaged ones skipped."""

from __future__ import annotations

import io
import random
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ldm.data.check import check_dataset
from ldm.data.formats.clip_embeddings import read_original
from ldm.data.formats.folder import ImageFolder
from ldm.data.formats.image_list import ImageList
from ldm.data.formats.image_sets import image_batches
from ldm.data.formats.lmdb_text import LMDBImages, LMDBTextImages
from ldm.data.formats.picture_files import Decoding, decode_picture, inspect_picture
from ldm.data.formats.text_writers import write_text_lmdb
from ldm.errors import ConfigError, UserError

DRAWS = np.random.RandomState(3)
CORNERS = np.array([[[200, 0, 0], [0, 200, 0], [0, 0, 200]], [[90, 90, 0], [0, 90, 90], [9, 9, 9]]], np.uint8)


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def decoded(picture, kind="PNG", decoding=None, **options):
    return np.array(decode_picture(encoded(picture, kind, **options), "x", decoding or Decoding()))


def with_chunk(data, kind, content):
    """Insert a chunk behind the header of a PNG."""
    body = kind + content
    return data[:33] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_images_of_8_bits_are_read_as_before(mode):
    picture = Image.fromarray(DRAWS.randint(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    found = decode_picture(encoded(picture), "x")
    assert found.mode == "RGB" and (np.array(found) == np.array(picture.convert("RGB"))).all()
    jpeg = encoded(picture.convert("RGB"), "JPEG")
    assert (np.array(decode_picture(jpeg, "x")) == np.array(Image.open(io.BytesIO(jpeg)))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_a_ramp_of_16_bits(kind):
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    found = decoded(Image.fromarray(ramp), kind)
    assert found.shape == (256, 256, 3) and (found[..., 0] == found[..., 1]).all()
    assert found.min() == 0 and found.max() == 255 and found[..., 0].mean() == 127.5
    values = found[..., 0].reshape(-1)
    assert values[[0, 128, 129, 257, 385, 386, 32_767, 32_768, 65_406, 65_407]].tolist() == [
        0, 0, 1, 1, 1, 2, 127, 128, 254, 255
    ]  # fmt: skip


def test_a_ramp_of_12_bits():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    expected = np.floor(np.arange(4096) / 4095 * 255 + 0.5).reshape(64, 64)
    plain = encoded(Image.fromarray(ramp))
    assert np.array(decode_picture(plain, "x")).max() == 16  # 4095 / 257: the file does not state 12 bits
    assert (np.array(decode_picture(plain, "x", Decoding(white_level=4095)))[..., 0] == expected).all()
    stated = with_chunk(plain, b"sBIT", b"\x0c")
    assert (np.array(decode_picture(stated, "x"))[..., 0] == expected).all()
    scaled = with_chunk(encoded(Image.fromarray(ramp << 4 | ramp >> 8)), b"sBIT", b"\x0c")  # as PNG requires
    assert np.abs(np.array(decode_picture(scaled, "x"))[..., 0] - expected).max() <= 1
    dark = with_chunk(encoded(Image.fromarray(ramp // 16 << 4)), b"sBIT", b"\x0c")
    assert np.array(decode_picture(dark, "x")).max() == 16
    assert inspect_picture(plain, "x") == {"grey of 16 bits": 4095}


def test_big_endian_32_bits_and_floats():
    ramp = np.arange(65_536).reshape(256, 256)
    assert decoded(Image.fromarray(ramp.astype(np.int32)), "TIFF")[..., 0].mean() == 127.5
    header = b"P5 256 256 65535\n"
    assert np.array(decode_picture(header + ramp.astype(">u2").tobytes(), "x"))[..., 0].mean() == 127.5
    unit = decoded(Image.fromarray((ramp / 65_535).astype(np.float32)), "TIFF")
    assert unit.min() == 0 and unit.max() == 255 and abs(unit.mean() - 127.5) < 0.01
    message = "^a.tif: expected grey values from 0 to (1|65535), got .* Write 8 or 16 bits"
    for values in (ramp * 2, ramp - 1, ramp.astype(np.float32), np.full((4, 4), np.nan, np.float32)):
        picture = Image.fromarray(values.astype(np.int32 if values.dtype.kind == "i" else np.float32))
        with pytest.raises(UserError, match=message):
            decode_picture(encoded(picture, "TIFF"), "a.tif")
    assert decoded(Image.fromarray(ramp.astype(np.int32) * 2), "TIFF", Decoding(white_level=131_070)).max() == 255


def test_transparent_grey_of_16_bits():
    values = np.array([[0, 65_535], [257, 25_700]], np.uint16)
    data = with_chunk(encoded(Image.fromarray(values)), b"tRNS", struct.pack(">H", 257))
    assert np.array(decode_picture(data, "x"))[..., 0].tolist() == [[0, 255], [255, 100]]
    assert np.array(decode_picture(data, "x", Decoding((0, 0, 0))))[..., 0].tolist() == [[0, 255], [0, 100]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientations(orientation, kind):
    """The picture that viewers show: row and column 0 of the stored one are the sides that the standard names."""
    stored = np.kron(CORNERS, np.ones((16, 16, 1), np.uint8))
    expected = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1],
        7: stored.swapaxes(0, 1)[::-1, ::-1],
        8: stored.swapaxes(0, 1)[::-1],
    }.get(orientation, stored)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(stored), kind, exif=exif, **options)
    found = np.array(decode_picture(data, "x")).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= (4 if kind == "JPEG" else 0)
    assert inspect_picture(data, "x") == ({"turned (EXIF)": 1} if 2 <= orientation <= 8 else {})


def test_damaged_exif_is_ignored():
    data = encoded(Image.fromarray(CORNERS), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert (np.array(decode_picture(data, "x")) == CORNERS).all()


def transparent_pictures():
    """Red with alpha 255, 128 and 0 (which hides a colour), in all modes that have transparency."""
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 128], [0, 255, 77, 0]]], np.uint8)
    grey = np.array([[[100, 255], [100, 128], [7, 0]]], np.uint8)
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 255, 0, 0, 0, 255, 77])
    return {
        "RGBA": (Image.fromarray(rgba), {}, [[255, 0, 0], [255, 127, 127], [255, 255, 255]]),
        "LA": (Image.fromarray(grey), {}, [[100] * 3, [177] * 3, [255] * 3]),
        "P": (palette, {"transparency": bytes([255, 128, 0])}, [[255, 0, 0], [255, 127, 127], [255, 255, 255]]),
        "RGB": (Image.fromarray(rgba).convert("RGB"), {"transparency": (0, 255, 77)}, [[255, 0, 0]] * 2 + [[255] * 3]),
        "L": (Image.fromarray(np.array([[9, 8, 7]], np.uint8)), {"transparency": 7}, [[9] * 3, [8] * 3, [255] * 3]),
    }


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency(mode):
    picture, options, expected = transparent_pictures()[mode]
    assert np.abs(decoded(picture, **options)[0].astype(int) - expected).max() <= 1
    data = encoded(picture, **options)
    assert inspect_picture(data, "x") == {"transparent": 1}
    for colour in ((0, 0, 0), (10, 20, 30)):
        assert np.array(decode_picture(data, "x", Decoding(colour)))[0, 2].tolist() == list(colour)
    assert decode_picture(data, "x", Decoding(None)).mode == "RGBA"


def test_opaque_alpha_changes_nothing():
    pixels = DRAWS.randint(0, 256, (5, 5, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(np.dstack([pixels, np.full((5, 5), 255, np.uint8)])))
    assert (np.array(decode_picture(data, "x")) == pixels).all() and inspect_picture(data, "x") == {}


def test_other_colour_spaces():
    red = np.array(Image.new("RGB", (8, 8), (200, 40, 40)))
    cmyk = decoded(Image.fromarray(red).convert("CMYK"), "JPEG", quality=100).astype(int)
    assert np.abs(cmyk - red).max() <= 6
    lab = Image.new("LAB", (4, 4), (138, 209, 198))  # L* 54.3, a* 80.8, b* 69.9: pure red
    assert np.abs(decoded(lab, "TIFF")[0, 0].astype(int) - [255, 0, 0]).max() <= 6
    ycbcr = decoded(Image.fromarray(red).convert("YCbCr"), "JPEG", quality=100).astype(int)
    assert np.abs(ycbcr - red).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_animations(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array(decode_picture(data, "x"))[0, 0].tolist() == [255, 0, 0]
    assert inspect_picture(data, "x") == {"frames not read": 2}


def bomb(side=20_000):
    """A PNG of one bit per pixel that declares side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\x00" * (side * (side // 8 + 1)), 9)
    plain = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        plain += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return plain


def test_images_with_too_many_pixels_are_named():
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = (
            "^big.png: expected an image of at most 178,956,970 pixels, got 400,000,000. Set max_pixels: 400000000"
        )
        with pytest.raises(UserError, match=message):
            decode_picture(bomb(), "big.png")
        with pytest.raises(UserError, match="^a: expected an image of at most 10 pixels, got 64"):
            decode_picture(encoded(Image.new("RGB", (8, 8))), "a", Decoding(max_pixels=10))
        assert decode_picture(bomb(9600), "big.png").size == (9600, 9600)  # Pillow would warn without a name
    assert Image.MAX_IMAGE_PIXELS == limit


def test_threads_do_not_change_the_limit_of_pillow(monkeypatch):
    limit, data, open_image = Image.MAX_IMAGE_PIXELS, bomb(), Image.open

    def open_slowly(stream):
        time.sleep(random.random() / 500)
        return open_image(stream)

    def read(_):
        with pytest.raises(UserError, match="at most 178,956,970 pixels, got 400,000,000"):
            decode_picture(data, "x")

    monkeypatch.setattr(Image, "open", open_slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(100)))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_options_of_data_sets(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0, 0]] * 4] * 4, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "b.png")
    data = ImageFolder(tmp_path, image_size=4, background=[1, 2, 3], white_level=4095)
    assert data[0]["image"][0, 0].tolist() == [1, 2, 3] and data[1]["image"].unique().tolist() == [255]
    assert np.array(read_original(data, 0)[1])[0, 0].tolist() == [1, 2, 3]
    assert ImageList(paths=[str(tmp_path / "a.png")], background="black")[0]["image"].unique().tolist() == [0]
    assert next(image_batches(tmp_path))[:, :, 0, 0].tolist() == [[255] * 3, [16] * 3]
    for background in ("whit", [1, 2], [1, 2, 300], [1.0, 2, 3], 7):
        with pytest.raises(ConfigError, match="background: expected "):
            ImageFolder(tmp_path, background=background)
    for option in ({"max_pixels": 0}, {"white_level": -1}, {"damaged": "ignore"}):
        with pytest.raises(ConfigError, match=f"{[*option][0]}: expected"):
            ImageFolder(tmp_path, **option)


@pytest.fixture
def partly_damaged(tmp_path):
    """20 pictures with a table, of which 003 is truncated, 007 empty and 011 a web page."""
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:03d}.png")
    lines = [f"{number:03d}.png,{'ab'[number % 2]},{'xy'[number // 12]}" for number in range(20)]
    (tmp_path / "t.csv").write_text("\n".join(["image,one,two", *lines]))
    whole = (tmp_path / "003.png").read_bytes()
    for name, content in {"003": whole[:45], "007": b"", "011": b"<html>404</html>"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    return tmp_path


def test_damaged_images_are_skipped(partly_damaged, caplog):
    with pytest.raises(UserError, match="003.png: expected a complete PNG or JPEG image, but .* Replace it"):
        ImageFolder(partly_damaged, image_size=8).__getitems__(range(20))
    options = {"path": partly_damaged, "attributes": "t.csv", "image_size": 8, "damaged": "skip"}
    data = ImageFolder(**options)
    kept = [number for number in range(20) if number not in (3, 7, 11)]
    assert [*data.skipped] == [3, 7, 11] and data.rows.tolist() == kept and len(data) == 17
    batch = data.__getitems__(range(17))
    assert batch["image"][:, 0, 0, 0].tolist() == kept and batch["index"].tolist() == kept
    assert batch["text"] == [["ab"[number % 2], "xy"[number // 12]] for number in kept]
    assert "damaged images were skipped: 3 (" in caplog.text and "003.png" in caplog.text
    one = {**options, "columns": ["one"]}
    assert ImageFolder(**one).space is None and ImageFolder(**{**one, "damaged": "error"}).space is not None
    splits = [ImageFolder(**options, split=split).rows.tolist() for split in ("train", "validation")]
    plain = [ImageFolder(partly_damaged, "t.csv", split=split).rows.tolist() for split in ("train", "validation")]
    assert splits == [[row for row in rows if row not in (3, 7, 11)] for rows in plain]
    assert ImageFolder(**options, split="train", holdout=0.25).rows_of(None).tolist() == kept
    assert len(ImageFolder(**options, repeat=3)) == 51
    report = check_dataset(data)
    assert not report.num_problems and dict(report.facts)["images skipped"].startswith("3 of 20: ")


def test_damage_is_read_again_after_a_change(partly_damaged):
    options = {"path": partly_damaged, "image_size": 8, "damaged": "skip"}
    assert len(ImageFolder(**options)) == 17
    Image.new("RGB", (8, 8)).save(partly_damaged / "007.png")
    assert len(ImageFolder(**options)) == 18
    for file in partly_damaged.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="expected images that can be read, got none. .*000.png"):
        ImageFolder(**options)


def test_lists_and_lmdbs_skip_damaged_images(partly_damaged, tmp_path):
    names = [str(partly_damaged / f"{number:03d}.png") for number in range(5)]
    listed = ImageList(paths=[*names, "gone.png"], damaged="skip")
    assert listed.rows.tolist() == [0, 1, 2, 4] and "gone.png: " in listed.skipped[5]
    samples = [(np.full((8, 8, 3), number, np.uint8), ["ab"[number % 2], "xyz"[number // 2]]) for number in range(6)]
    write_text_lmdb(tmp_path / "x.lmdb", samples, 8)
    import lmdb

    with lmdb.open(str(tmp_path / "x.lmdb")) as environment, environment.begin(write=True) as transaction:
        for number in range(6):
            transaction.put(b"img-4-000000%d" % number, transaction.get(b"img-8-000000%d" % number))
        transaction.put(b"img-8-0000002", transaction.get(b"img-8-0000002")[:50])
        transaction.delete(b"img-8-0000004")
    for kind, options in ((LMDBImages, {}), (LMDBTextImages, {}), (LMDBTextImages, {"holdout": 0.5, "split": "test"})):
        data = kind(tmp_path / "x.lmdb", image_size=8, original_resolution=8, damaged="skip", **options)
        assert data.rows.tolist() == [0, 1, 3, 5] == data.rows_of(None).tolist()
        assert data.__getitems__(range(4))["image"][:, 0, 0, 0].tolist() == [0, 1, 3, 5]
    assert len(LMDBImages(tmp_path / "x.lmdb", image_size=4, original_resolution=4, damaged="skip")) == 6
