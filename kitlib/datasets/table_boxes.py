"""Reads the boxes of a user's own images from four columns of a table, in pixels of the image files."""

import pandas as pd

from kitlib.datasets.base import cut_at_edges, make_boxes
from kitlib.datasets.data_folder import DataFolder
from kitlib.datasets.table_columns import BOX_KEYS
from kitlib.errors import DatasetError
from kitlib.tables import empty_table


def add_boxes(
    rows: pd.DataFrame, images: pd.DataFrame, source: DataFolder, file: str, is_own_file: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `images` and `boxes`, with boxes cut at the edges of their images (see `cut_at_edges`).

    Each of `rows` has the `path` of an image and the four cells of one box; four blank cells mean that the image has no box.
    If the cells are not four numbers, or the box has no area or no finding, or does not fit the image, the image is left out
    and recorded as a fault: without the box, it would be taken for healthy. `file` is the name of the table in messages.
    `is_own_file` is True if the table lists only boxes; an image that is not in such a table has no box. Raises
    DatasetError if no image has a box.
    """
    image_ids = rows.path.map(str).map(images.set_index("path").image_id)
    if is_own_file:
        unknown = rows.file[image_ids.isna()]
        source.faults.add_summary(file, unknown, "are boxes of images that are not listed, or left out", "other rows")
        without = set(images.image_id) - set(image_ids)
        source.faults.add_summary(file, without, "have no row; they count as images without a box", "other images")
    rows, image_ids = rows[image_ids.notna()], image_ids.dropna()
    cells = rows[[key for key in BOX_KEYS if key in rows]]
    has_box = (cells != "").any(axis=1)
    if len(images) and not has_box.any():
        raise DatasetError(
            f"{file}: the box columns are blank for all usable images; remove these columns from the parameter `columns`"
        )
    rows, image_ids, cells = rows[has_box], image_ids[has_box], cells[has_box]
    sides = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    if "xmax" in sides:
        sides = sides.assign(xmax=sides.xmax - sides.xmin, ymax=sides.ymax - sides.ymin)
    boxes, is_valid = make_boxes(image_ids, sides)
    for image_id, row in zip(image_ids[~is_valid], cells[~is_valid].itertuples(index=False), strict=True):
        problem = f"the box {', '.join(row)} ({', '.join(cells)}) is not four numbers with an area; the image is left out"
        source.faults.add(file, image_id, problem)
    if "finding" in rows:
        boxes["finding"] = rows.finding
        has_finding = (rows.finding != "").to_numpy()
        for image_id in image_ids[is_valid & ~has_finding]:
            source.faults.add(file, image_id, "a box has no finding; the image is left out")
        is_valid = is_valid & has_finding
    images = images[~images.image_id.isin(image_ids[~is_valid])]
    boxes = boxes[boxes.image_id.isin(images.image_id)]
    if boxes.empty:
        return images, empty_table("boxes")
    return cut_at_edges(images, boxes, source, file)
