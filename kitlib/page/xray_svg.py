"""Draws an X-ray with all its layers as one SVG picture, and the probabilities of a study as bars."""

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
import pandas as pd

from kitlib.classes import ONE_FINDING
from kitlib.tables import BOX, findings_of
from kitlib.xrays.drawn_boxes import finding_colours, place_labels
from kitlib.xrays.worker import shrink

# A picture of 1024 pixels takes 4 ms and 130 kB (as PNG 25 ms and 400 kB); grey levels differ by at most 12 of 255.
JPEG_QUALITY = 92
HEAT_SIDE = 256  # pixels; Grad-CAM is coarser, and the browser interpolates
HEAT_ALPHA = 0.6  # opacity of the hottest pixel; the X-ray must stay visible
BAR = "#3b82f6"  # contrast above 3 on white and on Gradio's dark background


@dataclass(frozen=True)
class Mark:
    """The style of one kind of line: colours of Okabe and Ito for colour-blind people, dashes for black and white print."""

    colour: str
    width: float  # pixels of the screen
    dash: str  # SVG's stroke-dasharray; "" for a solid line
    border: str  # the line's style in CSS, for the legend


# If there are several findings, boxes have the colours of their findings instead.
MARKS = {
    "predicted": Mark("#E69F00", 2.5, "", "solid"),
    "truth": Mark("#56B4E9", 2.5, "9 6", "dashed"),
    "mask": Mark("#CC79A7", 2, "", "solid"),
}


def draw_picture(
    pixels: np.ndarray,
    rows: int,
    columns: int,
    *,
    boxes: pd.DataFrame | None = None,
    truth: pd.DataFrame | None = None,
    threshold: float = 0.0,
    mask: np.ndarray | None = None,
    heat: np.ndarray | None = None,
    caption: str = "",
    findings: Collection[str] = (),
    structure: str = "lungs",
) -> str:
    """Return HTML with a legend and one `<svg>`, whose coordinates are pixels of the original image of `rows` x `columns`.

    `pixels` (uint8), `mask` (bool) and `heat` (float 0..1) are arrays (h, w) of the whole image; their sizes may differ. An
    all-zero mask or heat map is not drawn. Predicted `boxes` (finding, score, xmin, ymin, xmax, ymax) with a score of at
    least `threshold` are drawn and listed below the picture. Annotated boxes `truth` (finding, xmin, ymin, xmax, ymax) are
    always drawn. All boxes are in original pixels. Colours are assigned to `findings`, by default the findings of all boxes.
    The picture fills the width of its column, up to three quarters of the window's height. `caption` is plain text, and
    `structure` is the name of what the mask shows. Raises ValueError if `pixels`, `mask` or `heat` has another type, shape
    or range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or not pixels.size or rows < 1 or columns < 1:
        raise ValueError(
            f"expected uint8 pixels (h, w) and a size of at least 1 x 1, "
            f"got {pixels.dtype} {pixels.shape} and {rows} x {columns}"
        )
    mask, heat = (layer if layer is not None and layer.any() else None for layer in (mask, heat))
    _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    layers, legend = [_image("xray", "jpeg", jpeg, rows, columns)], []
    findings = tuple(findings) or findings_of(boxes, truth)
    colours = finding_colours(findings)
    visible_boxes = None if boxes is None else boxes[boxes.score >= threshold].sort_values("score", kind="stable")
    if heat is not None:
        layers.append(_image("heat", "png", _heat_png(heat), rows, columns))
        legend.append((_heat_swatch(), "where the model looked (Grad-CAM)"))
    if mask is not None:
        layers += _line_with_halo("path", f'd="{_outline_path(mask, rows, columns)}"', "mask")
        legend.append((_swatch("mask"), f"{structure} found by the model"))
    drawn = {name for name in findings_of(visible_boxes, truth) if name in colours}
    legend += [(_swatch("mask", colours[name]), name) for name in sorted(drawn, reverse=True)]
    finding = "finding" if colours else "".join(findings) or ONE_FINDING
    for name, table, meaning in (
        ("truth", truth, f"annotated {finding}"),
        ("predicted", visible_boxes, f"{finding} found by the model, with its score"),
    ):
        if table is not None and len(table):
            for box, of_finding in zip(table[list(BOX)].to_numpy(float), _findings(table), strict=True):
                layers += _rectangle(name, box, colours.get(of_finding, ""))
            legend.append((_swatch(name, "currentColor" if colours else ""), meaning))
    # Labels are drawn after all rectangles, so that no line crosses a number, and the highest score last, so that it is on
    # top.
    layers += _labels(visible_boxes, truth, colours, rows, columns)
    return (
        '<figure class="xray-picture" style="margin:0">'
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns} {rows}" role="img" '
        f'aria-label="{escape(_description(visible_boxes, truth, threshold, findings, mask, heat, structure))}" '
        f'style="display:block;margin:0 auto;width:min(100%,{75 * columns / rows:.4f}vh);height:auto;'
        f'aspect-ratio:{columns}/{rows}">{"".join(layers)}</svg>'
        f'<figcaption style="text-align:center;font-size:0.9em;line-height:1.6">{_legend(legend)}'
        f"{f'<div>{escape(caption)}</div>' if caption else ''}</figcaption>{_table(visible_boxes)}</figure>"
    )


def draw_bars(
    classes: Mapping[str, float], none: float | None = None, priors: bool = False, true_classes: Collection[str] = ()
) -> str:
    """Return HTML with one bar for each class and, unless `none` is None, one for `none`; values have three decimals.

    `classes` maps names to probabilities of the study or image, `none` is the probability that the image has no finding,
    all 0..1. If `priors` is True, no model has predicted the study, and `classes` holds the class frequencies of the
    training set, which are drawn in grey. The `true_classes` are marked as annotated. Raises ValueError if a value is
    outside 0..1.
    """
    rows = [_bar(label, float(value), priors, label in true_classes) for label, value in classes.items()]
    note = ""
    if priors:
        note = (
            '<p class="priors" style="margin:0.5em 0 0;font-size:0.9em">None of the selected models predicts the class. The '
            "grey bars show how common each class is in the training set; they are the same for every study.</p>"
        )
    of_image = ""
    if none is not None:
        rule = "border-top:1px solid currentColor;opacity:0.25;margin:0.5em 0"
        of_image = f'<div style="{rule}"></div>{_bar("none", float(none), False, False, "no finding in this image")}'
    return f'<div class="study-bars" style="color:var(--body-text-color,currentColor)">{"".join(rows)}{note}{of_image}</div>'


def _bar(label: str, value: float, grey: bool, is_true: bool, meaning: str = "") -> str:
    if not 0 <= value <= 1:
        raise ValueError(f"the probability of {label!r} is {value}; expected 0..1")
    title = meaning or f"probability of {label}"
    title += (", its share of the training set" if grey else "") + (", the annotated class" if is_true else "")
    badge = '<span style="border:1px solid currentColor;border-radius:3px;padding:0 0.3em;font-size:0.75em">annotated</span>'
    colour = "currentColor;opacity:0.35" if grey else BAR
    return (
        f'<div class="bar{" priors" if grey else ""}{" truth" if is_true else ""}" title="{escape(title)}" '
        'style="display:grid;grid-template-columns:minmax(7em,12em) minmax(4em,1fr) 3.5em;'
        'gap:0.6em;align-items:center;margin:0.3em 0">'
        f'<span style="font-weight:{700 if is_true else 400}">{escape(label)} {badge if is_true else ""}</span>'
        f'<span role="meter" aria-label="{escape(title)}" aria-valuemin="0" aria-valuemax="1" aria-valuenow="{value:.3f}" '
        'style="position:relative;height:0.9em;border-radius:3px;overflow:hidden">'
        '<span style="position:absolute;inset:0;background:currentColor;opacity:0.12"></span>'
        f'<span style="position:absolute;inset:0 auto 0 0;width:{100 * value:.2f}%;background:{colour}"></span></span>'
        f'<span style="text-align:right;font-variant-numeric:tabular-nums">{value:.3f}</span></div>'
    )


def _image(name: str, kind: str, encoded: np.ndarray, rows: int, columns: int) -> str:
    uri = f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
    return f'<image class="{name}" width="{columns}" height="{rows}" preserveAspectRatio="none" href="{uri}"/>'


def _heat_png(heat: np.ndarray) -> np.ndarray:
    """Return the heat map as an encoded PNG, more transparent where the heat is lower."""
    if heat.ndim != 2 or not (np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1):
        raise ValueError(f"expected a heat map (h, w) with finite values in 0..1, got an array {heat.shape}")
    levels = np.rint(shrink(heat.astype(np.float32), HEAT_SIDE) * 255).astype(np.uint8)
    coloured = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2BGRA)
    coloured[..., 3] = np.rint(levels * HEAT_ALPHA)
    return cv2.imencode(".png", coloured)[1]


def _outline_path(mask: np.ndarray, rows: int, columns: int) -> str:
    """Return an SVG path, in original pixels, around the mask and its holes, through the centres of the edge pixels."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"expected a bool mask (h, w), got {mask.dtype} {mask.shape}")
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # OpenCV's origin is the centre of the first pixel, SVG's is its corner.
    scale = np.array([columns / mask.shape[1], rows / mask.shape[0]])
    placed = [(contour[:, 0] + 0.5) * scale for contour in contours]
    return "".join("M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + "Z" for points in placed)


def _line_with_halo(element: str, geometry: str, name: str, colour: str = "") -> list[str]:
    """Return SVG for a line in the style MARKS[name] on top of a wider dark line, to be visible on white and on black."""
    mark, drawn = (
        MARKS[name],
        'fill="none" vector-effect="non-scaling-stroke" stroke-linecap="round" stroke-linejoin="round"',
    )
    dash = f' stroke-dasharray="{mark.dash}"' if mark.dash else ""
    return [
        f'<{element} class="halo" {geometry} {drawn} stroke="#000" stroke-opacity="0.55" stroke-width="{mark.width + 2}"/>',
        f'<{element} class="{name}" {geometry} {drawn} stroke="{colour or mark.colour}" stroke-width="{mark.width}"{dash}/>',
    ]


def _rectangle(name: str, box: np.ndarray, colour: str) -> list[str]:
    xmin, ymin, xmax, ymax = box
    geometry = f'x="{xmin:.2f}" y="{ymin:.2f}" width="{xmax - xmin:.2f}" height="{ymax - ymin:.2f}"'
    return _line_with_halo("rect", geometry, name, colour)


def _labels(
    boxes: pd.DataFrame | None, truth: pd.DataFrame | None, colours: Mapping[str, str], rows: int, columns: int
) -> list[str]:
    """Return SVG texts at the boxes: the scores of predicted boxes and, if `colours` is not empty, the findings' names.

    `boxes` are in ascending order of their scores. Annotated boxes have names only.
    """
    size = max(rows, columns) / (60 if colours else 40)
    labels = []  # kind, finding, text, corners; the least important label first
    for kind, table in (("name", truth if colours else None), ("score", boxes)):
        if table is not None:
            scores = [f"{score:.2f}" for score in table.score] if kind == "score" else [""] * len(table)
            corners = table[list(BOX)].to_numpy(float)
            if kind == "name":  # below the box, because the score of a predicted box is above the box
                corners[:, 1] = np.minimum(corners[:, 3] + 1.3 * size, rows)
            for name, score, box in zip(_findings(table), scores, corners, strict=True):
                labels.append((kind, name, f"{name if colours else ''} {score}".strip(), box))
    widths = [0.55 * size * len(text) for _, _, text, _ in reversed(labels)]
    places = place_labels(np.array([box for *_, box in reversed(labels)]), widths, size, rows, columns)[::-1]
    return [
        f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}" font-size="{size:.2f}" font-family="sans-serif" font-weight="600" '
        f'fill="{colours.get(name, MARKS["predicted"].colour)}" stroke="#000" stroke-width="{size / 5:.2f}" '
        f'stroke-linejoin="round" paint-order="stroke">{escape(text)}</text>'
        for (kind, name, text, _), (x, y) in zip(labels, places, strict=True)
    ]


def _findings(table: pd.DataFrame) -> list[str]:
    return list(table["finding"]) if "finding" in table else [ONE_FINDING] * len(table)


def _table(boxes: pd.DataFrame | None) -> str:
    """Return a collapsible HTML table of the visible `boxes`, highest score first, or "" if there are no boxes."""
    if boxes is None or boxes.empty:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{score:.3f}</td><td>{', '.join(f'{side:.0f}' for side in box)}</td></tr>"
        for name, score, box in reversed(list(zip(_findings(boxes), boxes.score, boxes[list(BOX)].to_numpy(), strict=True)))
    )
    heads = f"<tr><th>finding</th><th>confidence</th><th>{', '.join(BOX)} (pixels)</th></tr>"
    return f'<details class="box-table"><summary>Table of the boxes</summary><table>{heads}{rows}</table></details>'


def _swatch(name: str, colour: str = "") -> str:
    mark = MARKS[name]
    line = f"border-top:3px {mark.border} {colour or mark.colour}"
    if colour.startswith("#"):
        line += ";filter:drop-shadow(0 0 1px #000)"  # pale colours must be visible on a white page
    return f'<span style="display:inline-block;width:2em;{line};vertical-align:middle"></span>'


def _heat_swatch() -> str:
    ramp = "linear-gradient(90deg,transparent,#bc3754,#fca50a,#fcffa4)"
    return f'<span style="display:inline-block;width:2em;height:0.7em;background:{ramp};vertical-align:middle"></span>'


def _legend(entries: list[tuple[str, str]]) -> str:
    if not entries:
        return ""
    named = [f"{swatch} {escape(meaning)}" for swatch, meaning in reversed(entries)]
    items = "".join(f'<span style="white-space:nowrap">{entry}</span>' for entry in named)
    return f'<div class="legend" style="display:flex;flex-wrap:wrap;justify-content:center;gap:0 1.5em">{items}</div>'


def _description(
    visible_boxes: pd.DataFrame | None,
    truth: pd.DataFrame | None,
    threshold: float,
    findings: Collection[str],
    mask: np.ndarray | None,
    heat: np.ndarray | None,
    structure: str,
) -> str:
    """Return a sentence that describes the picture for screen readers."""
    parts = []
    if visible_boxes is not None:
        names = pd.Series(_findings(visible_boxes), dtype=object).value_counts().sort_index()
        listed = ", ".join(f"{count} {name}" for name, count in names.items())
        of_finding = (f" ({listed})" if listed else "") if len(findings) > 1 else f" of {''.join(findings) or ONE_FINDING}"
        parts.append(f"{_count(len(visible_boxes), 'box', 'boxes')}{of_finding} with a score of at least {threshold:.2f}")
    if truth is not None:
        parts.append(f"{_count(len(truth), 'annotated box', 'annotated boxes')}")
    parts += [f"the outline of the {structure}"] * (mask is not None) + ["a heat map"] * (heat is not None)
    return "Chest X-ray" + (" with " + ", ".join(parts) if parts else "") + "."


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
