"""Picture files are read as a viewer shows them."""
import numpy as np
import pytest
from PIL import ExifTags, Image

from support.cards import FORMATS, card_picture, open_picture
from support.streets import check_panorama


def shown(tmp_path, picture, name, **options):
    """What open_picture makes of a picture saved under a name: size and first pixel."""
    picture.save(tmp_path / name, **options)
    read = open_picture(tmp_path / name)
    assert read.mode == "RGB"
    return read.size, read.getpixel((0, 0))


def test_16_bits_a_level_are_read_as_the_8_that_matter(tmp_path):
    for level, expected in ((0, 0), (0x8000, 128), (0xffff, 255), (0x00ff, 0)):
        picture = Image.fromarray(np.full((4, 4), level, np.uint16))
        for name in ("16.png", "16.tif", "16.pgm"):
            assert shown(tmp_path, picture, name) == ((4, 4), (expected,) * 3)
    for mode, colour, expected in (("L", 128, (128,) * 3), ("1", 1, (255,) * 3),
                                   ("RGB", (1, 2, 3), (1, 2, 3))):
        assert shown(tmp_path, Image.new(mode, (4, 4), colour), "8.png")[1] == expected
    assert shown(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.tif")[1] == (
        255, 0, 0)


@pytest.mark.parametrize("kind, name, options", [
    (np.float32, "float.tif", {}), (np.int32, "32.tif", {}),
    (np.uint16, "16.png", {"transparency": 7})])
def test_levels_that_could_mean_anything_are_refused_by_name(tmp_path, kind, name, options):
    Image.fromarray(np.full((4, 4), 1, kind)).save(tmp_path / name, **options)
    with pytest.raises(ValueError,
                       match=f"{name}: not a picture that can be read: nothing says which of "
                             "its levels"):
        open_picture(tmp_path / name)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_a_picture_is_upright_as_its_exif_block_says_and_a_broken_one_says_nothing(tmp_path, name):
    picture, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    picture.paste("blue", (32, 0, 64, 32))
    for orientation, size, first in ((1, (64, 32), "red"), (3, (64, 32), "blue"),
                                     (6, (32, 64), "red"), (8, (32, 64), "blue")):
        exif[ExifTags.Base.Orientation] = orientation
        read_size, pixel = shown(tmp_path, picture, name, exif=exif)
        assert read_size == size and (pixel[0] > 128) == (first == "red")
    if name == "turned.jpg":
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"Exif\0\0MM", b"Exif\0\0??"))
        assert open_picture(tmp_path / name).size == (64, 32)


@pytest.mark.parametrize("mode, colour, name, options", [
    ("RGBA", (10, 20, 30, 0), "clear.png", {}), ("LA", (10, 0), "clear.png", {}),
    ("RGBA", (10, 20, 30, 0), "clear.webp", {"exact": True, "lossless": True}),
    ("RGB", (10, 20, 30), "clear.png", {"transparency": (10, 20, 30)}),
    ("L", 10, "clear.png", {"transparency": 10}),
    ("P", 0, "clear.gif", {"transparency": 0}), ("P", 0, "clear.png", {"transparency": 0})])
def test_what_is_transparent_is_white_and_no_hidden_colour_shows(
        tmp_path, mode, colour, name, options):
    assert shown(tmp_path, Image.new(mode, (4, 4), colour), name, **options) == (
        (4, 4), (255, 255, 255))
    half = shown(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "half.png")[1]
    assert half == (255, 204, 204)


def test_of_several_frames_the_first_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("two.gif", "two.png", "two.webp"):
        assert shown(tmp_path, frames[0], name, save_all=True, append_images=frames[1:],
                     lossless=True)[1][0] > 250


def test_other_formats_of_pillow_are_not_opened_whatever_their_name(tmp_path):
    """An EPS starts Ghostscript."""
    for kind in ("EPS", "PCX", "ICO", "PDF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", format=kind)
        with pytest.raises(ValueError, match="x.png: not a picture that can be read: it is none of "
                                             "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM"):
            open_picture(tmp_path / "x.png")
        with pytest.raises(ValueError, match="x.png: .*none of PNG"):
            check_panorama(tmp_path / "x.png")
    for kind in FORMATS:
        assert shown(tmp_path, Image.new("RGB", (8, 8)), "x", format=kind) == ((8, 8), (0, 0, 0))


@pytest.mark.filterwarnings("error")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    picture = Image.new("1", (13_300, 13_300))
    picture.save(tmp_path / "large.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    for read in (open_picture, check_panorama):
        with pytest.raises(ValueError, match="large.png: not a picture that can be read: "
                                             "13300x13300 is more than 89,478,485 pixels"):
            read(tmp_path / "large.png")


def test_the_corners_of_official_cards_are_black(tmp_path):
    """They are transparent, and the official code pastes them without a mask."""
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "HT.png")
    assert card_picture("10", "H", 4, 4, str(tmp_path)).getpixel((0, 0)) == (0, 0, 0)
