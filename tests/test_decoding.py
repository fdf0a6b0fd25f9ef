"""Images are opened in one place: bounded before they are decoded, of formats that start no program."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.engine.places import ImageFile, read_image
from vlabs.data.decoding import known_formats, open_picture
from vlabs.data.images import decode_region
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.prediction.search import list_pictures


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain_png(side):
    """A small file of very many black pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"


@pytest.fixture(scope="module")
def bomb():
    return plain_png(13_000)


def test_more_pixels_than_are_allowed_are_refused_before_they_are_decoded(bomb, tmp_path):
    assert len(bomb) < 200_000
    with pytest.raises(UserError, match="13000 x 13000 pixels: make it smaller than 120 million, or .*MEGAPIXELS"):
        decode_image(bomb, "picture 7")
    with pytest.raises(UserError, match="the region of a text about picture 7 .* 13000 x 13000"):
        decode_region(bomb, "picture 7")
    (tmp_path / "a.png").write_bytes(bomb)
    with pytest.raises(ValueError, match="13000 x 13000"):
        read_image(ImageFile.of_path(tmp_path / "a.png", "a.png"))


def test_a_jpeg_is_measured_at_the_size_at_which_it_is_decoded(monkeypatch):
    monkeypatch.setenv("VLABS_MAX_MEGAPIXELS", "0.1")
    content = saved(Image.new("RGB", (1600, 1200)), "JPEG")
    assert decode_image(content, "picture", at_least=150).size == (200, 150)
    with pytest.raises(UserError, match="1600 x 1200"):
        decode_image(content, "picture")


def test_a_variable_says_how_many_pixels_are_allowed(monkeypatch, bomb):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # Pillow's own limit, which gives way
    monkeypatch.setenv("VLABS_MAX_MEGAPIXELS", "170")
    assert open_picture(bomb).size == (13_000, 13_000)
    for value in ("many", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("VLABS_MAX_MEGAPIXELS", value)
        with pytest.raises(UserError, match=f"VLABS_MAX_MEGAPIXELS={value} must be"):
            decode_image(bomb, "picture")


def test_a_tile_larger_than_its_image_is_measured_too():
    def tiff(tile):
        tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: 8}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)

    assert open_picture(tiff(16)).size == (16, 16)
    with pytest.raises(ValueError, match="make it smaller"):
        open_picture(tiff(40_000))


def test_a_jpeg_that_is_drawn_a_thousand_times_is_refused():
    content = saved(Image.new("L", (500, 500)), "JPEG", progressive=True)
    assert decode_image(content, "picture").size == (500, 500)
    drawn = content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 1000 + content[-2:]
    with pytest.raises(UserError, match="more than 200 scans"):
        decode_image(drawn, "picture")


@pytest.mark.parametrize("content", [EPS, b"%PDF-1.4", b"", b"\x00\x00\x01\xba" + bytes(50), b"\xff\xd8\xff"])
def test_what_is_no_image_is_one_line_without_an_address(content, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)  # of Ghostscript
    with pytest.raises(UserError, match="picture 7 is not a whole image") as refused:
        decode_image(content, "picture 7")
    assert "0x" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_heic_of_a_phone_is_named_and_what_to_do():
    with pytest.raises(UserError, match="HEIC, which needs another program: save it as JPEG"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "IMG_1.HEIC")


def test_whatever_a_decoder_raises_is_one_line(monkeypatch):
    content = saved(Image.new("L", (9, 9)), "PNG")
    for error in (KeyError("a\nb"), struct.error("x"), MemoryError(), RecursionError("deep"), AttributeError("y")):
        monkeypatch.setattr(Image.Image, "convert", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="picture 7 is not a whole image") as refused:
            decode_image(content, "picture 7")
        assert "\n" not in str(refused.value)


def test_formats_that_people_have_are_decoded():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    for form in ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"):
        assert form in known_formats()
        assert decode_image(saved(noise, form), form).size == (40, 30)
    pair = saved(noise, "MPO", save_all=True, append_images=[noise])  # of a phone
    assert decode_image(pair, "MPO").size == (40, 30)


def test_what_is_no_image_by_its_name_is_not_searched(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.tif", "d.pdf", "e.mpg", "f.eps", "g.txt", "h.ps", "i.h5"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpg", "b.PNG", "c.tif"]


def test_of_sixteen_bits_too_what_is_transparent_is_white():
    values = np.array([[7, 0], [65535, 7]], dtype=np.uint16)
    content = saved(Image.fromarray(values), "PNG", transparency=7)
    assert np.asarray(decode_image(content, "picture"))[..., 0].tolist() == [[255, 0], [255, 255]]


def test_what_pillow_says_of_a_damaged_exif_is_nobodys_concern(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0"
    (tmp_path / "a.jpg").write_bytes(saved(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    code = "import sys; from vlabs.data.decoding import decode; decode(open('a.jpg', 'rb').read())"
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
