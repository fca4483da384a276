"""Make the weights of `GlyphNet`: train it to read letters and digits in many fonts.

    python benchmarks/glyphnet.py [STEPS]        (default 2000: 27 minutes of one busy core)

Images are endless: one of 62 characters in one of 20 fonts of matplotlib, at random size, place,
turn, ink and paper. Writes cmbook/weights/glyphnet.safetensors in half precision and
benchmarks/results/glyphnet.json.
"""

import json
import platform
import string
import sys
import time
from functools import cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor

from cmbook.features import GlyphNet, glyph_network
from cmbook.noise import seeded, uniform

RESULTS = Path(__file__).parent / "results" / "glyphnet.json"
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
CHARACTERS = string.digits + string.ascii_letters
LARGE = 64  # drawn at twice the size, turned, then halved


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{name}.ttf", size)


def glyph(character: int, u: list[float]) -> Tensor:
    """One character as coverage in [0, 1]; `u` are uniform numbers that decide the rest."""
    face = font(FONTS[int(u[0] * len(FONTS))], 30 + 2 * int(u[1] * 14))
    image = Image.new("L", (LARGE, LARGE))
    place = (LARGE / 2 + 14 * (u[2] - 0.5), LARGE / 2 + 14 * (u[3] - 0.5))
    ImageDraw.Draw(image).text(place, CHARACTERS[character], fill=255, font=face, anchor="mm")
    image = image.rotate(30 * (u[4] - 0.5), Image.Resampling.BILINEAR).reduce(2)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, 32, 32) / 255


def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n` gray images in [-1, 1] and what they show."""
    u = uniform(8 * n, generator).reshape(n, 8)
    label = (u[:, 7] * len(CHARACTERS)).long()
    drawn = [glyph(int(c), row) for c, row in zip(label, u.tolist(), strict=True)]
    paper = 2 * u[:, 5] - 1
    contrast = 0.5 + u[:, 6] * 1.5  # from 0.5 to all of the range
    ink = torch.where(paper < 0, (paper + contrast).clamp(max=1), (paper - contrast).clamp(min=-1))
    image = torch.stack(drawn)
    return torch.lerp(paper.reshape(-1, 1, 1, 1), ink.reshape(-1, 1, 1, 1), image), label


def accuracy(net: torch.nn.Module, images: Tensor, label: Tensor) -> tuple[float, float]:
    """The share that is right, and the share that is right but for upper and lower case."""
    with torch.no_grad():
        answer = torch.cat([net(chunk).argmax(1) for chunk in images.split(1000)])
    lower = torch.tensor([CHARACTERS.lower().index(c) for c in CHARACTERS.lower()])
    same = (answer == label, lower[answer] == lower[label])
    return float(same[0].double().mean()), float(same[1].double().mean())


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    start = time.perf_counter()
    torch.manual_seed(0)
    net = glyph_network().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        images, label = batch(256, seeded(0, "glyphs", step))
        loss = torch.nn.functional.cross_entropy(net(images), label, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    net = net.half()
    GlyphNet.FILE.parent.mkdir(exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(weights, GlyphNet.FILE)
    GlyphNet.FILE.chmod(0o644)
    right, but_for_case = accuracy(net.float().eval(), *batch(10_000, seeded(0, "glyphs", "test")))
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "steps": steps,
        "parameters": sum(p.numel() for p in net.parameters()),
        "bytes": GlyphNet.FILE.stat().st_size,
        "test_images": 10_000,
        "test_accuracy": right,
        "test_accuracy_but_for_case": but_for_case,
        "seconds": round(time.perf_counter() - start),
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
