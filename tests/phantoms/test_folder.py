"""How many processes draw phantoms, and the hash of the code that draws them."""

import re

import pytest

from kitlib.phantoms.folder import choose_workers, hash_code, map_in_order


@pytest.mark.parametrize(("images", "workers"), [(0, 1), (99, 1), (100, 2), (101, 2), (399, 4), (400, 4), (10_000, 4)])
def test_each_hundred_images_gets_a_process_up_to_the_number_of_cores(monkeypatch, images, workers):
    monkeypatch.setattr("kitlib.phantoms.folder.usable_cores", lambda: 4)
    assert choose_workers(images) == workers


def test_the_hash_of_the_code_depends_on_the_modules():
    hashes = {hash_code(), hash_code("kitlib.phantoms.nih"), hash_code("kitlib.phantoms.siim")}
    assert len(hashes) == 3 and all(re.fullmatch("[0-9a-f]{16}", text) for text in hashes)


@pytest.mark.parametrize("workers", [0, 1])
def test_one_worker_is_this_process_and_results_keep_their_order(workers):
    seen = []

    def write(number):
        seen.append(number)
        return -number

    assert list(map_in_order(write, [3, 1, 2], workers, 64)) == [-3, -1, -2] and seen == [3, 1, 2]
