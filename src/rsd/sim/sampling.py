"""robosuite's observables, over the physics substeps of control steps.

robosuite asks each of the 30 or so observables in each of the 25 substeps whether it is to take a sample. They all
follow the same clock, and in 23 of the substeps the answer is that only the clock goes on.
"""

from __future__ import annotations

from typing import Any

Clock = tuple[float, bool, float, float]  # seconds since the last sample, sampled, period, delay (s)


class Sampling:
    """`_update_observables` of a robosuite environment after each substep of ONE control step: `substep` n times, then
    `finish`. What is sampled when, and the clocks to their last bit, are robosuite's."""

    _time: float
    _sampled: bool
    _period: float
    _last_moment: float  # to sample at

    def __init__(self, simulation: Any) -> None:
        self._simulation = simulation
        self._observables = [each for each in simulation._observables.values() if each._enabled]
        self._timestep: float = simulation.model_timestep
        self._read()

    def substep(self) -> None:
        """Where all observables share their clock, and it neither asks for a sample nor starts anew, it alone goes on;
        otherwise this is robosuite's own update."""
        if self._shared:
            time = self._time + self._timestep
            if time < self._period and (self._sampled or time > self._last_moment):
                self._time = time
                return
        self.finish()
        self._simulation._update_observables()
        self._read()

    def finish(self) -> None:
        """Sets the observables' own clocks."""
        if self._shared:
            for observable in self._observables:
                observable._time_since_last_sample = self._time

    def _read(self) -> None:
        clocks: set[Clock] = {
            (each._time_since_last_sample, each._sampled, each._sampling_timestep, each._current_delay)
            for each in self._observables
        }
        self._shared = len(clocks) == 1
        if self._shared:
            ((self._time, self._sampled, self._period, delay),) = clocks
            self._last_moment = self._period - delay
