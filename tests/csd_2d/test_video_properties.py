"""What a video says of its pictures is kept, converted or said: colors, bits, aspect, orientation, times, names."""

import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from csd_2d.cli import main
from csd_2d.io import hdr
from csd_2d.io.images import write_image
from csd_2d.io.video import Clip, Format, check_video_output, read_clip, what_is_lost, write_clip

STEPS = ["--prompt", "make it night", "--prior", "analytic", "--steps", "2"]
NITS = (0.0, 1.0, 10.0, 50.0, 100.0, 203.0, 400.0, 600.0, 1000.0)


def film(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    tags: tuple[int, int, int] = (1, 1, 1),
    base: Fraction = Fraction(1, 25),
    times: Sequence[int] | None = None,
    last: int = 1,
    aspect: Fraction | None = None,
    turned: tuple[float, bool, bool] | None = None,
    matrix: Sequence[int] | None = None,
) -> Path:
    """Write R'G'B' frames of 8 or 16 bits; tags are primaries, transfer and matrix, times in units of `base`."""
    times = range(len(frames)) if times is None else times
    lasting = dict(zip(times, np.diff([*times, times[-1] + last]).tolist(), strict=True))
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        stream.options = {"crf": "4"}
        context = stream.codec_context
        context.time_base, context.color_range = base, 1
        context.color_primaries, context.color_trc, context.colorspace = tags
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if turned is not None:
            stream.set_display_rotation(*turned)
        if matrix is not None:
            stream.set_display_matrix(matrix)

        def write(packets):
            for packet in packets:
                packet.duration = lasting[packet.pts]
                container.mux(packet)

        for time, frame in zip(times, frames, strict=True):
            kind = "rgb48le" if frame.dtype == np.uint16 else "rgb24"
            known = tags[2] if tags[2] in (1, 5, 9) else None  # of others FFmpeg's scaler makes nothing
            picture = av.VideoFrame.from_ndarray(frame, format=kind).reformat(format=pixels, dst_colorspace=known)
            picture.pts, picture.time_base = time, base
            write(stream.encode(picture))
        write(stream.encode())
    return path


def stream_of(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        return {
            "aspect": stream.sample_aspect_ratio,
            "pixels": context.pix_fmt,
            "tags": (context.color_primaries, context.color_trc, context.colorspace, context.color_range),
        }


def patches(signals: Any) -> np.ndarray:
    """One gray patch of 16x16 px a signal, in 16 bits."""
    row = np.repeat((np.asarray(signals) * 65535).round().astype(np.uint16), 16)
    return np.broadcast_to(row[None, :, None], (16, len(row), 3)).copy()


def levels(image: torch.Tensor) -> torch.Tensor:
    """The middle of each patch."""
    return image[:, 8, 8::16]


def gray(count: int, height: int = 16, width: int = 24) -> list[np.ndarray]:
    """Frames that tell their number."""
    return [np.full((height, width, 3), 255 * (index + 1) // (count + 1), np.uint8) for index in range(count)]


def numbers(clip: Clip, count: int) -> list[int]:
    return [round(frame.mean().item() * (count + 1)) - 1 for frame in clip.frames]


# --- colors


def test_pq_is_the_published_curve():
    """Values of BT.2408's table of PQ levels, and the ends."""
    nits = torch.tensor([0.0, 100.0, 203.0, 1000.0, 10000.0], dtype=torch.float64)
    signal = torch.tensor([0.0, 0.508, 0.581, 0.752, 1.0], dtype=torch.float64)
    torch.testing.assert_close(hdr.nits_to_pq(nits), signal, atol=5e-4, rtol=0)
    torch.testing.assert_close(hdr.pq_to_nits(hdr.nits_to_pq(nits)), nits, atol=1e-6, rtol=1e-9)


def test_hlg_is_the_published_curve():
    """BT.2100: a half is a twelfth; three quarters are 203 nits of a display of 1,000."""
    scene = hdr.hlg_to_scene(torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    torch.testing.assert_close(scene[[0, 1, 3]], torch.tensor([0, 1 / 12, 1.0]).double(), atol=1e-7, rtol=0)
    assert 1000 * scene[2] ** 1.2 == pytest.approx(203, abs=1)


def test_light_is_compressed_as_bt2390_says():
    nits = torch.logspace(-2, 3, 500, dtype=torch.float64)
    out = hdr.compressed(nits, 1000)
    knee = hdr.pq_to_nits(1.5 * hdr.nits_to_pq(torch.tensor(203.0)) - 0.5 * hdr.nits_to_pq(torch.tensor(1000.0)))
    below = nits < knee
    assert torch.equal(out[below], nits[below])
    assert (out.diff() > 0).all() and out[-1] == pytest.approx(203, rel=1e-6)
    torch.testing.assert_close(hdr.compressed(nits, 150), nits.clamp(max=203))  # no brighter than the display


def test_primaries_convert_as_bt2087_says():
    expected = torch.tensor([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    torch.testing.assert_close(hdr.to_bt709("BT.2020"), expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(hdr.to_bt709("BT.709"), torch.eye(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_is_tone_mapped_and_said(tmp_path, capsys, transfer):
    nits = torch.tensor(NITS, dtype=torch.float64)
    if transfer == 16:
        signal, name = hdr.nits_to_pq(nits), "PQ"
    else:  # the inverse of BT.2100's OOTF, and its OETF
        scene = (nits / 1000) ** (1 / 1.2)
        log = 0.17883277 * (12 * scene - 0.28466892).clamp(min=1e-9).log() + 0.55991073
        signal, name = torch.where(scene <= 1 / 12, (3 * scene).sqrt(), log), "HLG"
    path = film(tmp_path / "in.mp4", [patches(signal)] * 2, pixels="yuv420p10le", tags=(9, transfer, 9))
    expected = (hdr.compressed(nits, 1000) / 203) ** (1 / 2.4)
    seen = levels(read_clip(path).frames[0])
    # One step of 10 bits is 2 % of light.
    torch.testing.assert_close(seen.double(), expected.expand(3, -1), atol=0.01, rtol=0)

    main(["video", str(path), str(tmp_path / "out.mp4"), *STEPS])
    assert f"csd: {path} is HDR ({name}); it is tone-mapped to standard range" in capsys.readouterr().err
    assert stream_of(tmp_path / "out.mp4") | {"aspect": None} == {
        "aspect": None,
        "pixels": "yuv420p10le",
        "tags": (1, 1, 1, 1),
    }


def test_wide_colors_of_standard_range_become_bt709s_and_are_said(tmp_path):
    light = np.array([0.5, 0.3, 0.2])  # of BT.709
    wide = np.linalg.solve(hdr.to_bt709("BT.2020").double().numpy(), light) ** (1 / 2.4)
    image = np.broadcast_to((wide * 65535).round().astype(np.uint16), (16, 16, 3)).copy()
    path = film(tmp_path / "in.mp4", [image], pixels="yuv420p10le", tags=(9, 14, 9))
    clip = read_clip(path)
    torch.testing.assert_close(clip.frames[0][:, 8, 8].double(), torch.tensor(light ** (1 / 2.4)), atol=0.005, rtol=0)
    assert clip.notes == (f"{path} has BT.2020's wide colors; they are converted to BT.709's.",)


@pytest.mark.parametrize("tags", [(6, 6, 5), (5, 6, 5), (12, 13, 1)])  # NTSC, PAL, Display P3
def test_colors_of_standard_range_keep_their_tags(tmp_path, tags):
    image = np.broadcast_to(np.array([200, 50, 30], np.uint8), (16, 16, 3)).copy()
    clip = read_clip(film(tmp_path / "in.mp4", [image], tags=tags))
    torch.testing.assert_close(clip.frames[0][:, 8, 8] * 255, torch.tensor([200.0, 50, 30]), atol=3, rtol=0)
    write_clip(clip, tmp_path / "out.mp4")
    assert stream_of(tmp_path / "out.mp4")["tags"] == (*tags[:2], 1, 1)
    back = read_clip(tmp_path / "out.mp4").frames[0]
    torch.testing.assert_close(back[:, 8, 8] * 255, torch.tensor([200.0, 50, 30]), atol=3, rtol=0)


@pytest.mark.parametrize(("size", "matrix"), [((720, 1280), 1), ((480, 720), 5)])
def test_untagged_colors_are_what_players_take_them_for(tmp_path, size, matrix):
    image = np.broadcast_to(np.array([200, 50, 30], np.uint8), (*size, 3)).copy()
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(image).reformat(format="yuv420p", dst_colorspace=matrix)
        frame.colorspace = 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert stream_of(tmp_path / "in.mp4")["tags"][2] == 2
    pixel = read_clip(tmp_path / "in.mp4").frames[0][:, 8, 8] * 255
    torch.testing.assert_close(pixel, torch.tensor([200.0, 50, 30]), atol=3, rtol=0)


def test_colors_nobody_can_read_are_named(tmp_path):
    path = film(tmp_path / "in.mp4", gray(1), tags=(9, 16, 14))  # ICtCp
    with pytest.raises(ValueError, match=r"colors are coded by matrix 14 of ITU-T H\.273"):
        read_clip(path)


# --- bits


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_ten_bits_stay(tmp_path, suffix):
    """Steps that eight bits do not have."""
    signals = 0.4 + np.arange(12) / 876
    path = film(tmp_path / "in.mov", [patches(signals)] * 2, pixels="yuv420p10le")
    clip = read_clip(path)
    write_clip(clip, tmp_path / f"out{suffix}")
    assert stream_of(tmp_path / f"out{suffix}")["pixels"] == "yuv420p10le"
    assert not what_is_lost(clip, tmp_path / f"out{suffix}")
    back = read_clip(tmp_path / f"out{suffix}")
    assert back.format == clip.format
    before, after = (levels(one.frames[0])[1] for one in (clip, back))
    assert (before.diff() > 0).all()
    torch.testing.assert_close(after, before, atol=1.1 / 876, rtol=0)  # lossy by a step


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_ten_bits_of_the_shortest_films_stay(tmp_path, count):
    write_clip(Clip([torch.full((3, 16, 32), 0.3)] * count, format=Format(bits=10)), tmp_path / "a.mp4")
    assert len(read_clip(tmp_path / "a.mp4").frames) == count
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux() if packet.size]
    assert [packet.dts for packet in packets] == [packet.pts for packet in packets]


def test_bits_that_are_lost_are_said(tmp_path, capsys):
    path = film(tmp_path / "in.mp4", [patches([0.2, 0.4])] * 2, pixels="yuv420p10le")
    clip = read_clip(path)
    if "yuv420p10le" not in [one.name for one in av.Codec("libvpx-vp9", "w").video_formats or ()]:
        main(["video", str(path), str(tmp_path / "out.webm"), *STEPS])
        assert "out.webm will have 8 bits a color, the input has 10." in capsys.readouterr().err
    assert what_is_lost(clip, tmp_path / "frames") == [
        f"the PNG images of {tmp_path / 'frames'} have 8 bits a color, the input 10."
    ]


def test_a_resumed_edit_of_hdr_writes_the_same_file(tmp_path, monkeypatch):
    path = film(
        tmp_path / "in.mp4", [patches([0.2, 0.4 + 0.02 * i]) for i in range(4)], pixels="yuv420p10le", tags=(9, 18, 9)
    )
    main(["video", str(path), str(tmp_path / "a.mp4"), *STEPS[:-1], "6"])
    edit = sys.modules["csd_2d.edit"]
    monkeypatch.setattr(edit.ProgressFile, "SECONDS", 0.0)
    save, saved = edit.ProgressFile.save, []

    def interrupt(*args, **kwargs):
        save(*args, **kwargs)
        saved.append(1)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(edit.ProgressFile, "save", interrupt)
    with pytest.raises(SystemExit):
        main(["video", str(path), str(tmp_path / "b.mp4"), *STEPS[:-1], "6"])
    assert (tmp_path / "b.mp4.unfinished").exists()
    main(["video", str(path), str(tmp_path / "b.mp4"), *STEPS[:-1], "6", "--resume"])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


# --- shape


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi"])
def test_pixels_that_are_not_square_stay_so(tmp_path, suffix):
    clip = read_clip(film(tmp_path / "in.mp4", gray(3), aspect=Fraction(64, 45)))
    assert clip.format.pixel_aspect == Fraction(64, 45)
    out = tmp_path / f"out{suffix}"
    write_clip(clip, out)
    assert not what_is_lost(clip, out)
    assert read_clip(out).format == clip.format
    for other in ("out.webm", "frames"):
        assert "64/45 times as wide as high" in what_is_lost(clip, tmp_path / other)[0]


def test_pixels_turn_with_the_picture(tmp_path):
    path = film(tmp_path / "in.mp4", gray(2), aspect=Fraction(4, 3), turned=(90, False, False))
    clip = read_clip(path)
    assert (clip.sizes[0], clip.format.pixel_aspect) == ((24, 16), Fraction(3, 4))


CORNERS = np.zeros((16, 24, 3), np.uint8)
CORNERS[:8, :12], CORNERS[:8, 12:], CORNERS[8:, :12], CORNERS[8:, 12:] = 40, 90, 150, 220


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_the_whole_display_matrix_is_applied(tmp_path, degrees, mirrored, flipped):
    """Turned counterclockwise, then mirrored: by its definition, from pixel to pixel."""
    path = film(tmp_path / "in.mov", [CORNERS], turned=(degrees, mirrored, flipped))
    expected = np.rot90(CORNERS, degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    expected = expected[::-1] if flipped else expected
    clip = read_clip(path)
    assert clip.sizes[0] == expected.shape[:2] and not clip.notes
    seen = (clip.frames[0] * 255).permute(1, 2, 0).numpy()
    assert np.abs(seen - expected)[2:-2:3, 2:-2:3].mean() < 8


def test_a_slant_is_said(tmp_path):
    path = film(tmp_path / "in.mov", [CORNERS], turned=(20, False, False))
    assert read_clip(path).notes == (f"{path} asks to be shown at a slant; it is turned by the nearest quarter only.",)
    write_clip(read_clip(path), tmp_path / "out.mp4")
    assert not read_clip(tmp_path / "out.mp4").notes


@pytest.mark.parametrize(("suffix", "pixels"), [(".mp4", "yuv444p"), (".webm", "yuv420p")])
def test_odd_sizes_are_kept_and_said_where_players_refuse_them(tmp_path, capsys, suffix, pixels):
    clip = Clip([torch.full((3, 15, 21), 0.5)] * 2)
    out = tmp_path / f"out{suffix}"
    write_clip(clip, out)
    assert stream_of(out)["pixels"] == pixels and read_clip(out).sizes == [(15, 21)] * 2
    said = [f"21x15 px is odd: {suffix} keeps that as 4:4:4, which many players refuse; .webm is shown by more."]
    assert what_is_lost(clip, out) == (said if suffix == ".mp4" else [])
    assert not what_is_lost(Clip([torch.full((3, 16, 22), 0.5)]), out)


# --- times


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0.2, None, range(5, 10)), (0, 0.2, range(5)), (0.12, 0.28, range(3, 7))]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_parts_are_cut_by_exact_fractions(tmp_path, suffix, start, end, expected):
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = film(tmp_path / f"in{suffix}", gray(10), codec=codec)
    clip = read_clip(path, start, end)
    assert numbers(clip, 10) == [*expected]
    assert (clip.rate, clip.times, clip.last) == (25, None, None)


def test_parts_of_rates_that_are_no_decimals_are_exact(tmp_path):
    path = film(tmp_path / "in.mp4", gray(10), base=Fraction(1001, 30000))
    for third in (3, 7):
        assert numbers(read_clip(path, Fraction(1001 * third, 30000)), 10) == [*range(third, 10)]
        assert numbers(read_clip(path, 0, Fraction(1001 * third, 30000)), 10) == [*range(third)]


SLIDES = (0, 40, 80, 5000, 5040)
"""Milliseconds."""


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("start", "end", "expected", "times", "last"),
    [
        (2, 4, [2], [0], 2),
        (2, None, [2, 3, 4], [0, 3, 3.04], 3),
        (0, 1.5, [0, 1, 2], [0, 0.04, 0.08], 1.42),
        (6, None, [4], [0], 2.04),
        (0, None, [0, 1, 2, 3, 4], [0, 0.04, 0.08, 5, 5.04], 3),
    ],
)
def test_a_part_begins_with_the_frame_on_screen(tmp_path, suffix, start, end, expected, times, last):
    path = film(tmp_path / f"in{suffix}", gray(5), base=Fraction(1, 1000), times=SLIDES, last=3000)
    clip = read_clip(path, start, end)
    assert numbers(clip, 5) == expected
    assert ([float(time) for time in clip.times or ()], float(clip.last or 0)) == (times, last)
    with pytest.raises(ValueError, match="holds no video frames from second 9"):
        read_clip(path, 9)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_last_frame_is_shown_as_long_as_before(tmp_path, suffix, count):
    path = film(tmp_path / "in.mp4", gray(count), base=Fraction(1, 12800), times=range(0, 512 * count, 512), last=38400)
    clip = read_clip(path)
    assert (clip.last or 1 / clip.rate) == 3  # a single frame's rate tells it
    write_clip(clip, tmp_path / f"out{suffix}")
    back = read_clip(tmp_path / f"out{suffix}")
    assert (back.times, back.last or 1 / back.rate) == (clip.times, 3)


def test_times_of_mp4_are_kept_to_the_tick(tmp_path):
    times = [0, 517, 1024, 9999, 10512, 30000]
    path = film(tmp_path / "in.mp4", gray(6), base=Fraction(1, 12800), times=times, last=7777)
    clip = read_clip(path)
    assert clip.times == [Fraction(time, 12800) for time in times] and clip.last == Fraction(7777, 12800)
    write_clip(clip, tmp_path / "out.mp4")
    back = read_clip(tmp_path / "out.mp4")
    assert (back.times, back.last) == (clip.times, clip.last)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_a_film_of_slides_is_as_long_as_before(tmp_path, suffix, bits):
    """As the container says it, which is where players end."""
    pixels = "yuv420p" if bits == 8 else "yuv420p10le"
    path = film(tmp_path / "in.mkv", gray(5), base=Fraction(1, 1000), times=SLIDES, last=3000, pixels=pixels)
    clip = read_clip(path)
    write_clip(clip, tmp_path / f"out{suffix}")
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert (container.duration or 0) / av.time_base == pytest.approx(8.04, abs=0.001)
    back = read_clip(tmp_path / f"out{suffix}")
    assert (back.times, back.last) == (clip.times, 3) and numbers(back, 5) == [*range(5)]


def test_times_no_container_tells_are_said_or_refused_before_work(tmp_path):
    path = film(tmp_path / "in.mp4", gray(5), base=Fraction(1, 1000), times=SLIDES)
    assert what_is_lost(read_clip(path), Path("out.avi")) == [
        ".avi shows frames evenly; the times of the input's are not kept."
    ]
    assert "do not say when they are shown" in what_is_lost(read_clip(path), Path("frames"))[0]
    endless = Clip([torch.zeros(3, 16, 16)] * 2, times=[Fraction(0), Fraction(10**9)])
    with pytest.raises(ValueError, match="for too long"):
        check_video_output(tmp_path / "out.mp4", endless)


def test_titles_and_dates_are_kept(tmp_path):
    said = {"title": "A swan", "comment": "at dawn"}
    write_clip(Clip([torch.zeros(3, 16, 16)] * 2, tags=said), tmp_path / "a.mp4")
    clip = read_clip(tmp_path / "a.mp4")
    assert clip.tags == said
    for suffix in (".mkv", ".mov", ".webm"):
        write_clip(clip, tmp_path / f"b{suffix}")
        assert read_clip(tmp_path / f"b{suffix}").tags.items() >= {"title": "A swan"}.items()


# --- folders


def test_folders_have_a_rate_and_an_order_that_people_expect(tmp_path, capsys):
    folder = tmp_path / "frames"
    names = ["img_3.png", "IMG_10.JPG", "img_1.png", "Img_2.webp"]
    for name in names:
        number = int(name.split("_")[1].split(".")[0])
        write_image(torch.full((3, 16, 16), number / 12), folder / name)
    for other in ("x.pdf", "clip.mpg", "data.h5", "notes.txt", ".hidden.png"):
        (folder / other).write_bytes(b"%PDF-1.4")
    clip = read_clip(folder, fps=10)
    assert clip.names == ["img_1", "Img_2", "img_3", "IMG_10"] and clip.rate == 10
    assert clip.notes == (f"{folder} also holds clip.mpg and 3 more, no image that can be read: left out.",)
    assert read_clip(folder, 0.1, 0.3, fps=10).names == ["Img_2", "img_3"]
    main(["video", str(folder), str(tmp_path / "out.mp4"), "--fps", "12.5", *STEPS])
    assert read_clip(tmp_path / "out.mp4").rate == Fraction(25, 2)
    assert "also holds clip.mpg and 3 more" in capsys.readouterr().err


def test_rates_that_are_none_are_named(tmp_path):
    write_clip(Clip([torch.zeros(3, 16, 16)] * 2), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="fps is for folders of frames"):
        read_clip(tmp_path / "a.mp4", fps=10)
    for rate in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(ValueError, match="fps must be from 1/3600 to 1000"):
            read_clip(tmp_path, fps=rate)


# --- files that lie


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_files_cut_short_are_read_or_named(tmp_path, suffix, share):
    path = film(tmp_path / f"in{suffix}", gray(20))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    try:
        assert len(list(read_clip(path).frames)) > 0
    except ValueError as error:
        assert str(path) in str(error)


def test_parts_beyond_all_numbers_are_named(tmp_path):
    path = film(tmp_path / "in.mp4", gray(3))
    with pytest.raises(ValueError, match=r"holds no video frames from second 1e\+300"):
        read_clip(path, 1e300)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_the_longest_slide_is_written_or_refused_before_work(tmp_path, suffix):
    for days in (1, 2, 3, 20):
        clip = Clip([torch.zeros(3, 16, 16)] * 2, times=[Fraction(0), days * Fraction(86_400)])
        try:
            check_video_output(tmp_path / f"a{suffix}", clip)
        except ValueError:
            assert days > 2
        else:
            write_clip(clip, tmp_path / f"a{suffix}")
            assert read_clip(tmp_path / f"a{suffix}").times == clip.times


def test_a_title_of_another_alphabet_does_not_stand_in_the_way(tmp_path):
    write_clip(Clip([torch.zeros(3, 16, 16)] * 2, tags={"title": "Schwaene"}), tmp_path / "a.avi")
    latin = (tmp_path / "a.avi").read_bytes().replace(b"Schwaene", "Schw\xe4ne ".encode("latin-1"))
    (tmp_path / "a.avi").write_bytes(latin)
    assert read_clip(tmp_path / "a.avi").tags["title"].startswith("Schw")


def test_covers_are_no_films(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width, stream.pix_fmt, stream.disposition = 16, 16, "yuvj420p", 1024
        picture = av.VideoFrame.from_ndarray(gray(1, 16, 16)[0]).reformat(format="yuvj420p")
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="holds no video"):
        read_clip(tmp_path / "a.mp4")


def test_a_matrix_of_zeros_changes_nothing(tmp_path):
    clip = read_clip(film(tmp_path / "in.mov", [CORNERS], matrix=[0] * 9))
    assert (
        clip.sizes == [(16, 24)]
        and np.abs(clip.frames[0][0].numpy() * 255 - CORNERS[..., 0])[2:-2:3, 2:-2:3].mean() < 8
    )
