"""Several processes that do the same thing at the same moment, and what a database is asked meanwhile."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

# A server that has imported everything once forks the processes: they start in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tuner.study", "tests.toy"])
_PATIENCE_S = 120


def race(n: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """What `target(index, *args)` returned in each of `n` processes that were let go together."""
    barrier = _CONTEXT.Barrier(n)
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(n)]
    processes = [
        _CONTEXT.Process(target=_child, args=(barrier, send, target, index, *args), daemon=True)
        for index, (_, send) in enumerate(pipes)
    ]
    results: list[tuple[bool, Any]] = []
    try:
        for process in processes:
            process.start()
        for receive, _ in pipes:
            assert receive.poll(_PATIENCE_S), "a process of the race gave no answer in time"
            results.append(receive.recv())
    finally:
        for process in processes:
            if process.pid is not None:
                if len(results) < n:
                    process.kill()
                process.join()
            process.close()
        for ends in pipes:
            for end in ends:
                end.close()
    broken = [answer for ok, answer in results if not ok]
    assert not broken, "\n".join(broken)
    return [answer for _, answer in results]


def _child(barrier: Any, send: Any, target: Callable[..., Any], index: int, *args: Any) -> None:
    try:
        barrier.wait(_PATIENCE_S)
        send.send((True, target(index, *args)))
    except BaseException:
        send.send((False, traceback.format_exc()))


@dataclass
class Counted:
    transactions: int = 0


@contextmanager
def counted(engine: sa.Engine) -> Iterator[Counted]:
    """Counts the transactions that begin on an engine, whoever begins them."""
    counter = Counted()

    def begun(_connection: sa.Connection) -> None:
        counter.transactions += 1

    sa.event.listen(engine, "begin", begun)
    try:
        yield counter
    finally:
        sa.event.remove(engine, "begin", begun)
