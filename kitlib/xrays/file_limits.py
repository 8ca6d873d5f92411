"""Sets the time limit for decoding one file, and lowers it once slow files have used up their share of the time."""

from bisect import insort

from kitlib.xrays.worker import Outcome

# Share of the time that files slower than SHORTEST_S may use before the limit is lowered.
SLOW_SHARE = 0.1
# The limit of one file is this share of what remains for slow files, so that the first ones get as much as they need.
FILE_SHARE = 0.1
SHORTEST_S = 5.0  # the limit is never lower, because a busy machine may interrupt any file for seconds
TIMES_USUAL = 10  # nor is it lower than this multiple of a usual file's time, because on a slow machine all files are slow
# A usual file's time is this quantile, low so that slow files do not raise it, of the times of at least USUAL_FILES files.
USUAL_QUANTILE, USUAL_FILES = 0.1, 10


class FileLimits:
    """Decides how many seconds each file may take to decode: at most `longest_s`, less after many slow files.

    A single file that takes nearly `longest_s` does no harm, but a thousand such files would use up all the time. `files` is
    the number of files, `workers` the number of decoding processes. `seconds` is the time for all work, not only for
    decoding. Call `next_limit` before each file and `count` with each Outcome.
    """

    def __init__(self, longest_s: float, seconds: float, workers: int, files: int) -> None:
        self.longest_s = self.lowest_s = longest_s
        self.slow, self.slow_s = 0, 0.0  # number of files slower than SHORTEST_S, and their seconds
        self._remaining_s = SLOW_SHARE * seconds * workers
        # If all files took this long, half of the time would be gone.
        self._highest_floor_s = 0.5 * seconds * workers / max(1, files)
        self._decoded_s: list[float] = []

    def next_limit(self) -> float:
        """Return the time limit of the next file, in seconds."""
        floor = SHORTEST_S
        if len(self._decoded_s) >= USUAL_FILES:
            usual = self._decoded_s[int(USUAL_QUANTILE * len(self._decoded_s))]
            floor = max(floor, min(TIMES_USUAL * usual, self._highest_floor_s))
        limit = min(self.longest_s, max(floor, FILE_SHARE * self._remaining_s))
        self.lowest_s = min(self.lowest_s, limit)
        return limit

    def count(self, outcome: Outcome) -> None:
        """Record the decoding time of a finished file, from which later limits are computed."""
        if outcome.status == "decoded":
            insort(self._decoded_s, outcome.seconds)
        if outcome.seconds >= SHORTEST_S:
            self.slow += 1
            self.slow_s += outcome.seconds
            self._remaining_s -= outcome.seconds

    @property
    def note(self) -> str:
        """Text on the time of slow files and the lowered limit; "" without slow files, or if the limit was not lowered."""
        if not self.slow or self.lowest_s == self.longest_s:
            return ""
        return (
            f"these files took {SHORTEST_S:g} s or more each, {self.slow_s:.0f} s in all; the time limit was lowered from "
            f"{self.longest_s:g} s to {self.lowest_s:.3g} s"
        )
