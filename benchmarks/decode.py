"""JPEGs to training crops: how fast disttrain decodes them, against Pillow's usual way and webdataset's decoder.

Claim: a random-resized-crop to 224 x 224 comes out of a photograph about twice as fast through disttrain with
``backend: simplejpeg`` as through Pillow's usual way (decode, crop, resize, flip, to a tensor, stack), and about 1.4
times as fast with ``backend: pillow``; more where the photograph is large enough to be decoded at half its size.

Method: JPEGs of several sizes and qualities, made from scikit-learn's two sample photographs, lie in memory. All
contenders cut out the same boxes, with the same flips, by the same random numbers (so all pay for drawing them),
and are checked to give nearly the same pixels. Pillow's usual way is that of torchvision's transforms on PIL images;
webdataset's decoder is its ``pilrgb``, followed by the same steps. A repeat runs every contender once; the order
rotates from repeat to repeat. With 2 threads each decodes half of the batches, which is how disttrain's loader does
it; peers commonly take processes instead, whose rate a core is that of 1 thread, before batches go between them.

How to read it: ratios within one run mean more than rates, which follow the machine; many short repeats spread a
disturbance over all. The rates of 2 threads need two cores that do nothing else. Where a file is large for its pixels
(high quality), more of the time goes into Huffman decoding, in which all are alike, and the contenders come closer.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from webdataset.autodecode import imagehandler

from disttrain.data.decode.fields import Field, RandomResizedCrop, RawValues, decode
from disttrain.data.decode.rng import Draws

SIDE: Final = 224
BATCH: Final = 16
AUGMENT: Final = RandomResizedCrop()
THREADS: Final = (1, 2)
KINDS: Final = ((400, 350, 75), (400, 350, 90), (400, 350, 95), (1024, 768, 90))  # width, height, quality
PILLOW, WEBDATASET = "Pillow, as usual", "webdataset's pilrgb"
COLORS: Final = {"disttrain, simplejpeg": "#1f6fb4", "disttrain, pillow": "#6fa8d6", WEBDATASET: "#d9822b"}

Batches = list[tuple[list[bytes], Draws]]
Decoder = Callable[[list[bytes], Draws], Tensor]
Results = dict[tuple[str, int], list[float]]  # samples/s by contender and threads


@dataclass(frozen=True)
class Kind:
    """The photographs to decode."""

    width: int
    height: int
    quality: int
    batches: Batches

    @property
    def name(self) -> str:
        size = sum(len(value) for values, _ in self.batches for value in values) / BATCH / len(self.batches)
        return f"{self.width} x {self.height}, quality {self.quality} ({size / 1000:.0f} kB)"


def make_kind(width: int, height: int, quality: int, num_samples: int) -> Kind:
    """Windows of two photographs, brought to one size."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random, values = np.random.default_rng(0), []
    for number in range(num_samples):
        photo = photos[number % len(photos)]
        left, top = (int(random.integers(0, side // 5)) for side in photo.size)
        box = (left, top, left + photo.width * 4 // 5, top + photo.height * 4 // 5)
        stream = io.BytesIO()
        resized = photo.resize((width, height), Image.Resampling.LANCZOS, box=box)
        resized.save(stream, "JPEG", quality=quality)
        values.append(stream.getvalue())
    ids = [np.arange(start, start + BATCH) for start in range(0, num_samples, BATCH)]
    draws = [Draws(0, np.zeros(BATCH, np.int64), here) for here in ids]
    batches = [([values[i] for i in here], drawn) for here, drawn in zip(ids, draws, strict=True)]
    return Kind(width, height, quality, batches)


def disttrain_decoder(backend: str) -> Decoder:
    field = Field("jpg", shape=(3, SIDE, SIDE), augment=AUGMENT, backend=backend)
    return lambda values, draws: torch.as_tensor(decode(field, RawValues([memoryview(v) for v in values]), draws))


def usual_decoder(read: Callable[[bytes], Any]) -> Decoder:
    """What torchvision's transforms do with a PIL image, step by step, and a collate function that stacks."""

    def one(value: bytes, generator: np.random.Generator) -> Tensor:
        image = read(value)
        top, left, height, width, flip = AUGMENT.draw(image.height, image.width, generator)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def batch(values: list[bytes], draws: Draws) -> Tensor:
        return torch.stack([one(value, draws.generator(place, "decode")) for place, value in enumerate(values)])

    return batch


DECODERS: Final[dict[str, Decoder]] = {
    "disttrain, simplejpeg": disttrain_decoder("simplejpeg"),
    "disttrain, pillow": disttrain_decoder("pillow"),
    PILLOW: usual_decoder(lambda value: Image.open(io.BytesIO(value)).convert("RGB")),
    WEBDATASET: usual_decoder(partial(imagehandler("pilrgb"), "jpg")),
}


def check(kind: Kind) -> None:
    """All contenders must give nearly the same pixels: scaled decoding blurs a little otherwise than resizing."""
    values, draws = kind.batches[0]
    truth = DECODERS[PILLOW](values, draws).float()
    for name, decoder in DECODERS.items():
        difference = float((decoder(values, draws).float() - truth).abs().mean())
        if difference > 3:
            raise RuntimeError(f"{name}: {kind.name}: {difference:.1f} levels from Pillow's pixels")


def rate(decoder: Decoder, batches: Batches, threads: int, pool: ThreadPoolExecutor) -> float:
    """Samples a second."""

    def work(part: Batches) -> int:
        return sum(len(decoder(values, draws)) for values, draws in part)

    started = time.perf_counter()
    parts = [batches[thread::threads] for thread in range(threads)]
    done = sum(pool.map(work, parts)) if threads > 1 else work(batches)
    return done / (time.perf_counter() - started)


def measure(kinds: Sequence[Kind], repeats: int) -> list[Results]:
    every = [(name, threads) for name in DECODERS for threads in THREADS]
    found: list[Results] = [{contender: [] for contender in every} for _ in kinds]
    with ThreadPoolExecutor(max(THREADS)) as pool:
        for repeat in range(repeats + 1):
            for kind, results in zip(kinds, found, strict=True):
                at = repeat % len(every)
                for name, threads in every[at:] + every[:at]:
                    value = rate(DECODERS[name], kind.batches, threads, pool)
                    if repeat:  # once before it counts
                        results[name, threads].append(value)
            print(f"repeat {repeat} of {repeats}", flush=True)
    return found


def ratio(results: Results, name: str, threads: int) -> float:
    """A contender's rate as a multiple of that of Pillow's usual way."""
    return median(results[name, threads]) / median(results[PILLOW, threads])


def machine() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    names = ("disttrain", "torch", "pillow", "simplejpeg", "webdataset", "numpy")
    cpu = f"{model[1] if model else 'unknown CPU'}, {os.cpu_count()} cores, {platform.system()}"
    return f"{cpu}; Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}"


def page(kinds: Sequence[Kind], found: Sequence[Results], command: str) -> str:
    repeats = len(found[0][PILLOW, 1])
    samples = BATCH * len(kinds[0].batches)
    lines = [
        "# Decoding JPEGs to training crops\n",
        f"{samples} photographs of each kind in memory, random-resized-crop to {SIDE} x {SIDE}, batches of {BATCH};"
        f" {repeats} alternating repeats. What is measured, and how to read it, stands in"
        " [`benchmarks/decode.py`](../decode.py).\n\n![Rates](decode.png)\n",
        "| images | samples/s | threads | median | min | max | to Pillow |\n|-|-|-:|-:|-:|-:|-:|",
    ]
    for kind, results in zip(kinds, found, strict=True):
        for (name, threads), values in results.items():
            numbers = " | ".join(f"{value:,.0f}" for value in (median(values), min(values), max(values)))
            lines.append(f"| {kind.name} | {name} | {threads} | {numbers} | {ratio(results, name, threads):.2f} |")
    return "\n".join([*lines, f"\nMachine: {machine()}.\n", f"Command: `{command}`\n"])


def chart(kinds: Sequence[Kind], found: Sequence[Results]) -> Figure:
    """A panel a kind; bars are medians, lines the whole range."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, (len(kinds) + 1) // 2, squeeze=False).flat
    for axes, kind, results in zip(panels, kinds, found, strict=False):
        for place, ((name, threads), values) in enumerate(results.items()):
            axes.barh(place, median(values), color=COLORS.get(name, "#b5b5b5"), height=0.7)
            axes.hlines(place, min(values), max(values), color="black", linewidth=1)
            text = f"{median(values):,.0f} = {ratio(results, name, threads):.2f} x Pillow"
            axes.annotate(text, (max(values), place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(results)), [f"{name}, {n} thread{'s' * (n > 1)}" for name, n in results])
        axes.invert_yaxis()
        axes.set_title(kind.name, fontsize="medium")
        axes.set_xlabel("samples/s (more is better)")
        axes.margins(x=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="photographs of each kind")
    parser.add_argument("--repeats", type=int, default=45, help="times that everything is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    options = parser.parse_args()
    if options.samples % (BATCH * max(THREADS)):
        parser.error(f"--samples must be a multiple of {BATCH * max(THREADS)}")
    torch.set_num_threads(1)
    kinds = [make_kind(*kind, options.samples) for kind in KINDS]
    for kind in kinds:
        check(kind)
    found = measure(kinds, options.repeats)
    command = f"python benchmarks/decode.py --samples {options.samples} --repeats {options.repeats}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decode.md").write_text(page(kinds, found, command))
    chart(kinds, found).savefig(options.out / "decode.png", dpi=150)


if __name__ == "__main__":
    main()
