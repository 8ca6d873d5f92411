"""Descriptions of models for tests of systems; no bundle is read."""

from pathlib import Path

from kitlib.inference.answer import AnsweringModel


def describe_model(name, *answers, fold=0, classes=(), longest_side=64, wants_masks=False) -> AnsweringModel:
    """Return the description of a model whose bundle is in the folder NAME-foldFOLD, and which predicts `answers`."""
    return AnsweringModel(
        folder=Path(f"{name}-fold{fold}"),
        model=name,
        fold=fold,
        answers=frozenset(answers),
        longest_side=longest_side,
        wants_masks=wants_masks,
        masked=False,
        segmenter="",
        data_fingerprint="",
        classes=tuple(classes),
    )
