"""Animations of a reduction, as GIF or MP4."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import MissingExtraError, UsageError
from ..files import atomic_path


def save_film(frames: Sequence[Image.Image], path: str | os.PathLike[str], seconds: float = 0.7) -> None:
    """Write frames of one size as a .gif, which loops forever, or an .mp4.

    Args:
        seconds: duration of each frame; the last one stays three times as long.

    Raises:
        UsageError: the path does not end in .gif or .mp4.
        MissingExtraError: an .mp4 needs imageio-ffmpeg.
        LTMPError: the file cannot be written.
    """
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise UsageError(f"cannot write a film to {path}: expected a name that ends in .gif or .mp4")
    with atomic_path(path) as temporary:
        writers[suffix](frames, temporary, seconds)


def _write_gif(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(3000 * seconds)]
    # coverage keeps the colours of small details, such as an eye; without dithering, flat colours stay flat
    first, *others = (
        frame.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE) for frame in frames
    )
    first.save(path, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _write_mp4(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingExtraError("imageio-ffmpeg", "video", "Writing an MP4") from error
    # the codec stores colours at half the resolution, so width and height must be even
    width, height = (side + side % 2 for side in frames[0].size)
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=10, codec="libx264", macro_block_size=2, quality=8,
        output_params=["-f", "mp4", "-movflags", "+faststart"],
    )  # fmt: skip
    writer.send(None)
    for i, frame in enumerate(frames):
        padded = Image.new("RGB", (width, height), frame.getpixel((0, 0)))
        padded.paste(frame)
        for _ in range(round(10 * seconds) * (3 if i == len(frames) - 1 else 1)):
            writer.send(np.asarray(padded))
    writer.close()
