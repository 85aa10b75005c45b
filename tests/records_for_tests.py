"""A small record, made up, in which every kind of row occurs."""

from convt_lab import records
from convt_lab.measure import Load, Sustained, Timing
from convt_lab.problem import Problem
from convt_lab.records import Ceiling, Ceilings, Point, Record, Row, RowErrors, Shape

PROBLEM = Problem(2, 4, 6, 8, 10, kernel_size=(3, 7))


def timing(seconds, runs=5):
    return Timing((seconds,) * (runs - 1) + (2 * seconds,))


def sustained(seconds, enqueue=1e-6):
    return Sustained(seconds, 100, enqueue, Load(4, 1980.0, 650.5, 45.0))


def stage(name, seconds, condition=2.0, **changes):
    row = Row(
        name,
        "stage",
        "float32",
        "contiguous",
        None,
        "ok",
        errors=RowErrors(3e-7, condition, 8.0),
        cold=timing(seconds),
        sustained=sustained(round(1.1 * seconds, 6)),
        peak_bytes=0,
    )
    return Row(**{**vars(row), **changes})


def untimed(name, status, failure=None, errors=None):
    return Row(name, "stage", "float32", "contiguous", None, status, failure=failure, errors=errors)


def pytorch(name, seconds):
    row = stage(name, seconds, condition=20.0, kind="pytorch", peak_bytes=2**20)
    return Row(**{**vars(row), **form(name)})


def form(name):
    dtype, memory_format, allow_tf32 = records.PYTORCH_ROWS[name]
    return dict(dtype=dtype, memory_format=memory_format, allow_tf32=allow_tf32)


def ceiling(work, unit, seconds):
    return Ceiling(work, unit, timing(seconds), sustained(round(1.25 * seconds, 6)))


def record(**changes):
    rows = (
        stage("first", 0.008),
        stage("second", 0.002),
        untimed("wrong", "wrong", errors=RowErrors(float("inf"), 1e5, 8.0)),
        untimed("broken", "failed", failure="KernelError: it stopped"),
        pytorch("cudnn_float32", 0.004),
        pytorch("cudnn_float16", 0.001),
    )
    points = tuple(
        Point(
            records.point_name("batch", n),
            Problem(n, 4, 6, 8, 10, kernel_size=(3, 7)),
            (stage("first", 0.01 * n), stage("second", 0.005 * n), rows[4]),
            n,
        )
        for n in (1, 2)
    )
    return Record(
        **{
            **dict(
                gpu=records.GPU("NVIDIA H200", (9, 0), 132, 150 * 10**9, 60 * 2**20, 700.0),
                software=records.Software("0.1.0", "2.11.0", "13.0", "9.19.0"),
                date="2026-11-25",
                seed=0,
                seconds=100.0,
                parts=records.PARTS,
                meaning={"cold": "a median"},
                ceilings=Ceilings(
                    {
                        "fp32_fma": ceiling(6 * 10**10, "FLOP", 0.001),
                        "copy": ceiling(4 * 10**9, "byte", 0.001),
                        "gemm_tf32": None,
                    }
                ),
                shapes=(Shape("star", PROBLEM, rows),),
                growth={"batch": points},
            ),
            **changes,
        }
    )
