"""Merges the boxes that several radiologists (readers) drew around the same finding, so that each finding has one box."""

import numpy as np
import pandas as pd

from kitlib.fusion.box_fusion import merge_lists
from kitlib.fusion.weighted_boxes import ImageLists
from kitlib.tables import BOX, check_table


def merge_reader_boxes(boxes: pd.DataFrame, images: pd.DataFrame, iou: float = 0.4) -> pd.DataFrame:
    """Merge the boxes of several readers (radiologists) by weighted box fusion; return a `boxes` table.

    Boxes are merged within each image and finding. `boxes` has the additional column `reader`; every box must lie within its
    image. `images` states the size of each image. Boxes with an IoU above `iou` are merged into their mean; all readers have
    equal weight. Instead of `reader`, the result has the column `readers`, the number of readers who marked the box. If only
    one reader marked a finding in an image, the boxes of this finding are unchanged.
    """
    ordered = boxes.sort_values(["image_id", "finding", "reader"], kind="stable")
    group = ordered.groupby(["image_id", "finding"], sort=False).ngroup().to_numpy()  # ascending, because rows are sorted
    is_first = ~ordered.duplicated(["image_id", "finding", "reader"]).to_numpy()  # of a reader's boxes in a group
    list_counts = np.bincount(group[is_first])
    list_ends = np.cumsum(list_counts)
    first_list = np.append(0, list_ends)
    sizes = images.set_index("image_id")[["columns", "rows"]]
    lists = ImageLists(
        corners=ordered[list(BOX)].to_numpy(float) / np.tile(sizes.loc[ordered["image_id"]].to_numpy(), 2),
        score=np.ones(len(ordered)),
        ends=np.cumsum(np.bincount(group)),
        list_of=np.cumsum(is_first) - 1 - first_list[group],
        weights=np.ones(is_first.sum()),
        list_ends=list_ends,
    )
    # This confidence is the share of an image's lists that have a box in the cluster; it is 1 for an unchanged list.
    corners, share, merged_group = merge_lists(lists, "wbf", iou, "box_and_model_avg")
    merged = ordered.drop_duplicates(["image_id", "finding"])[["image_id", "finding"]].iloc[merged_group]
    corners = corners * np.tile(sizes.loc[merged["image_id"]].to_numpy(), 2)
    merged = merged.assign(**dict(zip(BOX, corners.T, strict=True)))
    return check_table(merged.assign(readers=np.rint(share * list_counts[merged_group]).astype(int)), "boxes")
