"""Worker processes start from several threads at once, and what identifies the content of a file."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from kitlib.xrays.json_header import MAX_JSON_BYTES
from kitlib.xrays.worker import LightContext, source_of


def test_processes_started_by_several_threads_keep_the_main_module():
    main, context = sys.modules["__main__"], LightContext()
    processes = [context.Process(target=os.getpid) for _ in range(3)]
    with ThreadPoolExecutor(len(processes)) as threads:
        list(threads.map(lambda process: process.start(), processes))
    for process in processes:
        process.join()
    assert sys.modules["__main__"] is main and {process.exitcode for process in processes} == {0}


def test_a_file_is_identified_by_its_size_its_time_and_64_kib_at_three_places(tmp_path):
    path, kib = tmp_path / "x.dcm", 1024
    whole = bytes(number % 251 for number in range(300 * kib))

    def source(content):
        path.write_bytes(content)
        os.utime(path, ns=(0, 1_700_000_000_123_456_789))
        return source_of(str(path))

    before = source(whole)
    assert before["source_bytes"] == str(300 * kib) and before["source_mtime_ns"] == "1700000000123456789"
    # The beginning, the middle (the same distance from either end) and the end.
    inside = {(0, 64), (118, 182), (236, 300)}
    for first, last in [*inside, (64, 118), (182, 236)]:
        for place in (first * kib, last * kib - 1):
            changed = source(whole[:place] + b"\xff" + whole[place + 1 :])
            differs = {name for name in before if changed[name] != before[name]}
            assert differs == ({"source_samples"} if (first, last) in inside else set()), place
    assert source(whole[:10]) != source(whole[:9] + b"\xff")  # a small file is sampled as a whole
    assert source(b"")["source_bytes"] == "0"


def test_the_json_header_of_a_png_is_part_of_its_content(tmp_path):
    (tmp_path / "x.png").write_bytes(b"pixels")
    digests = [source_of(str(tmp_path / "x.png"))]
    for text in ("{}", "[]", "[]".ljust(MAX_JSON_BYTES)):
        (tmp_path / "x.json").write_text(text)
        digests.append(source_of(str(tmp_path / "x.png")))
    assert len({digest["source_samples"] for digest in digests}) == 4
