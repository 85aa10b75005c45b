"""What `tools/distributed_times.py` measured on several GPUs, and what the book says of it.

The file's schema stands in that tool. Reading checks it all, as `convt_lab.records` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from convt_lab import records
from convt_lab.columns import aligned
from convt_lab.problem import Problem
from convt_lab.records import Node

__all__ = [
    "CASES",
    "DistributedRecord",
    "Exchange",
    "Row",
    "exchanges",
    "from_json",
    "load",
    "times",
]

#: What is measured -> whether the whole problem grows with the number of GPUs: weak scaling.
CASES = {"images": True, "rows": True, "tall": False}


@dataclass(frozen=True)
class Exchange:
    """What a profile of some calls says of one of a rank's exchanges, in microseconds.

    Attributes
    ----------
    sent
        How long NCCL's kernel ran, waiting for the other rank included; None if there was none.
    hidden
        How much of that another kernel ran; None likewise.
    call
        From the beginning of one exchange to that of the next; the mean.
    """

    sent: float | None
    hidden: float | None
    call: float


@dataclass(frozen=True)
class Row:
    """One case on some of the GPUs.

    Attributes
    ----------
    case
        One of `CASES`.
    problem
        The whole one.
    ranks
        GPUs.
    allow_tf32
        Whether float32 may be multiplied as TF32.
    kernel
        That computes the first rank's own rows, or its images.
    error
        The largest against one GPU's result, relative to the largest value.
    rounds_ms
        The time of each round, of the GPU that takes longest.
    usual_ms
        The same where NCCL's streams have their usual priority, not a high one; empty where nothing
        is sent.
    alone_ms
        The same with nothing sent; empty likewise.
    bytes_sent
        Of each rank; empty where nothing is sent.
    exchange
        Of each rank; empty where nothing is sent.
    """

    case: str
    problem: Problem
    ranks: int
    allow_tf32: bool
    kernel: str
    error: float
    rounds_ms: tuple[float, ...] = field(repr=False)
    usual_ms: tuple[float, ...] = field(repr=False, default=())
    alone_ms: tuple[float, ...] = field(repr=False, default=())
    bytes_sent: tuple[int, ...] = ()
    exchange: tuple[Exchange, ...] = ()

    @property
    def ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds_ms)

    @property
    def ms_at_usual_priority(self) -> float:
        """The median of the rounds at NCCL's usual priority; where nothing is sent, `ms`."""
        return statistics.median(self.usual_ms) if self.usual_ms else self.ms

    @property
    def ms_without_exchange(self) -> float:
        """The median of the rounds with nothing sent; where nothing is sent, `ms`."""
        return statistics.median(self.alone_ms) if self.alone_ms else self.ms


@dataclass(frozen=True)
class DistributedRecord:
    """All that was measured in one run.

    Attributes
    ----------
    gpu, gpus, link
        Its name, how many there were, and what nvidia-smi calls the way from one to the next.
    software
        Name -> version.
    date, seed, meaning
        The day, of the inputs, and words for what the file holds.
    rows
        Of all cases.
    """

    gpu: str
    gpus: int
    link: str | None
    software: dict[str, str]
    date: str
    seed: int
    meaning: dict[str, str]
    rows: tuple[Row, ...]

    def row(self, case: str, ranks: int, allow_tf32: bool = False) -> Row:
        """Return a row.

        Raises
        ------
        KeyError
            If there is none.
        """
        for row in self.rows:
            if (row.case, row.ranks, row.allow_tf32) == (case, ranks, allow_tf32):
                return row
        raise KeyError(f"no row of {case!r} on {ranks} GPUs with allow_tf32={allow_tf32}")

    def efficiency(self, row: Row) -> float:
        """Return a row's speed-up over one GPU, divided by the number of GPUs.

        Where the problem grows with the GPUs, that is one GPU's time for its part over the time of
        all for the whole.
        """
        alone = self.row(row.case, 1, row.allow_tf32).ms
        return alone / row.ms / (1 if CASES[row.case] else row.ranks)


# ---- Reading -------------------------------------------------------------------------------------


def load(path: Path | str) -> DistributedRecord:
    """Read a record and check it.

    Raises
    ------
    RecordError
        If it is no JSON or not as the schema says.
    OSError
        If it can't be read.
    """
    return from_json(records.read_json(path), str(path))


def from_json(value: object, file: str = "record") -> DistributedRecord:
    """Check a parsed JSON value and make a record of it.

    Raises
    ------
    RecordError
        If it is not as the schema says.
    """
    root = Node(value, "", file)
    records.require_schema(root, 1)
    _, what, gpu, gpus, link, software, day, seed, meaning, rows = root.fields(
        *("schema", "what", "gpu", "gpus", "link", "software", "date", "seed", "meaning", "rows")
    )
    what.text()
    found = tuple(_row(node) for node in rows.items())
    keys = [(row.case, row.ranks, row.allow_tf32) for row in found]
    for key, node in zip(keys, rows.items(), strict=True):
        if keys.count(key) > 1:
            raise node.wrong("the only row of its case, ranks and allow_tf32")
        if (key[0], 1, key[2]) not in keys:
            raise node.wrong("beside a row of the same case on one GPU")
    return DistributedRecord(
        gpu=gpu.text(),
        gpus=gpus.integer(2),
        link=link.optional(Node.text),
        software=_texts(software, "convt_lab", "torch", "cuda", "cudnn", "nccl"),
        date=records.read_day(day),
        seed=seed.integer(0),
        meaning={name: node.text() for name, node in meaning.members().items()},
        rows=found,
    )


def _texts(node: Node, *names: str) -> dict[str, str]:
    return {name: n.text() for name, n in zip(names, node.fields(*names), strict=True)}


_COMMON = ("case", "problem", "ranks", "allow_tf32", "kernel", "error", "ms", "rounds_ms")
_OF_ROWS = (
    *("ms_at_usual_priority", "rounds_ms_at_usual_priority"),
    *("ms_without_exchange", "rounds_ms_without_exchange", "bytes_sent", "exchange"),
)


def _row(node: Node) -> Row:
    members = node.members()
    ranks = members["ranks"].integer(1) if "ranks" in members else 1
    case = members["case"].choice(*CASES) if "case" in members else ""
    sends = ranks > 1 and case != "images"
    _, problem, _, allow_tf32, kernel, error, ms, rounds, *rest = node.fields(
        *_COMMON, *(_OF_ROWS if sends else ())
    )
    row = {
        "case": case,
        "problem": records.read_problem(problem),
        "ranks": ranks,
        "allow_tf32": allow_tf32.boolean(),
        "kernel": kernel.text(),
        "error": error.number(),
        "rounds_ms": _rounds(ms, rounds),
    }
    if sends:
        usual, usual_rounds, alone, alone_rounds, sent, exchange = rest
        row |= {
            "usual_ms": _rounds(usual, usual_rounds),
            "alone_ms": _rounds(alone, alone_rounds),
            "bytes_sent": _of_each(sent, ranks, lambda n: n.integer(0)),
            "exchange": _of_each(exchange, ranks, _exchange),
        }
    return Row(**row)


def _rounds(median: Node, rounds: Node) -> tuple[float, ...]:
    values = tuple(node.positive() for node in rounds.items())
    # Rounds are rounded themselves, to five digits.
    if not values or abs(median.positive() / statistics.median(values) - 1) > 1e-4:
        raise median.wrong(f"the median of {rounds.place}")
    return values


def _of_each(node: Node, ranks: int, read: Callable) -> tuple:
    items = node.items()
    if len(items) != ranks:
        raise node.wrong(f"a list of {ranks}, one for each rank")
    return tuple(read(item) for item in items)


def _exchange(node: Node) -> Exchange:
    sent, hidden, call = node.fields("sent_us", "hidden_us", "call_us")
    found = Exchange(sent.optional(Node.positive), hidden.optional(Node.number), call.positive())
    if (found.sent is None) != (found.hidden is None):
        raise node.wrong("sent_us and hidden_us that are both null, or neither")
    # They are rounded themselves.
    if found.sent is not None and not found.hidden <= 1.0001 * found.sent <= 1.0002 * found.call:
        raise node.wrong("hidden_us at most sent_us, and that at most call_us")
    return found


# ---- What the book shows -------------------------------------------------------------------------


def times(record: DistributedRecord) -> str:
    """Return a table of times and efficiencies.

    `spread` is the distance from the fastest round to the slowest, relative to the median; `none
    sent` is the time with the exchange left out, `usual priority` that with NCCL's streams as they
    usually are; `MB` is what the rank sends that sends most.
    """
    rows = [
        (
            *("case", "GPUs", "TF32", "ms", "spread", "efficiency"),
            *("none sent", "usual priority", "MB", "error"),
        )
    ]
    for row in record.rows:
        spread = (max(row.rounds_ms) - min(row.rounds_ms)) / row.ms
        rows.append(
            (
                row.case,
                str(row.ranks),
                "on" if row.allow_tf32 else "off",
                f"{row.ms:.3f}",
                f"{spread:.1%}",
                f"{record.efficiency(row):.3f}",
                f"{row.ms_without_exchange:.3f}" if row.alone_ms else "",
                f"{row.ms_at_usual_priority:.3f}" if row.usual_ms else "",
                f"{max(row.bytes_sent) / 1e6:.2f}" if row.bytes_sent else "",
                f"{row.error:.0e}",
            )
        )
    return aligned(rows, left=(0,))


def exchanges(record: DistributedRecord) -> str:
    """Return a table of what profiles say: of each rank, when rows travelled and what ran then."""
    rows = [("case", "GPUs", "TF32", "rank", "travel us", "hidden us", "hidden")]
    for row in record.rows:
        for rank, exchange in enumerate(row.exchange):
            seen = ("-", "-", "-")
            if exchange.sent is not None:
                share = exchange.hidden / exchange.sent
                seen = (f"{exchange.sent:.0f}", f"{exchange.hidden:.0f}", f"{share:.0%}")
            tf32 = "on" if row.allow_tf32 else "off"
            cells = (row.case, str(row.ranks), tf32, str(rank))
            rows.append((*cells, *seen))
    return aligned(rows, left=(0,))
