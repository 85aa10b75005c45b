"""What a traced launch did, as exact integers: the simulator's counterpart of a profiler's page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from convt_lab.columns import aligned

__all__ = ["BufferUse", "Hazard", "Report", "Request", "Site"]

SECTOR_BYTES = 32


@dataclass(frozen=True)
class Site:
    """One line's accesses of one kind to one buffer, summed over all warps.

    Attributes
    ----------
    line
        Line of the kernel's source, from 1.
    space
        ``"global"`` or ``"shared"``.
    op
        ``"load"``, ``"store"`` or ``"atomic"``.
    buffer
        The kernel's parameter, or the shared array.
    requests
        Instructions that warps issued. One whose lanes go to several buffers counts for each.
    active_lanes
        Lanes that took part, summed over the requests.
    sectors
        32-byte pieces of memory that the requests touched (global memory; 0 for shared).
    wavefronts
        Passes over the 32 banks that the requests took (shared memory; 0 for global).
    bytes_requested
        What the lanes asked for.
    bytes_moved
        32 bytes for a sector, 128 for a wavefront.
    ideal
        Sectors or wavefronts that each request's distinct bytes would need if they lay together.
    """

    line: int
    space: str
    op: str
    buffer: str
    requests: int
    active_lanes: int
    sectors: int
    wavefronts: int
    bytes_requested: int
    bytes_moved: int
    ideal: int

    @property
    def cost(self) -> int:
        """Sectors or wavefronts."""
        return self.sectors + self.wavefronts


@dataclass(frozen=True)
class Request:
    """The costliest request of a site, lane by lane, for pictures.

    Of several that cost the same it is the first one of those in which a lane asks for most.

    Attributes
    ----------
    line, space, op, buffer
        Its site.
    bytes
        What each lane asked for.
    offsets
        32 byte offsets from the buffer's start; None for a lane that took no part.
    cost
        Sectors or wavefronts.
    """

    line: int
    space: str
    op: str
    buffer: str
    bytes: int
    offsets: tuple[int | None, ...]
    cost: int


@dataclass(frozen=True)
class Hazard:
    """Something that is wrong, or right only by luck.

    Attributes
    ----------
    kind
        ``"race"``, ``"divergent_barrier"``, ``"out_of_bounds"``, ``"uninitialised_read"``,
        ``"write_conflict"`` or ``"misaligned"``.
    line
        Line of the kernel's source where it was noticed.
    buffer
        The parameter or shared array, or ``""``.
    message
        What happened, with one example: block, thread and place.
    count
        How often it happened at this line.
    """

    kind: str
    line: int
    buffer: str
    message: str
    count: int = 1


@dataclass(frozen=True)
class BufferUse:
    """How a buffer in global memory was used.

    Attributes
    ----------
    name
        The kernel's parameter.
    bytes
        Its size.
    footprint
        Distinct sectors that were touched.
    loads
        How often each element was read, flat.
    """

    name: str
    bytes: int
    footprint: int
    loads: np.ndarray = field(repr=False, compare=False)

    @property
    def reuse(self) -> float:
        """How often an element that was read at all was read, on average."""
        read = np.count_nonzero(self.loads)
        return float(self.loads.sum() / read) if read else 0.0


@dataclass(frozen=True)
class Report:
    """What a traced launch did. Identical on every run and machine.

    Attributes
    ----------
    sites
        Ordered by line.
    totals
        Sums over the sites, for instance ``totals["global_load_sectors"]``.
    fma
        Fused multiply-adds (``fmaf``), counted by thread.
    tensor_fma
        Multiply-adds of the tensor cores' instructions: 16 * 8 * k for one of a warp.
    hazards
        Empty for a correct kernel.
    buffers
        How each buffer in global memory was used, by name.
    requests
        The costliest request of each site.
    blocks, grid_blocks
        How many blocks were traced, of how many in the grid. If they differ, the others did not
        run, and every count is of the traced ones alone.
    source
        The kernel's text.
    steps
        Iterations of loops, summed over the threads.
    """

    sites: tuple[Site, ...]
    totals: Mapping[str, int]
    fma: int
    hazards: tuple[Hazard, ...]
    buffers: Mapping[str, BufferUse]
    requests: tuple[Request, ...] = field(repr=False)
    blocks: int
    grid_blocks: int
    source: str = field(repr=False)
    tensor_fma: int = 0
    steps: int = 0

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs (two for a multiply-add) per byte moved between the SM and global memory."""
        moved = sum(site.bytes_moved for site in self.sites if site.space == "global")
        return 2 * (self.fma + self.tensor_fma) / moved if moved else 0.0

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return the sites, totals and hazards as text for a person.

        The lanes, the cost and the ideal cost are those of one request, on average.
        """
        columns = (
            *("line", "space", "op", "buffer", "requests", "lanes"),
            *("sectors", "wavefronts", "cost", "ideal"),
        )
        rows = [
            (
                *(str(s.line), s.space, s.op, s.buffer, f"{s.requests:,}"),
                f"{s.active_lanes / s.requests:.1f}",
                f"{s.sectors:,}" if s.space == "global" else "",
                f"{s.wavefronts:,}" if s.space == "shared" else "",
                f"{s.cost / s.requests:.1f}",
                f"{s.ideal / s.requests:.1f}",
            )
            for s in self.sites
        ]
        lines = [aligned([columns, *rows], left={1, 2, 3})]
        counts = [f"{self.fma:,} FMAs"]
        if self.tensor_fma:
            counts.append(f"{self.tensor_fma:,} multiply-adds of tensor cores")
        counts.append(f"{self.arithmetic_intensity:.2f} FLOP per byte moved")
        lines.append("; ".join(counts))
        if self.blocks != self.grid_blocks:
            lines.append(
                f"traced {self.blocks:,} of {self.grid_blocks:,} blocks, and only these ran"
            )
        lines += [
            f"{h.kind} in line {h.line}, {h.count:,} times: {h.message}" for h in self.hazards
        ] or ["no hazards"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that is a number or a word, for JSON."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "totals": dict(self.totals),
            "fma": self.fma,
            "tensor_fma": self.tensor_fma,
            "steps": self.steps,
            "hazards": [asdict(hazard) for hazard in self.hazards],
            "buffers": {
                use.name: {
                    "bytes": use.bytes,
                    "footprint": use.footprint,
                    "elements_read": int(np.count_nonzero(use.loads)),
                    "element_reads": int(use.loads.sum()),
                }
                for use in self.buffers.values()
            },
            "blocks": self.blocks,
            "grid_blocks": self.grid_blocks,
        }


def totals_of(sites: tuple[Site, ...]) -> dict[str, int]:
    """Sum the sites by space and operation."""
    totals = {}
    for space, costs in (("global", "sectors"), ("shared", "wavefronts")):
        for op in ("load", "store", "atomic"):
            those = [s for s in sites if s.space == space and s.op == op]
            for quantity in (
                "requests",
                "active_lanes",
                costs,
                "bytes_requested",
                "bytes_moved",
                "ideal",
            ):
                totals[f"{space}_{op}_{quantity}"] = sum(getattr(s, quantity) for s in those)
    return totals
