"""Time in which the machine ran something else: other processes here, and other machines."""

from pathlib import Path
from time import perf_counter

STAT = Path("/proc/stat")
TASKS = Path("/proc/self/task")
TICKS_PER_SECOND = 100


class LostTime:
    """Counts from when it is made. Off Linux nothing is known to be lost."""

    def __init__(self):
        self._begin = perf_counter()
        self._stolen = stolen_seconds()
        self._waited = waited_seconds()

    def share(self) -> float:
        """Seconds lost since then over seconds gone by: the longer of the two waits.

        The hypervisor's is counted in hundredths of a second, over all cores.
        """
        lost = max(stolen_seconds() - self._stolen, waited_seconds() - self._waited)
        return max(lost, 0.0) / (perf_counter() - self._begin)


def stolen_seconds(stat: Path = STAT) -> float:
    """What the hypervisor has given to other machines so far."""
    if not stat.exists():
        return 0.0
    fields = stat.read_text().split("\n", 1)[0].split()
    return int(fields[8]) / TICKS_PER_SECOND if len(fields) > 8 else 0.0


def waited_seconds(tasks: Path = TASKS) -> float:
    """How long threads of this process have been ready to run, and had no core."""
    waited = 0
    for path in tasks.glob("*/schedstat"):
        try:
            waited += int(path.read_text().split()[1])
        except OSError:
            # The thread has ended meanwhile.
            continue
    return waited / 1e9
