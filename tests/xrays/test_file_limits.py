"""Limits of single files, simulated: no file is decoded and no time passes."""

import pytest

from kitlib.xrays.file_limits import SHORTEST_S, FileLimits
from kitlib.xrays.worker import Outcome

PLANNED_S = 0.65 * 9 * 3600


def decode(seconds, planned_s=PLANNED_S, workers=2, longest_s=20.0):
    """Return the limits after files that need `seconds` each, the indices of those lost, and all workers' seconds."""
    limits, lost, spent = FileLimits(longest_s, planned_s, workers, len(seconds)), [], 0.0
    for index, needed in enumerate(seconds):
        limit = limits.next_limit()
        if needed > limit:
            lost.append(index)
        used = min(needed, limit)
        spent += used
        limits.count(Outcome(str(index), "failed" if needed > limit else "decoded", seconds=used))
    return limits, lost, spent


@pytest.mark.parametrize("crafted_s", [19.9, 60.0], ids=["decoded in the end", "never decoded"])
@pytest.mark.parametrize("order", ["first", "last", "mixed"])
def test_a_thousand_slow_files_cost_a_third_of_the_time_at_most_and_no_normal_file(crafted_s, order):
    crafted, normal = [crafted_s] * 1000, [0.3] * 1000
    files = {"first": crafted + normal, "last": normal + crafted, "mixed": [crafted_s, 0.3] * 1000}[order]
    limits, lost, spent = decode(files)
    # 20,000 s of decoding in two processes would be half of the planned 21,060 s.
    assert spent / 2 < PLANNED_S / 3
    assert {files[index] for index in lost} == {crafted_s}
    assert "lowered from 20 s to 5 s" in limits.note


def test_a_few_slow_files_are_given_their_time():
    limits, lost, _ = decode([19.9] * 10 + [0.3] * 1200)
    assert not lost and limits.note == ""


@pytest.mark.parametrize("usual_s", [0.5, 2.0, 6.0])
def test_on_a_slow_machine_no_file_is_lost(usual_s):
    # Files differ by a factor of up to three; at 6 s they take 4,800 of the planned 21,060 s, and many last longer than 5 s.
    _, lost, _ = decode([usual_s, usual_s, 2 * usual_s, 3 * usual_s] * 200)
    assert lost == []


def test_short_limits_leave_each_file_five_seconds():
    limits, lost, _ = decode([4.9] * 100, planned_s=10.0)
    assert SHORTEST_S == 5.0 and lost == [] and limits.lowest_s == 5.0


def test_files_never_get_more_than_the_longest_limit():
    assert decode([1.0] * 20, longest_s=2.0)[0].lowest_s == 2.0


def test_without_files_there_is_a_limit():
    assert decode([])[0].next_limit() == 20.0


@pytest.mark.parametrize(
    ("outcomes", "limit_s"),
    [
        ({"failed": 4.0}, 5.0),  # files that fail say nothing about the machine
        ({"decoded": 1.0}, 10.0),  # ten times what they take
        ({"cached": 0.0, "decoded": 1.0}, 10.0),
    ],
)
def test_only_decoded_files_tell_what_usual_files_take(outcomes, limit_s):
    # A tenth of 200 s in two processes, and of that a tenth, would be 4 s for a file.
    limits = FileLimits(20.0, 200.0, 2, 10)
    for status, seconds in outcomes.items():
        for number in range(10):
            limits.count(Outcome(str(number), status, seconds=seconds))
    assert limits.next_limit() == limit_s


@pytest.mark.parametrize(
    ("times", "limit_s"),
    [
        ([], 8.0),  # slow files have a tenth of 400 s in two processes, 80 s, and each has a tenth of what remains
        ([10.0], 7.0),
        ([5.0], 7.5),
        ([4.9], 8.0),
        ([1.0, *[1.5] * 8], 8.0),  # nine files do not tell what is usual
        ([1.0, *[1.5] * 9], 15.0),  # ten times the second of ten, in order of time
        ([4.0] * 10, 20.0),  # 20 files of 20 s take half of the 800 s
    ],
)
def test_the_limit_follows_from_what_remains_and_from_what_usual_files_take(times, limit_s):
    limits = FileLimits(100.0, 400.0, 2, 20)
    for number, seconds in enumerate(times):
        limits.count(Outcome(str(number), "decoded", seconds=seconds))
    assert limits.next_limit() == pytest.approx(limit_s)
    slow = [seconds for seconds in times if seconds >= 5]
    assert (limits.slow, limits.slow_s, limits.lowest_s) == (len(slow), sum(slow), pytest.approx(limit_s))
