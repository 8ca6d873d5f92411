"""Data set of cached X-rays with targets and reproducible augmentation, and a data loader that makes batches of it."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from kitlib.device import derived_seed
from kitlib.letterbox import PLACEMENTS, Placement
from kitlib.lungs.canvas import read_canvas
from kitlib.lungs.crop import choose_finder, clip_boxes_to_canvas, crop, find_lungs
from kitlib.lungs.finders import LungFinder, Lungs
from kitlib.recipes.fields import WithBackbone
from kitlib.tables import BOX
from kitlib.training import data_parallel, kept_memory
from kitlib.training.augmentation import Augmentation
from kitlib.training.shared_memory import BATCH_TIMEOUT_S
from kitlib.xrays.cache import CachedXray, DecodedXrays

# Maps the recipe's `trained_on` to the kinds of canvas that it uses: whole images ("full"), lung crops ("lungs").
CANVAS_KINDS = {"full": ("full",), "lungs": ("lungs",), "either": ("full", "lungs")}


class Examples(Dataset[dict[str, Any]]):
    """Base class of data sets with one example per image in `image_ids`, in the same order.

    The key of an example is its index, or (epoch, index) from `EpochSampler`.
    """

    image_ids: list[str]
    example_bytes: int  # size in bytes of an example's pixels; the rest of an example is small

    def __len__(self) -> int:
        return len(self.image_ids)

    def sampler(self, seed: int) -> "EpochSampler":
        """Return the sampler of training, which yields the keys of each epoch's examples."""
        return EpochSampler(len(self), seed)


class XrayDataset(Examples):
    """Data set of X-rays with their targets: one example per row of `images`, in the same order.

    An example is a dict. `pixels`, uint8 (side, side), is the grey image on the recipe's canvas. `label`, float32
    (classes,), has the labels of the image's study in the order of the `labels` table, NaN if unknown. `boxes` is float32
    (k, 4), one row per box: xmin, ymin, xmax, ymax in canvas pixels. `findings`, int64 (k,), has the boxes' findings as
    indices of `classes`; without `classes`, all are 0. `index` is the row in `images`. `none`, float32, is the probability
    that the image has no opacity: the value in the column `none` of `images`, unless the column is missing or the value is
    NaN. In this case, the probability is NaN if the column `boxes_known` is False (opacities are not annotated); otherwise,
    it is 0 for an image with boxes, and 1 for an image without boxes.

    The key of an example is its index, or (epoch, index) from `EpochSampler`. Its augmentation depends on `seed` and the key
    alone, in any process, so that resumed training uses the same examples as uninterrupted training.

    If the recipe's `trained_on` is "lungs", images are cropped to the frame of the lungs. If it is "either", `seed` and the
    key (epoch, index) decide whether an image is cropped; with a plain index, as in validation, it is never cropped. If the
    recipe's `masked` is true, pixels outside the lung mask are black. If the recipe's `probe` is "outside_lungs", the lungs
    are black instead. The argument `lungs` finds the lungs; it is used only if the recipe's `lungs` is "masks" (see
    kitlib.lungs.crop). An image without usable lungs is used whole and unmasked; `lungs_missed` counts such images.

    If the recipe's `canvas` is larger than its `image_size`, a square of `image_size` pixels a side is cropped from the
    larger canvas: with `augment` a random square, otherwise the middle. The larger canvas is kept in memory.
    """

    def __init__(
        self,
        images: pd.DataFrame,
        labels: pd.DataFrame,
        boxes: pd.DataFrame,
        cache: DecodedXrays,
        recipe: WithBackbone,
        augment: bool = False,
        seed: int = 0,
        lungs: LungFinder | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.cache, self.side, self.seed, self.canvas = cache, recipe.image_size, seed, read_canvas(recipe)
        self.image_ids, self.example_bytes = images.image_id.tolist(), recipe.image_size**2
        self.make_placement = PLACEMENTS[recipe.placement]
        self.label = labels.set_index("id").reindex(images.study_id).to_numpy(np.float32)
        # The class is a fifth column, so that whatever moves or removes a box keeps its class.
        boxes = boxes.assign(code=pd.Index(classes).get_indexer(boxes["finding"]) if classes else 0)
        rows_of = {image_id: rows[[*BOX, "code"]].to_numpy(float) for image_id, rows in boxes.groupby("image_id")}
        self.boxes = [rows_of.get(image_id, np.zeros((0, 5))) for image_id in self.image_ids]
        self.none = np.array([float(not len(image_boxes)) for image_boxes in self.boxes], dtype=np.float32)
        if "boxes_known" in images.columns:
            self.none[images.boxes_known.eq(False).to_numpy()] = np.nan
        if "none" in images.columns:
            soft_none = images.none.to_numpy(np.float32)
            if ((soft_none < 0) | (soft_none > 1)).any():
                raise ValueError(
                    f"the column 'none' of `images` has values from {np.nanmin(soft_none)} to {np.nanmax(soft_none)}; "
                    "valid: 0..1 and NaN"
                )
            self.none = np.where(np.isnan(soft_none), self.none, soft_none)
        self.augmentation = Augmentation(recipe) if augment else None
        self.finder, self.canvas_kinds = choose_finder(recipe.lungs, lungs), CANVAS_KINDS[recipe.trained_on]
        self.frame_cache = FrameCache(len(self))
        # Canvases stay in memory, because reading and resizing an image takes longer than augmentation. Whole images come
        # first, then lung crops.
        fitting = kept_memory.CANVASES.reserve(self, len(self.canvas_kinds) * len(self), self.canvas.whole**2)
        self.canvas_cache = CanvasCache(fitting, self.canvas.whole)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        pixels, place = self._read_canvas(index, self._choose_kind(key))
        # Boxes are clipped to the canvas, and dropped if a side is then shorter than a pixel.
        if self.augmentation is None:
            pixels, boxes = (
                self.canvas.crop_middle(pixels),
                clip_boxes_to_canvas(self.canvas.middle(place), self.boxes[index]),
            )
        else:
            boxes = clip_boxes_to_canvas(place, self.boxes[index])
            pixels, boxes = self.augmentation(pixels, boxes, derived_seed(self.seed, epoch, index))
        return {
            "pixels": torch.from_numpy(pixels),
            "label": torch.from_numpy(self.label[index]),
            "none": torch.tensor(self.none[index]),
            "boxes": torch.from_numpy(boxes[:, :4].astype(np.float32)),
            "findings": torch.from_numpy(boxes[:, 4].astype(np.int64)),
            "index": index,
        }

    def lungs_missed(self) -> int:
        """Return the number of images that are used whole, because no usable lungs were found.

        Looks for the lungs in all images that have not been read yet. Returns 0 if the recipe does not use lungs.
        """
        if not self.canvas.needs_mask and "lungs" not in self.canvas_kinds:
            return 0
        for index in np.flatnonzero(self.frame_cache.status == 0).tolist():
            self._find_lungs(index, self.cache.read(self.image_ids[index]))
        return int((self.frame_cache.status == FrameCache.MISSED).sum())

    def _choose_kind(self, key: int | tuple[int, int]) -> str:
        """Return the kind of canvas for an example's key: "full" for the whole image, "lungs" for the lung crop."""
        return self.canvas_kinds[derived_seed(self.seed, *key, 2) % len(self.canvas_kinds) if isinstance(key, tuple) else 0]

    def _read_canvas(self, index: int, kind: str) -> tuple[np.ndarray, Placement]:
        """Return the canvas of an image, before cropping to `image_size`, and the image's placement on it.

        The canvas comes from the cache, or is drawn and then cached. `kind` is "full" or "lungs", as in `_choose_kind`.
        """
        slot = self.canvas_kinds.index(kind) * len(self) + index
        has_slot = slot < len(self.canvas_cache.pixels)
        cached = self.canvas_cache.get(slot) if has_slot else None
        if cached is not None:
            pixels, rows, columns = cached
            return pixels, self._placement(kind, self.frame_cache.get(index), rows, columns)
        xray = self.cache.read(self.image_ids[index])
        needs_lungs = self.canvas.needs_mask or kind == "lungs"
        lungs = self._find_lungs(index, xray) if needs_lungs else Lungs(None)
        place = self._placement(kind, lungs, xray.rows, xray.columns)
        pixels = self.canvas.lay(self.canvas.grey(xray.pixels, lungs.mask), place)
        if has_slot:
            self.canvas_cache.put(slot, pixels, xray.rows, xray.columns)
        return pixels, place

    def _placement(self, kind: str, lungs: Lungs, rows: int, columns: int) -> Placement:
        """Return the placement of an image on the canvas; if `kind` is "lungs", the image is cropped to the lungs' frame."""
        return crop(self.make_placement, lungs.frame if kind == "lungs" else None, rows, columns, self.canvas.whole)

    def _find_lungs(self, index: int, xray: CachedXray) -> Lungs:
        """Return the frame of an image's lungs and, if the recipe requires it, their mask.

        Frames are cached. Masks are not, because they are large.
        """
        if not self.canvas.needs_mask and self.frame_cache.status[index]:
            return self.frame_cache.get(index)
        (lungs,) = find_lungs(self.finder, [xray], self.canvas.needs_mask)
        self.frame_cache.put(index, lungs.frame)
        return lungs


class FrameCache:
    """In-memory cache of the rectangles around the lungs (frames, in original pixels), shared by forked workers.

    `status` (n,) has one value per image: FOUND if a frame is stored, MISSED if no usable lungs were found, 0 if unknown.
    """

    FOUND, MISSED = 1, 2

    def __init__(self, count: int) -> None:
        self.frames = np.frombuffer(mmap.mmap(-1, max(32, count * 32)), np.float64)[: count * 4].reshape(count, 4)
        self.status = np.frombuffer(mmap.mmap(-1, max(1, count)), np.uint8)[:count]

    def get(self, index: int) -> Lungs:
        """Return the Lungs of image `index`; the frame is None if no lungs were found or nothing is stored at `index`."""
        return Lungs(self.frames[index].copy() if self.status[index] == self.FOUND else None)

    def put(self, index: int, frame: np.ndarray | None) -> None:
        """Store the lungs' frame of image `index`: xmin, ymin, xmax, ymax, or None if no lungs were found."""
        if frame is not None:
            self.frames[index] = frame
        self.status[index] = self.MISSED if frame is None else self.FOUND  # last, as in CanvasCache


class CanvasCache:
    """In-memory cache of canvases, uint8 (side, side), and of the original sizes of their images.

    Forked workers share the cache, so that each canvas is stored only once. Memory is allocated as the cache is filled.
    """

    def __init__(self, count: int, side: int) -> None:
        # Anonymous memory, because /dev/shm is small in containers.
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, count * side**2)), np.uint8)[: count * side**2]
        self.pixels = self.pixels.reshape(count, side, side)
        self.sizes = np.frombuffer(mmap.mmap(-1, max(8, count * 8)), np.int32)[: count * 2].reshape(count, 2)

    def get(self, index: int) -> tuple[np.ndarray, int, int] | None:
        """Return the canvas stored at `index`, and the numbers of rows and columns of its original image.

        Returns None if nothing is stored at `index`. The canvas must not be changed.
        """
        columns, rows = self.sizes[index].tolist()
        return (self.pixels[index], rows, columns) if rows else None

    def put(self, index: int, pixels: np.ndarray, rows: int, columns: int) -> None:
        """Store the canvas `pixels` of an image whose original size is `rows` x `columns` pixels."""
        self.pixels[index] = pixels
        self.sizes[index, 0] = columns
        self.sizes[index, 1] = rows  # last, because it tells other workers that the canvas is complete


class EpochSampler(Sampler[tuple[int, int]]):
    """Sampler that yields the keys (epoch, index) of all examples in an order that depends on `seed` and the epoch alone.

    The epoch is part of the key, because persistent workers have copies of the data set in which it cannot be changed later.
    Lightning calls `set_epoch` before each epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


def batches(
    dataset: Examples,
    batch_size: int,
    workers: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> DataLoader:
    """Return a data loader for a data set. Batches are made by `collate_fn` (default: `collate`).

    With `shuffle`, each epoch has a new random order, and an incomplete last batch is dropped. If n processes train
    together, the process with rank r gets the examples r, r + n, r + 2n, ... of each batch (with `shuffle`) or of the data
    set (without). If the `workers` deliver no batch for 10 minutes (BATCH_TIMEOUT_S), the loader raises RuntimeError.
    """
    (rank, processes), batch_size = data_parallel.rank_and_world_size(), min(batch_size, len(dataset))
    if shuffle:
        # An incomplete last batch is dropped, because batch norm fails on a single image.
        sampler = dataset.sampler(seed)
        batch_sampler = data_parallel.SharedBatches(sampler, min(batch_size, len(sampler)))
        sampling: dict[str, Any] = {"batch_sampler": batch_sampler}
    else:
        sampling = {"sampler": range(rank, len(dataset), processes), "batch_size": max(1, batch_size // processes)}
    return DataLoader(
        dataset,
        **sampling,
        collate_fn=collate_fn or collate,
        num_workers=workers,
        timeout=BATCH_TIMEOUT_S if workers else 0,
        persistent_workers=workers > 0,
        # Only forked processes share the canvases in memory.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        # A separate generator, because drawing the workers' seeds from the global generator would change dropout.
        generator=torch.Generator(),
        worker_init_fn=_limit_threads,
    )


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of n examples of an `XrayDataset`, as a dict.

    `pixels` (n, side, side), `label` (n, classes), `none` (n,) and `index` (n,) are tensors. `boxes` and `findings` are
    lists with one tensor, (k, 4) and (k,), per example.
    """
    stacked = {name: torch.stack([example[name] for example in examples]) for name in ("pixels", "label", "none")}
    index = torch.tensor([example["index"] for example in examples])
    lists = {name: [example[name] for example in examples] for name in ("boxes", "findings")}
    return {**stacked, **lists, "index": index}


def _limit_threads(_: int) -> None:
    """Limit a data loader's worker to one thread, because there is one worker per core and more threads would be slower."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
