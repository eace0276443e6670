"""Items that threads make ahead of their use, in order, and only so many bytes of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

T = TypeVar("T")

PREFETCH_BYTES = 2**30  # of a rank, where nothing else is said


class Prefetch(Generic[T]):
    """Iterates over make(start), make(start + 1), ... without an end.

    Items that wait to be taken or are being made hold at most `max_bytes` together. One that is
    being made counts as the largest so far, `expected_bytes` if none is; so the bound is exceeded
    only by as much as items are larger than all before. The next item is always made, however
    large it is. An error of `make` is raised where its item would come.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        size_of: Callable[[T], int],
        *,
        num_workers: int,
        max_items: int,
        max_bytes: int,
        start: int = 0,
        expected_bytes: int | None = None,
    ) -> None:
        """`expected_bytes` None: nothing is known, and the first item is made alone."""
        self._make, self._size_of = make, size_of
        self._num_workers, self._max_items, self._max_bytes = num_workers, max_items, max_bytes
        self._largest = max_bytes if expected_bytes is None else expected_bytes
        self._is_known = expected_bytes is not None
        self._next = start
        self._running = 0
        self._waiting: deque[tuple[Future[T], int]] = deque()  # and their numbers
        self._bytes: dict[int, int] = {}  # what each of them holds, or may hold
        self._lock = threading.RLock()
        self._is_open = True
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="prefetch")

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            self._fill()
            future, number = self._waiting[0]
        item = future.result()
        with self._lock:
            self._waiting.popleft()
            del self._bytes[number]
            self._fill()
        return item

    def close(self) -> None:
        """Make nothing more."""
        self._is_open = False
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fill(self) -> None:
        while self._is_open and self._may_start():
            number, self._next = self._next, self._next + 1
            try:
                future = self._pool.submit(self._make, number)
            except RuntimeError:  # the interpreter ends
                self._is_open = False
                return
            self._running += 1
            self._bytes[number] = self._largest
            self._waiting.append((future, number))
            future.add_done_callback(partial(self._made, number))

    def _may_start(self) -> bool:
        if not self._waiting:
            return True
        is_room = sum(self._bytes.values()) + self._largest <= self._max_bytes
        return (
            is_room and self._running < self._num_workers and len(self._waiting) < self._max_items
        )

    def _made(self, number: int, future: Future[T]) -> None:
        with self._lock:
            self._running -= 1
            if future.cancelled() or future.exception():
                self._bytes[number] = 0
                return
            size = self._size_of(future.result())
            self._largest = max(self._largest, size) if self._is_known else size
            self._is_known = True
            self._bytes[number] = size
            self._fill()
