"""Data races of Triton kernels, found in the interpreter.

    python -m bench.races [--order random|forward|reversed] [--seed N] [--json FILE] [PYTEST ARGUMENTS]

Runs tests/triton_kernels (or what the arguments name) with every launch under watch: its programs run in the order that
is asked for, and what each of them reads, writes and adds atomically is recorded with the barriers between. Reported:

- two programs that touch one byte of which one writes it. Programs have no order among them, and no barrier holds them;
  only atomic additions (and their like) of several programs to one byte are none.
- two threads of a program that touch one byte of which one writes it, with no `tl.debug_barrier()` between. Elements of
  two accesses belong to one thread where place in the block, shape and item size are the same; a block of fewer
  elements than the program has threads is read by several of each. Threads that write the same value do not count.
- an access outside the memory of the tensors it may touch. It is left out, so that the run goes on.

A line a kernel: launches, programs, bytes. Exit code 1 for a race, a failed test, or where nothing was launched. Not
seen: races through shared memory (the compiler's own), and an address that is wrong but inside another tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

ORDERS = ("random", "forward", "reversed")
READ, WRITE, ATOMIC = range(3)
VERBS = ("reads", "writes", "updates atomically")
AGAINST = {READ: (WRITE, ATOMIC), WRITE: (READ, WRITE, ATOMIC), ATOMIC: (READ, WRITE)}
SEVERAL = -1  # programs, or threads, instead of one of them
WARP = 32
TESTS = ("tests/triton_kernels", "--ignore=tests/triton_kernels/test_races.py")  # that one makes races


class Race(NamedTuple):
    """One kind of conflict of one kernel in a launch, by its first place."""

    kernel: str
    argument: str
    byte: int  # in the memory of that argument
    what: str

    def __str__(self) -> str:
        return f"{self.kernel}, byte {self.byte} of {self.argument}: {self.what}"


class Area(NamedTuple):
    """The memory behind some arguments, in units of their smallest item."""

    start: int  # address
    end: int
    unit: int  # bytes
    offset: int  # of its first unit in the launch's records
    names: str


NOWHERE = Area(0, 0, 1, 0, "no argument")


class Access(NamedTuple):
    """A load, store or atomic update: its units, and whose each is."""

    kind: int
    area: Area
    units: np.ndarray
    threads: np.ndarray
    old: Any
    new: np.ndarray | None

    def value(self, threads: np.ndarray) -> np.ndarray:
        """What a store's threads write; the bits of a NaN do not count."""
        values = np.broadcast_to(self.new, np.shape(self.old())).ravel()[threads & 0xFFFFFFFF]
        return np.nan_to_num(values, nan=1e38) if values.dtype.kind == "f" else values

    def changes(self) -> np.ndarray:
        """Where a store writes another value than is there."""
        there = self._replace(new=self.old()).value(self.threads)
        return there != self.value(self.threads).astype(there.dtype)


class Touches:
    """Of every unit: who touched it last in one of the three ways."""

    def __init__(self, units: int) -> None:
        self.program = np.zeros(units, np.int32)  # 0: nobody, SEVERAL
        self.phase = np.zeros(units, np.int32)  # between two barriers of one program
        self.thread = np.zeros(units, np.int64)


class LaunchRecord:
    """What the programs of one launch touch, and the races between them."""

    def __init__(self, kernel: str, threads: int, arguments: dict[str, Any], races: list[Race]) -> None:
        self.kernel, self.threads, self.races = kernel, threads, races
        self.areas = _areas(arguments)
        self.starts = np.array([area.start for area in self.areas], np.int64)
        units = sum((area.end - area.start) // area.unit for area in self.areas)
        self.touches = [Touches(units) for _ in AGAINST]
        self.program = self.programs = self.phase = 0  # program: its number and 1
        self.bytes: Counter[int] = Counter()
        self.seen: set[tuple] = set()

    def begin_program(self, number: int) -> None:
        self.program = number + 1
        self.programs += 1
        self.phase += 1

    def barrier(self) -> None:
        self.phase += 1

    def inside(self, kind: int, pointers: Any, mask: np.ndarray) -> np.ndarray:
        """The mask of an access without what lies outside the memory where it begins, which is reported."""
        mask = np.broadcast_to(mask, np.shape(pointers.data)).astype(bool)
        area, place, lanes = self._place(pointers, mask)
        good = (place >= 0) & (place + _item(pointers) <= area.end - area.start)
        if not good.all():
            what = f"program {self.program - 1} {VERBS[kind]} outside of it"
            self._report((kind, "outside"), area.names, int(place[~good][0]), what)
            mask.reshape(-1)[lanes[~good]] = False
        return mask

    def _place(self, pointers: Any, mask: np.ndarray) -> tuple[Area, np.ndarray, np.ndarray]:
        """(memory where the access begins, bytes from there, lanes) of the lanes under the mask."""
        lanes = np.flatnonzero(mask)
        addresses = np.asarray(pointers.data).astype(np.int64).ravel()[lanes]
        number = int(np.searchsorted(self.starts, addresses.min(initial=2**62), "right")) - 1
        area = self.areas[max(0, number)] if self.areas else NOWHERE
        return area, addresses - area.start, lanes

    def touch(self, kind: int, pointers: Any, mask: np.ndarray, old: Any = None, new: np.ndarray | None = None) -> None:
        """Record an access of lanes that lie inside. old(): what is in memory; new: what is written there."""
        area, place, lanes = self._place(pointers, mask)
        item, size = _item(pointers), np.size(pointers.data)
        self.bytes[kind] += item * len(lanes)
        shape = (size * 64 + item) << 32  # in place of the layout that the compiler chooses for a block
        replicated = kind == READ and size < self.threads
        threads = np.full(len(lanes), SEVERAL, np.int64) if replicated else shape + lanes
        each = max(1, item // area.unit)
        units = (area.offset + place // area.unit)[:, None] + np.arange(each)
        access = Access(kind, area, units.ravel(), np.repeat(threads, each), old, new)
        for other in AGAINST[kind]:
            self._compare(access, other)
        mine = self.touches[kind]
        program, phase, thread = (t[access.units] for t in (mine.program, mine.phase, mine.thread))
        mine.program[access.units] = np.where((program == 0) | (program == self.program), self.program, SEVERAL)
        again = (phase == self.phase) & (thread != access.threads)
        mine.thread[access.units] = np.where(again, SEVERAL, access.threads)
        mine.phase[access.units] = self.phase
        twice = (mine.thread[access.units] != access.threads) & ~again
        if twice.any():
            if kind == WRITE and (access.value(access.threads) != access.value(mine.thread[access.units]))[twice].any():
                self._conflict(access, WRITE, access.units[twice][0], "two threads of one store")
            mine.thread[access.units[twice]] = SEVERAL

    def _compare(self, access: Access, other: int) -> None:
        before, units = self.touches[other], access.units
        program, thread = before.program[units], before.thread[units]
        bad = (program != 0) & (program != self.program)
        if bad.any():
            self._conflict(access, other, units[bad][0], "and programs have no order")
        bad = (before.phase[units] == self.phase) & ((thread != access.threads) | (access.threads == SEVERAL))
        if bad.any() and access.kind == other == WRITE:
            bad &= access.changes()
        if bad.any():
            self._conflict(access, other, units[bad][0], "another thread, and no barrier is between")

    def _conflict(self, access: Access, other: int, unit: int, how: str) -> None:
        which = int(self.touches[other].program[unit])
        whose = "others" if which == SEVERAL else f"program {which - 1}"
        verb = VERBS[other] if which != SEVERAL else VERBS[other].replace("s", "", 1)
        what = f"program {self.program - 1} {VERBS[access.kind]} what {whose} {verb}: {how}"
        byte = int(unit - access.area.offset) * access.area.unit
        self._report((access.kind, other, how), access.area.names, byte, what)

    def _report(self, key: tuple, names: str, byte: int, what: str) -> None:
        if (key, names) not in self.seen:  # the first place of each kind is enough
            self.seen.add((key, names))
            self.races.append(Race(self.kernel, names, byte, what))


def _item(pointers: Any) -> int:
    """Bytes of what a pointer points at."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for field, item in zip(getattr(value, "_fields", range(len(value))), value):
            yield from _tensors(f"{name}.{field}", item)
    elif hasattr(value, "data_ptr"):
        yield name, value
    elif hasattr(value, "base"):  # a tensor descriptor
        yield from _tensors(name, value.base)


def _areas(arguments: dict[str, Any]) -> list[Area]:
    """The memory of all tensors among the arguments, by address; views of one storage are one area."""
    found: dict[int, tuple[int, int, list[str]]] = {}
    for argument, value in arguments.items():
        for name, tensor in _tensors(argument, value):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                size, unit, names = found.get(storage.data_ptr(), (storage.nbytes(), 8, []))
                found[storage.data_ptr()] = (size, min(unit, tensor.element_size()), [*names, name])
    areas, offset = [], 0
    for start, (size, unit, names) in sorted(found.items()):
        areas.append(Area(start, start + size // unit * unit, unit, offset, " and ".join(names)))
        offset += size // unit
    return areas


class Watch:
    """What was seen: races, and of each kernel launches, programs and bytes."""

    def __init__(self, order: str = "random", seed: int = 0) -> None:
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
        self.order, self.random = order, random.Random(seed)
        self.races: list[Race] = []
        self.counts: dict[str, Counter[str]] = {}
        self.record: LaunchRecord | None = None
        self.sizes: tuple[int, ...] = ()
        self.programs: Iterator[int] = iter(())

    def begin(self, kernel: str, warps: int, arguments: dict[str, Any]) -> None:
        self.record = LaunchRecord(kernel, WARP * warps, arguments, self.races)

    def grid(self, *sizes: int) -> None:
        self.sizes, programs = sizes, list(range(math.prod(sizes)))
        if self.order == "random":
            self.random.shuffle(programs)
        elif self.order == "reversed":
            programs.reverse()
        self.programs = iter(programs)

    def next_place(self) -> tuple[int, ...]:
        """Of the next program in the grid, whose record begins."""
        number = next(self.programs)
        self.record.begin_program(number)
        return tuple(int(place) for place in np.unravel_index(number, self.sizes))

    def end(self) -> None:
        record, self.record = self.record, None
        read, wrote, added = (record.bytes[kind] for kind in (READ, WRITE, ATOMIC))
        numbers = {"launches": 1, "programs": record.programs, "read": read, "written": wrote, "atomic": added}
        self.counts.setdefault(record.kernel, Counter()).update(numbers)


@contextmanager
def watched(order: str = "random", seed: int = 0) -> Iterator[Watch]:
    """Launches of the interpreter in this context run their programs in `order`, and are recorded.

    Raises RuntimeError where kernels are not interpreted (TRITON_INTERPRET=1 must be set before triton is imported).
    """
    from triton.runtime import interpreter

    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("races are looked for in Triton's interpreter; set TRITON_INTERPRET=1")
    watch, builder = Watch(order, seed), interpreter.interpreter_builder
    names = ("set_grid_dim", "set_grid_idx", "create_barrier", "create_masked_load", "create_masked_store")
    names += ("create_atomic_rmw", "create_atomic_cas", "create_atomic_load", "create_atomic_store")
    names += ("create_atomic_poll",)
    before = {name: getattr(builder, name) for name in names if hasattr(builder, name)}
    after = _replacements(watch, before, interpreter)
    with ExitStack() as stack:
        for name in before:
            stack.enter_context(mock.patch.object(builder, name, after[name]))
        call = _call(watch, interpreter.GridExecutor.__call__)
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))
        yield watch


def _call(watch: Watch, start: Any) -> Any:
    """What runs a grid, between the beginning and the end of its record."""

    def call(executor, *arguments, **keywords):
        given = dict(zip(executor.arg_names, arguments)) | keywords
        watch.begin(executor.fn.__name__, keywords.get("num_warps", 4), given)
        try:
            return start(executor, *arguments, **keywords)
        finally:
            watch.end()

    return call


def _replacements(watch: Watch, before: dict[str, Any], interpreter: Any) -> dict[str, Any]:
    """What the interpreter's builder does instead, by name."""
    triton_mask = partial(interpreter.TensorHandle, dtype=interpreter.tl.int1)
    kinds = {"load": READ, "store": WRITE}  # of accesses that are not atomic; while one is, ATOMIC for both

    def set_grid_dim(*sizes):
        before["set_grid_dim"](*sizes)
        watch.grid(*sizes)

    def set_grid_idx(*_):
        before["set_grid_idx"](*watch.next_place())

    def create_barrier(*arguments, **keywords):
        watch.record.barrier()
        return before["create_barrier"](*arguments, **keywords)

    def create_masked_load(pointers, mask, *more, **keywords):
        kind, record = kinds["load"], watch.record
        inside = record.inside(kind, pointers, mask.data)
        record.touch(kind, pointers, inside)
        return before["create_masked_load"](pointers, triton_mask(inside), *more, **keywords)

    def create_masked_store(pointers, value, mask, *more, **keywords):
        kind, record = kinds["store"], watch.record
        inside = triton_mask(record.inside(kind, pointers, mask.data))
        there = partial(before["create_masked_load"], pointers, inside, None, None, False)
        record.touch(kind, pointers, inside.data, lambda: there().data, value.data)
        return before["create_masked_store"](pointers, value, inside, *more, **keywords)

    def create_atomic_rmw(operation, pointers, value, mask, *more, **keywords):
        inside = watch.record.inside(ATOMIC, pointers, mask.data)
        watch.record.touch(ATOMIC, pointers, inside)
        return before["create_atomic_rmw"](operation, pointers, value, triton_mask(inside), *more, **keywords)

    def create_atomic_cas(pointers, *more, **keywords):
        watch.record.touch(ATOMIC, pointers, watch.record.inside(ATOMIC, pointers, np.True_))
        return before["create_atomic_cas"](pointers, *more, **keywords)

    def atomic(name):
        def run(*arguments, **keywords):
            with mock.patch.dict(kinds, load=ATOMIC, store=ATOMIC):
                return before[name](*arguments, **keywords)

        return run

    plain = (set_grid_dim, set_grid_idx, create_barrier, create_masked_load, create_masked_store)
    found = {function.__name__: function for function in (*plain, create_atomic_rmw, create_atomic_cas)}
    return found | {name: atomic(name) for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll")}


class Plugin:
    """Watches every test, and keeps what was seen in all of them."""

    def __init__(self, order: str, seed: int) -> None:
        self.order, self.seed = order, seed
        self.races: list[tuple[str, Race]] = []  # with the test
        self.counts: dict[str, Counter[str]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with watched(self.order, self.seed) as watch:
            yield
        self.races += [(item.nodeid, race) for race in watch.races]
        for kernel, numbers in watch.counts.items():
            self.counts.setdefault(kernel, Counter()).update(numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--order", choices=ORDERS, default="random", help="of the programs of a launch")
    parser.add_argument("--seed", type=int, default=0, help="of the random order")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    args, more = parser.parse_known_args()
    os.environ |= {"TRITON_INTERPRET": "1", "FASTRLHF_REQUIRE_TRITON": "1"}  # before triton is imported
    plugin = Plugin(args.order, args.seed)
    given = ["-q", "-p", "no:cacheprovider", *(more or TESTS)]
    failed = pytest.main(given, plugins=[plugin])
    columns = ("launches", "programs", "read", "written", "atomic")
    print("kernel " + " ".join(columns))
    for kernel, numbers in sorted(plugin.counts.items()):
        print(kernel, *(numbers[column] for column in columns))
    for test, race in plugin.races:
        print(f"RACE {race} ({test})")
    print(f"{len(plugin.races)} races")
    if args.json:
        rows = {kernel: dict(numbers) for kernel, numbers in sorted(plugin.counts.items())}
        found = {"order": args.order, "seed": args.seed, "races": [str(race) for _, race in plugin.races]}
        args.json.write_text(json.dumps(found | {"kernels": rows}, indent=1) + "\n")
    return 1 if failed or plugin.races or not plugin.counts else 0


if __name__ == "__main__":
    sys.exit(main())
