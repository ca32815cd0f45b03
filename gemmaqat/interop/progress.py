"""How far a long pass over weights is: a bar where there is one, else a line now and then."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from absl import logging

# `progress(total=, desc=, unit=, unit_scale=)` gives an object with `update` and `close`;
# `tqdm.tqdm` is one.
Progress = Callable[..., Any]

_SECONDS_BETWEEN_LINES = 10.0


class Pass:
    """One pass over `total` weights; a context manager."""

    def __init__(self, name: str, total: int, progress: Progress | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self.bar = progress and progress(total=total, desc=name, unit="weight", unit_scale=True)
        self.start = self.logged = time.perf_counter()

    def update(self, weights: int) -> None:
        """Takes the number of weights that have just been dealt with."""
        self.done += weights
        if self.bar is not None:
            self.bar.update(weights)
            return
        now = time.perf_counter()
        if now - self.logged > _SECONDS_BETWEEN_LINES:
            rate = self.done / (now - self.start)
            left = max(0, self.total - self.done) / rate
            logging.info("%s: %.0f %%, %.0f s left", self.name, 100 * self.done / self.total, left)
            self.logged = now

    def __enter__(self) -> "Pass":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
