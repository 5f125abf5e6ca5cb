"""Clips written and read back; nothing half-written is ever left."""

import time

import numpy as np
import pytest

from diffaccel.video import (
    VideoError,
    VideoWriter,
    check_output,
    read_image,
    read_video,
    side_by_side,
    to_uint8,
    write_video,
)


def gradient(frames: int = 5, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth colourful clip in [0, 1], which lossy codecs keep well; every frame differs."""
    t, y, x = np.meshgrid(
        np.arange(frames) / frames, np.arange(height) / height, np.arange(width) / width, indexing="ij"
    )
    return np.stack([x, (y + t) / 2, 1 - (x + y) / 2], axis=-1).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def feed(path, *batches, then: BaseException | None = None) -> None:
    with VideoWriter(path) as writer:
        for batch in batches:
            writer.append(batch)
        if then is not None:
            raise then


def hidden(folder) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("name", "floor"), [("clip.mp4", 36.0), ("clip.gif", 25.0), ("frames", np.inf)])
def test_written_frames_come_back(tmp_path, name, floor):
    clip = gradient()
    path = write_video(tmp_path / name, clip, fps=8)
    back = read_video(path)
    assert back.shape == clip.shape
    assert back.dtype == np.uint8
    with np.errstate(divide="ignore"):
        assert psnr(back, to_uint8(clip)) >= floor
    assert not hidden(tmp_path)


def test_colours_survive_the_codec(tmp_path):
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [250, 200, 40]):
        clip = np.full((3, 32, 32, 3), colour, dtype=np.uint8)
        back = read_video(write_video(tmp_path / "c.mp4", clip))
        assert np.abs(back.astype(int) - clip).max() <= 6, (colour, back[0, 0, 0])


def test_odd_sides_are_padded_by_their_last_row_and_column(tmp_path):
    clip = to_uint8(gradient(3, 33, 47))
    back = read_video(write_video(tmp_path / "odd.mp4", clip))
    assert back.shape == (3, 34, 48, 3)
    assert psnr(back[:, :33, :47], clip) > 34
    assert read_video(write_video(tmp_path / "odd.gif", clip)).shape == clip.shape


def test_streaming_in_chunks_equals_writing_at_once(tmp_path):
    clip = gradient(7)
    with VideoWriter(tmp_path / "chunks.mp4", fps=8) as writer:
        writer.append(clip[:3])
        assert not (tmp_path / "chunks.mp4").exists()
        writer.append(clip[3])
        writer.append(clip[4:])
    assert writer.frames == 7
    assert not hidden(tmp_path)
    assert np.array_equal(read_video(writer.path), read_video(write_video(tmp_path / "once.mp4", clip, fps=8)))


def test_an_error_leaves_no_file_and_the_older_one_as_it_was(tmp_path):
    path = write_video(tmp_path / "clip.mp4", gradient(2))
    before = path.read_bytes()
    for name in ("clip.mp4", "new.gif", "frames"):
        with pytest.raises(RuntimeError, match="boom"):
            feed(tmp_path / name, gradient(2), then=RuntimeError("boom"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["clip.mp4", "frames"])
def test_aborting_deletes_what_is_on_disk(tmp_path, name):
    writer = VideoWriter(tmp_path / name)
    writer.append(gradient(2))
    deadline = time.monotonic() + 20
    while not hidden(tmp_path):  # the encoder makes its file when it has started
        assert time.monotonic() < deadline
        time.sleep(0.02)
    writer.abort()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "frames"])
def test_an_interrupt_keeps_the_frames_so_far(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        feed(tmp_path / name, gradient(4), then=KeyboardInterrupt())
    assert len(read_video(tmp_path / name)) == 4
    assert not hidden(tmp_path)


def test_a_writer_without_frames_leaves_nothing(tmp_path):
    with VideoWriter(tmp_path / "none.mp4") as writer:
        pass
    assert writer.close() is None
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_dies_is_reported_and_cleaned_up(tmp_path):
    writer = VideoWriter(tmp_path / "clip.mp4")
    writer.append(gradient(1))
    assert writer._process is not None
    writer._process.kill()
    writer._process.wait()
    with pytest.raises(VideoError, match="the encoder could not write"):
        writer.append(gradient(200))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    (tmp_path / "frames").mkdir()
    write_video(tmp_path / "frames", gradient(2))
    assert sorted(p.name for p in (tmp_path / "frames").iterdir()) == ["00000.png", "00001.png"]
    with pytest.raises(VideoError, match="not empty"):
        check_output(tmp_path / "frames")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("clip.avi", "not '.avi'"),
        ("nowhere/clip.mp4", "does not exist"),
        ("folder.mp4", "is a folder"),
        ("file", "without suffix"),
    ],
)
def test_bad_outputs_are_refused_before_anything_is_written(tmp_path, name, sentence):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(VideoError, match=sentence):
        VideoWriter(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 2


def test_frames_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(VideoError, match="size of the first, 64x48, got 32x16"):
        feed(tmp_path / "a.mp4", gradient(1), gradient(1, 16, 32))
    with pytest.raises(VideoError, match="shape"):
        feed(tmp_path / "a.mp4", np.zeros((4, 4)))
    with pytest.raises(VideoError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", np.zeros((0, 8, 8, 3)))
    with pytest.raises(VideoError, match="not finite"):
        write_video(tmp_path / "a.mp4", np.full((1, 8, 8, 3), np.nan))
    with pytest.raises(VideoError, match="got int64"):
        write_video(tmp_path / "a.mp4", np.zeros((1, 8, 8, 3), dtype=np.int64))
    with pytest.raises(VideoError, match="frame rate"):
        write_video(tmp_path / "a.mp4", gradient(1), fps=0)
    assert not list(tmp_path.iterdir())


def test_what_is_no_video_or_image_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("bad.mp4", "bad.gif", "bad.png"):
        (tmp_path / name).write_bytes(b"not a picture")
    for name in ("bad.mp4", "bad.gif"):
        with pytest.raises(VideoError, match="cannot be read as a video"):
            read_video(tmp_path / name)
    with pytest.raises(VideoError, match="cannot be read as an image"):
        read_image(tmp_path / "bad.png")
    with pytest.raises(VideoError, match="no image at"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(VideoError, match="no video at"):
        read_video(tmp_path / "gone.mp4")
    with pytest.raises(VideoError, match="holds no PNG"):
        read_video(tmp_path / "empty")


def test_an_image_is_read_as_rgb(tmp_path):
    write_video(tmp_path / "frames", gradient(1))
    image = read_image(tmp_path / "frames" / "00000.png")
    assert np.array_equal(image, to_uint8(gradient(1))[0])


def test_side_by_side_shows_every_clip_with_its_writing():
    left, right = to_uint8(gradient(4)), 255 - to_uint8(gradient(3))
    both = side_by_side([("dense", left), ("fast", right)], captions=["2.0 s", "1.0 s"])
    assert both.shape[0] == 4
    assert both.shape[2] == 2 * 256
    assert both.shape[1] > 192
    assert np.array_equal(both[1, :192:4, :256:4], left[1])
    assert np.array_equal(both[3, :192:4, 256::4], right[2])  # the shorter clip holds its last frame
    bar = both[0, 192:]
    assert bar[:, :256].max() > 150
    assert not np.array_equal(bar[:, :256], bar[:, 256:])
    assert np.array_equal(both[0, 192:], both[3, 192:])


def test_side_by_side_refuses_what_cannot_stand_beside_each_other():
    with pytest.raises(VideoError, match="one frame size"):
        side_by_side([("a", gradient(1)), ("b", gradient(1, 16, 16))])
    with pytest.raises(VideoError, match="one caption a clip"):
        side_by_side([("a", gradient(1))], captions=[])
    with pytest.raises(VideoError, match="at least one clip"):
        side_by_side([])
