"""Every rank says where it is, to all; whoever is gone, stopped or stuck is named by all others.

Without it a rank that was stopped or cut off leaves the others in a collective until its timeout,
half an hour later, with a message that names nobody. Once a beat a thread of each rank leaves its
position on the board of its host (board.py), and looks for a diagnosis there. The first rank of
each host has a second thread, with the host's one connection to a small store on the first rank of
all (torch's TCPStore): it brings the board's positions there, and a diagnosis back. The first
rank's reads all positions and passes it:

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from torch.distributed import DistError, TCPStore

from gemoe_ds.cluster.board import Board, is_alive
from gemoe_ds.engine.host_memory import HostMemory
from gemoe_ds.engine.world import World, gather_objects
from gemoe_ds.errors import BUG, MISTAKE, STALLED, GemoeError, Stopped, in_a_line
from gemoe_ds.progress import PROGRESS, Position

_DIAGNOSIS, _LOST = "diagnosis", "lost"
_SLOWEST_BEAT = 2.0  # seconds
_OWN_WORDS = 7.0  # seconds that a rank has to say itself what the diagnosis says of another
_LEAST_READING = 1.0  # seconds that all ranks have to read a diagnosis
_SHOWN = 8  # positions in a diagnosis
_PATIENCE = 10  # bounds that loading and saving may take without a move


Said = tuple[float, dict]  # a rank's clock, and the fields of its position


class Watch:
    """One rank's threads. Collective: all ranks make one, and stop it, together."""

    def __init__(self, world: World, bound: float) -> None:
        self.rank, self.size, self.bound = world.rank, world.size, bound
        self.beat = min(_SLOWEST_BEAT, bound / 10)
        memory = HostMemory.of(world)
        self.board = Board(memory)
        self.leads = memory.rank == 0
        address = os.environ["MASTER_ADDR"]
        self._own = None
        if self.rank == 0:
            self._own = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        port = self._own.port if self._own else 0
        places = gather_objects((port, socket.gethostname(), os.getpid(), memory.ranks[0]))
        self.hosts = [host for _, host, _, _ in places]
        leaders = [leader for *_, leader in places]
        self.leader, self.leaders_pid = leaders[self.rank], places[leaders[self.rank]][2]
        self._over, self._ending = threading.Event(), threading.Lock()
        self._say()
        gather_objects(None)  # every position is on its board before it is brought to the store
        threads = {"watch": self._listen}
        if self.leads:
            self._store = TCPStore(address, places[0][0], is_master=False)
            self._bring()
            threads["watch of a host"] = self._exchange
        gather_objects(None)  # and there before the first rank reads them
        of = sorted({*leaders})
        self._detector = StallDetector(leaders, bound, self.beat) if self.rank == 0 else None
        self._keys = [_positions_of(leader) for leader in of]
        self._heard, self._first_at = time.monotonic(), ""
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True) for name, run in threads.items()
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """At the end of a run that went well. Collective."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        gather_objects(None)  # the store goes with the first rank

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank ends; or end with them, if one of them was first."""
        lost_a_peer = any(words in str(error) for words in _LOST_WORDS)
        if lost_a_peer:
            self.board.say_lost()
            self._threads[0].join(8 * self.beat + self.bound / 2)  # the diagnosis ends this process
        words = "lost contact to another rank" if lost_a_peer else in_a_line(error)
        code = MISTAKE if isinstance(error, GemoeError) else STALLED if lost_a_peer else BUG
        self._over.set()
        self._tell({"rank": self.rank, "words": f"failed: {words}", "code": code})
        self._let_others_read()

    def _let_others_read(self) -> None:
        """The store goes with the first rank, and the diagnosis with it."""
        if self.rank == 0:
            time.sleep(max(1.5 * self.beat, _LEAST_READING))

    def _tell(self, diagnosis: dict) -> None:
        self.board.tell(diagnosis)
        if self.leads:
            try:
                self._store.set(_DIAGNOSIS, json.dumps(diagnosis))
            except (DistError, RuntimeError):
                pass  # the first rank is gone, and its end ends the others

    def _say(self) -> None:
        self.board.say(asdict(PROGRESS))

    def _listen(self) -> None:
        """Every rank's. It never asks the store: one whose process is stopped keeps whoever asks it
        waiting, whatever the timeout."""
        clock, lost_at = 0.0, None
        while not self._over.wait(self.beat):
            self._say()
            now = time.monotonic()
            if not self.leads and (entry := self.board.said().get(self.leader)):
                clock, self._heard = entry[0], self._heard if entry[0] == clock else now
            if lost_at is None and self.board.is_lost():
                lost_at = now
            just_lost = lost_at is not None and now - lost_at > 4 * self.beat
            silence = now - self._heard
            if diagnosis := self.board.diagnosis():
                self._end(diagnosis)
            elif not self.leads and not is_alive(self.leaders_pid):
                self._end(self._above("is gone"))
            elif silence > (3 * self.beat if just_lost else self.bound):
                self._end(self._above(f"has been silent for {silence:.0f} s"))

    def _above(self, words: str) -> dict:
        """What is wrong with the rank that this one hears the others from."""
        rank, at = (0, self._first_at) if self.leads else (self.leader, "")
        if not self.leads:
            at = str(Position(**self.board.said()[rank][1]))
        return {"rank": rank, "words": f"{words}; it was last seen at: {at}"}

    def _exchange(self) -> None:
        """Of the first rank of a host: between the board and the store."""
        while not self._over.wait(self.beat):
            try:
                self._bring()
                if self._detector and (found := self._detector(self._read(), self._store)):
                    self._store.set(_DIAGNOSIS, json.dumps(found))
                if self._store.check([_DIAGNOSIS]):
                    self._end(json.loads(self._store.get(_DIAGNOSIS)))
                first = json.loads(self._store.get(_positions_of(0)))["0"]
                self._first_at, self._heard = str(Position(**first[1])), time.monotonic()
            except (DistError, RuntimeError):
                self._end(self._above("is gone"))

    def _bring(self) -> None:
        """What the board says, to the store."""
        self._store.set(_positions_of(self.rank), json.dumps(self.board.said()))
        if self.board.is_lost():
            self._store.set(_LOST, "")
        if (found := self.board.diagnosis()) and not self._store.check([_DIAGNOSIS]):
            self._store.set(_DIAGNOSIS, json.dumps(found))

    def _read(self) -> list[Said]:
        """What every rank has said last."""
        hosts = [json.loads(entry) for entry in self._store.multi_get(self._keys)]
        said = {int(rank): entry for host in hosts for rank, entry in host.items()}
        return [said[rank] for rank in range(self.size)]

    def _end(self, diagnosis: dict) -> None:
        if not self._ending.acquire(blocking=False):
            return
        self.board.tell(diagnosis)
        culprit = diagnosis["rank"]
        if culprit != self.rank and diagnosis["words"].startswith("failed"):
            self._over.wait(_OWN_WORDS)  # what all ranks find, each says in its own words
        if self._over.is_set():
            return
        text = (
            f"rank {culprit} (host {self.hosts[culprit]}) {diagnosis['words']}. "
            f"Rank {self.rank} (host {self.hosts[self.rank]}) was at: {PROGRESS}"
        )
        sys.stderr.write(f"\nerror: {text}\n")
        sys.stderr.flush()
        self._let_others_read()
        os._exit(diagnosis.get("code", STALLED))


def _positions_of(leader: int) -> str:
    """The store's key for what the host of this first rank says."""
    return f"at {leader}"


@contextmanager
def watched(world: World, bound: float | None) -> Iterator[None]:
    """Watch over what is done inside, with several ranks and a bound in seconds."""
    if world.size == 1 or bound is None:
        yield
        return
    watch = Watch(world, bound)
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

    def __init__(self, leaders: Sequence[int], bound: float, beat: float) -> None:
        """`leaders`: for each rank the first one of its host, through which it is heard."""
        self.leaders, self.bound, self.beat = leaders, bound, beat
        now, size = time.monotonic(), len(leaders)
        self.said = [(0.0, now)] * size  # what a rank's clock said, and when that was new here
        self.num_events = [(0, now)] * size
        self.lost_since: float | None = None

    def __call__(self, found: list[Said], store: TCPStore) -> dict | None:
        now = time.monotonic()
        positions = []
        for rank, (clock, fields) in enumerate(found):
            position = Position(**fields)
            positions.append(position)
            if clock != self.said[rank][0]:
                self.said[rank] = (clock, now)
            if position.num_events != self.num_events[rank][0]:
                self.num_events[rank] = (position.num_events, now)
        silence = [now - since for _, since in self.said]
        if self.lost_since is None and store.check([_LOST]):
            self.lost_since = now
        just_lost = self.lost_since is not None and now - self.lost_since > 4 * self.beat
        quietest = max(range(len(silence)), key=silence.__getitem__)
        if silence[self.leaders[quietest]] > silence[quietest] / 2:
            quietest = self.leaders[quietest]  # with it the whole host falls silent
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
_LOST_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)
