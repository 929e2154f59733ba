"""A synthetic picture with things to recognise."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFilter


def landscape(width: int = 480, height: int = 320) -> Image.Image:
    """Sky, sun, mountains, a lake and a red house."""
    big = Image.new("RGB", (2 * width, 2 * height))
    draw, w, h = ImageDraw.Draw(big), 2 * width, 2 * height
    for y in range(h):
        t = y / h
        draw.line((0, y, w, y), (int(90 + 140 * t), int(150 + 70 * t), int(230 - 20 * t)))
    draw.ellipse((0.75 * w, 0.08 * h, 0.87 * w, 0.08 * h + 0.12 * w), (255, 225, 120))
    draw.polygon([(0, 0.6 * h), (0.25 * w, 0.2 * h), (0.5 * w, 0.62 * h)], (95, 105, 125))
    draw.polygon([(0.3 * w, 0.62 * h), (0.6 * w, 0.3 * h), (w, 0.62 * h)], (75, 90, 105))
    draw.rectangle((0, 0.6 * h, w, h), (85, 140, 75))
    draw.ellipse((0.45 * w, 0.72 * h, 1.05 * w, 0.95 * h), (60, 110, 170))
    draw.rectangle((0.12 * w, 0.55 * h, 0.32 * w, 0.8 * h), (185, 60, 50))
    draw.polygon([(0.09 * w, 0.56 * h), (0.22 * w, 0.4 * h), (0.35 * w, 0.56 * h)], (90, 45, 35))
    draw.rectangle((0.2 * w, 0.65 * h, 0.25 * w, 0.8 * h), (240, 220, 160))
    return big.filter(ImageFilter.GaussianBlur(1)).resize((width, height))
