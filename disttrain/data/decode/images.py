"""Decode, crop, resize and flip images.

An image becomes uint8, shape (3, height, width), or (1, height, width) for gray values and masks.
:class:`RandomResizedCrop` takes a random crop in training and a center crop in evaluation; the crop is then resized
(bilinear, antialiased) and possibly flipped. The result depends only on the bytes and the random draws of that sample,
not on the batch, the threads, or the CPU type (torch's integer resize is bit-identical with and without AVX).

Cost: a JPEG whose crop is at least twice the target size is decoded at 1/2, 1/4 or 1/8 scale (libjpeg-turbo's scaled
decoding), for a fraction of the cost. Decoding and resizing release the GIL, so threads scale. simplejpeg decodes the
same pixels as Pillow (bit-identical if both were built with the same libjpeg-turbo) in 2/3 of the time. Files that it
cannot read or reports as damaged go to Pillow, so both backends accept the same files. The backend is declared rather
than detected: otherwise two nodes might silently train on different pixels.

An image with too many pixels is rejected by its header, before memory is allocated for its pixels. A mask is never
blended: it is resized to the nearest pixel, and cropped and flipped like the sample's image with the same ``augment``.
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
# An allowlist, because some of Pillow's formats run other programs, such as Ghostscript for EPS.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
_TRIES: Final = 10
MODES: Final = ("rgb", "gray", "mask")
MAX_PIXELS: Final = 89_478_485  # above this Pillow warns of a decompression bomb, and may raise
_MASKS: Final = ("1", "L", "P", "LA", "PA")
_ORIENTATION: Final = 0x0112  # EXIF tag


class Crop(NamedTuple):
    """A crop box in pixels, and whether to flip it horizontally."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random crop in training and a center crop in evaluation, resized to the field's shape.

    Crops are drawn like torchvision's ``RandomResizedCrop`` (`torchvision.transforms.v2`; first in "Going deeper with
    convolutions", Szegedy et al., 2014): uniform in area, log-uniform in aspect ratio, until one fits. After ten
    misses, the crop is the largest center crop with an allowed ratio.

    Attributes:
        scale: smallest and largest area of the crop, as fractions of the image's area.
        ratio: smallest and largest width / height of the crop.
        flip: probability of a horizontal flip.
        evaluation_fraction: side of the evaluation crop, as a fraction of the largest center crop with the shape's
            aspect ratio. 0.875 equals resizing to 256 and cropping to 224.

    Raises:
        ConfigError: a value is out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    evaluation_fraction: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"augment.scale is {self.scale}", hint="use 0 < min <= max <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"augment.ratio is {self.ratio}", hint="use 0 < min <= max")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"augment.flip is {self.flip}", hint="use a probability from 0 to 1")
        if not 0 < self.evaluation_fraction <= 1:
            raise ConfigError(
                f"augment.evaluation_fraction is {self.evaluation_fraction}", hint="use 0 < fraction <= 1"
            )

    def draw(self, height: int, width: int, generator: np.random.Generator) -> Crop:
        """Draw a training crop.

        Args:
            height: image height.
            width: image width.
            generator: the sample's generator.
        """
        # Draw all numbers in one call, so that each has a fixed position however many tries are needed.
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
        """Return the evaluation crop.

        Args:
            height: image height.
            width: image width.
            size: the target size. (height, width)
        """
        scale = self.evaluation_fraction * min(height / size[0], width / size[1])
        h, w = (max(1, round(scale * side)) for side in size)
        return Crop((height - h) // 2, (width - w) // 2, h, w)


def check_backend(ext: str, backend: str) -> None:
    """Check that the libraries of a backend are installed.

    Raises:
        ConfigError: a library is missing.
    """
    for module, name in (("PIL", "Pillow"), ("simplejpeg", "simplejpeg"))[: 1 + (backend == "simplejpeg")]:
        if find_spec(module) is None:
            raise ConfigError(
                f"field {ext!r} holds images, but {name} is missing", hint="pip install 'disttrain[image]'"
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
        size: size to resize to, (height, width); None to keep the original size.
        augment: the crop to take first; None to use the whole image.
        backend: ``pillow`` or ``simplejpeg``.
        generator: the sample's generator; None in evaluation.
        mode: ``rgb``, ``gray`` or ``mask``.
        orient: apply the EXIF orientation.
        max_pixels: the largest width x height.

    Returns:
        A non-contiguous view: copying it into the batch separates the channels at no more cost than a plain copy.
        uint8, shape (3, height, width), or (1, height, width) for ``gray`` and ``mask``

    Raises:
        ValueError: it is not a readable image, or is larger than allowed.
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
    """How to orient the stored pixels: transpose, then flip."""

    transpose: bool = False
    up_down: bool = False
    left_right: bool = False

    @classmethod
    def of(cls, picture: Image.Image) -> _Turn:
        """Read the EXIF orientation, if there is one.

        Raises:
            ValueError: the image is damaged.
        """
        try:
            found = picture.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # Pillow may have to read the whole file for it, and meet damage there
            raise _unreadable(error) from None
        if not isinstance(found, int) or not 1 <= found <= 8:
            return cls()
        # 1 to 4: unchanged, mirrored, rotated by 180 degrees, flipped vertically; 5 to 8: the same after a transpose.
        return cls(found > 4, found % 4 in (0, 3), found % 4 in (2, 3))

    def swapped(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[::-1] if self.transpose else size

    def stored(self, crop: Crop, full: tuple[int, int]) -> Crop:
        """Map a crop of the oriented image, which has size ``full``, to the stored image."""
        top = full[0] - crop.top - crop.height if self.up_down else crop.top
        left = full[1] - crop.left - crop.width if self.left_right else crop.left
        if self.transpose:
            return Crop(left, top, crop.width, crop.height)
        return Crop(top, left, crop.height, crop.width)

    def turned(self, pixels: Pixels) -> Pixels:
        pixels = pixels.transpose(1, 0, 2) if self.transpose else pixels
        return pixels[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


def _factor(full: tuple[int, int], crop: Crop, size: tuple[int, int] | None) -> int:
    """Return the largest factor such that a JPEG decoded at 1 / factor still has a crop no smaller than ``size``.

    Scales in between, such as 3/4, are slower than full size: libjpeg-turbo has no SIMD code for them.
    """
    if size is None or max(full) < 8:  # below 8 pixels some of those scales give the same size as 1/2
        return 1
    reach = min(crop.height // size[0], crop.width // size[1])
    return next((factor for factor in (8, 4, 2) if reach >= factor), 1)


def _cut(crop: Crop, factor: int) -> tuple[slice, slice]:
    """Return the rows and columns of the crop in an image decoded at 1 / factor, to the nearest pixel."""
    top, left, bottom, right = (
        (edge + factor // 2) // factor for edge in (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width)
    )
    return slice(top, bottom), slice(left, right)


def _jpeg_size(value: memoryview, max_pixels: int) -> tuple[int, int] | None:
    """Return the height and width of a JPEG; None if Pillow must decode the file."""
    if bytes(value[:2]) != b"\xff\xd8":
        return None
    from simplejpeg import decode_jpeg_header

    try:
        height, width, space, _ = decode_jpeg_header(value)
    except ValueError:
        return None
    return (height, width) if space in ("YCbCr", "RGB", "Gray") and height * width <= max_pixels else None


def _simplejpeg(value: memoryview, full: tuple[int, int], crop: Crop, factor: int) -> Pixels | None:
    """Decode the crop, shape (height, width, 3); None if libjpeg-turbo reports a damaged file."""
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
    """Open an image, reading only its header."""
    from PIL import Image

    Image.init()  # loads the plugins on the first call
    head = bytes(value[:16])
    # Like Image.open, but without its warning and its pixel limit, which are global to the process.
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        try:
            accepted = factory is not None and (accepts is None or accepts(head))
            if factory is None or not accepted or isinstance(accepted, str):  # text says what the plugin lacks
                continue
            picture: Image.Image = factory(io.BytesIO(value), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # not this format; Image.open catches the same
            continue
        except Exception as error:  # Pillow's plugins raise many kinds on damaged bytes
            raise _unreadable(error) from None
        if picture.width * picture.height > max_pixels:
            raise ValueError(
                f"an image of {picture.width} x {picture.height} pixels, more than max_pixels ({max_pixels:,})"
            )
        return picture
    if head[4:8] == b"ftyp":
        kind = head[8:12].decode("ascii", "replace")
        what = "AVIF, which needs Pillow 11.3 or newer" if kind.startswith("avi") else f"of type {kind!r}"
        raise ValueError(f"not an image that Pillow can read: it is {what}")
    raise ValueError("not an image that Pillow can read: cannot identify image file")


def _pillow(picture: Image.Image, full: tuple[int, int], crop: Crop, factor: int, mode: str) -> Pixels:
    """Decode the crop. shape (height, width, 3), or (height, width, 1) for ``gray`` and ``mask``"""
    if picture.mode.startswith("I") or picture.mode == "F":
        raise ValueError(f"an image with more than 8 bits per channel (mode {picture.mode}); store it as npy")
    if mode == "mask" and picture.mode not in _MASKS:
        raise ValueError(f"an image of mode {picture.mode}, but a mask has one channel")
    try:
        if factor > 1 or mode == "gray":  # a JPEG stores luma separately, so draft can skip the colors
            picture.draft("RGB" if mode == "rgb" else "L", (full[1] // factor, full[0] // factor))
            factor = factor if picture.size != (full[1], full[0]) else 1  # Pillow may have declined
        rows, columns = _cut(crop, factor)
        box = (columns.start, rows.start, columns.stop, rows.stop)
        part = picture if box == (0, 0, *picture.size) else picture.crop(box)
        part.load()
        part.info.pop("transparency", None)  # else Pillow may warn about a palette's transparency
        if mode == "mask":
            band = np.array(part.getchannel(0) if part.mode in ("LA", "PA") else part).astype(np.uint8)
            return band[:, :, None]
        pixels = np.array(part.convert("RGB" if mode == "rgb" else "L"))
        return pixels if mode == "rgb" else pixels[:, :, None]
    except Exception as error:
        raise _unreadable(error) from None


def _unreadable(error: Exception) -> ValueError:
    return ValueError(f"not an image that Pillow can read: {str(error).split(' <_io')[0]}")


def _resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize (bilinear, antialiased): shape (height, width, 3) to (*size, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    # torch uses its faster channels_last kernel only if the strides say so.
    image = torch.from_numpy(np.ascontiguousarray(pixels).reshape(1, *pixels.shape)).permute(0, 3, 1, 2)
    resized: Pixels = functional.interpolate(image, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return resized


def _nearest(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize by taking, for each output pixel, the input pixel under its center."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new)) for new, old in zip(size, pixels.shape[:2], strict=True)
    )
    nearest: Pixels = pixels[rows[:, None], columns]
    return nearest
