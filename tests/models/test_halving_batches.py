"""Batches: pieces become smaller for good when memory runs out; results keep their order; other errors are raised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kitlib.models.halving_batches import HalvingBatches

CPU = torch.device("cpu")


class Doubling:
    """Doubles each number of a piece; memory runs out at more than `memory` numbers."""

    def __init__(self, memory):
        self.memory, self.sizes = memory, []

    def __call__(self, piece):
        self.sizes.append(len(piece))
        if len(self.sizes) > 100:
            pytest.fail("a batch is repeated without an end")
        if len(piece) > self.memory:
            raise torch.OutOfMemoryError("out of memory")
        return [2 * number for number in piece.tolist()]


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
def test_results_are_those_of_one_batch_and_pieces_fit_for_good(numbers, size, memory):
    batches, compute = HalvingBatches("model", CPU, size), Doubling(memory)
    pixels = torch.arange(numbers)
    assert batches(compute, pixels) == [2 * number for number in range(numbers)]
    assert batches.size == size if min(size, numbers) <= memory else batches.size <= memory
    assert sum(each for each in compute.sizes if each <= memory) == numbers  # none is computed twice
    assert max(compute.sizes, default=0) == min(size, numbers)
    # The next batch does not try again what did not fit.
    again = Doubling(memory)
    assert batches(again, pixels) == [2 * number for number in range(numbers)]
    assert max(again.sizes, default=0) == min(batches.size, numbers) <= memory


@pytest.mark.parametrize("numbers", [1, 2, 7])
def test_an_image_that_does_not_fit_alone_raises_the_error(numbers):
    with pytest.raises(torch.OutOfMemoryError):
        HalvingBatches("model", CPU, 4)(Doubling(0), torch.arange(numbers))


def test_other_errors_are_raised_at_once():
    pieces = []

    def compute(piece):
        pieces.append(len(piece))
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        HalvingBatches("model", CPU, 4)(compute, torch.arange(8))
    assert pieces == [4]


def test_pieces_are_moved_to_the_device():
    devices = HalvingBatches("model", torch.device("meta"), 2)(lambda piece: [piece.device.type] * len(piece), torch.ones(3))
    assert devices == ["meta"] * 3
