"""Images: keyed crops, an evaluation that draws nothing, and scaled decoding that is near the full one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from torch import Tensor

from disttrain.data.decode.fields import BadValuesError, Field, RandomResizedCrop, RawValues, decode
from disttrain.data.decode.images import BACKENDS, decode_image
from disttrain.data.decode.rng import Draws
from disttrain.errors import ConfigError

Image: Any = pytest.importorskip("PIL.Image")
pytest.importorskip("simplejpeg")

quick = settings(derandomize=True, deadline=None, max_examples=100)


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth shapes with some texture, as photographs have. shape (height, width, 3)"""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for _ in range(6):
        fy, fx, phase = random.uniform((0.005, 0.005, 0), (0.06, 0.06, 6))
        pixels += np.sin(fy * y + fx * x + phase)[:, :, None] * random.uniform(5, 35, 3)
    return np.clip(128 + pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def encoded(pixels: NDArray[np.uint8], format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **{"quality": 90, **options})  # PNG has no quality and takes none
    return stream.getvalue()


def in_mode(mode: str, format: str, pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format)
    return stream.getvalue()


def images(field: Field, values: list[bytes], draws: Draws | None = None) -> Tensor:
    found = decode(field, RawValues([memoryview(value) for value in values]), draws)
    assert isinstance(found, Tensor)
    return found


def draws(*ids: int, epoch: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, np.full(len(ids), epoch), np.array(ids))


def crop_field(side: int = 32, backend: str = "pillow", augment: RandomResizedCrop | None = None) -> Field:
    return Field("jpg;png", shape=(3, side, side), augment=augment or RandomResizedCrop(), backend=backend)


def distance(a: Any, b: Any) -> float:
    """Mean difference in levels of 0 to 255."""
    return float(np.abs(np.asarray(a).astype(float) - np.asarray(b).astype(float)).mean())


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_boxes_lie_in_the_image_and_have_the_area_and_ratio(height: int, width: int, seed: int) -> None:
    augment = RandomResizedCrop(scale=(0.2, 0.7))
    top, left, h, w, _ = augment.draw(height, width, np.random.default_rng(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1
    if min(height, width) > 50 and 0.5 < height / width < 2:
        assert 0.19 < h * w / (height * width) < 0.71
        assert 0.73 < w / h < 1.36


@pytest.mark.parametrize(("height", "width", "box"), [(10, 1000, (10, 13)), (1000, 10, (13, 10)), (1, 9, (1, 1))])
def test_where_no_box_fits_it_is_the_largest_in_the_middle(height: int, width: int, box: tuple[int, int]) -> None:
    top, left, *found, _ = RandomResizedCrop().draw(height, width, np.random.default_rng(0))
    if (height, width) != (1, 9):
        assert tuple(found) == box
        assert (top, left) == ((height - box[0]) // 2, (width - box[1]) // 2)


def test_boxes_spread_over_areas_and_places_as_published() -> None:
    boxes = [RandomResizedCrop().draw(400, 500, np.random.default_rng(seed)) for seed in range(2000)]
    areas = np.array([box.height * box.width for box in boxes]) / 200_000
    # Drawn uniformly from 0.08 to 1; boxes that do not fit are drawn again, which takes the largest more often.
    assert 0.40 < areas.mean() < 0.54
    assert areas.min() < 0.1
    assert areas.max() > 0.9
    ratios = np.log([box.width / box.height for box in boxes])
    assert abs(ratios.mean()) < 0.05
    assert 0.45 < np.mean([box.flip for box in boxes]) < 0.55
    room = [(box.left + 0.5) / (500 - box.width + 1) for box in boxes]
    assert 0.45 < np.mean(room) < 0.55


def test_evaluation_takes_the_middle_in_the_shape_s_own_ratio() -> None:
    assert RandomResizedCrop().middle(256, 256, (224, 224)) == (16, 16, 224, 224, False)
    assert RandomResizedCrop().middle(512, 1024, (224, 224)) == (32, 288, 448, 448, False)
    assert RandomResizedCrop(evaluation_fraction=1.0).middle(100, 300, (50, 100)) == (0, 50, 100, 200, False)
    assert RandomResizedCrop().middle(1, 1, (224, 224)) == (0, 0, 1, 1, False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_looks_the_same_whatever_the_batch_and_the_thread(backend: str) -> None:
    values = [encoded(photo(90, 70 + 9 * i, i)) for i in range(6)]
    field = crop_field(backend=backend)
    together = images(field, values, draws(*range(6)))
    with ThreadPoolExecutor(3) as pool:
        alone = list(pool.map(lambda i: images(field, [values[i]], draws(i))[0], range(6)))
    assert torch.equal(together, torch.stack(alone))
    backwards = images(field, values[::-1], draws(*range(5, -1, -1)))
    assert torch.equal(together, backwards.flip(0))


def test_a_sample_looks_different_in_another_epoch_and_to_another_sample() -> None:
    value = encoded(photo(100, 100))
    first, again, other = images(crop_field(), [value] * 3, draws(3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for changed in (draws(3, epoch=1), draws(3, seed=1)):
        assert not torch.equal(first, images(crop_field(), [value], changed)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_draws_nothing_and_is_the_middle(backend: str) -> None:
    pixels = photo(80, 120)
    found = images(crop_field(70, backend), [encoded(pixels, "PNG")] * 2)
    assert torch.equal(found[0], found[1])
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), pixels[5:75, 25:95])


def test_draws_do_not_enter_without_augment() -> None:
    value = encoded(photo(50, 60))
    field = Field("jpg", shape=(3, 32, 32))
    assert torch.equal(images(field, [value], draws(1)), images(field, [value]))


@pytest.mark.parametrize("size", [(40, 60), (20, 30)])
def test_flips_mirror_the_image(size: tuple[int, int]) -> None:
    value = encoded(photo(40, 60), "PNG")
    never, always = (
        Field("png", shape=(3, *size), augment=RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=flip))
        for flip in (0.0, 1.0)
    )
    straight, mirrored = (images(field, [value], draws(0))[0] for field in (never, always))
    assert torch.equal(mirrored, straight.flip(-1))
    assert not torch.equal(mirrored, straight)
    assert torch.equal(images(always, [value])[0], images(never, [value])[0]), "evaluation flips"
    some = images(Field("png", shape=(3, 40, 60), augment=RandomResizedCrop(flip=0.5)), [value] * 40, draws(*range(40)))
    assert some.shape == (40, 3, 40, 60)


@pytest.mark.parametrize("size", [(37, 51), (224, 160), (10, 200)])
def test_resizing_is_near_pillow_s(size: tuple[int, int]) -> None:
    pixels = photo(97, 131)
    truth = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
    found = images(Field("png", shape=(3, *size)), [encoded(pixels, "PNG")])[0].permute(1, 2, 0)
    assert np.abs(found.numpy().astype(int) - np.asarray(truth).astype(int)).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_decoding_is_near_the_full_one(backend: str, factor: int) -> None:
    pixels = photo(factor * 101 + 3, factor * 133 + 1)
    value = encoded(pixels, quality=95)
    assert images(Field("jpg", backend=backend), [value]).shape[2:] == pixels.shape[:2]
    truth = Image.open(io.BytesIO(value)).resize((120, 100), Image.Resampling.BILINEAR)
    found = images(Field("jpg", shape=(3, 100, 120), backend=backend), [value])[0].permute(1, 2, 0)
    assert distance(found, truth) < 2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_crops_are_near_full_ones(backend: str) -> None:
    augment, side = RandomResizedCrop(scale=(0.5, 0.9), flip=0.0), 64
    pixels = photo(403, 509)
    value = encoded(pixels, quality=95)
    for number in range(5):
        top, left, h, w, _ = augment.draw(403, 509, draws(number).generator(0, "decode"))
        full = Image.open(io.BytesIO(value))
        truth = full.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        found = images(crop_field(side, backend, augment), [value], draws(number))[0].permute(1, 2, 0)
        assert distance(found, truth) < 3


@quick
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    side=st.integers(1, 40),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    number=st.integers(0, 999),
)
def test_both_backends_give_the_same_pixels(
    height: int, width: int, side: int, subsampling: int, progressive: bool, number: int
) -> None:
    value = encoded(photo(height, width), subsampling=subsampling, progressive=progressive)
    for random in (None, draws(number)):
        one, other = (images(crop_field(side, backend), [value], random) for backend in BACKENDS)
        # Pillow and simplejpeg each bring a libjpeg-turbo: the same in the versions that the tests are run with.
        assert distance(one, other) < 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 3), (7, 7), (8, 9)])
def test_tiny_images(backend: str, size: tuple[int, int]) -> None:
    for random in (None, draws(1)):
        found = images(crop_field(16, backend), [encoded(np.full((*size, 3), 77, np.uint8))], random)
        assert found.shape == (1, 3, 16, 16)
        assert (found.int() - 77).abs().max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_images_and_extreme_ratios(backend: str) -> None:
    flat = np.full((2000, 2600, 3), 200, np.uint8)
    values = [encoded(flat), encoded(flat[:, :3]), encoded(flat[:2])]
    for random in (None, draws(1, 2, 3)):
        found = images(crop_field(8, backend), values, random)
        assert (found.int() - 200).abs().max() <= 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "PPM")),
        *(("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("RGBA", "WEBP")),
    ],
)
def test_all_kinds_become_rgb(mode: str, format: str, backend: str) -> None:
    value = in_mode(mode, format, photo(30, 40))
    truth = np.asarray(Image.open(io.BytesIO(value)).convert("RGB"))
    found = images(Field("img", backend=backend), [value])[0]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), truth)
    assert images(crop_field(16, backend), [value], draws(5)).shape == (1, 3, 16, 16)


def test_a_palette_with_transparent_colours_does_not_warn() -> None:
    stream = io.BytesIO()
    Image.fromarray(photo(9, 9)).quantize(8).save(stream, "PNG", transparency=bytes([0, 128, *[255] * 6]))
    assert images(Field("png"), [stream.getvalue()]).shape == (1, 3, 9, 9)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_more_than_eight_bits_are_refused_rather_than_clipped(dtype: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype)).save(stream, "TIFF")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_image(memoryview(stream.getvalue()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_bad_images_of_a_batch_are_listed(backend: str) -> None:
    good = encoded(photo(40, 40))
    bad = [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0 no image",
        good[: len(good) // 2],
        good[:100],
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ]
    values = [good, *bad, good]
    for field in (crop_field(backend=backend), Field("jpg", backend=backend)):
        with pytest.raises(BadValuesError) as caught:
            images(field, values, draws(*range(8)))
        assert list(caught.value.faults) == [1, 2, 3, 4, 5, 6]
        assert all("image" in what for what in caught.value.faults.values()), caught.value.faults
    assert "truncated" in caught.value.faults[4].lower()


def test_what_libjpeg_only_warns_of_is_the_same_through_both() -> None:
    damaged = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    damaged[len(damaged) // 2] ^= 0x55
    damaged[len(damaged) // 2 + 7] ^= 0xFF
    one, other = (images(crop_field(16, backend), [bytes(damaged)], draws(3)) for backend in BACKENDS)
    assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_damaged_jpegs_are_bad_through_both_or_the_same(mode: str) -> None:
    good, random = in_mode(mode, "JPEG", photo(24, 33)), np.random.default_rng(0)
    outcomes = {"bad": 0, "read": 0}
    for number in range(200):
        value = bytearray(good)
        for at in random.integers(0, 200 if number % 2 else len(good), 3):
            value[at] = int(random.choice([0, 255, int(random.integers(256))]))
        found = []
        for backend in BACKENDS:
            try:
                found.append(decode_image(memoryview(bytes(value)), size=(8, 8), backend=backend))
            except ValueError:
                found.append(np.zeros(0, np.uint8))
        assert found[0].shape == found[1].shape
        assert not found[0].size or distance(*found) < 0.5
        outcomes["read" if found[0].size else "bad"] += 1
    assert min(outcomes.values()) > 20, f"the test shows little: {outcomes}"


def test_a_batch_is_contiguous_and_may_be_written_to() -> None:
    values = [encoded(photo(30, 50)), encoded(photo(50, 30), "PNG")]
    for field in (crop_field(), crop_field(backend="simplejpeg"), Field("jpg", shape=(3, 30, 50))):
        found = images(field, values, draws(0, 1))
        assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
        found.add_(1)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.4)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"flip": float("nan")}, "flip"),
        ({"evaluation_fraction": 0.0}, "evaluation_fraction"),
    ],
)
def test_crops_that_cannot_be_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment.{word} is .*\n.*use"):
        RandomResizedCrop(**settings)


@pytest.mark.parametrize(("backend", "missing"), [("pillow", "PIL"), ("simplejpeg", "simplejpeg")])
def test_a_missing_library_is_named(backend: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.data.decode.images.find_spec", lambda asked: None if asked == missing else object())
    with pytest.raises(ConfigError, match=r"missing\n.*pip install 'disttrain\[image\]'"):
        images(Field("jpg", backend=backend), [encoded(photo(9, 9))])


@pytest.mark.slow
def test_the_kind_of_cpu_does_not_change_the_pixels() -> None:
    program = "from tests.data.decode.test_images import some_pixels; print(some_pixels().tobytes().hex())"
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == some_pixels().tobytes().hex(), run.stderr


def some_pixels() -> NDArray[np.uint8]:
    values = [encoded(photo(180, 150 + 40 * i, i), "PNG") for i in range(4)]
    return images(crop_field(40), values, draws(*range(4))).numpy()


def test_crops_never_change() -> None:
    """Frozen values: who resumes a run with another version of disttrain must see the same crops."""
    drawn = [RandomResizedCrop().draw(375, 500, draws(n, epoch=2, seed=5).generator(0, "decode")) for n in (11, 12, 13)]
    assert [tuple(crop) for crop in drawn] == FROZEN


FROZEN = [(39, 10, 335, 310, False), (60, 145, 259, 264, False), (0, 69, 365, 364, True)]


def oriented(pixels: NDArray[np.uint8], orientation: int, format: str = "PNG") -> bytes:
    """An image whose EXIF data says how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, format, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_says(orientation: int) -> None:
    from PIL import ImageOps

    pixels = photo(40, 64)
    value = oriented(pixels, orientation)
    upright = encoded(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(value)))), "PNG")
    for shape, augment in (((), None), ((3, 24, 32), None), ((3, 24, 32), RandomResizedCrop())):
        how: dict[str, Any] = {"ext": "png", "shape": shape, "augment": augment}
        for drawn in (None, draws(3), draws(4)):
            ours = images(Field(**how, orient=True), [value], drawn)
            assert torch.equal(ours, images(Field(**how), [upright], drawn)), (shape, augment, drawn)
    left = images(Field("png"), [value])
    assert torch.equal(left[0], torch.from_numpy(pixels.transpose(2, 0, 1).copy())), "turned without being told to"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_jpeg_is_turned_as_well_where_it_is_decoded_at_a_smaller_scale(backend: str, orientation: int) -> None:
    value = oriented(photo(400, 640), orientation, "JPEG")
    whole = images(Field("jpg", orient=True, backend=backend), [value])[0].permute(1, 2, 0).numpy()
    assert whole.shape[:2] == ((640, 400) if orientation > 4 else (400, 640))
    # No crop, so that only the scale of the decoding is between them.
    small = images(Field("jpg", shape=(3, 60, 60), orient=True, backend=backend), [value])
    assert distance(small, images(Field("png", shape=(3, 60, 60)), [encoded(whole, "PNG")])) < 2


def test_exif_data_that_makes_no_sense_is_ignored() -> None:
    pixels = photo(10, 12)
    for orientation in (0, 9, 65535):
        assert images(Field("png", orient=True), [oriented(pixels, orientation)]).shape == (1, 3, 10, 12)
    broken = encoded(pixels, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):  # Pillow's
        assert images(Field("jpg", orient=True), [broken]).shape == (1, 3, 10, 12)


def test_a_mask_keeps_the_numbers_of_its_palette_and_is_never_blended() -> None:
    classes = np.zeros((30, 50), np.uint8)
    classes[10:, 20:] = 3
    classes[20:, 40:] = 255
    stream = io.BytesIO()
    as_palette = Image.new("P", (50, 30))
    as_palette.putpalette([(i * 7) % 256 for i in range(768)])
    as_palette.putdata(classes.ravel().tolist())
    as_palette.save(stream, "PNG")
    for value in (stream.getvalue(), encoded(classes, "PNG")):
        assert torch.equal(images(Field("png", mode="mask"), [value])[0, 0], torch.from_numpy(classes))
        small = images(Field("png", mode="mask", shape=(1, 11, 17)), [value])
        assert small.shape == (1, 1, 11, 17)
        assert set(small.unique().tolist()) == {0, 3, 255}
    two = io.BytesIO()
    Image.fromarray(classes > 0).save(two, "PNG")
    assert images(Field("png", mode="mask"), [two.getvalue()]).unique().tolist() == [0, 1]
    with pytest.raises(BadValuesError, match="an image of mode RGB, but a mask has one channel"):
        images(Field("png", mode="mask"), [encoded(photo(8, 8), "PNG")])


@pytest.mark.parametrize("drawn", [None, 0, 1, 2, 3])
def test_a_mask_is_cut_and_flipped_as_its_image(drawn: int | None) -> None:
    y, x = np.mgrid[0:64, 0:64]
    numbers = (x // 16 + 4 * (y // 16)).astype(np.uint8)
    picture = np.repeat((numbers * 16)[:, :, None], 3, axis=2)
    which = None if drawn is None else draws(drawn)
    augment = RandomResizedCrop(scale=(0.3, 1.0))
    mask = images(Field("png", mode="mask", shape=(1, 32, 32), augment=augment), [encoded(numbers, "PNG")], which)
    image = images(Field("png", shape=(3, 32, 32), augment=augment), [encoded(picture, "PNG")], which)
    # Only on the edges between areas does the image hold a blend.
    assert float((image[:, :1] == mask * 16).float().mean()) > 0.6


def test_gray_values_have_one_channel() -> None:
    pixels = photo(20, 30)
    expected = np.array(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(images(Field("png", mode="gray"), [encoded(pixels, "PNG")])[0, 0].numpy(), expected)
    jpeg = [encoded(photo(160, 320))]
    small = images(Field("jpg", mode="gray", shape=(1, 20, 20)), jpeg)
    assert small.shape == (1, 1, 20, 20)
    assert distance(small, images(Field("jpg", shape=(3, 20, 20)), jpeg).float().mean(dim=1, keepdim=True)) < 12


def bomb(side: int) -> bytes:
    """A PNG whose header says how large it is; of its pixels there are a few bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_more_pixels_than_allowed_is_refused_by_its_header(backend: str) -> None:
    for side, limit in ((9_500, 89_478_485), (13_000, 89_478_485), (2**31 - 1, 89_478_485), (40_000, 10**9)):
        field = Field("png", shape=(3, 8, 8), backend=backend, max_pixels=limit)
        with pytest.raises(BadValuesError) as caught:
            images(field, [bomb(side)])
        assert caught.value.faults == {0: f"an image of {side} x {side} pixels, more than max_pixels ({limit:,})"}
    jpeg = encoded(photo(20, 30))
    assert images(Field("jpg", backend=backend, max_pixels=600), [jpeg]).shape == (1, 3, 20, 30)
    with pytest.raises(BadValuesError, match=r"30 x 20 pixels, more than max_pixels \(599\)"):
        images(Field("jpg", backend=backend, max_pixels=599), [jpeg])
    with pytest.raises(BadValuesError, match=r"more than 89,478,485|exceeds limit of 89478485 pixels"):
        images(Field("png", decoder="webdataset:rgb8"), [bomb(9_460)])


def test_every_format_that_is_listed_is_read() -> None:
    pixels = photo(24, 40)
    for format in ("PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF"):
        found = images(Field("x.img"), [encoded(pixels, format)])
        assert found.shape == (1, 3, 24, 40), format
        assert distance(found[0].permute(1, 2, 0), pixels) < 20, format
    assert Field("a.avif").kind == Field("a.jp2").kind == "image"


def test_an_image_that_cannot_be_read_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    avif = encoded(photo(24, 40), "AVIF")
    heic = b"\0\0\0\x18ftypheic" + bytes(30)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(BadValuesError, match=r"it is AVIF, which needs Pillow 11\.3 or newer"):
        images(Field("avif"), [avif])
    with pytest.raises(BadValuesError, match="it is of type 'heic'"):
        images(Field("img"), [heic])
