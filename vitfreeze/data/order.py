"""Which sample comes when, and with which random numbers: pure functions of (seed, epoch).

Nothing here knows of ranks or worker processes. The order of an epoch is made in two draws. The shards are
permuted, then cut into windows of `window_shards` consecutive ones, and the samples of each window are permuted
together. So all reads at one time fall into few shards (which a page cache or a bounded download cache holds), any
place of the epoch is reached by permuting one window, and the seed and the epoch alone decide everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

# Separates the streams drawn from one user seed; the values mean nothing.
_SHARD_STREAM, _WINDOW_STREAM = 1, 2


class EpochOrder:
    """The order of the samples of every epoch.

    A sample's index is its place in the concatenation of all shards as they are listed, so it names the same
    photograph in every epoch.

    Args:
        lengths: samples in each shard.
        seed: the run's seed.
        window_shards: how many shards are shuffled together. More mixes better and reads less locally.

    Raises:
        ValueError: no window, or no sample.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int, window_shards: int = 16) -> None:
        if window_shards < 1:
            raise ValueError(f"window_shards is {window_shards}; at least 1 shard must be shuffled at a time")
        if not sum(lengths):
            raise ValueError(f"the {len(lengths)} shards hold no sample")
        self.seed = seed
        self.window_shards = window_shards
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.num_samples = int(self.starts[-1])
        self._epoch = -1
        self._shards: np.ndarray = np.empty(0, dtype=np.int64)
        self._window_ends: np.ndarray = np.empty(0, dtype=np.int64)
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the sample indices at places start..stop of an epoch, (stop - start,) int64.

        Raises:
            ValueError: the range reaches outside the epoch.
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"places {start}..{stop} reach outside an epoch of {self.num_samples} samples")
        self._enter(epoch)
        pieces: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
        window = int(np.searchsorted(self._window_ends, start, side="right"))
        while start < stop:
            end = int(self._window_ends[window])
            samples = self._window(epoch, window)
            begin = end - len(samples)
            pieces.append(samples[start - begin : min(stop, end) - begin])
            start, window = min(stop, end), window + 1
        return np.concatenate(pieces)

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._shards = np.random.default_rng([self.seed, _SHARD_STREAM, epoch]).permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[self._shards])
        last = np.append(np.arange(self.window_shards, len(ends), self.window_shards), len(ends)) - 1
        self._window_ends = ends[last]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Return the shuffled samples of one window; the last two are remembered, as a batch may span both."""
        known = self._windows.get((epoch, window))
        if known is not None:
            return known
        shards = self._shards[window * self.window_shards : (window + 1) * self.window_shards]
        samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards])
        np.random.default_rng([self.seed, _WINDOW_STREAM, epoch, window]).shuffle(samples)
        while len(self._windows) > 1:
            del self._windows[next(iter(self._windows))]
        self._windows[epoch, window] = samples
        return samples


def find_places(
    step: int, *, steps_per_epoch: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[tuple[int, range]]:
    """Yield the epoch, and the places in it of the crops, of every micro-batch of a rank in an optimizer step.

    Global batch s of an epoch is places s*G..(s+1)*G; micro-batch m of rank r is its places (m * world_size + r) *
    micro_batch onward.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    for number in range(global_batch // (micro_batch * world_size)):
        start = step_in_epoch * global_batch + (number * world_size + rank) * micro_batch
        yield epoch, range(start, start + micro_batch)


class SampleRandom:
    """Random numbers that belong to one crop of one sample in one epoch, wherever it is drawn.

    Philox is counter-based: (epoch, sample, crop) are placed in its counter and the seed in its key, so every crop
    owns a stream of 2**64 blocks that meets no other, and no hash can collide. One object is moved from stream to
    stream because building a numpy generator costs three times as much (20 us against 7).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._philox = np.random.Philox(key=seed)
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def __reduce__(self) -> tuple:
        return SampleRandom, (self.seed,)

    def seek(self, *, epoch: int, sample: int, crop: int) -> None:
        """Go to the beginning of a crop's stream."""
        # numpy's state keeps the counter's four words (least significant first) and the words already made
        self._state["state"]["counter"][:] = (0, crop, epoch, sample)
        self._state["buffer_pos"] = 4
        self._state["has_uint32"] = 0
        self._philox.state = self._state

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` float64 in [0, 1)."""
        return self._generator.random(count)

    def fill(self, out: np.ndarray) -> None:
        """Fill a contiguous float32 array from [0, 1). Drawn in single precision: rounding a double could give 1."""
        self._generator.random(out=out, dtype=np.float32)

    def integer(self) -> int:
        """Return an integer in [0, 2**32), to seed someone else's generator with."""
        return int(self._generator.integers(2**32))
