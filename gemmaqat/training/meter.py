"""How far a run is and how fast: a progress bar where there is one, else a line now and then."""

import time
from collections.abc import Callable
from typing import Any

from absl import logging

from gemmaqat.training.records import Records

# `progress(total=, initial=, desc=, unit=)` gives an object with `update`, `set_postfix` and
# `close`; `tqdm.tqdm` is one.
Progress = Callable[..., Any]

_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Shows the progress of one run and writes its rates to timing.jsonl."""

    def __init__(
        self, name: str, records: Records, progress: Progress | None, step: int, num_steps: int
    ) -> None:
        self.name, self.records, self.num_steps = name, records, num_steps
        self.bar = progress and progress(total=num_steps, initial=step, desc=name, unit="step")
        # Clocks start at the end of this call's first step: compilation is no part of a rate.
        self.first_step: int | None = None
        self.start = self.window = self.logged = time.perf_counter()
        self.window_step, self.tokens = step, 0

    def update(self, step: int, loss: float, tokens: int, record_every: int) -> None:
        """Takes the numbers of the step that has just ended, in order."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update(1)
        elif now - self.logged > _SECONDS_BETWEEN_LINES or step == self.num_steps:
            pace = ""
            if self.first_step is not None:
                rate = (step - self.first_step) / (now - self.start)
                pace = f", {rate:.2f} steps/s, {(self.num_steps - step) / rate:.0f} s left"
            logging.info("%s: step %d/%d, loss %.4f%s", self.name, step, self.num_steps, loss, pace)
            self.logged = now
        if self.first_step is None:
            self.first_step, self.start = step, now
            self.window_step, self.window = step, now
            return
        self.tokens += tokens
        if step % record_every == 0:
            seconds = now - self.window
            self.records.timing(
                step,
                {
                    "time/step_seconds": seconds / (step - self.window_step),
                    "time/tokens_per_second": self.tokens / seconds,
                },
            )
            self.window_step, self.window, self.tokens = step, now, 0

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
