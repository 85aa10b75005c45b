"""Random divergent kernels, and what a GPU's warps would do with them.

`random_kernel` draws a small program: branches, loops, early exits and calls whose course depends
on the thread and on data. The program is one tree with two readings. `Kernel.text` is its CUDA C++,
with each access to memory on a line of its own. `Kernel.run` interprets it in the way that SIMT
hardware executes a warp: a statement runs once, for the lanes whose bit of an active mask is set.
The lanes of both sides of a branch meet behind it, lanes that leave a loop wait behind it, lanes
that have returned wait at the end of the call. This gives the number of requests of every line and
their cost, by a way that shares nothing with the simulator, which runs thread after thread and puts
the warps together afterwards.

The programs have no undefined behaviour and no races: numbers are unsigned, every index is reduced
to its range, a thread writes only slots of its own, and reads only those, the input, which nothing
writes, and a shared tile, which is written between barriers. Nor is there an access that a compiler
may drop: what is loaded goes into a sum that is stored in the end, and no two accesses have the
same index, because each adds a constant of its own to it (and to `salt`, which is 0 in the kernel
and another unknown in each call).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

WARP = 32
INPUT_WORDS = 256
SLOTS = 4
MAX_STEPS = 5000
"""Statements that the warps of one kernel may execute: more would take the interpreter too long."""

Lanes = np.ndarray  # a warp's 32 values: uint32, or bool for a mask

PARAMETERS = ("in", "out", "own", "tile", "mine", "t", "g", "zero")
"""What a kernel hands to its functions; `t` is the thread in the block and `g` in the grid."""


class TooLong(Exception):
    """The program takes more than `MAX_STEPS`."""


# ---- Memory and counts -------------------------------------------------------------------------


@dataclass
class Counts:
    """What the requests of one line to one buffer cost, summed."""

    requests: int = 0
    active_lanes: int = 0
    cost: int = 0  # sectors or wavefronts


class Machine:
    """The memory that a block sees, and what has been counted."""

    def __init__(self, memory: dict[str, np.ndarray]):
        self.memory = memory
        self.counts: dict[tuple[int, str, str, str], Counts] = {}
        self.steps = 0

    def access(self, line: int, op: str, buffer: str, index: Lanes, mask: Lanes) -> Lanes:
        """Count one request; returns the words that the active lanes touch."""
        words = index[mask].astype(np.int64)
        space = "shared" if buffer in ("tile", "mine") else "global"
        counts = self.counts.setdefault((line, space, op, buffer), Counts())
        counts.requests += 1
        counts.active_lanes += len(words)
        if space == "global":  # 32-byte sectors
            counts.cost += len({word // 8 for word in words.tolist()})
        else:  # passes over 32 banks, each of which gives one word at a time
            counts.cost += max(Counter(word % 32 for word in set(words.tolist())).values())
        return words

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooLong


class Frame:
    """One call's variables and the lanes that wait at its end or behind its loops."""

    def __init__(self, machine: Machine, variables: dict[str, Lanes]):
        self.machine = machine
        self.variables = variables
        self.result = np.zeros(WARP, np.uint32)
        self.array = np.zeros((SLOTS, WARP), np.uint32)
        self.broken: list[Lanes] = []  # of each loop or switch that is open
        self.continued: list[Lanes] = []  # of each loop

    def assign(self, name: str, value: Lanes, mask: Lanes) -> None:
        self.variables[name] = np.where(mask, value, self.variables[name]).astype(np.uint32)


def nobody() -> Lanes:
    return np.zeros(WARP, bool)


# ---- Values ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    number: int

    def text(self) -> str:
        return f"{self.number}u"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        return np.full(WARP, self.number, np.uint32)


@dataclass(frozen=True)
class Name:
    name: str

    def text(self) -> str:
        return self.name

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        return frame.variables[self.name]


_OPERATORS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "&": np.bitwise_and,
    "|": np.bitwise_or,
    "^": np.bitwise_xor,
    ">>": np.right_shift,
    "%": np.remainder,
    "<": np.less,
    "==": np.equal,
    "!=": np.not_equal,
}


@dataclass(frozen=True)
class Binary:
    op: str
    left: Value
    right: Value

    def text(self) -> str:
        text = f"({self.left.text()} {self.op} {self.right.text()})"
        return f"unsigned{text}" if self.op in ("<", "==", "!=") else text

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        left, right = self.left.lanes(frame, mask), self.right.lanes(frame, mask)
        return _OPERATORS[self.op](left, right).astype(np.uint32)


@dataclass(frozen=True)
class Choice:
    """``c ? a : b`` without accesses: a select, not a branch."""

    condition: Value
    yes: Value
    no: Value

    def text(self) -> str:
        return f"({self.condition.text()} != 0u ? {self.yes.text()} : {self.no.text()})"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        yes, no = self.yes.lanes(frame, mask), self.no.lanes(frame, mask)
        return np.where(self.condition.lanes(frame, mask) != 0, yes, no)


@dataclass(frozen=True)
class Local:
    """An element of the array in registers; not an access to memory that counts."""

    index: Value

    def text(self) -> str:
        return f"local[{self.index.text()} % {SLOTS}u]"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        return frame.array[self.index.lanes(frame, mask) % SLOTS, np.arange(WARP)]


@dataclass(eq=False)
class Load:
    buffer: str
    index: Value
    line: int = 0

    def text(self) -> str:
        return f"{self.buffer}[{self.index.text()}]"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        machine = frame.machine
        index = self.index.lanes(frame, mask)
        value = np.zeros(WARP, np.uint32)
        words = machine.access(self.line, "load", self.buffer, index, mask)
        value[mask] = machine.memory[self.buffer][words]
        return value


@dataclass(eq=False)
class Call:
    function: Function
    salt: Value
    a: Value
    b: Value

    def text(self) -> str:
        own = [value.text() for value in (self.salt, self.a, self.b)]
        return f"{self.function.name}({', '.join([*PARAMETERS, *own])})"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        own = [value.lanes(frame, mask) for value in (self.salt, self.a, self.b)]
        return self.function.call(frame, mask, *own)


@dataclass(eq=False)
class Tick:
    """``++name < limit``: what ends a loop whatever its other condition says."""

    name: str
    limit: int

    def text(self) -> str:
        return f"++{self.name} < {self.limit}u"

    def lanes(self, frame: Frame, mask: Lanes) -> Lanes:
        frame.assign(self.name, frame.variables[self.name] + np.uint32(1), mask)
        return (frame.variables[self.name] < self.limit).astype(np.uint32)


Value = Number | Name | Binary | Choice | Local | Load | Call | Tick


# ---- Conditions --------------------------------------------------------------------------------


@dataclass(eq=False)
class Condition:
    """``value & bit``, on a line of its own."""

    value: Value
    bits: int = 0

    def pieces(self) -> list[tuple[str, Value]]:
        text = self.value.text()
        return [(f"({text} & {self.bits}u) != 0u" if self.bits else text, self.value)]

    def holds(self, frame: Frame, mask: Lanes) -> Lanes:
        value = self.value.lanes(frame, mask)
        return mask & ((value & self.bits if self.bits else value) != 0)


@dataclass(eq=False)
class Both:
    """``first && second``, or ``||``: lanes that the first decides do not evaluate the second."""

    op: str
    first: Condition | Both
    second: Condition | Both

    def pieces(self) -> list[tuple[str, Value]]:
        pieces = [*self.first.pieces(), *self.second.pieces()]
        middle, last = len(self.first.pieces()) - 1, len(pieces) - 1
        pieces[middle] = (f"{pieces[middle][0]} {self.op}", pieces[middle][1])
        pieces[0] = (f"({pieces[0][0]}", pieces[0][1])
        pieces[last] = (f"{pieces[last][0]})", pieces[last][1])
        return pieces

    def holds(self, frame: Frame, mask: Lanes) -> Lanes:
        first = self.first.holds(frame, mask)
        undecided = first if self.op == "&&" else mask & ~first
        second = self.second.holds(frame, undecided) if undecided.any() else nobody()
        return second if self.op == "&&" else first | second


Test = Condition | Both


# ---- Statements: `write` gives the text, `run` the lanes that go on to the next statement -------


class Writer:
    """Collects lines and tells each access where it stands."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def add(self, text: str, *accesses: object) -> int:
        self.lines.append("  " * self.depth + text)
        for access in accesses:
            if isinstance(access, Load | Store):
                access.line = len(self.lines)
        return len(self.lines)

    def test(self, before: str, test: Test, after: str) -> None:
        pieces = test.pieces()
        for i, (text, value) in enumerate(pieces):
            start = before if i == 0 else "    "
            self.add(start + text + (after if i == len(pieces) - 1 else ""), value)

    def block(self, body: Sequence[Statement]) -> None:
        self.depth += 1
        for statement in body:
            statement.write(self)
        self.depth -= 1


def run(body: Sequence[Statement], frame: Frame, mask: Lanes) -> Lanes:
    for statement in body:
        if not mask.any():
            break
        frame.machine.step()
        mask = statement.run(frame, mask)
    return mask


@dataclass(eq=False)
class Assign:
    """``name = name * 3u op value``: what it was stays in what it is."""

    name: str
    op: str
    value: Value

    def write(self, writer: Writer) -> None:
        text = f"{self.name} = {self.name} * 3u {self.op} {self.value.text()};"
        writer.add(text, self.value)

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        value = self.value.lanes(frame, mask)
        before = frame.variables[self.name] * np.uint32(3)
        frame.assign(self.name, _OPERATORS[self.op](before, value), mask)
        return mask


@dataclass(eq=False)
class AddToLocal:
    index: Value
    value: Value

    def write(self, writer: Writer) -> None:
        writer.add(f"local[{self.index.text()} % {SLOTS}u] += {self.value.text()};", self.value)

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        value = self.value.lanes(frame, mask)
        index = self.index.lanes(frame, mask) % SLOTS
        frame.array[index[mask], np.flatnonzero(mask)] += value[mask]
        return mask


@dataclass(eq=False)
class Store:
    buffer: str
    index: Value
    value: Value
    adds: bool = False  # "+=": a load and a store
    line: int = 0

    def write(self, writer: Writer) -> None:
        op = "+=" if self.adds else "="
        writer.add(f"{self.buffer}[{self.index.text()}] {op} {self.value.text()};", self)

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        machine = frame.machine
        value = self.value.lanes(frame, mask)
        index = self.index.lanes(frame, mask)
        memory = machine.memory[self.buffer]
        if self.adds:
            words = machine.access(self.line, "load", self.buffer, index, mask)
            value = value.copy()
            value[mask] += memory[words]
        words = machine.access(self.line, "store", self.buffer, index, mask)
        memory[words] = value[mask]
        return mask


@dataclass(eq=False)
class Pick:
    """``name += test ? value : value`` with an access on either side: a branch.

    Both values stand on one line: GCC gives them the line of the question mark.
    """

    name: str
    test: Test
    yes: Value
    no: Value

    def write(self, writer: Writer) -> None:
        writer.test(f"{self.name} += ", self.test, "")
        writer.add(f"    ? {self.yes.text()} : {self.no.text()};", self.yes, self.no)

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        true = self.test.holds(frame, mask)
        for value, lanes in ((self.yes, true), (self.no, mask & ~true)):
            if lanes.any():
                total = frame.variables[self.name] + value.lanes(frame, lanes)
                frame.assign(self.name, total, lanes)
        return mask


@dataclass(eq=False)
class If:
    test: Test
    yes: list[Statement]
    no: list[Statement]

    def write(self, writer: Writer) -> None:
        writer.test("if (", self.test, ") {")
        writer.block(self.yes)
        if self.no:
            writer.add("} else {")
            writer.block(self.no)
        writer.add("}")

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        true = self.test.holds(frame, mask)
        return run(self.yes, frame, true) | run(self.no, frame, mask & ~true)


@dataclass(eq=False)
class Switch:
    value: Value
    cases: list[list[Statement]]  # the last is the default

    def write(self, writer: Writer) -> None:
        writer.add(f"switch ({self.value.text()} % {len(self.cases)}u) {{", self.value)
        writer.depth += 1
        for i, body in enumerate(self.cases):
            writer.add(f"case {i}u: {{" if i < len(self.cases) - 1 else "default: {")
            writer.block([*body, Break()])
            writer.add("}")
        writer.depth -= 1
        writer.add("}")

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        value = self.value.lanes(frame, mask) % len(self.cases)
        frame.broken.append(nobody())
        left = nobody()
        for i, body in enumerate(self.cases):
            left = left | run(body, frame, mask & (value == i))
        return left | frame.broken.pop()


@dataclass(eq=False)
class Loop:
    """``for``, ``while`` or ``do``, which differ in what comes before and after the body."""

    kind: str
    counter: str
    start: Value
    test: Test | None  # None only for a `for` with a bound
    bound: Value | None
    step: int
    body: list[Statement]

    def write(self, writer: Writer) -> None:
        start = f"unsigned {self.counter} = {self.start.text()};"
        if self.kind == "for":
            bound = f"{self.counter} < {self.bound.text()} % 6u"
            step = f"{self.counter} += {self.step}u"
            writer.add(f"for ({start} {bound}; {step}) {{", self.bound)
        else:
            writer.add(start)
        if self.kind == "while":
            writer.test("while (", self.test, ") {")
        if self.kind == "do":
            writer.add("do {")
        writer.block(self.body)
        if self.kind == "do":
            writer.test("} while (", self.test, ");")
        else:
            writer.add("}")

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        frame.variables.setdefault(self.counter, np.zeros(WARP, np.uint32))
        frame.assign(self.counter, self.start.lanes(frame, mask), mask)
        left = nobody()
        frame.broken.append(nobody())
        is_first = True
        while mask.any():
            frame.machine.step()
            if self.kind != "do" or not is_first:
                holds = self._holds(frame, mask)
                left, mask = left | (mask & ~holds), holds
            is_first = False
            frame.continued.append(nobody())
            mask = run(self.body, frame, mask)
            mask = mask | frame.continued.pop()
            if self.kind == "for":
                counter = frame.variables[self.counter] + np.uint32(self.step)
                frame.assign(self.counter, counter, mask)
        return left | frame.broken.pop()

    def _holds(self, frame: Frame, mask: Lanes) -> Lanes:
        if self.kind != "for":
            return self.test.holds(frame, mask)
        bound = self.bound.lanes(frame, mask) % 6
        return mask & (frame.variables[self.counter] < bound)


@dataclass(eq=False)
class Break:
    def write(self, writer: Writer) -> None:
        writer.add("break;")

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        frame.broken[-1] |= mask
        return nobody()


@dataclass(eq=False)
class Continue:
    def write(self, writer: Writer) -> None:
        writer.add("continue;")

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        frame.continued[-1] |= mask
        return nobody()


@dataclass(eq=False)
class Return:
    """``return digest + value`` from a function, ``return`` from a kernel."""

    value: Value | None = None
    digest: Value | None = None

    def write(self, writer: Writer) -> None:
        value = f" {self.digest.text()} + {self.value.text()}" if self.value else ""
        writer.add(f"return{value};", self.value)

    def run(self, frame: Frame, mask: Lanes) -> Lanes:
        if self.value is not None:
            value = self.value.lanes(frame, mask) + self.digest.lanes(frame, mask)
            frame.result = np.where(mask, value, frame.result)
        return nobody()


Statement = (
    Assign | AddToLocal | Store | Pick | If | Switch | Loop | Break | Continue | Return
)  # fmt: skip


# ---- Functions and kernels ---------------------------------------------------------------------


def _write_locals(writer: Writer, values: dict[str, Value]) -> None:
    writer.add(f"unsigned local[{SLOTS}] = {{0u, 0u, 0u, 0u}};")
    for name, value in values.items():
        writer.add(f"unsigned {name} = {value.text()};")


@dataclass(eq=False)
class Function:
    """``unsigned f(..., salt, a, b)``; `b` bounds its recursion, if it has one."""

    name: str
    qualifier: str
    values: dict[str, Value]
    body: list[Statement] = field(default_factory=list)

    def write(self, writer: Writer) -> None:
        writer.add(f"__device__ {self.qualifier} unsigned {self.name}(const unsigned* in,")
        writer.add("    unsigned* out, unsigned* own, const unsigned* tile, unsigned* mine,")
        writer.add(
            "    unsigned t, unsigned g, unsigned zero, unsigned salt, unsigned a, unsigned b) {"
        )
        writer.depth += 1
        _write_locals(writer, self.values)
        writer.depth -= 1
        writer.block(self.body)
        writer.add("}")

    def call(self, caller: Frame, mask: Lanes, salt: Lanes, a: Lanes, b: Lanes) -> Lanes:
        variables = {name: caller.variables[name] for name in ("t", "g", "zero")}
        variables |= {"salt": salt, "a": a, "b": b}
        frame = Frame(caller.machine, variables)
        for name, value in self.values.items():
            variables[name] = value.lanes(frame, mask)
        run(self.body, frame, mask)
        return frame.result


@dataclass(eq=False)
class Kernel:
    """A program with its launch. A barrier stands between one part of `parts` and the next."""

    name: str
    seed: int
    block: tuple[int, int]
    blocks: int
    functions: list[Function]
    values: dict[str, Value]
    parts: list[list[Statement]]
    text: str = ""

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1]

    def write(self) -> None:
        """Set `text` and every access's line, from 1."""
        writer = Writer()
        for function in self.functions:
            function.write(writer)
        writer.add(f"__global__ void {self.name}(const unsigned* in, unsigned* out, unsigned* own,")
        writer.add("    unsigned zero) {")
        writer.depth += 1
        writer.add(f"__shared__ unsigned tile[{self.threads}];")
        writer.add(f"__shared__ unsigned mine[{SLOTS * self.threads}];")
        writer.add("const unsigned t = threadIdx.y * blockDim.x + threadIdx.x;")
        writer.add(f"const unsigned g = blockIdx.x * {self.threads}u + t;")
        writer.add("const unsigned salt = zero;")
        _write_locals(writer, self.values)
        writer.depth -= 1
        for i, part in enumerate(self.parts):
            if i > 0:
                writer.add("  __syncthreads();")
            writer.block(part)
        writer.add("}")
        self.text = "\n".join(writer.lines) + "\n"

    def arrays(self) -> dict[str, np.ndarray]:
        """Return new arrays to launch with (and a 0): the same each time."""
        generator = np.random.default_rng(self.seed)
        slots = SLOTS * self.threads * self.blocks
        sizes = {"in": INPUT_WORDS, "out": slots, "own": slots}
        return {n: generator.integers(0, 2**20, s, np.uint32) for n, s in sizes.items()}

    def run(self) -> Machine:
        """Interpret the launch."""
        machine = Machine(self.arrays())
        for block in range(self.blocks):
            machine.memory["tile"] = np.zeros(self.threads, np.uint32)
            machine.memory["mine"] = np.zeros(SLOTS * self.threads, np.uint32)
            warps = [self._warp(machine, block, t) for t in range(0, self.threads, WARP)]
            for part in self.parts:
                warps = [(frame, run(part, frame, mask)) for frame, mask in warps]
        return machine

    def _warp(self, machine: Machine, block: int, first: int) -> tuple[Frame, Lanes]:
        t = np.arange(first, first + WARP, dtype=np.uint32)
        g = t + np.uint32(block * self.threads)
        zero = np.zeros(WARP, np.uint32)
        frame = Frame(machine, {"t": t, "g": g, "zero": zero, "salt": zero})
        mask = t < self.threads
        for name, value in self.values.items():
            frame.variables[name] = value.lanes(frame, mask)
        return frame, mask


# ---- Drawing a kernel --------------------------------------------------------------------------

BLOCKS = [(32, 1), (40, 1), (64, 1), (70, 1), (97, 1), (8, 5), (16, 6), (5, 13)]


def random_kernel(name: str, seed: int) -> Kernel:
    """Draw a kernel, the same for a seed everywhere, that the interpreter runs in a moment."""
    for attempt in range(1000):
        kernel = _Generator(random.Random(f"{seed}.{attempt}"), name, seed).kernel()
        kernel.write()
        try:
            kernel.run()
        except TooLong:
            continue
        return kernel
    raise AssertionError(f"seed {seed} gives no short kernel")


class _Generator:
    def __init__(self, pick: random.Random, name: str, seed: int):
        self.pick = pick
        self.name, self.seed = name, seed
        self.block = pick.choice(BLOCKS)
        self.blocks = pick.choice([1, 1, 2])
        self.functions: list[Function] = []
        threads = self.block[0] * self.block[1]
        # Words between a thread's slots and between threads: coalesced, and not.
        self.strides = {
            "out": ("g", threads * self.blocks, 1),
            "own": ("g", 1, SLOTS),
            "mine": ("t", threads, 1) if pick.random() < 0.5 else ("t", 1, SLOTS),
        }
        self.counters = 0
        self.readable: list[str] = []  # variables in scope
        self.assignable: list[str] = []
        self.nesting: list[str] = []  # the loops and switches around
        self.returns: str = ""  # "", "nothing" or "value"
        self.salt = 0
        self.deepest = pick.choice([2, 3, 3, 4])  # nesting

    def kernel(self) -> Kernel:
        for i in range(self.pick.choice([0, 1, 1, 2])):
            self.functions.append(self.function(i))
        self.readable, self.assignable = ["t", "g"], []
        values = self.locals(4)
        self.returns = ""
        parts = [[self.store_to_tile(), *self.first_stores()]]
        for _ in range(self.pick.choice([0, 0, 1])):
            parts += [self.body(0, 2), [self.store_to_tile()]]
        self.returns = "nothing"
        parts.append(self.body(0, 5))
        parts[-1].append(self.store_digest())
        return Kernel(self.name, self.seed, self.block, self.blocks, self.functions, values, parts)

    def function(self, number: int) -> Function:
        pick = self.pick
        qualifier = pick.choice(["__noinline__", "__noinline__", "", "", "__forceinline__"])
        self.readable, self.assignable = ["t", "g", "a", "b"], ["a"]
        function = Function(f"{self.name}_f{number}", qualifier, self.locals(2))
        self.returns = "value"
        function.body = self.body(1, 2)
        if qualifier != "__forceinline__" and pick.random() < 0.25:
            less = Binary("-", Name("b"), Number(1))
            call = Call(function, self.new_salt(), self.expression(), less)
            recursion = [Assign(self.local(), "+", call)]
            function.body.append(If(Condition(Name("b")), recursion, self.body(2, 1)))
        function.body.append(Return(self.value(), self.digest()))
        return function

    def locals(self, count: int) -> dict[str, Value]:
        values = {f"v{i}": self.expression() for i in range(count)}
        self.readable = [*self.readable, *values]
        self.assignable = [*self.assignable, *values]
        return values

    def local(self) -> str:
        return self.pick.choice(self.assignable)

    # -- Values

    def expression(self, depth: int = 2) -> Value:
        pick = self.pick
        kind = pick.random()
        if depth == 0 or kind < 0.3:
            return Name(pick.choice(self.readable)) if pick.random() < 0.8 else self.number()
        if kind < 0.38:
            return Local(self.expression(depth - 1))
        if kind < 0.46:
            return Choice(*(self.expression(depth - 1) for _ in range(3)))
        op = pick.choice(["+", "+", "-", "*", "^", "&", "|", ">>", "%", "<", "==", "!="])
        right = self.expression(depth - 1)
        if op == ">>":
            right = Number(pick.randrange(1, 9))
        elif op == "%":
            right = Number(pick.randrange(2, 40))
        return Binary(op, self.expression(depth - 1), right)

    def number(self) -> Value:
        return Number(self.pick.choice([0, 1, 2, 3, 5, 7, 8, 16, 31, 33, 64, 1000]))

    def value(self) -> Value:
        """An expression, an access or a call: what a line has one of."""
        kind = self.pick.random()
        if kind < 0.3:
            return self.salted(self.expression())
        if kind < 0.85 or not self.functions:
            return self.load()
        return self.call()

    def call(self) -> Value:
        depth = Binary("%", self.expression(1), Number(3))
        function = self.pick.choice(self.functions)
        return Call(function, self.new_salt(), self.expression(), depth)

    def salted(self, value: Value) -> Value:
        """Make the value differ from all others in a way that the compiler can't see through."""
        return Binary("+", value, self.new_salt())

    def new_salt(self) -> Value:
        self.salt += 1
        return Binary("%", Binary("+", Name("salt"), Number(self.salt)), Number(1021))

    def digest(self) -> Value:
        """Use all that has been computed."""
        total: Value = Local(Number(0))
        for value in [*(Local(Number(i)) for i in range(1, SLOTS)), *map(Name, self.assignable)]:
            total = Binary("+", Binary("*", total, Number(3)), value)
        return total

    def load(self) -> Value:
        pick = self.pick
        buffer = pick.choice(["in", "in", "in", "tile", "own", "out", "mine"])
        if buffer in self.strides:
            return Load(buffer, self.slot(buffer, self.expression(1)))
        words = INPUT_WORDS if buffer == "in" else self.block[0] * self.block[1]
        index = self.expression()
        if pick.random() < 0.4:  # lane after lane, or with a stride
            index = Binary("*", Name(pick.choice("tg")), Number(pick.choice([1, 1, 2, 3, 8, 32])))
            index = Binary("+", index, self.expression(1))
        return Load(buffer, Binary("%", self.salted(index), Number(words)))

    def slot(self, buffer: str, number: Value) -> Value:
        who, between_slots, between_threads = self.strides[buffer]
        number = Binary("%", self.salted(number), Number(SLOTS))
        slot = Binary("*", number, Number(between_slots))
        thread = Binary("+", Name(who), Name("zero"))
        return Binary("+", slot, Binary("*", thread, Number(between_threads)))

    def condition(self) -> Condition:
        return Condition(self.value(), self.pick.choice([1, 1, 2, 3, 4, 6, 8, 16, 64]))

    def test(self) -> Test:
        if self.pick.random() < 0.65:
            return self.condition()
        return Both(self.pick.choice(["&&", "||"]), self.condition(), self.test())

    # -- Statements

    def store_to_tile(self) -> Statement:
        return Store("tile", Binary("+", Name("t"), Name("zero")), self.expression())

    def store_digest(self) -> Statement:
        return Store("own", self.slot("own", self.expression(1)), self.digest(), adds=True)

    def first_stores(self) -> list[Statement]:
        _, between_slots, between_threads = self.strides["mine"]
        start = Binary("*", Binary("+", Name("t"), Name("zero")), Number(between_threads))
        slots = [Binary("+", start, Number(i * between_slots)) for i in range(SLOTS)]
        return [Store("mine", slot, self.expression()) for slot in slots]

    def body(self, depth: int, size: int) -> list[Statement]:
        return [self.statement(depth) for _ in range(self.pick.randint(1, size))]

    def effect(self) -> Statement:
        """Something at the end of a body, so that a jump there has something to skip."""
        return Assign(self.local(), "+", self.salted(self.expression(1)))

    def statement(self, depth: int) -> Statement:
        kinds = {
            self.assign: 5,
            self.store: 4,
            self.assign_local: 1,
            self.choose: 1,
        }
        if depth < self.deepest:
            kinds |= {self.branch: 5, self.leave: 2, self.switch: 0.7}
            kinds |= {self.loop: 3} if self.nesting.count("loop") < 3 else {}
        draw = self.pick.choices(list(kinds), list(kinds.values()))[0]
        return draw(depth)

    def assign(self, depth: int) -> Statement:
        return Assign(self.local(), self.pick.choice("+^-"), self.value())

    def assign_local(self, depth: int) -> Statement:
        return AddToLocal(self.expression(1), self.value())

    def store(self, depth: int) -> Statement:
        buffer = self.pick.choice(["out", "own", "own", "mine"])
        calls = self.functions and self.pick.random() < 0.15
        value = self.call() if calls else self.salted(self.expression())
        slot = self.slot(buffer, self.expression(1))
        return Store(buffer, slot, value, adds=not calls and self.pick.random() < 0.3)

    def choose(self, depth: int) -> Statement:
        return Pick(self.local(), self.test(), self.value(), self.value())

    def branch(self, depth: int) -> Statement:
        yes = self.body(depth + 1, 2)
        no = self.body(depth + 1, 2) if self.pick.random() < 0.5 else []
        if self.pick.random() < 0.35:  # a jump at the end of one side
            side = no if no and self.pick.random() < 0.5 else yes
            side += [self.effect(), *self.jump()]
        return If(self.test(), yes, no)

    def leave(self, depth: int) -> Statement:
        jump = self.jump()
        return If(self.test(), jump, []) if jump else self.assign(depth)

    def jump(self) -> list[Statement]:
        """A ``break``, ``continue`` or ``return``, where there may be one."""
        kinds: list[str] = []
        if self.nesting:
            kinds += ["break"] * 3
        if "loop" in self.nesting:
            kinds += ["continue"] * 3
        if self.returns:
            kinds.append("return")
        if not kinds:
            return []
        kind = self.pick.choice(kinds)
        if kind == "break":
            return [Break()]
        if kind == "continue":
            return [Continue()]
        if self.returns == "value":
            return [Return(self.value(), self.digest())]
        return [self.store_digest(), Return()]

    def switch(self, depth: int) -> Statement:
        self.nesting.append("switch")
        cases = [[*self.body(depth + 1, 2), self.effect()] for _ in range(self.pick.randint(2, 6))]
        self.nesting.pop()
        return Switch(self.value(), cases)

    def loop(self, depth: int) -> Statement:
        pick = self.pick
        counter = f"i{self.counters}"
        self.counters += 1
        start = Binary("%", self.expression(1), Number(3))
        kind = pick.choice(["for", "for", "while", "do"])
        bound, test = None, None
        if kind == "for":
            bound = self.value()
        else:
            test = Condition(Tick(counter, pick.randint(3, 7)))
            if pick.random() < 0.8:
                test = Both("&&", test, self.test())
        self.nesting.append("loop")
        outer = self.readable
        self.readable = [*outer, counter]
        body = [*self.body(depth + 1, 3), self.effect()]
        self.readable = outer
        self.nesting.pop()
        return Loop(kind, counter, start, test, bound, pick.randint(1, 2), body)
