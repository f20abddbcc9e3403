"""The clock: it counts what a (pretended) device has finished, and ends before the budget does."""

import time

import pytest

from harness.run import Clock, Step


class Machine:
    """A host and a device with one time line: work is queued in order, an event waits for it."""

    def __init__(self):
        self.time, self.free_at = 1000.0, 1000.0  # of the host; of the device
        self.unfinished: list[Event] = []

    def now(self) -> float:
        return self.time

    def queue(self, seconds: float) -> "Event":
        event = Event(self, max(self.time, self.free_at), seconds)
        self.free_at = event.end
        self.unfinished.append(event)
        return event

    def ahead(self) -> int:
        """Return how many queued steps the device has not finished."""
        self.unfinished = [event for event in self.unfinished if event.end > self.time]
        return len(self.unfinished)


class Event:
    def __init__(self, machine: Machine, start: float, seconds: float):
        self.machine, self.start, self.end = machine, start, start + seconds

    def synchronize(self) -> None:
        self.machine.time = max(self.machine.time, self.end)


def drive(budget: float, device_seconds, host_seconds: float = 0.0):
    """Run steps as the run's loop does; device_seconds(k): what step k takes on the device.

    Return the clock, the machine, and of each step (Step, Event, steps ahead when it was queued).
    """
    machine, log = Machine(), []
    clock = Clock(budget, machine.now)
    clock.start()
    while clock.fits():
        step = Step(len(log), min(clock.next_start() / budget, 1.0), 1)
        ahead = machine.ahead()
        machine.time += host_seconds
        event = machine.queue(device_seconds(len(log)))
        log.append((step, event, ahead))
        clock.queued.append((event, step))
        list(clock.settle(Clock.MAX_AHEAD))
    list(clock.settle(0))
    return clock, machine, log


# Binary fractions, so that sums are exact and "the last one that fits" has one answer.
@pytest.mark.parametrize("host", [0.0, 0.125, 0.5])
@pytest.mark.parametrize("step", [0.125, 0.375, 1.0])
def test_constant_steps_fill_the_budget_and_never_exceed_it(step, host):
    clock, machine, log = drive(16.0, lambda k: step, host)
    each = max(step, host)  # what a step costs once the pipeline is full
    used = log[-1][1].end - 1000.0
    assert clock.seconds == used <= 16.0
    assert used + each + host > 16.0  # one more would not have fitted


def test_the_budget_holds_for_a_single_step_that_fills_it():
    clock, _, log = drive(1.0, lambda k: 0.25)
    assert (clock.seconds, len(log)) == (1.0, 4)


def test_a_run_of_uneven_steps_expects_the_slowest_of_late():
    clock, _, log = drive(16.0, lambda k: 1.0 if k % 5 == 4 else 0.25)
    assert clock.seconds <= 16.0
    assert clock.seconds > 16.0 - 2 * 1.0


def test_the_host_is_never_more_than_max_ahead_ahead():
    _, _, log = drive(16.0, lambda k: 0.25)
    aheads = [ahead for _, _, ahead in log]
    assert max(aheads) == Clock.MAX_AHEAD  # it does run ahead, and no further
    assert set(aheads[Clock.MAX_AHEAD :]) == {Clock.MAX_AHEAD}


def test_progress_is_the_share_gone_when_the_device_begins_the_step():
    _, _, log = drive(16.0, lambda k: 0.25)
    for step, event, _ in log[Clock.MAX_AHEAD + 1 :]:
        assert step.progress == pytest.approx((event.start - 1000.0) / 16.0)
    progresses = [step.progress for step, *_ in log]
    assert progresses[0] == 0.0 and progresses == sorted(progresses)
    assert progresses[-1] == pytest.approx(1 - 0.25 / 16.0)  # schedules reach their end


def test_seconds_count_finished_steps_only():
    machine = Machine()
    clock = Clock(16.0, machine.now)
    clock.start()
    steps = [Step(k, 0.0, 1) for k in range(3)]
    for step in steps:
        clock.queued.append((machine.queue(2.0), step))
    assert clock.seconds == 0.0 and machine.time == 1000.0  # queueing waits for nothing
    assert list(clock.settle(2)) == steps[:1] and clock.seconds == 2.0
    assert clock.next_start() == 6.0  # two more of the same are queued
    assert list(clock.settle(0)) == steps[1:] and clock.seconds == 6.0
    assert [step.seconds for step in steps] == [2.0, 2.0, 2.0]


def test_a_host_that_stops_between_steps_pays_for_it():
    machine = Machine()
    clock = Clock(4.0, machine.now)
    clock.start()
    clock.queued.append((machine.queue(1.0), Step(0, 0.0, 1)))
    list(clock.settle(0))
    machine.time += 2.5
    clock.queued.append((machine.queue(0.5), Step(1, 0.0, 1)))
    list(clock.settle(0))
    assert clock.seconds == 4.0 and not clock.fits()


def test_setting_the_time_of_the_machine_changes_nothing(monkeypatch):
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    clock, started = Clock(0.2), time.perf_counter()
    assert clock.now in (time.perf_counter, time.monotonic)
    clock.start()
    steps = 0
    while clock.fits():
        time.sleep(0.01)
        clock.queued.append((None, Step(steps, 0.0, 1)))
        list(clock.settle(Clock.MAX_AHEAD))
        steps += 1
    list(clock.settle(0))
    assert steps > 3
    assert clock.seconds == pytest.approx(time.perf_counter() - started, abs=0.05)
