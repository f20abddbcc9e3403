"""The clock of the time budget. Not edited; a part of the rules."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from harness.gpu import seconds_between


class Clock:
    """Counts the budget, in seconds, by what the device has finished; the host runs ahead."""

    # Steps that the host may have queued: enough to hide launches, and no more.
    MAX_AHEAD = 2

    def __init__(self, budget: float, now: Callable[[], float] = time.perf_counter):
        self.budget = budget
        self.now = now
        self.running = False
        self.started_at: float | None = None
        self.seconds = 0.0  # from the start to the end of the last finished step
        # Of the last steps, to judge the next by.
        self.durations: deque[float] = deque(maxlen=8)
        self.queued: deque = deque()  # (CUDA event at its end, None on a CPU; step)
        self.last_event = None  # of the last finished step
        self.starved = 0  # steps that the device was idle before

    def start(self) -> None:
        self.started_at = self.now()
        self.running = True

    def queue(self, event, step) -> None:
        """Take note of a step, all of which is queued on the device; event: its end."""
        self.queued.append((event, step))

    def begin(self) -> None:
        """Take note that the host begins a step: is all done that was queued before?

        Not asked when a step has been queued: CUDA lets about 1000 launches wait
        (forums.developer.nvidia.com/t/68937), so the host has queued a longer step only when
        the device is in the middle of it, and the step before is always over.
        """
        if self.queued:
            event, _ = self.queued[-1]
            self.starved += event is not None and event.query()

    def settle(self, ahead: int) -> Iterator:
        """Wait until at most `ahead` steps are unfinished; yield the finished ones, timed."""
        while len(self.queued) > ahead:
            event, step = self.queued.popleft()
            if event is not None:
                event.synchronize()
            end = self.now() - self.started_at
            step.seconds, self.seconds = end - self.seconds, end
            if self.last_event is not None:  # a host that looks late sees two end at once
                step.seconds = seconds_between(self.last_event, event)
            self.last_event = event
            self.durations.append(step.seconds)
            yield step

    def next_start(self) -> float:
        """Return the seconds after the start at which the device will begin the next step."""
        mean = sum(self.durations) / max(len(self.durations), 1)
        return self.seconds + len(self.queued) * mean

    def fits(self) -> bool:
        """Return whether one more step, as slow as the slowest of late, ends within the budget."""
        return self.next_start() + max(self.durations, default=0.0) <= self.budget
