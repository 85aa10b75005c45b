"""A record of several GPUs with made-up numbers."""

from dataclasses import asdict, replace

from convt_lab import Problem

STAR = Problem.named("star")


def made_json(counts=(1, 2, 4)) -> dict:
    """As the tool writes it; what is sent takes longer on more GPUs."""
    rows = []
    for allow_tf32, whole in ((False, 8.0), (True, 4.0)):
        for case in ("images", "rows", "tall"):
            for ranks in counts:
                ms = whole / (ranks if case == "tall" else 1) + 0.125 * (ranks - 1)
                row = {
                    "case": case,
                    "problem": asdict(_problem(case, ranks)),
                    "ranks": ranks,
                    "allow_tf32": allow_tf32,
                    "kernel": "hopper_single" if allow_tf32 else "hopper",
                    "error": 1e-7 * (ranks - 1),
                    "ms": ms,
                    "rounds_ms": [ms * 0.99, ms, ms * 1.01],
                }
                if case != "images" and ranks > 1:
                    alone = ms - 0.0625 * (ranks - 1)
                    usual = ms + 0.03125 * (ranks - 1)
                    row |= {
                        "ms_at_usual_priority": usual,
                        "rounds_ms_at_usual_priority": [usual * 0.99, usual, usual * 1.02],
                        "ms_without_exchange": alone,
                        "rounds_ms_without_exchange": [alone * 0.98, alone, alone * 1.01],
                        "bytes_sent": [4_000_000] * (ranks - 1) + [0],
                        "exchange": [
                            {"sent_us": 40.0, "hidden_us": 30.0 + rank, "call_us": 1000.0 * ms}
                            for rank in range(ranks)
                        ],
                    }
                rows.append(row)
    return {
        "schema": 1,
        "what": "made up for tests",
        "gpu": "NVIDIA Test",
        "gpus": max(counts),
        "link": "NV18",
        "software": {
            "convt_lab": "0.1.0",
            "torch": "2.11.0",
            "cuda": "13.0",
            "cudnn": "9.19.0",
            "nccl": "2.27.5",
        },
        "date": "2026-11-29",
        "seed": 0,
        "meaning": {"ms": "of nothing that was measured"},
        "rows": rows,
    }


def _problem(case: str, ranks: int) -> Problem:
    if case == "images":
        return replace(STAR, batch=STAR.batch * ranks)
    if case == "rows":
        return replace(STAR, height=STAR.height * ranks)
    return replace(STAR, batch=1, height=8192, width=8192)
