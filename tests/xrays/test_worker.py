"""Worker processes start from several threads at once."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from kitlib.xrays.worker import LightContext


def test_processes_started_by_several_threads_keep_the_main_module():
    main, context = sys.modules["__main__"], LightContext()
    processes = [context.Process(target=os.getpid) for _ in range(3)]
    with ThreadPoolExecutor(len(processes)) as threads:
        list(threads.map(lambda process: process.start(), processes))
    for process in processes:
        process.join()
    assert sys.modules["__main__"] is main and {process.exitcode for process in processes} == {0}
