"""Made ahead, in order, by threads, in bounded memory; no item is too large to come."""

from __future__ import annotations

import threading
import time

import pytest

from gemoe_ds.data.prefetch import Prefetch

SIZES = [30, 10, 50, 20, 50, 40, 10, 10, 10, 30] * 4


class Watched:
    """Makes numbers of known sizes; knows what is there at most that nobody has taken."""

    def __init__(self, sizes=SIZES, seconds: float = 0.002) -> None:
        self.sizes, self.seconds = sizes, seconds
        self.lock = threading.Lock()
        self.bytes = self.most_bytes = self.making = self.most_making = self.items = 0
        self.most_items = 0

    def make(self, number: int) -> int:
        with self.lock:
            self.bytes += self.sizes[number]
            self.making += 1
            self.items += 1
            self.most_bytes = max(self.most_bytes, self.bytes)
            self.most_making = max(self.most_making, self.making)
            self.most_items = max(self.most_items, self.items)
        time.sleep(self.seconds)
        with self.lock:
            self.making -= 1
        return number

    def take(self, items: Prefetch[int], number: int) -> None:
        for expected in range(number):
            time.sleep(self.seconds / 2)
            found = next(items)
            with self.lock:
                self.bytes -= self.sizes[found]
                self.items -= 1
            assert found == expected


def prefetch(watched: Watched, **changes) -> Prefetch[int]:
    options = {"num_workers": 4, "max_items": 8, "max_bytes": 10**9, "expected_bytes": 50}
    return Prefetch(watched.make, lambda n: watched.sizes[n], **options | changes)


@pytest.mark.parametrize(("max_bytes", "most"), [(250, 250), (120, 120), (60, 60), (1, 50)])
def test_what_waits_and_what_is_made_is_bounded(max_bytes, most):
    """The item that is handed over may be replaced before `take` has counted it out."""
    watched = Watched(seconds=0.01)
    watched.take(prefetch(watched, max_bytes=max_bytes), 30)
    assert watched.most_bytes <= most + 50
    if max_bytes >= 120:
        assert watched.most_making > 1, "several at a time"
    else:
        assert watched.most_items <= 2, "one, and the one that was handed over"


def test_threads_and_items_are_bounded_too():
    watched = Watched()
    watched.take(prefetch(watched), 30)
    assert watched.most_making == 4 and watched.most_items <= 8 + 1


def test_the_first_is_made_alone_where_no_size_is_known():
    watched, went_on = Watched([40] * 20), threading.Event()
    made: list[int] = []

    def make(number: int) -> int:
        went_on.wait(0.2 if number == 0 else 0)
        made.append(number)
        if number:
            went_on.set()
        return number

    items = Prefetch(make, lambda n: 40, num_workers=4, max_items=8, max_bytes=100)
    assert next(items) == 0 and made[0] == 0, "others would have come before it"
    items.close()
    watched = Watched([40] * 20)
    watched.take(Prefetch(watched.make, lambda n: 40, num_workers=2, max_items=4, max_bytes=80), 12)
    assert watched.most_making == 2


def test_an_item_that_is_larger_than_the_bound_comes_all_the_same():
    watched = Watched([5, 500, 500, 5, 5, 500, 5, 5, 5])
    watched.take(prefetch(watched, max_bytes=20, expected_bytes=5), 9)


def test_an_error_comes_in_the_place_of_its_item():
    def make(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number

    items = Prefetch(make, lambda n: 1, num_workers=2, max_items=4, max_bytes=10)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(items)


def test_it_starts_anywhere_and_ends_when_it_is_closed():
    watched = Watched([1] * 200, seconds=0)
    items = Prefetch(watched.make, lambda n: 1, num_workers=2, max_items=4, max_bytes=9, start=100)
    assert [next(items) for _ in range(5)] == [100, 101, 102, 103, 104]
    items.close()
    made = watched.items
    time.sleep(0.02)
    assert watched.items <= made + 2 and watched.most_items <= 5 + 4
