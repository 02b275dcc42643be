"""Images: decode, crop, resize and flip, each by its own bytes and its own random numbers.

An image becomes uint8, RGB, shape (3, height, width). In training :class:`RandomResizedCrop` cuts a random box
out of it, in evaluation the middle; the box is then resized (bilinear, antialiased) and maybe flipped. What comes
out depends on the bytes and the draws of that one sample: not on the batch, the threads, or the kind of CPU
(torch's integer resize gives the same bits with and without AVX).

Cost: a JPEG of which the box is at least twice as large as what it is resized to is decoded at 1/2, 1/4 or 1/8
(libjpeg-turbo's scaled decoding), for a fraction of the price. Decoding and resizing release the GIL, so threads
scale. simplejpeg decodes the same pixels as Pillow (bit by bit, where both were built with the same libjpeg-turbo)
in 2/3 of the time. What it cannot read, or calls damaged, goes to Pillow, so both take the same files. Which one is
used is declared, not guessed from what is installed: else two nodes might train on different pixels in silence.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

Pixels = NDArray[np.uint8]

BACKENDS: Final = ("pillow", "simplejpeg")
# By name: among all that Pillow knows are formats that run other programs, such as Ghostscript for EPS.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000")
_TRIES: Final = 10
_MAX_PIXELS: Final = 89_478_485  # above these Pillow warns of decompression bombs, and may refuse


class Crop(NamedTuple):
    """A box of an image, in pixels, and whether it is mirrored from left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box in training, the middle of the image in evaluation; both resized to the field's shape.

    The box is drawn as torchvision's ``RandomResizedCrop`` draws it (`torchvision.transforms.v2`; first in
    "Going deeper with convolutions", Szegedy et al., 2014): its area uniformly, its aspect ratio log-uniformly,
    until one fits, ten times at most; then it is the largest box in the middle whose ratio is allowed.

    Attributes:
        scale: least and largest area of the box, as fractions of the image's.
        ratio: least and largest width / height of the box.
        flip: probability of a horizontal flip.
        evaluation_fraction: side of the box in evaluation, as a fraction of the largest box in the middle that
            has the shape's aspect ratio. 0.875 is to resize to 256 and to cut out 224.

    Raises:
        ConfigError: a value out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    evaluation_fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"augment.scale is {self.scale}", mend="give 0 < least <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"augment.ratio is {self.ratio}", mend="give 0 < least <= largest")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"augment.flip is {self.flip}", mend="give a probability from 0 to 1")
        if not 0 < self.evaluation_fraction <= 1:
            raise ConfigError(
                f"augment.evaluation_fraction is {self.evaluation_fraction}", mend="give 0 < fraction <= 1"
            )

    def draw(self, height: int, width: int, generator: np.random.Generator) -> Crop:
        """The box of an image in training.

        Args:
            height: of the image.
            width: of the image.
            generator: that sample's own.
        """
        # All numbers at once: one call, and each has its place whatever came of the others.
        *numbers, down, right, flip = generator.random(2 * _TRIES + 3).tolist()
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, aspect in zip(numbers[::2], numbers[1::2], strict=True):
            target = height * width * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Crop(int(down * (height - h + 1)), int(right * (width - w + 1)), h, w, flip < self.flip)
        h = min(height, max(1, round(width / self.ratio[0])))
        w = min(width, max(1, round(height * self.ratio[1])))
        return Crop((height - h) // 2, (width - w) // 2, h, w, flip < self.flip)

    def middle(self, height: int, width: int, size: tuple[int, int]) -> Crop:
        """The box of an image in evaluation.

        Args:
            height: of the image.
            width: of the image.
            size: what the box is to be resized to. (height, width)
        """
        scale = self.evaluation_fraction * min(height / size[0], width / size[1])
        h, w = (max(1, round(scale * side)) for side in size)
        return Crop((height - h) // 2, (width - w) // 2, h, w)


def check_backend(ext: str, backend: str) -> None:
    """See to it that the libraries of a backend are there.

    Raises:
        ConfigError: one is missing.
    """
    for module, name in (("PIL", "Pillow"), ("simplejpeg", "simplejpeg"))[: 1 + (backend == "simplejpeg")]:
        if find_spec(module) is None:
            raise ConfigError(
                f"field {ext!r} holds images, but {name} is missing", mend="pip install 'disttrain[image]'"
            )


def decode_image(
    value: memoryview,
    *,
    size: tuple[int, int] | None = None,
    augment: RandomResizedCrop | None = None,
    backend: str = "pillow",
    generator: np.random.Generator | None = None,
) -> Pixels:
    """Decode one image.

    Args:
        value: the file's bytes.
        size: what to resize to, (height, width); None to leave it as large as it is.
        augment: what to cut out before; None to take the whole image.
        backend: ``pillow`` or ``simplejpeg``.
        generator: the sample's random numbers; None in evaluation.

    Returns:
        RGB; a view, not contiguous: to copy it where it belongs puts the channels apart, which costs no more
        than any copy. uint8, shape (3, height, width)

    Raises:
        ValueError: it is no image that can be read.
    """
    found = _jpeg_size(value) if backend == "simplejpeg" else None
    picture = None
    if found is None:
        picture = _open(value)
        found = picture.height, picture.width
    crop = Crop(0, 0, *found)
    if size is not None and augment is not None:
        crop = augment.middle(*found, size) if generator is None else augment.draw(*found, generator)
    factor = _factor(found, crop, size) if picture is None or picture.format in ("JPEG", "MPO") else 1
    pixels = _simplejpeg(value, found, crop, factor) if picture is None else None
    if pixels is None:
        pixels = _pillow(_open(value) if picture is None else picture, found, crop, factor)
    pixels = pixels if size is None else _resized(pixels, size)
    return (pixels[:, ::-1] if crop.flip else pixels).transpose(2, 0, 1)


def _factor(full: tuple[int, int], crop: Crop, size: tuple[int, int] | None) -> int:
    """The least size at which a JPEG may be decoded, as 1 / factor: the crop must not become smaller than wanted.

    The factors between, such as 3/4, take longer than the whole image: libjpeg-turbo has no SIMD code for them.
    """
    if size is None or max(full) < 8:  # below 8 pixels some of those give the same height and width as 1/2
        return 1
    reach = min(crop.height // size[0], crop.width // size[1])
    return next((factor for factor in (8, 4, 2) if reach >= factor), 1)


def _cut(crop: Crop, factor: int) -> tuple[slice, slice]:
    """The rows and columns of the crop in an image decoded at 1 / factor, to the nearest pixel."""
    top, left, bottom, right = (
        (edge + factor // 2) // factor for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    return slice(top, bottom), slice(left, right)


def _jpeg_size(value: memoryview) -> tuple[int, int] | None:
    """Height and width of a JPEG; None for what is left to Pillow."""
    if bytes(value[:2]) != b"\xff\xd8":
        return None
    from simplejpeg import decode_jpeg_header

    try:
        height, width, space, _ = decode_jpeg_header(value)
    except ValueError:
        return None
    return (height, width) if space in ("YCbCr", "RGB", "Gray") and height * width <= _MAX_PIXELS else None


def _simplejpeg(value: memoryview, full: tuple[int, int], crop: Crop, factor: int) -> Pixels | None:
    """The crop's pixels, shape (height, width, 3); None where libjpeg-turbo finds fault with the file."""
    from simplejpeg import decode_jpeg

    height, width = (-(-side // factor) for side in full)
    try:
        pixels: Pixels = decode_jpeg(value, "RGB", min_height=height, min_width=width, min_factor=factor)
    except ValueError:
        return None
    if pixels.shape != (height, width, 3):
        return None
    return pixels[_cut(crop, factor)]


def _open(value: memoryview) -> Image.Image:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(value), formats=_FORMATS)
    except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
        raise _unreadable(error) from None


def _pillow(picture: Image.Image, full: tuple[int, int], crop: Crop, factor: int) -> Pixels:
    """The crop's pixels. shape (height, width, 3)"""
    if picture.mode.startswith("I") or picture.mode == "F":
        raise ValueError(f"an image of more than 8 bits a channel (mode {picture.mode}); store it as npy")
    try:
        if factor > 1:
            picture.draft("RGB", (full[1] // factor, full[0] // factor))
            factor = factor if picture.size != (full[1], full[0]) else 1  # Pillow may have declined
        rows, columns = _cut(crop, factor)
        part = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
        part.info.pop("transparency", None)  # Pillow would warn that it goes with the palette
        return np.array(part.convert("RGB"))
    except Exception as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ValueError:
    return ValueError(f"not an image that Pillow reads: {str(error).split(' <_io')[0]}")


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Shape (height, width, 3) to (*size, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    # torch keeps the pixels together, and is faster, only if it sees by the strides that they are (channels_last).
    image = torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    resized: Pixels = functional.interpolate(image, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return resized
