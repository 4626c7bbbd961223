"""Escaped elements of SVG and HTML: :func:`element`, :func:`figure`; numbers as short text: :func:`short`."""

from __future__ import annotations

import math

from markupsafe import Markup, escape


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """An element with everything escaped that is not markup already.

    Args:
        tag: Name of the element.
        children: Text or markup.
        attributes: Attributes; ``class_`` is ``class`` and underscores become dashes. None leaves one out; floats are
            rounded to a tenth, which is enough for coordinates.

    >>> str(element("rect", x=1.0, stroke_width=2, class_="a<b"))
    '<rect x="1" stroke-width="2" class="a&lt;b"/>'
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None:
            text = coordinate(value) if isinstance(value, float) else str(value)
            parts.append(f'{name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    opening = " ".join(parts)
    content = "".join(escape(child) for child in children)
    return Markup(f"<{opening}>{content}</{tag}>" if content else f"<{opening}/>")  # escaped above


def figure(name: str, text: str, *children: object, width: float, height: float, scale: bool = False) -> Markup:
    """An SVG picture that a screen reader can tell.

    Args:
        name: What it shows, a few words.
        text: What can be seen in it, in words.
        children: Its content.
        width: Width, CSS pixels.
        height: Height, CSS pixels.
        scale: Whether it fills its box instead of having its own width.
    """
    size: dict[str, object] = {} if scale else {"width": width, "height": height}
    return element(
        "svg",
        element("title", name),
        element("desc", text),
        *children,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=f"{name}. {text}",
        **size,
    )


def coordinate(value: float) -> str:
    """A length with at most one decimal.

    >>> coordinate(2.0), coordinate(-0.04), coordinate(1.26)
    ('2', '0', '1.3')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def short(value: float) -> str:
    """A number with three significant digits, for labels.

    >>> short(0.0), short(4.10921), short(-0.000123), short(15.94), short(123456.0)
    ('0', '4.11', '-1.23e-4', '15.9', '1.23e5')
    """
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e4:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """A share of 0 to 1 for people; what is not quite nothing does not become nothing.

    >>> percent(0.0), percent(0.00001), percent(0.1234), percent(1.0)
    ('0 %', '< 0.01 %', '12.3 %', '100 %')
    """
    value = 100 * share
    if value == 0 or value == 100:
        return f"{value:.0f} %"
    if value < 0.01:
        return "< 0.01 %"
    return f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def clipped_name(name: str, length: int = 36) -> str:
    """The end of a long name, which is where ONNX names differ.

    >>> clipped_name("/features/features.3/body/body.0/Conv", 20)
    '…s.3/body/body.0/Conv'
    """
    return name if len(name) <= length else f"…{name[-length:]}"
