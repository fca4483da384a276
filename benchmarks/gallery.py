"""The gallery of edits: one model that was trained to draw, and six things that come for free.

    python benchmarks/gallery.py

Writes docs/assets/gallery.png and benchmarks/results/gallery.json, in a few seconds. The model is
notebooks/weights/tinted, whose README says how it was made; the digits that are edited are held
out: it has never seen them.
"""

import json
from datetime import date
from pathlib import Path

import torch
from matplotlib.figure import Figure

import cmbook as cm
import cmbook.runs
from cmbook import plotting
from cmbook.editing import denoise

ROOT = Path(__file__).parents[1]
N = 8


def main() -> None:
    made = cm.load(ROOT / "notebooks/weights/tinted")
    model, noise_range = made.model, made.recipe.noise_range
    real = cm.Digits(tinted=True).build().held_out()
    assert real.label is not None

    def digit(kind: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`N` copies of a held-out digit of this class, and as many labels."""
        i = (real.label == kind).nonzero()[place, 0]
        return real.x[i].expand(N, 3, 8, 8), torch.full((N,), kind)

    def draws(row: int) -> cm.PerImage:
        return cm.PerImage(range(100 * row, 100 * row + N))

    rows: dict[str, torch.Tensor] = {}

    def edited(
        name: str, kind: int, place: int, measure: cm.Inpainting | cm.Grayscale | cm.Downsampling
    ) -> None:
        x, label = digit(kind, place)
        y = measure(x)
        made_of_it = cm.edit(
            model, y, measure, label, noise_range=noise_range, generator=draws(len(rows))
        )
        seen = measure.pinv(y[:1])
        seen = y[:1].expand(1, 3, 8, 8) if isinstance(measure, cm.Grayscale) else seen
        rows[name] = torch.cat([x[:1], seen, made_of_it])

    lower = torch.arange(8)[:, None].expand(8, 8) < 4
    edited("inpainting", 3, 40, cm.Inpainting(lower))
    edited("colorization", 7, 3, cm.Grayscale())
    edited("super-resolution, 2x", 5, 130, cm.Downsampling(2))
    edited("super-resolution, 4x", 2, 20, cm.Downsampling(4))

    x, label = digit(8, 60)
    strokes = torch.where(x.amax(1, keepdim=True) > -0.2, torch.ones_like(x), -torch.ones_like(x))
    strokes[:, 2] = -1.0  # a crude yellow painting of it
    sigmas = torch.tensor([1.5, 0.6])
    painted = cm.stroke(
        model, strokes, label, noise_range=noise_range, generator=draws(5), sigmas=sigmas
    )
    rows["strokes"] = torch.cat([x[:1], strokes[:1], painted])

    x, label = digit(6, 100)
    amount = torch.full((N,), 0.5)
    noisy = cm.add_noise(x, cm.normal(x, draws(6)), amount)
    rows["denoising, σ = 0.5"] = torch.cat([x[:1], noisy[:1], denoise(model, noisy, amount, label)])

    ends = cm.prior(torch.empty(2, 1, 3, 8, 8).flatten(0, 1), noise_range, cm.PerImage([31, 44]))
    nine = torch.tensor([9])
    between = cm.interpolate(model, ends[:1], ends[1:], N + 2, noise_range, nine)[:, 0]
    rows["interpolation"] = between

    with plotting.book_style():
        figure = Figure(figsize=(8, 5.6))
        axes = figure.subplots(len(rows), 1)
        for ax, (name, images) in zip(axes, rows.items(), strict=True):
            plotting.images(ax, images, columns=N + 2)
            ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center")
        plotting.save(figure, ROOT / "docs/assets/gallery.png")
    measure(made, real)


def measure(made: cmbook.runs.Run, real: cm.Batch) -> None:
    """How good the model is: 3,000 images with the held-out labels, in pixel space."""
    assert real.label is not None
    label = real.label[torch.arange(3000) % len(real.label)]
    result: dict[str, object] = {"date": date.today().isoformat(), "images": 3000}
    for steps in (1, 2):
        samples = made.sample(3000, label, steps=steps, generator=cm.seeded(0)).clamp(-1, 1)
        result[f"frechet, {steps} evaluations"] = round(cm.frechet_distance(samples, real.x), 3)
    training = cm.Digits(tinted=True).build().x
    result["frechet of the training digits"] = round(cm.frechet_distance(training, real.x), 3)
    print(result)
    text = json.dumps(result, indent=1)
    (ROOT / "benchmarks/results/gallery.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
