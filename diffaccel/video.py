"""Reading and writing clips: MP4, GIF, and folders of PNG frames. A clip is (F, H, W, 3), uint8 or float in [0, 1]."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import DiffaccelError

SUFFIXES = (".mp4", ".gif")
"""What a video file may end in; a path without a suffix is a folder of PNG frames."""


class VideoError(DiffaccelError, ValueError):
    """A clip cannot be read from, or written to, where it was asked for."""


def to_uint8(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """Frames (..., 3) in [0, 1] as uint8 by rounding; uint8 passes as it is. Values outside [0, 1] are clamped."""
    array = np.asarray(frames)
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise VideoError(f"frames must be uint8, or float in [0, 1], got {array.dtype}")
    if not np.isfinite(array).all():
        raise VideoError("frames hold values that are not finite (nan or inf), so no video was written")
    return np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8)


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path a video can be written to, or a `VideoError` that says what is wrong with it; nothing is created.

    `.mp4` and `.gif` are files, no suffix (or an existing folder) is a folder of PNG frames, and must be new or empty.
    The folder that is to hold the file or folder must exist and be writable.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if not target.is_dir() and suffix not in (*SUFFIXES, ""):
        raise VideoError(
            f"a video is written as .mp4, .gif or a folder of PNG frames (no suffix), not '{suffix}': {target}"
        )
    parent = target.absolute().parent
    if not parent.is_dir():
        raise VideoError(f"the folder '{parent}' does not exist; create it first or write elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise VideoError(f"the folder '{parent}' is not writable; write elsewhere")
    if target.is_dir() and suffix in SUFFIXES:
        raise VideoError(f"'{target}' is a folder, so no file of that name can be written; choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise VideoError(
            f"the folder '{target}' is not empty, and PNG frames go into a new or empty one; choose another"
        )
    if suffix == "" and target.is_file():
        raise VideoError(f"'{target}' is a file without suffix; name a .mp4, a .gif or a folder")
    return target


class VideoWriter:
    """Writes frames as they come; the file has its name only once it is whole.

        with VideoWriter("out.mp4", fps=16) as writer:
            for chunk in pipe.stream(prompt):
                writer.append(chunk[0])

    Frames go to a hidden name in the same folder. `close()` finishes the file and renames it, replacing an older one;
    `abort()` deletes it. Leaving the `with` block calls the first, and on an exception the second, except on
    KeyboardInterrupt, which keeps the frames so far as a playable file. MP4 is H.264 (yuv420p, BT.709, crf 16); where a
    side is odd its last row or column is repeated, because that format needs even sides. A GIF has one palette for the
    clip, and its player's clock ticks in hundredths of a second.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = 16.0) -> None:
        if not 0.0 < fps <= 240.0:
            raise VideoError(f"the frame rate must lie in (0, 240], got {fps:g}")
        self.path = check_output(path)
        self.fps = fps
        self.frames = 0
        folder, name = self.path.absolute().parent, self.path.name
        self._partial = folder / f".{self.path.stem}.partial-{os.getpid()}{self.path.suffix.lower()}"
        self._as_folder = self.path.is_dir() or Path(name).suffix.lower() not in SUFFIXES
        self._size: tuple[int, int] | None = None  # (height, width)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def append(self, frames: NDArray[Any]) -> None:
        """Add one frame (H, W, 3) or several (F, H, W, 3), uint8 or float in [0, 1]; all frames have one size."""
        if self._closed:
            raise VideoError(f"the video '{self.path}' is finished, nothing can be added")
        batch = to_uint8(frames)
        if batch.ndim == 3:
            batch = batch[None]
        if batch.ndim != 4 or batch.shape[-1] != 3:
            raise VideoError(
                f"frames must have the shape (height, width, 3) or (frames, height, width, 3), got {batch.shape}"
            )
        size = (batch.shape[1], batch.shape[2])
        if self._size is None:
            self._open(size)
        elif size != self._size:
            first = f"{self._size[1]}x{self._size[0]}"
            raise VideoError(f"every frame must have the size of the first, {first}, got {size[1]}x{size[0]}")
        for frame in batch:
            self._write(frame)
            self.frames += 1

    def close(self) -> Path | None:
        """Finish the file under its name and return its path; None, and no file, if no frame was added."""
        if self._closed:
            return self.path if self.frames else None
        self._closed = True
        if self._size is None:
            return None
        try:
            self._finish()
        except BaseException:
            self._delete()
            raise
        if self._as_folder and self.path.is_dir():
            self.path.rmdir()  # empty, as `check_output` saw to
        os.replace(self._partial, self.path)
        return self.path

    def abort(self) -> None:
        """Throw the frames away; the file of that name, if there was one, is as it was."""
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._delete()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            self.close()
        else:
            self.abort()

    def _open(self, size: tuple[int, int]) -> None:
        self._size = size
        if self._as_folder:
            self._partial.mkdir()
            return
        height, width = (side + side % 2 for side in size) if self._partial.suffix == ".mp4" else size
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:.6g}", "-i", "-"]
        if self._partial.suffix == ".gif":
            coding = ["-filter_complex", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "-loop", "0"]
        else:
            colour = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
            coding = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", *colour, "-c:v", "libx264"]
            coding += ["-pix_fmt", "yuv420p", "-crf", "16", "-movflags", "+faststart"]
        # A session of its own: Ctrl-C in the terminal must not end the encoder before it has written its last frames.
        self._process = subprocess.Popen(
            [_ffmpeg(), "-y", "-v", "error", *raw, *coding, str(self._partial)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def _write(self, frame: NDArray[np.uint8]) -> None:
        if self._as_folder:
            import imageio.v3 as iio

            iio.imwrite(self._partial / f"{self.frames:05d}.png", frame, plugin="pillow")
            return
        if self._partial.suffix == ".mp4":
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        try:
            self._pipe().write(np.ascontiguousarray(frame).tobytes())
        except BrokenPipeError:
            self._finish()  # says what the encoder said
            raise

    def _finish(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        _, said = process.communicate()
        if process.returncode != 0:
            last = said.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise VideoError(f"the encoder could not write '{self.path}': {last[0]}")

    def _pipe(self) -> IO[bytes]:
        assert self._process is not None
        assert self._process.stdin is not None
        return self._process.stdin

    def _delete(self) -> None:
        if self._partial.is_dir():
            shutil.rmtree(self._partial)
        else:
            self._partial.unlink(missing_ok=True)


def write_video(path: str | os.PathLike[str], frames: NDArray[Any], fps: float = 16.0) -> Path:
    """Write a clip (F, H, W, 3), uint8 or float in [0, 1], as .mp4, .gif or a folder of PNG frames; gives the path."""
    clip = np.asarray(frames)
    if clip.ndim != 4 or len(clip) == 0:
        raise VideoError(
            f"a clip must have the shape (frames, height, width, 3) and at least one frame, got {clip.shape}"
        )
    with VideoWriter(path, fps) as writer:
        writer.append(clip)
    return writer.path


def read_video(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a video file or a folder of PNG frames as uint8 (F, H, W, 3). Raises `VideoError` if it is no video."""
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob("*.png"))
        if not files:
            raise VideoError(f"the folder '{source}' holds no PNG frames")
        return np.stack([read_image(file) for file in files])
    if not source.is_file():
        raise VideoError(f"there is no video at '{source}'")
    try:
        return _read_gif(source) if source.suffix.lower() == ".gif" else _read_encoded(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise VideoError(f"'{source}' cannot be read as a video: {_first_line(error)}") from error


def _read_gif(source: Path) -> NDArray[np.uint8]:
    import imageio.v3 as iio

    return np.asarray(iio.imread(source, index=None, plugin="pillow", mode="RGB"))


def _read_encoded(source: Path) -> NDArray[np.uint8]:
    """Frames through ffmpeg as a row of PPM images, each of which says its size."""
    to_ppm = ["-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-"]
    done = subprocess.run([_ffmpeg(), "-v", "error", "-i", str(source), *to_ppm], capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise ValueError(done.stderr.decode(errors="replace").strip() or "it holds no frame")
    frames, position = [], 0
    while position < len(done.stdout):
        head = re.compile(rb"P6\s(\d+)\s(\d+)\s255\s").match(done.stdout, position)
        if head is None:
            raise ValueError("its frames are not 8-bit colour")
        width, height = int(head[1]), int(head[2])
        pixels = np.frombuffer(done.stdout, np.uint8, count=width * height * 3, offset=head.end())
        frames.append(pixels.reshape(height, width, 3))
        position = head.end() + pixels.size
    return np.stack(frames)


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a still image as uint8 (H, W, 3). Raises `VideoError` if it is missing or no image."""
    import imageio.v3 as iio

    source = Path(path)
    if not source.is_file():
        raise VideoError(f"there is no image at '{source}'")
    try:
        return np.asarray(iio.imread(source, plugin="pillow", mode="RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken PNG files
        raise VideoError(f"'{source}' cannot be read as an image: {_first_line(error)}") from error


def side_by_side(
    clips: Sequence[tuple[str, NDArray[Any]]], captions: Sequence[str] | None = None, panel: int = 256
) -> NDArray[np.uint8]:
    """One clip that shows several beside each other, (F, H', W', 3) uint8, each with its label and caption beneath.

    All clips have one frame size; a shorter one holds its last frame. Small frames are enlarged by a whole factor
    until they are at least `panel` pixels wide, so that the writing is legible. `captions` has one line a clip.
    """
    import cv2

    if not clips:
        raise VideoError("side_by_side needs at least one clip")
    if captions is not None and len(captions) != len(clips):
        raise VideoError(f"side_by_side needs one caption a clip, got {len(captions)} for {len(clips)}")
    arrays = [to_uint8(frames) for _, frames in clips]
    sizes = {array.shape[1:] for array in arrays}
    if len(sizes) > 1 or any(array.ndim != 4 or len(array) == 0 for array in arrays):
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise VideoError(f"side_by_side needs clips (frames, height, width, 3) of one frame size, got {shapes}")
    height, width, _ = sizes.pop()
    scale = max(1, -(-panel // width))
    length = max(len(array) for array in arrays)
    bars = [
        _caption_bar(width * scale, [label] if captions is None else [label, captions[number]])
        for number, (label, _) in enumerate(clips)
    ]
    out = np.zeros((length, height * scale + bars[0].shape[0], width * scale * len(arrays), 3), dtype=np.uint8)
    for number, (array, bar) in enumerate(zip(arrays, bars, strict=True)):
        columns = slice(number * width * scale, (number + 1) * width * scale)
        for index in range(length):
            frame = array[min(index, len(array) - 1)]
            big = cv2.resize(frame, (width * scale, height * scale), interpolation=cv2.INTER_NEAREST)
            out[index, : height * scale, columns] = big
        out[:, height * scale :, columns] = bar
    return out


def _caption_bar(width: int, lines: Sequence[str]) -> NDArray[np.uint8]:
    """A dark strip (h, width, 3) with one line of light text a row, each shrunk to fit."""
    import cv2

    row, font = 24, cv2.FONT_HERSHEY_SIMPLEX
    bar = np.full((row * len(lines) + 8, width, 3), 24, dtype=np.uint8)
    for number, line in enumerate(lines):
        (text_width, _), _ = cv2.getTextSize(line, font, 0.55, 1)
        size = 0.55 * min(1.0, (width - 12) / max(text_width, 1))
        cv2.putText(bar, line, (6, row * (number + 1) - 5), font, size, (235, 235, 235), 1, cv2.LINE_AA)
    return bar


def _ffmpeg() -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        return str(get_ffmpeg_exe())
    except RuntimeError as error:
        raise VideoError("no ffmpeg was found; install imageio-ffmpeg, or write a folder of PNG frames") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
