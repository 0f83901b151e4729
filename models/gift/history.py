"""Counts, sums and recencies of past events, for millions of (group, time) queries at once.

An event becomes one integer key, group * span + time; sorted keys, `searchsorted` and cumulative sums then give
everything exactly in int64. "Past" is strictly before: an event at the query's own time is not in it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from models.trainer import InputError


class Axis:
    """Maps (group, time) to one sortable int64, for times from `first` to `last`, the last query.

    Later times are clipped to `last`: past of no query, they need no more than that.

    Raises:
        InputError: the keys would not fit into 62 bits.
    """

    def __init__(self, first: int, last: int, n_groups: int) -> None:
        self.first, self.last, self.span = first, last, last - first + 1
        if n_groups * self.span >= 2**62:
            got = f"got {first} to {last}; correct the outlier"
            raise InputError(f"timestamps: expected one period in Unix milliseconds, {got}")

    def relative(self, times: np.ndarray) -> np.ndarray:
        return np.clip(times, self.first, self.last) - self.first


class Events:
    """Events of one kind, sorted by (group, time).

    Args:
        group: [M] dense codes; events with -1 (a group without queries) are dropped.
        times, value: [M] int64.
    """

    def __init__(self, axis: Axis, group: np.ndarray, times: np.ndarray, value: np.ndarray | None = None) -> None:
        known = group >= 0
        key = group[known] * axis.span + axis.relative(times[known])
        self._span = axis.span
        if value is None:
            self.key = np.sort(key)
        else:
            order = np.argsort(key)
            self.key, self._value = key[order], value[known][order]

    @cached_property
    def total_time(self) -> np.ndarray:
        """[M + 1] sums of the times of the first 0, 1, ... events."""
        return _totals(self.key % self._span)

    @cached_property
    def total_value(self) -> np.ndarray:
        return _totals(self._value)


def _totals(values: np.ndarray) -> np.ndarray:
    totals = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=totals[1:])
    return totals


class Past:
    """What of `events` lies before each query, in the whole past (window None) or in the last `window` ms.

    Queries, `base` (group * span) and `now` (time on the axis), come sorted by (group, time): neighbouring
    searches then touch neighbouring memory. Index ranges, in the part of the events that lies between the first
    and the last query, are remembered per window. N >= 1.
    """

    def __init__(self, events: Events, base: np.ndarray, now: np.ndarray) -> None:
        self._events, self._base, self._now = events, base, now
        low, high = np.searchsorted(events.key, (base[0], base[-1] + now[-1]))
        self._key, self._sums = events.key[low:high], slice(low, high + 1)  # what these queries can find
        self._begins: dict[int, np.ndarray] = {}

    @cached_property
    def _first(self) -> np.ndarray:
        """[N] index of the group's first event."""
        return np.searchsorted(self._key, self._base)

    @cached_property
    def _end(self) -> np.ndarray:
        """[N] index after the last event before now."""
        return np.searchsorted(self._key, self._base + self._now)

    def _begin(self, window: int | None) -> np.ndarray:
        """[N] index of the first event at or after now - window."""
        if window is None:
            return self._first
        if window not in self._begins:
            since = np.maximum(self._now - window, 0)
            self._begins[window] = np.searchsorted(self._key, self._base + since)
        return self._begins[window]

    def count(self, window: int | None) -> np.ndarray:
        """[N] int64 number of events."""
        return self._end - self._begin(window)

    def value(self, window: int | None) -> np.ndarray:
        """[N] int64 sum of the events' values."""
        totals = self._events.total_value[self._sums]
        return totals[self._end] - totals[self._begin(window)]

    def lapse(self, window: int | None) -> np.ndarray:
        """[N] int64 sum over the events of the time since each; less the same sum as of now - window."""
        lapse = self._lapse(self._end, self._now)
        return lapse if window is None else lapse - self._lapse(self._begin(window), self._now - window)

    def _lapse(self, end: np.ndarray, now: np.ndarray) -> np.ndarray:
        totals = self._events.total_time[self._sums]
        return (end - self._first) * now - (totals[end] - totals[self._first])

    def since_last(self) -> np.ndarray:
        """[N] float64 time since the last event, NaN where there is none."""
        if not len(self._key):
            return np.full(len(self._now), np.nan)
        last = self._key[np.maximum(self._end - 1, 0)] - self._base
        return np.where(self._end > self._first, (self._now - last).astype(np.float64), np.nan)
