"""PASCAL VOC 2010 average precision by its definition, in plain Python with exact fractions: slow, independent of kitlib."""

import math
from fractions import Fraction


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    shared = width * height
    return Fraction(shared, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_average_precision(detections, truth, least=Fraction(1, 2)):
    """Return the VOC 2010 average precision of detections (image, score, box) against truth (image, box), IoU > `least`."""
    if not truth:
        return math.nan
    claimed, curve, hits, shown = set(), [], 0, 0
    for level in sorted({confidence for _, confidence, _ in detections}, reverse=True):
        for image, confidence, box in detections:
            if confidence != level:
                continue
            shown += 1
            in_image = [(n, true_box) for n, (true_image, true_box) in enumerate(truth) if true_image == image]
            candidates = [(iou(box, true_box), [-side for side in true_box], n) for n, true_box in in_image]
            overlap, _, n = max(candidates, default=(0, 0, 0))
            if overlap > least and n not in claimed:
                claimed.add(n)
                hits += 1
        curve.append((Fraction(hits, len(truth)), Fraction(hits, shown)))
    area, previous = Fraction(0), Fraction(0)
    for index, (recall, _) in enumerate(curve):
        area += (recall - previous) * max(precision for _, precision in curve[index:])
        previous = recall
    return float(area)
