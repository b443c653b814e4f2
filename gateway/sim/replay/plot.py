"""The figures of a study as one SVG: time to the first token by policy, and over the rate."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

_WIDTH: Final = 960
_ROW: Final = 26
_LEFT: Final = 150
_COLOURS: Final = (
    *("#1b6ca8", "#d1495b", "#3c8d5a", "#8f5bb0", "#c47f17", "#4a4a4a", "#0f9d9d", "#b0567d", "#7a8b1f", "#6b6bd6"),
)


def svg(title: str, policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Bars of mean and p90 for each policy; below them, where rates were swept, the p90 over the rate."""
    bars = _bars(policies, 60)
    top = 60 + _ROW * len(policies) + 50
    swept = {name: one["sweep"] for name, one in policies.items() if one.get("sweep")}
    lines = _lines(swept, policies, top) if swept else []
    height = top + (330 if swept else 0)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            _text(20, 28, title, size=16),
            _text(20, 48, "time to the first token: mean (dark) and p90 (light), seconds"),
            *bars,
            *lines,
            "</svg>\n",
        ]
    )


def _bars(policies: Mapping[str, Mapping[str, Any]], top: int) -> list[str]:
    longest = max(one["ttft_p90_s"] for one in policies.values()) or 1.0
    scale = (_WIDTH - _LEFT - 120) / longest
    drawn = []
    for row, (name, one) in enumerate(policies.items()):
        y = top + row * _ROW
        colour = _COLOURS[row % len(_COLOURS)]
        mean, p90 = one["ttft_mean_s"], one["ttft_p90_s"]
        drawn += [
            _text(_LEFT - 8, y + 14, name + (" *" if one.get("default") else ""), anchor="end"),
            f'<rect x="{_LEFT}" y="{y}" width="{p90 * scale:.1f}" height="18" fill="{colour}" opacity="0.35"/>',
            f'<rect x="{_LEFT}" y="{y}" width="{mean * scale:.1f}" height="18" fill="{colour}"/>',
            _text(_LEFT + p90 * scale + 6, y + 14, f"{mean:.2f} / {p90:.2f}"),
        ]
    return drawn


def _lines(swept: Mapping[str, Any], policies: Mapping[str, Mapping[str, Any]], top: int) -> list[str]:
    left, right, low, high = _LEFT, _WIDTH - 160, top + 280, top + 20
    rates = [point["rate"] for points in swept.values() for point in points]
    limit_s = max(one.get("knee_p90_s", 0.0) for one in policies.values())
    ceiling = 2 * limit_s or 1.0
    x_scale = (right - left) / (max(rates) or 1.0)
    y_scale = (low - high) / ceiling

    def place(point: Mapping[str, float]) -> str:
        return f"{left + point['rate'] * x_scale:.1f},{low - min(point['ttft_p90_s'], ceiling) * y_scale:.1f}"

    drawn = [
        _text(20, top, "p90 over requests a second; the knee is where a line passes the dashed one"),
        f'<path d="M{left},{high}V{low}H{right}" fill="none" stroke="#888"/>',
        f'<path d="M{left},{low - limit_s * y_scale:.1f}H{right}" stroke="#888" stroke-dasharray="5 4"/>',
        _text(left - 8, low - limit_s * y_scale + 4, f"{limit_s:.1f} s", anchor="end"),
        _text(left, low + 18, "0"),
        _text(right, low + 18, f"{max(rates):.1f}/s", anchor="end"),
    ]
    for row, name in enumerate(policies):
        if name not in swept:
            continue
        colour = _COLOURS[row % len(_COLOURS)]
        drawn += [
            f'<polyline points="{" ".join(map(place, swept[name]))}" fill="none" stroke="{colour}" stroke-width="2"/>',
            _text(right + 16, high + 14 + row * 20, name, colour=colour),
        ]
    return drawn


def _text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", colour: str = "#222") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
