"""What a call costs, on a machine that does other things as well."""

import gc
import time


def cpu_s(function, *arguments):
    """CPU seconds of this thread in a call, without those of collecting other tests' garbage."""
    gc.disable()
    try:
        start = time.thread_time()
        function(*arguments)
        return time.thread_time() - start
    finally:
        gc.enable()
