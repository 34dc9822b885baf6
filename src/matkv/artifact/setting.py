"""How a cache was set when something was measured with it."""

from __future__ import annotations

# What a row was measured with: another row with equal values of these is the same measurement.
CACHE_KEYS = ("artifact", "ranks", "budget", "sink", "recent", "dtype")
