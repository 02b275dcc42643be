"""Images: decode, crop, resize and flip, each by its own bytes and its own random numbers.

An image becomes uint8, shape (3, height, width), or (1, height, width) as gray values or as a mask. In training
:class:`RandomResizedCrop` cuts a random box out of it, in evaluation the middle; the box is then resized (bilinear,
antialiased) and maybe flipped. What comes out depends on the bytes and the draws of that one sample: not on the batch,
the threads, or the kind of CPU (torch's integer resize gives the same bits with and without AVX).

Cost: a JPEG of which the box is at least twice as large as what it is resized to is decoded at 1/2, 1/4 or 1/8
(libjpeg-turbo's scaled decoding), for a fraction of the price. Decoding and resizing release the GIL, so threads
scale. simplejpeg decodes the same pixels as Pillow (bit by bit, where both were built with the same libjpeg-turbo)
in 2/3 of the time. What it cannot read, or calls damaged, goes to Pillow, so both take the same files. Which one is
used is declared, not guessed from what is installed: else two nodes might train on different pixels in silence.

An image of more pixels than allowed is refused by its header, before its pixels get any memory. A mask is never
blended: it is resized to the nearest pixel, and cut out and flipped as the image beside it with the same ``augment``.
"""

from __future__ import annotations

import io
import math
import struct
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
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
_TRIES: Final = 10
MODES: Final = ("rgb", "gray", "mask")
MAX_PIXELS: Final = 89_478_485  # above these Pillow warns of decompression bombs, and may refuse
_MASKS: Final = ("1", "L", "P", "LA", "PA")
_ORIENTATION: Final = 0x0112  # the tag of EXIF


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
    mode: str = "rgb",
    orient: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Decode one image.

    Args:
        value: the file's bytes.
        size: what to resize to, (height, width); None to leave it as large as it is.
        augment: what to cut out before; None to take the whole image.
        backend: ``pillow`` or ``simplejpeg``.
        generator: the sample's random numbers; None in evaluation.
        mode: ``rgb``, ``gray`` or ``mask``.
        orient: turn it as its EXIF data says.
        max_pixels: the largest width x height.

    Returns:
        A view, not contiguous: to copy it where it belongs puts the channels apart, which costs no more than any
        copy. uint8, shape (3, height, width), or (1, height, width) for ``gray`` and ``mask``

    Raises:
        ValueError: it is no image that can be read, or larger than allowed.
    """
    stored = _jpeg_size(value, max_pixels) if backend == "simplejpeg" else None
    picture = _open(value, max_pixels) if stored is None or orient else None
    turn = _Turn.of(picture) if orient and picture is not None else _Turn()
    if stored is None:
        assert picture is not None
        stored = picture.height, picture.width
    else:
        picture = None
    full = stored[::-1] if turn.transpose else stored
    crop = Crop(0, 0, *full)
    if size is not None and augment is not None:
        crop = augment.middle(*full, size) if generator is None else augment.draw(*full, generator)
    box = turn.stored(crop, full)
    can_scale = mode != "mask" and (picture is None or picture.format in ("JPEG", "MPO"))
    factor = _factor(stored, box, size and turn.swapped(size)) if can_scale else 1
    pixels = _simplejpeg(value, stored, box, factor) if picture is None else None
    if pixels is None:
        pixels = _pillow(_open(value, max_pixels) if picture is None else picture, stored, box, factor, mode)
    pixels = turn.turned(pixels)
    if size is not None:
        pixels = _nearest(pixels, size) if mode == "mask" else _resized(pixels, size)
    return (pixels[:, ::-1] if crop.flip else pixels).transpose(2, 0, 1)


class _Turn(NamedTuple):
    """How an image lies in its file: rows and columns exchanged, then mirrored."""

    transpose: bool = False
    up_down: bool = False
    left_right: bool = False

    @classmethod
    def of(cls, picture: Image.Image) -> _Turn:
        """What the EXIF data says, if there is any.

        Raises:
            ValueError: the image is damaged.
        """
        try:
            found = picture.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # Pillow may have to read the whole file to find it
            raise _unreadable(error) from None
        if not isinstance(found, int) or not 1 <= found <= 8:
            return cls()
        # 1 to 8: as it is, mirrored, turned by 180 degrees, upside down; then the same once rows are columns.
        return cls(found > 4, found % 4 in (0, 3), found % 4 in (2, 3))

    def swapped(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[::-1] if self.transpose else size

    def stored(self, crop: Crop, full: tuple[int, int]) -> Crop:
        """Where a box of the turned image, which is as large as ``full``, lies in the file."""
        top = full[0] - crop.top - crop.height if self.up_down else crop.top
        left = full[1] - crop.left - crop.width if self.left_right else crop.left
        if self.transpose:
            return Crop(left, top, crop.width, crop.height)
        return Crop(top, left, crop.height, crop.width)

    def turned(self, pixels: Pixels) -> Pixels:
        pixels = pixels.transpose(1, 0, 2) if self.transpose else pixels
        return pixels[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


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


def _jpeg_size(value: memoryview, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of a JPEG; None for what is left to Pillow."""
    if bytes(value[:2]) != b"\xff\xd8":
        return None
    from simplejpeg import decode_jpeg_header

    try:
        height, width, space, _ = decode_jpeg_header(value)
    except ValueError:
        return None
    return (height, width) if space in ("YCbCr", "RGB", "Gray") and height * width <= max_pixels else None


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


def _open(value: memoryview, max_pixels: int) -> Image.Image:
    """An image of which the header has been read."""
    from PIL import Image

    Image.init()  # loads the plugins, the first time
    head = bytes(value[:16])
    # What Image.open does, without the warning and the limit of its own, which the whole process shares.
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        try:
            accepted = factory is not None and (accepts is None or accepts(head))
            if factory is None or not accepted or isinstance(accepted, str):  # text says what the plugin lacks
                continue
            picture: Image.Image = factory(io.BytesIO(value), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # another format after all
            continue
        except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
            raise _unreadable(error) from None
        if picture.width * picture.height > max_pixels:
            raise ValueError(
                f"an image of {picture.width} x {picture.height} pixels, more than max_pixels, {max_pixels:,}"
            )
        return picture
    if head[4:8] == b"ftyp":
        kind = head[8:12].decode("ascii", "replace")
        what = "AVIF, which needs Pillow 11.3 or newer" if kind.startswith("avi") else f"of the kind {kind!r}"
        raise ValueError(f"not an image that Pillow reads: it is {what}")
    raise ValueError("not an image that Pillow reads: cannot identify image file")


def _pillow(picture: Image.Image, full: tuple[int, int], crop: Crop, factor: int, mode: str) -> Pixels:
    """The crop's pixels. shape (height, width, 3), or (height, width, 1) for ``gray`` and ``mask``"""
    if picture.mode.startswith("I") or picture.mode == "F":
        raise ValueError(f"an image of more than 8 bits a channel (mode {picture.mode}); store it as npy")
    if mode == "mask" and picture.mode not in _MASKS:
        raise ValueError(f"an image of mode {picture.mode}, but a mask has one channel")
    try:
        if factor > 1 or mode == "gray":  # a JPEG has its gray values beside its colors
            picture.draft("RGB" if mode == "rgb" else "L", (full[1] // factor, full[0] // factor))
            factor = factor if picture.size != (full[1], full[0]) else 1  # Pillow may have declined
        rows, columns = _cut(crop, factor)
        box = (columns.start, rows.start, columns.stop, rows.stop)
        part = picture if box == (0, 0, *picture.size) else picture.crop(box)
        part.load()
        part.info.pop("transparency", None)  # Pillow would warn that it goes with the palette
        if mode == "mask":
            band = np.array(part.getchannel(0) if part.mode in ("LA", "PA") else part).astype(np.uint8)
            return band[:, :, None]
        pixels = np.array(part.convert("RGB" if mode == "rgb" else "L"))
        return pixels if mode == "rgb" else pixels[:, :, None]
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


def _nearest(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The same by taking the nearest pixel: of each pixel of the result the one under its middle."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    nearest: Pixels = pixels[rows[:, None], columns]
    return nearest
