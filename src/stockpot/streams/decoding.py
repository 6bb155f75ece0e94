"""Image files as one tensor: decoded in threads, a block of rows at a time, kept on disk if large.

Pillow decodes without Python's lock, so threads help. No more than a few blocks are ever held
beside the result; a result of more than :data:`IN_MEMORY` bytes is written to the cache folder and
mapped into memory, so that it costs no more memory than is free, and is there the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from stockpot.errors import StockpotError, first_line
from stockpot.files import space_errors
from stockpot.streams.encoded import EncodedImages, LabelledFiles

__all__ = ["IN_MEMORY", "cache_folder", "decode", "eight_bits"]

IN_MEMORY = 2 * 2**30
"""Bytes of decoded images above which they are kept in a file."""
_BLOCK = 8 * 2**20
"""Bytes of decoded images that a thread makes at a time."""
_LAYOUT = 1
"""Goes up when the same files would be decoded to other pixels."""

Shape = tuple[int, int, int]
"""Channels, height, width."""
Pixels = NDArray[np.uint8]


class _ColourError(Exception):
    """An image has colours, and so far all were grey."""


def decode(parts: Sequence[LabelledFiles], size: int | None, remedy: str = "") -> list[Tensor]:
    """The images of each part, (N, C, H, W) uint8; one channel if all are grey, else three.

    Args:
        parts: training and test images, say; all become images of one shape.
        size: the side to which images are resized, whatever their shape was (Pillow's bilinear
            filter, which averages over what it leaves out when it reduces); None: not at all.
        remedy: ends the message on images of several sizes.

    Raises:
        StockpotError: naming the file or row that is no image or of another size.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    decoder = _Decoder(size, remedy, workers or 1)
    first = next((part for part in parts if len(part.rows)), None)
    if first is None:
        return [torch.zeros(0, 1, 1, 1, dtype=torch.uint8) for _ in parts]
    row = int(first.rows[0])
    image = decoder.open(first.source.name(row), first.source.read([row])[0])
    decoder.first = first.source.name(row)
    for channels in (1, 3) if image.mode == "L" else (3,):
        try:
            return [decoder.tensor(part, (channels, image.height, image.width)) for part in parts]
        except _ColourError:
            continue
    raise AssertionError("colour was refused to images of three channels")


class _Decoder:
    """How images become pixels in one call of :func:`decode`."""

    def __init__(self, size: int | None, remedy: str, workers: int) -> None:
        self.size, self.remedy, self.workers = size, remedy, workers
        self.first = ""
        """Where the image is from whose shape all must have."""

    def tensor(self, part: LabelledFiles, shape: Shape) -> Tensor:
        """All images of a part, in memory or mapped into it."""
        whole = (len(part.rows), *shape)
        if math.prod(whole) > IN_MEMORY:
            return _mapped(self._cached(part, whole), whole)
        out = np.empty(whole, np.uint8)
        begin = 0
        for block in self._blocks(part, shape):
            out[begin : begin + len(block)] = block
            begin += len(block)
        return torch.from_numpy(out)

    def open(self, name: str, file: bytes | Path) -> Image.Image:
        """One image in mode L or RGB, of the size asked for."""
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                image = eight_bits(opened)
            if self.size is not None and image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        except Exception as error:  # what a broken file raises is anyone's guess
            line = first_line(error)
            raise StockpotError(f"{name}: not an image that can be read ({line})") from error
        return image

    def _blocks(self, part: LabelledFiles, shape: Shape) -> Iterator[Pixels]:
        """The images in their order, some rows at a time."""
        rows = part.rows.tolist()
        step = min(256, max(1, _BLOCK // math.prod(shape)))
        waiting: deque[Future[Pixels]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for begin in range(0, len(rows), step):
                some = rows[begin : begin + step]
                files = part.source.read(some)
                waiting.append(pool.submit(self._block, part.source, some, files, shape))
                if len(waiting) > 2 * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _block(
        self, source: EncodedImages, rows: list[int], files: list[bytes | Path], shape: Shape
    ) -> Pixels:
        channels, height, width = shape
        out = np.empty((len(rows), *shape), np.uint8)
        for place, (row, file) in enumerate(zip(rows, files, strict=True)):
            image = self.open(source.name(row), file)
            if (image.height, image.width) != (height, width):
                raise StockpotError(
                    f"{source.name(row)} has {image.height}x{image.width} pixels (height x width) "
                    f"where {self.first} has {height}x{width}; images of one size are needed"
                    + self.remedy
                )
            if channels == 1:
                if image.mode != "L":
                    raise _ColourError
                out[place, 0] = np.asarray(image)
            else:
                # Channel by channel is twice as fast as turning an array's axes.
                for channel, band in enumerate(image.convert("RGB").split()):
                    out[place, channel] = np.asarray(band)
        return out

    def _cached(self, part: LabelledFiles, whole: tuple[int, ...]) -> Path:
        """The file in the cache folder that holds these pixels; made if it is not there."""
        # Another Pillow may decode and resize to other pixels.
        digest = hashlib.sha256(f"{_LAYOUT} {PIL.__version__} {self.size} {whole} ".encode())
        digest.update(part.source.fingerprint().encode())
        digest.update(part.rows.numpy().data)
        path = cache_folder() / f"{digest.hexdigest()[:32]}.pixels"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists() or path.stat().st_size != math.prod(whole):
                    self._write(path, part, whole)
        except OSError as error:
            raise StockpotError(
                f"cannot keep decoded images in {path.parent}: {error.strerror}; set "
                "XDG_CACHE_HOME to a folder that can be written to"
            ) from error
        return path

    def _write(self, path: Path, part: LabelledFiles, whole: tuple[int, ...]) -> None:
        """Write to another name first: what a kill leaves there is overwritten the next time."""
        scratch = path.with_name(f".{path.name}.tmp")
        try:
            with space_errors(path):
                with scratch.open("wb") as file:
                    for block in self._blocks(part, (whole[1], whole[2], whole[3])):
                        file.write(block.data)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where decoded images are kept: may be deleted at any time when no experiment runs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "stockpot" / "images"


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file of bytes as a tensor that is read from the disk as it is needed."""
    pixels = np.memmap(path, np.uint8, mode="r", shape=shape)
    with warnings.catch_warnings():
        # Torch warns that the tensor must not be written to; nothing writes to images.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(pixels)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for another process that is decoding the same images."""
    with path.open("a") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def eight_bits(image: Image.Image) -> Image.Image:
    """Any image in mode L (grey) or RGB, upright.

    16-bit grey is divided by 257; what is transparent is laid over white; palettes and other colour
    spaces become RGB; a turn in the EXIF data is carried out.

    Raises:
        ValueError: for pixels of more than 16 bits or of floating point.
    """
    image.load()  # the file may be closed when this returns
    if image.getexif().get(0x0112, 1) != 1:  # the tag of the orientation
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        values: NDArray[Any] = np.asarray(image).astype(np.int64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode}; up to 16 bits a channel can be read")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if grey:
        return image if image.mode == "L" else image.convert("L")
    return image if image.mode == "RGB" else image.convert("RGB")
