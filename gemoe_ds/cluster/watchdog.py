"""Every rank says where it is, to all; whoever is gone, stopped or stuck is named by all others.

Without it a rank that was stopped or cut off leaves the others in a collective until its timeout,
half an hour later, with a message that names nobody. Each rank has a thread with a connection of
its own to a small store on the first rank (torch's TCPStore): it leaves its position there, once a
beat, and looks for a diagnosis. The first rank's thread reads all positions and passes it:

* a rank whose position did not come for `bound` seconds is silent: stopped, lost, or cut off;
* if nobody has moved for `bound` seconds in a step, the one with the fewest moves is stuck; while
  models are loaded and checkpoints written, for ten times as long;
* a rank that fails says so itself, and the others need not wait for any timeout.

Every rank that reads a diagnosis prints it with its own position, and ends with the same code.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch.distributed import DistError, TCPStore

from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.errors import BUG, MISTAKE, STALLED, GemoeError, Stopped, in_a_line
from gemoe_ds.progress import PROGRESS, Position

_DIAGNOSIS = "diagnosis"
_SLOWEST_BEAT = 2.0  # seconds
_OWN_WORDS = 7.0  # seconds that a rank has to say itself what the diagnosis says of another
_LEAST_READING = 1.0  # seconds that all ranks have to read a diagnosis
_SHOWN = 8  # positions in a diagnosis
_PATIENCE = 10  # bounds that loading and saving may take without a move


@dataclass(frozen=True)
class StoreAddress:
    """Where the store is, and the host of each rank."""

    address: str
    port: int
    hosts: list[str]


class Watch:
    """One rank's thread. `gather` is collective: a value of every rank, on every rank."""

    def __init__(
        self, rank: int, size: int, bound: float, gather: Callable[[object], list]
    ) -> None:
        self.rank, self.size, self.bound = rank, size, bound
        self.beat = min(_SLOWEST_BEAT, bound / 10)
        address = os.environ["MASTER_ADDR"]
        self._own = None
        if rank == 0:
            self._own = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        port = self._own.port if self._own else 0
        places = gather((port, socket.gethostname()))
        self.store_at = StoreAddress(address, places[0][0], [host for _, host in places])
        self._store = TCPStore(address, self.store_at.port, is_master=False)
        self._gather = gather
        self._over, self._ending = threading.Event(), threading.Lock()
        self._detector = StallDetector(size, bound, self.beat) if rank == 0 else None
        self._say()
        gather(None)  # every position is there before the first rank reads them
        self._heard, self._first_at = time.monotonic(), ""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        # A store whose process is stopped keeps whoever asks it waiting, whatever the timeout.
        threading.Thread(target=self._listen, name="watch of the watch", daemon=True).start()

    def stop(self) -> None:
        """At the end of a run that went well. Collective."""
        self._over.set()
        self._thread.join()
        self._gather(None)  # the store goes with the first rank

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends; or end with them, if one of them was first."""
        lost_a_peer = any(words in str(error) for words in _LOST)
        if lost_a_peer:
            self._put("lost", "")
            self._thread.join(8 * self.beat + self.bound / 2)  # the diagnosis ends this process
        self._over.set()
        words = "lost contact to another rank" if lost_a_peer else in_a_line(error)
        code = MISTAKE if isinstance(error, GemoeError) else STALLED if lost_a_peer else BUG
        diagnosis = {"rank": self.rank, "words": f"failed: {words}", "code": code}
        self._put(_DIAGNOSIS, json.dumps(diagnosis))
        self._let_others_read()

    def _let_others_read(self) -> None:
        """The store goes with the first rank, and the diagnosis with it."""
        if self.rank == 0:
            time.sleep(max(1.5 * self.beat, _LEAST_READING))

    def _put(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except (DistError, RuntimeError):
            pass  # the first rank is gone, and its end ends the others

    def _run(self) -> None:
        while not self._over.wait(self.beat):
            try:
                self._say()
                if self._detector and (diagnosis := self._detector(self._read(), self._store)):
                    self._store.set(_DIAGNOSIS, json.dumps(diagnosis))
                if self._store.check([_DIAGNOSIS]):
                    self._end(json.loads(self._store.get(_DIAGNOSIS)))
                self._first_at = str(Position(**json.loads(self._store.get("at 0"))[1]))
                self._heard = time.monotonic()
            except (DistError, RuntimeError):
                self._end(self._first_is("is gone"))

    def _listen(self) -> None:
        while not self._over.wait(self.beat):
            silence = time.monotonic() - self._heard
            if silence > self.bound:
                self._end(self._first_is(f"has been silent for {silence:.0f} s"))

    def _first_is(self, words: str) -> dict:
        return {"rank": 0, "words": f"{words}; it was last seen at: {self._first_at}"}

    def _say(self) -> None:
        self._store.set(f"at {self.rank}", json.dumps([time.time(), asdict(PROGRESS)]))

    def _read(self) -> list[bytes]:
        found: list[bytes] = self._store.multi_get([f"at {rank}" for rank in range(self.size)])
        return found

    def _end(self, diagnosis: dict) -> None:
        if not self._ending.acquire(blocking=False):
            return
        culprit = diagnosis["rank"]
        if culprit != self.rank and diagnosis["words"].startswith("failed"):
            self._over.wait(_OWN_WORDS)  # what all ranks find, each says in its own words
        if self._over.is_set():
            return
        text = (
            f"rank {culprit} (host {self.store_at.hosts[culprit]}) {diagnosis['words']}. "
            f"Rank {self.rank} (host {self.store_at.hosts[self.rank]}) was at: {PROGRESS}"
        )
        sys.stderr.write(f"\nerror: {text}\n")
        sys.stderr.flush()
        self._let_others_read()
        os._exit(diagnosis.get("code", STALLED))


@contextmanager
def watched(world: World, bound: float | None) -> Iterator[None]:
    """Watch over what is done inside, with several ranks and a bound in seconds."""
    if world.size == 1 or bound is None:
        yield
        return
    watch = Watch(world.rank, world.size, bound, gather_objects)
    try:
        yield
    except Stopped:
        watch.stop()
        raise
    except BaseException as error:
        watch.failed(error)
        raise
    watch.stop()


class StallDetector:
    """Reads all positions once a beat, and says who is to blame when nothing goes on."""

    def __init__(self, size: int, bound: float, beat: float) -> None:
        self.bound, self.beat = bound, beat
        now = time.monotonic()
        self.said = [(0.0, now)] * size  # what a rank's clock said, and when that was new here
        self.num_events = [(0, now)] * size
        self.lost_since: float | None = None

    def __call__(self, found: list[bytes], store: TCPStore) -> dict | None:
        now = time.monotonic()
        positions = []
        for rank, entry in enumerate(found):
            clock, fields = json.loads(entry)
            position = Position(**fields)
            positions.append(position)
            if clock != self.said[rank][0]:
                self.said[rank] = (clock, now)
            if position.num_events != self.num_events[rank][0]:
                self.num_events[rank] = (position.num_events, now)
        silence = [now - since for _, since in self.said]
        if self.lost_since is None and store.check(["lost"]):
            self.lost_since = now
        just_lost = self.lost_since is not None and now - self.lost_since > 4 * self.beat
        quietest = max(range(len(silence)), key=silence.__getitem__)
        if silence[quietest] > (3 * self.beat if just_lost else self.bound):
            words = f"has been silent for {silence[quietest]:.0f} s"
            return _diagnosis(quietest, words, positions)
        still = min(now - since for _, since in self.num_events)
        patience = 1 if all(p.is_short for p in positions) else _PATIENCE
        if still > self.bound * patience:
            behind = min(range(len(positions)), key=lambda rank: positions[rank].num_events)
            return _diagnosis(behind, f"has not moved for {still:.0f} s", positions)
        return None


def _diagnosis(rank: int, words: str, positions: list[Position]) -> dict:
    others = [f"rank {r}: {p}" for r, p in enumerate(positions) if r != rank][:_SHOWN]
    return {
        "rank": rank,
        "words": f"{words}; it was last seen at: {positions[rank]} (others: {'; '.join(others)})",
    }


# Of gloo and NCCL, when a process at the other end has gone.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)
