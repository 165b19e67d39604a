"""Video files: frame times and sound survive, parts are cut where they should be."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from csd_2d.cli import main
from csd_2d.io.video import Clip, read_clip, sound_fits, write_clip

STEPS = ["--prompt", "make it night", "--prior", "analytic", "--steps", "4"]
RATE = 48000


def gray_levels(count: int) -> list[torch.Tensor]:
    """Frames that tell their number."""
    return [torch.full((3, 16, 24), (index + 1) / (count + 1)) for index in range(count)]


def number(frame: torch.Tensor, count: int) -> int:
    return round(frame.mean().item() * (count + 1)) - 1


def write_with_sound(path: Path, count: int = 50, rate: int = 25, codec: str = "aac") -> None:
    """A video of `count` frames, with as long a tone that rises all the time."""
    silent = path.with_name("silent.avi" if path.suffix == ".avi" else "silent.mp4")
    write_clip(Clip(gray_levels(count), Fraction(rate)), silent)
    with av.open(str(silent)) as source, av.open(str(path), "w") as container:
        picture = source.streams.video[0]
        copy = container.add_stream_from_template(picture)
        sound = container.add_stream(codec, rate=RATE)
        for packet in source.demux(picture):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
        time = np.arange(RATE * count // rate) / RATE
        tone = (0.5 * np.sin(2000 * time * (1 + time)))[None].astype(np.float32)
        resampler = av.AudioResampler(format=sound.codec_context.format, layout="mono", rate=RATE)
        for start in range(0, tone.shape[1], 960):
            piece = av.AudioFrame.from_ndarray(tone[:, start : start + 960].copy(), format="fltp", layout="mono")
            piece.sample_rate, piece.pts = RATE, start
            for frame in resampler.resample(piece):
                container.mux(sound.encode(frame))
        container.mux(sound.encode())
    silent.unlink()


def packets(path: Path) -> list[tuple[float, bytes]]:
    """Time in seconds and content of each packet of sound; none without sound."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return []
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.dts is not None]


UNEVEN = [Fraction(index * index, 50) + Fraction(index, 25) for index in range(10)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_uneven_frame_times_are_kept(tmp_path, suffix):
    write_clip(Clip(gray_levels(10), Fraction(12), times=UNEVEN), tmp_path / f"a{suffix}")
    clip = read_clip(tmp_path / f"a{suffix}")
    assert clip.times is not None
    assert max(abs(a - b) for a, b in zip(clip.times, UNEVEN, strict=True)) <= 0.001  # Matroska counts in ms
    write_clip(clip, tmp_path / f"b{suffix}")
    assert read_clip(tmp_path / f"b{suffix}").times == clip.times
    assert [number(frame, 10) for frame in read_clip(tmp_path / f"b{suffix}").frames] == [*range(10)]


def test_avi_takes_uneven_frames_at_an_even_rate(tmp_path):
    write_clip(Clip(gray_levels(10), Fraction(12), times=UNEVEN), tmp_path / "a.avi")
    clip = read_clip(tmp_path / "a.avi")
    assert (clip.times, clip.rate, len(clip.frames)) == (None, 12, 10)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_sound_is_copied_packet_by_packet(tmp_path, suffix):
    write_with_sound(tmp_path / "in.mp4")
    main(["video", str(tmp_path / "in.mp4"), str(tmp_path / f"out{suffix}"), *STEPS])
    before, after = packets(tmp_path / "in.mp4"), packets(tmp_path / f"out{suffix}")
    assert len(before) > 80
    assert [content for _, content in after] == [content for _, content in before]
    # Matroska cannot begin before 0, and shifts sound and picture alike.
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        stream = container.streams.video[0]
        shift = float((stream.start_time or 0) * stream.time_base)
    assert max(abs(a - shift - b) for (a, _), (b, _) in zip(after, before, strict=True)) < 0.002
    clip = read_clip(tmp_path / f"out{suffix}")
    assert (clip.rate, clip.times, len(clip.frames)) == (25, None, 50)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_part_has_its_frames_and_its_sound(tmp_path, suffix):
    write_with_sound(tmp_path / f"in{suffix}", codec="mp3")
    part = ["--start", "0.5", "--end", "1.3"]
    main(["video", str(tmp_path / f"in{suffix}"), str(tmp_path / "out.mkv"), *STEPS, *part])
    # Twenty frames, from the 12.5th on: edited, so told from the source by their number only.
    clip = read_clip(tmp_path / f"in{suffix}", 0.5, 1.3)
    assert [number(frame, 50) for frame in clip.frames] == [*range(13, 33)]
    assert len(read_clip(tmp_path / "out.mkv").frames) == 20
    before, after = packets(tmp_path / f"in{suffix}"), packets(tmp_path / "out.mkv")
    contents = [content for _, content in before]
    first = contents.index(after[0][1])
    assert [content for _, content in after] == contents[first : first + len(after)]
    with av.open(str(tmp_path / "out.mkv")) as container:
        stream = container.streams.video[0]
        shift = float((stream.start_time or 0) * stream.time_base)
    # A packet lasts 24 ms: sound that was heard with a frame is heard with it still, and ends with the picture.
    assert abs((after[0][0] - shift) - (before[first][0] - 13 / 25)) < 0.03
    assert abs(before[first][0] - 13 / 25) < 0.03
    assert abs(before[first + len(after) - 1][0] - 1.3) < 0.03


def test_parts_of_a_folder_are_counted_at_24_frames_a_second(tmp_path):
    write_clip(Clip(gray_levels(24)), tmp_path / "frames")
    clip = read_clip(tmp_path / "frames", 0.25, 0.5)
    assert clip.names == [f"{index:05d}" for index in range(6, 12)]
    assert [number(frame, 24) for frame in clip.frames] == [*range(6, 12)]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (2, 1), (1, 1), (float("nan"), None)])
def test_parts_that_are_none_are_named(tmp_path, start, end):
    with pytest.raises(ValueError, match="start must be at least 0 and less than end"):
        read_clip(tmp_path, start, end)


def test_parts_beyond_the_end_are_named(tmp_path):
    write_clip(Clip(gray_levels(5)), tmp_path / "a.mp4")
    write_clip(Clip(gray_levels(5)), tmp_path / "frames")
    with pytest.raises(ValueError, match=r"a\.mp4 holds no video frames from second 9 to 10\."):
        read_clip(tmp_path / "a.mp4", 9, 10)
    with pytest.raises(ValueError, match=r"frames holds no images from second 9, at 24 a second\."):
        read_clip(tmp_path / "frames", 9)


def test_sound_a_container_cannot_hold_is_left_out_in_one_sentence(tmp_path, capsys):
    write_with_sound(tmp_path / "in.mp4", count=10)
    out = tmp_path / "out.webm"
    main(["video", str(tmp_path / "in.mp4"), str(out), *STEPS])
    assert f"csd: .webm cannot hold the input's aac sound; {out} will be silent.\n" in capsys.readouterr().err
    assert not packets(out) and len(read_clip(out).frames) == 10
    main(["video", str(tmp_path / "in.mp4"), str(tmp_path / "frames"), *STEPS])  # nobody expects sound of these
    assert "silent" not in capsys.readouterr().err


def test_whether_sound_fits_is_found_out_by_trying(tmp_path):
    write_with_sound(tmp_path / "in.mkv", count=10, codec="libopus")
    sound = read_clip(tmp_path / "in.mkv").sound
    assert sound is not None and sound.codec == "opus"
    fits = {suffix: sound_fits(sound, Path(f"out{suffix}")) for suffix in (".mp4", ".webm", ".mkv", ".mov", ".avi")}
    assert fits == {".mp4": True, ".webm": True, ".mkv": True, ".mov": False, ".avi": False}


def test_sound_and_picture_lie_side_by_side_in_the_file(tmp_path):
    """Not one behind the other, which players have to seek for, and which muxers keep in memory until the end."""
    write_with_sound(tmp_path / "in.mp4", count=100)
    write_clip(read_clip(tmp_path / "in.mp4"), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        kinds = [packet.stream.type for packet in container.demux() if packet.dts is not None]
    assert sum(a != b for a, b in pairwise(kinds)) > 50


def test_frames_are_seen_by_index_too(tmp_path):
    write_clip(Clip(gray_levels(9)), tmp_path / "a.mp4")
    frames = read_clip(tmp_path / "a.mp4").frames
    assert [number(frames[index], 9) for index in (0, 5, -1)] == [0, 5, 8]
    assert [number(frame, 9) for frame in frames[2:4]] == [2, 3]
    with pytest.raises(IndexError):
        frames[9]


def test_sizes_of_pictures_are_known_without_reading_them(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (20, 10 + orientation)).save(tmp_path / f"{orientation}.jpg", exif=exif)
    clip = read_clip(tmp_path)
    assert clip.sizes == [frame.shape[-2:] for frame in clip.frames]
    assert clip.sizes[0] == (11, 20) and clip.sizes[7] == (20, 18)
