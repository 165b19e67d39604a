"""What an image file carries beside its pixels: it is kept, or what is lost is said before the work starts."""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from csd_2d.cli import main
from csd_2d.io.color import Profile, read_profile
from csd_2d.io.deep import read_deep, write_deep
from csd_2d.io.images import image_size, read_header, read_image, read_picture, write_image
from csd_2d.io.video import Clip, read_clip, write_clip

NIGHT = ["--prompt", "make it night", "--prior", "analytic", "--steps", "3"]
HEIGHT, WIDTH = 24, 40
GPANO = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 tiff:Orientation="6" GPano:ProjectionType="equirectangular" GPano:FullPanoWidthPixels="40"/></rdf:RDF></x:xmpmeta>"""


def picture(channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (HEIGHT, WIDTH, channels), dtype=dtype)


def icc(red, green, blue, curve: bytes = b"curv\0\0\0\0\0\0\0\1\x02\x33") -> bytes:
    """Write an RGB profile by its specification: primaries, XYZ relative to D50, and a tone curve (a gamma of 2.2)."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    name = b"desc\0\0\0\0\0\0\0\5test\0" + b"\0" * 78
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, data = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", 132 + 12 * len(tags) + len(data), b"none", 2**25, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + data


DISPLAY_P3 = icc((0.51512, 0.29198, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
ADOBE = icc((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def described(data: bytes) -> Profile:
    profile = read_profile(data)
    assert profile is not None
    return profile


def deep_numbers(path: Path, shallow) -> np.ndarray:
    numbers = read_deep(path, np.asarray(shallow))
    assert numbers is not None
    return numbers


def exif(orientation: int = 1) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Copyright] = "Maker", "(c) me"
    tags[ExifTags.Base.Orientation] = orientation
    tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    tags.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return tags


def edit(folder: Path, name: str, output: str, masked: bool = False) -> Path:
    """Darken an image, or its left half only, and write it as the command does."""
    picture = read_picture(folder / name)
    mask = torch.ones(1, HEIGHT, WIDTH)
    if masked:
        mask[..., WIDTH // 2 :] = 0
    edited = torch.lerp(picture.rgb, 0.4 * picture.rgb + 0.05, mask)
    write_image(edited, folder / output, picture)
    return folder / output


def run(folder: Path, name: str, output: str, *options: str) -> None:
    main(["panorama", str(folder / name), str(folder / output), *NIGHT, *options])


def lost(path: Path, suffix: str) -> str:
    return "; ".join(read_header(path).lost_in(suffix))


def right(array) -> np.ndarray:
    return np.asarray(array)[:, WIDTH // 2 :]


@pytest.mark.parametrize(
    "profile",
    [
        DISPLAY_P3,
        ADOBE,
        icc((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141), b"curv\0\0\0\0\0\0\0\0"),
    ],
)
def test_colors_of_a_profile_are_converted_as_little_cms_does(profile):
    numbers = picture()
    ours = described(profile)
    expected = ImageCms.profileToProfile(
        Image.fromarray(numbers),
        ImageCms.ImageCmsProfile(_file(profile)),
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    converted = ours.to_srgb(numbers / 255)
    assert np.abs(converted * 255 - np.asarray(expected)).max() <= 1.5  # its own arithmetic has 8 bits
    inside = ((converted > 0.02) & (converted < 1)).all(-1)
    assert inside.mean() > 0.2
    assert np.abs(ours.from_srgb(converted) - numbers / 255)[inside].max() < 1e-3


def _file(data: bytes):
    import io

    return io.BytesIO(data)


def test_srgbs_own_profile_changes_no_number():
    assert described(SRGB).is_srgb and not described(DISPLAY_P3).is_srgb
    # A parametric curve, as phones write it.
    curve = b"para\0\0\0\0\0\3\0\0" + struct.pack(
        ">5i", *(round(x * 65536) for x in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    )
    assert described(
        icc((0.43607, 0.22250, 0.01393), (0.38508, 0.71688, 0.09710), (0.14308, 0.06062, 0.71417), curve)
    ).is_srgb


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_a_color_profile_is_kept_and_the_model_sees_srgb(tmp_path, suffix):
    numbers = picture()
    Image.fromarray(numbers).save(tmp_path / "in.png", icc_profile=DISPLAY_P3)
    shown = read_image(tmp_path / "in.png")
    expected = described(DISPLAY_P3).to_srgb(numbers / 255)
    assert np.abs(shown.permute(1, 2, 0).numpy() - expected).max() < 1e-6
    with Image.open(edit(tmp_path, "in.png", f"out.{suffix}", masked=True)) as edited:
        assert edited.info["icc_profile"] == DISPLAY_P3
        if suffix in ("png", "tif"):
            assert np.array_equal(right(edited), right(numbers))
    if suffix == "png":
        # Read again it is the edit of those colors, up to rounding to 8 bits, which is coarse in dark colors.
        assert (read_image(tmp_path / "out.png") - (0.4 * shown + 0.05))[..., : WIDTH // 2].abs().max() < 0.03


def test_a_format_without_profiles_gets_srgb(tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "in.png", icc_profile=DISPLAY_P3)
    write_image(read_image(tmp_path / "in.png"), tmp_path / "same.bmp", read_picture(tmp_path / "in.png"))
    assert (read_image(tmp_path / "same.bmp") - read_image(tmp_path / "in.png")).abs().max() <= 0.51 / 255
    run(tmp_path, "in.png", "out.bmp")
    assert "out.bmp will not keep all of" in (err := capsys.readouterr().err) and "converted to sRGB" in err


def test_a_gray_profile_and_a_damaged_one(tmp_path):
    linear = (
        b"\0" * 12
        + b"mntrGRAYXYZ "
        + b"\0" * 104
        + struct.pack(">I4sII", 1, b"kTRC", 144, 12)
        + b"curv\0\0\0\0\0\0\0\0"
    )
    Image.fromarray(np.full((8, 8), 55, np.uint8)).save(tmp_path / "gray.png", icc_profile=linear)
    light = 55 / 255
    assert read_image(tmp_path / "gray.png").mean().item() == pytest.approx(
        1.055 * light ** (1 / 2.4) - 0.055, abs=1e-4
    )
    assert read_header(tmp_path / "gray.png").lost == ("gray levels become sRGB's",)
    for broken in (DISPLAY_P3[:200], b"x" * 300, DISPLAY_P3.replace(b"curv", b"abcd")):
        Image.fromarray(picture()).save(tmp_path / "in.png", icc_profile=broken)
        one = read_picture(tmp_path / "in.png")
        assert np.array_equal((one.rgb * 255).round().permute(1, 2, 0), picture())
        assert "profile" in one.carried.lost[0]


def test_cmyk_is_converted_and_said(tmp_path):
    image = Image.fromarray(picture()).convert("CMYK")
    image.save(tmp_path / "in.tif")
    assert lost(tmp_path / "in.tif", ".jpg") == "CMYK becomes sRGB"
    with Image.open(edit(tmp_path, "in.tif", "out.png", masked=True)) as edited:
        assert np.array_equal(right(edited), right(image.convert("RGB")))


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("output", ["jpg", "png", "webp", "tif"])
def test_exif_xmp_and_resolution_are_kept(tmp_path, source, output):
    file = tmp_path / f"in.{source}"
    tags = Image.Exif()
    tags.load(exif(6).tobytes())
    if source == "tif":
        tags[700] = GPANO
    options = {"png": {"pnginfo": _text(GPANO)}, "tif": {}}.get(source, {"xmp": GPANO})
    Image.fromarray(picture()).save(file, exif=tags, dpi=(300, 150), **options)
    assert image_size(file) == (WIDTH, HEIGHT)
    edited = read_picture(file).rgb * 0.5
    write_image(edited, tmp_path / f"out.{output}", read_picture(file))
    with Image.open(tmp_path / f"out.{output}") as image:
        assert image.size == (HEIGHT, WIDTH)  # the camera's turn was applied,
        kept = image.getexif()
        assert kept.get(ExifTags.Base.Orientation, 1) == 1  # once
        assert (kept[ExifTags.Base.Make], kept[ExifTags.Base.Copyright]) == ("Maker", "(c) me")
        assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2024:05:06 07:08:09"
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"
        xmp = image.info.get("xmp") or image.info["XML:com.adobe.xmp"].encode()
        assert xmp.rstrip(b"\0") == GPANO.replace(b'\n tiff:Orientation="6"', b"")
        if "webp" not in (source, output):
            assert [float(value) for value in image.info["dpi"]] == pytest.approx((300, 150), abs=0.02)


def _text(xmp: bytes):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return info


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_are_applied(tmp_path, orientation):
    from PIL import ImageOps

    Image.fromarray(picture(4)).save(tmp_path / "in.png", exif=exif(orientation))
    with Image.open(tmp_path / "in.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    one = read_picture(tmp_path / "in.png")
    assert np.array_equal(one.finished(one.rgb), expected)
    assert one.carried.size == expected.shape[:2] == image_size(tmp_path / "in.png")


def test_a_thumbnail_shows_no_edit_and_is_left_out(tmp_path):
    thumbnail = b"\xff\xd8\xff\xd9" * 20
    data = exif().tobytes()
    raw = bytearray(data[6:])  # after "Exif\0\0": a TIFF file, whose next folder describes the thumbnail
    order = "<" if raw[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", raw, 4)
    (count,) = struct.unpack_from(order + "H", raw, first)
    end = len(raw)
    struct.pack_into(order + "I", raw, first + 2 + 12 * count, end)
    raw += struct.pack(order + "HHHIIHHIII", 2, 513, 4, 1, end + 30, 514, 4, 1, len(thumbnail), 0) + thumbnail
    Image.fromarray(picture()).save(tmp_path / "in.jpg", exif=b"Exif\0\0" + bytes(raw))
    with Image.open(tmp_path / "in.jpg") as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)
    edit(tmp_path, "in.jpg", "out.jpg")
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)
    assert thumbnail not in (tmp_path / "out.jpg").read_bytes()


def test_damaged_exif_does_not_stop_an_edit(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "in.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_image(tmp_path / "in.jpg").shape == (3, HEIGHT, WIDTH)
    Image.fromarray(picture()).save(tmp_path / "in.jpg", exif=b"Exif\0\0nonsense")
    assert "EXIF data are damaged" in lost(tmp_path / "in.jpg", ".jpg")
    assert read_image(edit(tmp_path, "in.jpg", "out.jpg")).shape == (3, HEIGHT, WIDTH)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept(tmp_path, suffix, mode):
    numbers = picture(4)
    numbers[:5, :, 3], numbers[5:10, :, 3] = 0, 255
    image = Image.fromarray(numbers)
    if mode == "P":
        image = Image.fromarray(numbers[..., 0] // 64)
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
        image.info["transparency"] = 1
    elif mode == "LA":
        image = image.convert("LA")
    image.save(tmp_path / "in.png")
    expected = np.asarray(image.convert("RGBA"))
    with Image.open(edit(tmp_path, "in.png", f"out.{suffix}", masked=True)) as edited:
        edited = np.asarray(edited.convert("RGBA"))
    assert np.array_equal(edited[..., 3], expected[..., 3])
    if suffix != "webp":
        assert np.array_equal(right(edited), right(expected))
        clear = expected[..., 3] == 0
        assert np.array_equal(edited[clear], expected[clear])
    opaque = expected[:, : WIDTH // 2, 3] == 255
    assert not np.array_equal(edited[:, : WIDTH // 2][opaque], expected[:, : WIDTH // 2][opaque])


def test_colors_under_transparency_are_edited_as_they_are(tmp_path):
    """Not as they look on white, which would leave a fringe around what is cut out."""
    numbers = np.full((HEIGHT, WIDTH, 4), 200, np.uint8)
    numbers[..., 3] = np.linspace(1, 255, WIDTH)
    Image.fromarray(numbers).save(tmp_path / "in.png")
    Image.fromarray(numbers[..., :3]).save(tmp_path / "opaque.png")
    edited = np.asarray(Image.open(edit(tmp_path, "in.png", "out.png")))
    opaque = np.asarray(Image.open(edit(tmp_path, "opaque.png", "opaque_night.png")))
    assert np.array_equal(edited[..., :3], opaque)


def test_formats_without_transparency_get_white_and_say_so(tmp_path):
    numbers = picture(4)
    numbers[..., 3] = 0
    Image.fromarray(numbers).save(tmp_path / "in.png")
    for suffix in ("jpg", "bmp"):
        with Image.open(edit(tmp_path, "in.png", f"out.{suffix}")) as image:
            assert (np.asarray(image) == 255).all()
        assert lost(tmp_path / "in.png", f".{suffix}") == "transparency is put on white"


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_read_and_written_back(tmp_path, channels, suffix):
    numbers = picture(channels, np.uint16)
    carrier = Image.new("RGB" if channels == 3 else "RGBA", (1, 1))
    write_deep(numbers, tmp_path / f"in.{suffix}", carrier, icc_profile=DISPLAY_P3, dpi=(300, 300))
    with Image.open(tmp_path / f"in.{suffix}") as image:  # Pillow reads the upper halves
        shallow = np.asarray(image)
        assert np.array_equal(shallow, numbers >> 8)
        assert image.info["icc_profile"] == DISPLAY_P3 and image.info["dpi"][0] == pytest.approx(300, abs=0.02)
    assert np.array_equal(deep_numbers(tmp_path / f"in.{suffix}", shallow), numbers)
    for output in ("png", "tif"):
        edited = edit(tmp_path, f"in.{suffix}", f"out.{output}", masked=True)
        with Image.open(edited) as image:
            written = deep_numbers(edited, np.asarray(image))
        assert np.array_equal(right(written), right(numbers))
        left = written[:, : WIDTH // 2, :3]
        assert not np.array_equal(left, numbers[:, : WIDTH // 2, :3]) and len({*left.ravel() % 257}) > 100
        if channels == 4:
            assert np.array_equal(written[..., 3], numbers[..., 3])


def test_a_turned_tiff_of_16_bits(tmp_path):
    numbers = picture(3, np.uint16)
    write_deep(numbers, tmp_path / "in.tif", Image.new("RGB", (1, 1)), exif=exif(6))
    one = read_picture(tmp_path / "in.tif")
    assert one.carried.size == (WIDTH, HEIGHT) and one.carried.deep
    assert np.array_equal(one.finished(one.rgb, deep=True), np.rot90(numbers, -1))


def test_16_bits_of_gray_are_kept(tmp_path):
    numbers = picture(1, np.uint16)[..., 0]
    Image.fromarray(numbers).save(tmp_path / "in.png")
    edited = edit(tmp_path, "in.png", "out.png", masked=True)
    with Image.open(edited) as image:
        assert np.array_equal(right(deep_numbers(edited, np.asarray(image))), right(numbers[..., None].repeat(3, -1)))


def test_8_of_16_bits_are_said(tmp_path):
    write_deep(picture(3, np.uint16), tmp_path / "in.png", Image.new("RGB", (1, 1)))
    assert lost(tmp_path / "in.png", ".jpg") == "16 bits a channel become 8" and not lost(tmp_path / "in.png", ".png")


@pytest.mark.parametrize("name", ["in.gif", "in.webp", "in.png", "in.tif"])
def test_further_pictures_in_a_file_are_said(tmp_path, name):
    frames = [Image.fromarray(np.roll(picture(), i, 1)) for i in range(3)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert f"only the first of its 3 {'pages' if name == 'in.tif' else 'frames'}" in lost(tmp_path / name, ".png")


def test_what_is_lost_is_said_in_one_line(tmp_path, capsys):
    """Of a 360 degree photograph, with a mask, and a format that is lossy."""
    Image.fromarray(picture(4)).save(
        tmp_path / "in.png", pnginfo=_text(GPANO.replace(b"tiff:Orientation", b"tiff:Other"))
    )
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, : WIDTH // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--mask", str(tmp_path / "mask.png"), "--feather", "0"]
    run(tmp_path, "in.png", "out.jpg", *options)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        f"csd: {tmp_path}/out.jpg will not keep all of {tmp_path}/in.png: transparency is put on white; "
        "what the mask keeps is compressed with loss."
    )
    assert "--wrap" in second
    run(tmp_path, "in.png", "out.png", *options)
    assert "not keep" not in capsys.readouterr().err
    with Image.open(tmp_path / "out.png") as edited:
        assert np.array_equal(right(edited), right(picture(4)))
        assert not np.array_equal(np.asarray(edited), picture(4))


def test_heic_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "in.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it was not installed
    with pytest.raises(SystemExit, match=r'needs pillow-heif: pip install "csd-edit\[heif\]"'):
        run(tmp_path, "in.heic", "out.png")


def test_heic_is_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    ramp = np.broadcast_to(np.linspace(20, 220, WIDTH).astype(np.uint8)[:, None], (HEIGHT, WIDTH, 3))
    heif.from_pillow(Image.fromarray(ramp)).save(str(tmp_path / "in.heic"), quality=-1)
    assert (read_image(tmp_path / "in.heic").permute(1, 2, 0) - torch.from_numpy(ramp / 255)).abs().max() < 0.02


def test_size_is_limited_by_memory(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit, passed by an image of 180 megapixels
    for suffix in ("png", "tif"):  # Pillow looks at the size of TIFF files when it loads them, too
        Image.fromarray(picture()).save(tmp_path / f"in.{suffix}")
        assert read_image(tmp_path / f"in.{suffix}").shape == (3, HEIGHT, WIDTH)
    assert Image.MAX_IMAGE_PIXELS == 100 and not [one for one in recwarn if "bomb" in str(one.message)]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2_000_000, 1_000_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")))
    with pytest.raises(
        ValueError, match=r"is 2000000x1000000 px; reading it takes 48000\.0 GB of memory, and .* are free"
    ):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif"])
def test_damaged_files_are_named(tmp_path, suffix):
    Image.fromarray(picture()).save(
        tmp_path / "whole", "JPEG" if suffix == "jpg" else {"tif": "TIFF"}.get(suffix, suffix)
    )
    whole, random = (tmp_path / "whole").read_bytes(), np.random.default_rng(1)
    path, failures = tmp_path / f"in.{suffix}", 0
    for case in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, min(len(data), 100 if case % 2 else len(data)), 8)
        data[places] = random.integers(0, 256, 8)
        path.write_bytes(data.tobytes()[: len(data) if case % 4 else len(data) // 2])
        try:
            read_image(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            failures += 1
    assert failures
    assert Image.MAX_IMAGE_PIXELS  # the limit for others is back


def test_sizes_that_a_format_cannot_have_are_refused_first(tmp_path):
    Image.new("RGB", (16384, 8)).save(tmp_path / "in.png")
    with pytest.raises(SystemExit, match=r"out\.webp can have 16383 px on a side, the image is 16384x8 px"):
        run(tmp_path, "in.png", "out.webp")


def test_frames_of_a_folder_keep_what_they_carry(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    numbers = picture(4)
    numbers[:5, :, 3] = 0
    Image.fromarray(numbers).save(tmp_path / "in" / "a.png", icc_profile=DISPLAY_P3, dpi=(300, 300))
    Image.fromarray(picture()).save(tmp_path / "in" / "b.jpg", exif=exif(), quality=100)
    write_deep(deep := picture(3, np.uint16), tmp_path / "in" / "c.png", Image.new("RGB", (1, 1)), icc_profile=ADOBE)
    # Nothing is edited: whatever was in the files comes back.
    write_clip(read_clip(tmp_path / "in"), tmp_path / "same")
    with Image.open(tmp_path / "same" / "a.png") as image:
        assert np.array_equal(np.asarray(image), numbers) and image.info["icc_profile"] == DISPLAY_P3
    with Image.open(tmp_path / "same" / "b.png") as image, Image.open(tmp_path / "in" / "b.jpg") as source:
        assert np.array_equal(np.asarray(image), np.asarray(source))
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
    with Image.open(tmp_path / "same" / "c.png") as image:
        assert np.array_equal(deep_numbers(tmp_path / "same" / "c.png", np.asarray(image)), deep)
    main(["video", str(tmp_path / "in"), str(tmp_path / "edited"), *NIGHT])
    assert "not keep" not in capsys.readouterr().err
    with Image.open(tmp_path / "edited" / "a.png") as image:
        edited = np.asarray(image)
    assert np.array_equal(edited[..., 3], numbers[..., 3]) and not np.array_equal(edited, numbers)


def test_a_video_of_frames_says_what_it_cannot_keep(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(picture(4)).save(tmp_path / "in" / f"{name}.png")
    main(["video", str(tmp_path / "in"), str(tmp_path / "out.mp4"), *NIGHT])
    assert "transparency is put on white (of 3 frames)" in capsys.readouterr().err


def test_an_image_of_no_file_is_written_as_before(tmp_path):
    image = torch.rand(3, 16, 24)
    write_clip(Clip([image]), tmp_path / "frames")
    assert (read_image(tmp_path / "frames" / "00000.png") - image).abs().max() <= 0.51 / 255
