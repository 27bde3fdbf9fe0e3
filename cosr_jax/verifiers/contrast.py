"""Contrast of text by WCAG 2.2 (https://www.w3.org/TR/WCAG22/#contrast-minimum).

The ratio is computed from the styles of the text and of all that it stands in, groups with opacity
included, and then confirmed in the rendered pixels: colours that something else paints over, or
text that is there by its styles only, do not count.  Text on a background image, or under a
filter, a mask or a blend mode has no contrast that styles could tell, and fails.
"""

from __future__ import annotations

import re
from typing import Any

from cosr_jax.verifiers.web_page import Box, View

_COLOUR = re.compile(r"rgba?\(([0-9.]+), ([0-9.]+), ([0-9.]+)(?:, ([0-9.]+))?\)")
_PLAIN = {
    "background-image": "none",
    "filter": "none",
    "backdrop-filter": "none",
    "mix-blend-mode": "normal",
    "mask-image": "none",
    "clip-path": "none",
}
#: Thin strokes are rendered paler than their colour: this share of a ratio above 1 must be seen.
_SEEN_SHARE = 0.35

Colour = tuple[float, float, float, float]  # red, green, blue in [0, 255], alpha in [0, 1]


def complaint(box: Box, view: View, least: float, pixels: Any) -> str:
    """What is wrong with the contrast of a text; "" if nothing is.

    Args:
      box: the text.
      view: the page.
      least: the ratio asked for; large text needs 3 at most.
      pixels: the rendered page, from ``Page.pixels``.
    """
    size = float(box.styles["font-size"].removesuffix("px"))
    is_large = size >= 24 or (size >= 18.66 and float(box.styles["font-weight"]) >= 700)
    least = min(least, 3.0) if is_large else least
    try:
        ratio = styled_ratio(box, view)
    except ValueError as error:
        return str(error)
    if ratio < least - 0.005:
        return f"contrast {ratio:.2f}, not {least:g}"
    if view.is_clipped(box, ("auto", "scroll")):
        return ""  # it has to be scrolled to; its colours are known
    seen = seen_ratio(box, pixels)
    if seen is not None and seen < 1 + _SEEN_SHARE * (least - 1):
        return f"contrast {ratio:.2f} by its styles, but {seen:.2f} on the screen"
    return ""


def styled_ratio(box: Box, view: View) -> float:
    """The ratio between a text's colour and what is behind it, from the styles.

    Raises:
      ValueError: the styles do not tell.
    """
    text = colour(box.styles["-webkit-text-fill-color"])
    behind: Colour = (0.0, 0.0, 0.0, 0.0)
    for index in view.lineage(box.node):
        frame = view.frames.get(index)
        if frame is None:
            continue
        for name, plain in _PLAIN.items():
            if frame.styles[name] != plain:
                raise ValueError(f"contrast unknown under {name}: {frame.styles[name][:40]}")
        paint = colour(frame.styles["background-color"])
        opacity = float(frame.styles["opacity"])
        text, behind = faded(over(text, paint), opacity), faded(over(behind, paint), opacity)
    white: Colour = (255.0, 255.0, 255.0, 1.0)
    return ratio_of(over(text, white), over(behind, white))


def seen_ratio(box: Box, pixels: Any) -> float | None:
    """The highest ratio between a pixel of the text's box and the commonest colour there.

    None: the box lies outside of what was rendered.
    """
    import numpy as np

    top, left = max(0, int(box.y)), max(0, int(box.x))
    part = pixels[top : int(box.y + box.height) + 1, left : int(box.x + box.width) + 1]
    colours, counts = np.unique(part.reshape(-1, 3), axis=0, return_counts=True)
    if not len(colours):
        return None
    light = [luminance(*map(float, c)) for c in colours]
    common = light[int(counts.argmax())]
    return max(_ratio(common, other) for other in light)


def colour(text: str) -> Colour:
    """Raises ``ValueError`` for a colour that is not written as rgb() or rgba()."""
    match = _COLOUR.fullmatch(text)
    if match is None:
        raise ValueError(f"contrast unknown of the colour {text[:40]}")
    red, green, blue = (float(match[i]) for i in (1, 2, 3))
    return red, green, blue, float(match[4] or 1)


def over(top: Colour, bottom: Colour) -> Colour:
    """``top`` painted over ``bottom``."""
    alpha = top[3] + bottom[3] * (1 - top[3])
    if alpha == 0:
        return (0.0, 0.0, 0.0, 0.0)
    red, green, blue = (
        (top[i] * top[3] + bottom[i] * bottom[3] * (1 - top[3])) / alpha for i in range(3)
    )
    return red, green, blue, alpha


def faded(paint: Colour, opacity: float) -> Colour:
    """``paint`` as part of a group with ``opacity``."""
    return (*paint[:3], paint[3] * opacity)


def ratio_of(one: Colour, other: Colour) -> float:
    """WCAG's contrast ratio of two opaque colours, from 1 to 21."""
    return _ratio(luminance(*one[:3]), luminance(*other[:3]))


def _ratio(one: float, other: float) -> float:
    light, dark = max(one, other), min(one, other)
    return (light + 0.05) / (dark + 0.05)


def luminance(red: float, green: float, blue: float) -> float:
    """WCAG's relative luminance of an sRGB colour with parts in [0, 255]."""
    parts = (_linear(part / 255) for part in (red, green, blue))
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def _linear(part: float) -> float:
    return float(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
