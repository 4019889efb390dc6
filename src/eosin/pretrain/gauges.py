"""Instruments of the training loop: a clock that tells waiting from working, a watch on NaN, an ear for signals."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from eosin.errors import NonFiniteError
from eosin.pretrain.config import PretrainConfig
from eosin.pretrain.engine import Stepped

log = logging.getLogger(__name__)


class Stop:
    """Remembers that SIGTERM or SIGINT came, while it is entered; only in the main thread can they be heard."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def _hear(self, number: int, _: object) -> None:
        if self.name is not None:  # the second time: at once
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        log.warning("%s: the step under way is finished and saved", self.name)

    def __exit__(self, *_: object) -> None:
        """Put back who listened before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Clock:
    """Seconds since `restart`, and how many of them the device was without tiles."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begin anew, once the device has done what it was given."""
        self._synchronise()
        self._begun, self._waited = time.perf_counter(), 0.0

    def read(self) -> tuple[float, float]:
        """Return seconds, and seconds waited."""
        self._synchronise()
        return max(time.perf_counter() - self._begun, 1e-9), self._waited

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting, unless the device was busy until its end."""
        busy = torch.cuda.Event() if self.device.type == "cuda" else None
        if busy is not None:
            busy.record()
        begun = time.perf_counter()
        yield
        if busy is None or busy.query():
            self._waited += time.perf_counter() - begun

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class FirstBad:
    """The first step at which a part of the loss or a gradient was not finite, found without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._names: list[str] = []
        self._first = torch.empty(0, device=device)

    def note(self, step: int, stepped: Stepped) -> None:
        """Look at a step."""
        found = {**stepped.parts, **{f"gradient of the {name}": norm for name, norm in stepped.norms.items()}}
        fine = torch.stack([value.detach().float() for value in found.values()]).isfinite()
        if self._names != list(found):
            self._names, self._first = list(found), torch.zeros(len(found), device=fine.device)
        self._first = torch.where((self._first == 0) & ~fine, float(step), self._first)

    def check(self, config: PretrainConfig, saved: str) -> None:
        """Raise `NonFiniteError` naming the first thing that broke, and what to change."""
        first = self._first.tolist()
        broken = sorted((step, at) for at, step in enumerate(first) if step)
        if not broken:
            return
        step, at = broken[0]
        what = self._names[at]
        shown = what if what.startswith("gradient") else f"{what} loss"
        raise NonFiniteError(
            f"training failed at step {step:.0f}: the {shown} is NaN or infinite. Change one of: lower optimizer.lr "
            f"(now {config.lr:.2e} at the peak), set optimizer.clip to 1 (now {config.optimizer.clip:g}), set "
            f'optimizer.betas to [0.9, 0.99] (now {list(config.optimizer.betas)}), or run.precision to "fp32" (now '
            f'"{config.run.precision}"). {saved}; start anew in another --out'
        )
