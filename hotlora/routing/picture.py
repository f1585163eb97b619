"""A grid of layers x experts as HTML, for notebooks: an SVG around a small PNG, readable on light and on dark pages."""

import base64
import html
import struct
import zlib
from collections.abc import Sequence

from ..base.escape import one_line

LOADS = tuple((0xFF - i * 3, 0xF7 - i * 6, 0xE0 - i * 7) for i in range(32))
"""Colours from an idle expert's to the busiest's."""
CHOICE = ((0xC9, 0xCE, 0xD6), (0xD5, 0x5E, 0x00))
"""Colours of an expert that is left, and of one that is kept."""

_Colors = Sequence[tuple[int, int, int]]


def grid_html(
    caption: str,
    layers: Sequence[int],
    levels: Sequence[Sequence[int]],
    colors: _Colors,
    sides: Sequence[str],
    legend: Sequence[tuple[int, str]],
) -> str:
    """A row for each layer, a cell for each expert.

    Args:
        levels: [L, E], indices into `colors`.
        sides: what stands at the right of each row.
        legend: the level of a colour, and what it says.
    """
    num_layers, num_experts = len(levels), len(levels[0])
    width = round(num_experts * min(18.0, max(2.0, 560 / num_experts)))
    step = min(18.0, max(9.0, 360 / num_layers))
    height, size, left = round(num_layers * step), min(11.0, step - 1), 40
    text = [
        f'<text x="{x}" y="{(row + 0.5) * step + 0.35 * size:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
        for row, (layer, side) in enumerate(zip(layers, sides, strict=True))
        for x, anchor, words in ((left - 6, "end", str(layer)), (left + width + 6, "start", side))
        if words
    ]
    text.append(f'<text x="{left}" y="{height + 16}">layers × experts 0 to {num_experts - 1}</text>')
    at = left + 190
    for level, words in legend:
        fill = "#" + bytes(colors[level]).hex()
        text.append(f'<rect x="{at}" y="{height + 7}" width="10" height="10" fill="{fill}"/>')
        text.append(f'<text x="{at + 14}" y="{height + 16}">{html.escape(words)}</text>')
        at += 24 + 7 * len(words)
    whole = max(left + width + 46, at)
    return (
        f"<div><div>{html.escape(one_line(caption))}</div>"
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {height + 22}" width="{whole}" '
        f'style="max-width: 100%; height: auto" font-family="sans-serif" font-size="{size:g}" fill="currentColor" '
        f'role="img" aria-label="{html.escape(one_line(caption))}">'
        f'<image x="{left}" y="0" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{_png(levels, colors)}"/>'
        f"{''.join(text)}</svg></div>"
    )


def _png(levels: Sequence[Sequence[int]], colors: _Colors) -> str:
    """One pixel a cell, in base64: an image with a palette (PNG specification, 11.2)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", len(levels[0]), len(levels), 8, 3, 0, 0, 0)
    palette = b"".join(map(bytes, colors))
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in levels), 9)
    parts = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", pixels), (b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)).decode()
