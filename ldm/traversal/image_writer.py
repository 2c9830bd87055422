"""Image files written by threads, while the next images are decoded. Pillow compresses beside other threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from ldm.images import Pixels, save_image

MOST_THREADS = 8
AHEAD = 4  # images a thread that wait at most, so that memory stays bounded


class ImageWriter:
    """Writes what it is given; on leaving its `with`, all of it is on the disk.

    An image that cannot be written raises there, or at a later `write`. Where the block fails or is interrupted, images
    that have not begun are dropped and the others completed: files are whole, and bear their names only then.

    Args:    done: called for each image once it is written, in their order, by the thread that writes to this.
    """

    def __init__(self, done: Callable[[int], object] = lambda count: None) -> None:
        threads = min(MOST_THREADS, os.cpu_count() or 1)
        self._most = AHEAD * threads
        self._done = done
        self._threads = ThreadPoolExecutor(threads, "image writer")
        self._waiting: deque[Future[None]] = deque()

    def write(self, path: Path, pixels: Pixels) -> None:
        """Take an image (H, W, 3), and wait where too many do already. Raises what an earlier one raised."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._most):
            self._collect()
        self._waiting.append(self._threads.submit(save_image, path, pixels))

    def _collect(self) -> None:
        self._waiting.popleft().result()
        self._done(1)

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                self._collect()
        finally:
            self._threads.shutdown(cancel_futures=True)
