"""What the simulator counts: against values derived by hand, and against a GPU's own counters."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from counter_cases import CASES, PATTERN_CASES, PROBLEMS, StageCase

import convt_lab as lab
from convt_lab.backend import kernel_headers
from convt_lab.stages import kernels

RECORDS = sorted((Path(__file__).parents[1] / "records").glob("*-counters.json"))


def profile(stage, problem_name):
    problem = lab.Problem.named(problem_name)
    x, weight, bias = problem.random_inputs()
    return lab.stages[stage].profile(x, weight, bias, **problem.arguments)


def total(report, quantity, **where):
    return sum(
        getattr(site, quantity)
        for site in report.sites
        if all(getattr(site, name) == value for name, value in where.items())
    )


@pytest.mark.parametrize("case", PATTERN_CASES, ids=str)
def test_known_values(case):
    report = case.run("simulator", trace=True)
    sites = [s for s in report.sites if (s.space, s.op) == (case.space, "load")]
    assert sites[-1].cost == case.expected  # the last line loads what is under study
    assert sites[-1].requests == 1
    assert report.hazards == ()


def lockstep(axis, lanes):
    """Walk the taps of a warp's lanes in step: k and i, [step, lane]; -1 where a lane has left."""
    paths = [axis.taps(o) if o < axis.out_size else [] for o in lanes]
    steps = np.full((max(map(len, paths)), len(paths), 2), -1)
    for lane, path in enumerate(paths):
        for step, pair in enumerate(path):
            steps[step, lane] = pair
    return steps[..., 0], steps[..., 1]


def sectors(addresses, active):
    return len({address // 32 for address in addresses[active]})


def derive_coalesced(problem):
    """A warp is 32 pixels of a row; its lanes take their taps in step."""
    rows, columns = problem.axes
    (_, c_in, height, width), (_, c_out, kernel_h, kernel_w) = (
        problem.input_shape,
        problem.weight_shape,
    )
    requests = input_sectors = weight_sectors = 0
    for first in range(0, problem.out_width, 32):
        kw, w = lockstep(columns, range(first, first + 32))
        for oh in range(problem.out_height):
            for kh, h in rows.taps(oh):
                for step in range(len(kw)):
                    active = kw[step] >= 0
                    requests += c_in * c_out
                    for ci in range(c_in):
                        row = (ci * height + h) * width
                        input_sectors += c_out * sectors(4 * (row + w[step]), active)
                    for filter_number in range(c_in * c_out):
                        row = (filter_number * kernel_h + kh) * kernel_w
                        weight_sectors += sectors(4 * (row + kw[step]), active)
    return requests, input_sectors, weight_sectors


@pytest.mark.parametrize("name", PROBLEMS)
def test_coalesced_by_hand(name):
    problem, report = lab.Problem.named(name), profile("coalesced", name)
    requests, input_sectors, weight_sectors = derive_coalesced(problem)
    loads = {"space": "global", "op": "load"}
    assert total(report, "requests", buffer="input", **loads) == requests
    assert total(report, "requests", buffer="weight", **loads) == requests
    assert total(report, "sectors", buffer="input", **loads) == input_sectors
    assert total(report, "sectors", buffer="weight", **loads) == weight_sectors
    assert report.fma == problem.multiply_adds
    assert total(report, "active_lanes", buffer="input", **loads) == problem.multiply_adds


def test_coalesced_by_hand_in_one_line():
    """The small star: rows of 24 pixels, three sectors, each read for 7 columns of taps."""
    report = profile("coalesced", "star_small")
    loads = {"space": "global", "op": "load", "buffer": "input"}
    assert total(report, "requests", **loads) == 8 * 8 * (16 * 3) * 7
    assert total(report, "sectors", **loads) == 3 * 8 * 8 * (16 * 3) * 7


@pytest.mark.parametrize("name", PROBLEMS)
def test_naive_gather_by_hand(name):
    """A warp is 32 outputs down the columns; a tap is a request if any lane meets an input."""
    problem, report = lab.Problem.named(name), profile("naive_gather", name)
    rows, columns = problem.axes
    index = np.arange(problem.out_height * problem.out_width * problem.out_channels)
    oh = index % problem.out_height
    ow = index // problem.out_height % problem.out_width
    co = index // problem.out_height // problem.out_width
    h_of = {(o, k): i for o in range(problem.out_height) for k, i in rows.taps(o)}
    w_of = {(o, k): i for o in range(problem.out_width) for k, i in columns.taps(o)}
    requests = input_sectors = 0
    for first in range(0, len(index), 32):
        lanes = range(first, min(first + 32, len(index)))
        for kh in range(problem.kernel_size[0]):
            for kw in range(problem.kernel_size[1]):
                places = {
                    (h_of[oh[n], kh], w_of[ow[n], kw])
                    for n in lanes
                    if (oh[n], kh) in h_of and (ow[n], kw) in w_of
                }
                requests += bool(places)
                input_sectors += len({(h * problem.width + w) * 4 // 32 for h, w in places})
    assert len({co[n] for n in range(32)}) == 1
    loads = {"space": "global", "op": "load", "buffer": "input"}
    assert total(report, "requests", **loads) == requests * problem.in_channels
    assert total(report, "sectors", **loads) == input_sectors * problem.in_channels
    assert report.fma == problem.multiply_adds


@pytest.mark.parametrize("name", PROBLEMS)
def test_shared_tiled_by_hand(name):
    """Its shared loads are stage 2's global loads, one wavefront each; a tile is fetched once."""
    problem, report = lab.Problem.named(name), profile("shared_tiled", name)
    requests, _, _ = derive_coalesced(problem)  # one warp covers a row of either problem's outputs
    shared = {"space": "shared", "op": "load"}
    assert total(report, "requests", **shared) == 2 * requests
    assert total(report, "wavefronts", **shared) == 2 * requests
    assert report.fma == problem.multiply_adds
    rows, _ = problem.axes
    fetched = 0
    for first in range(0, problem.out_height, 8):
        reach = range(first, first + 8)
        low = -(-(first + rows.padding - (rows.kernel - 1) * rows.dilation) // rows.stride)
        halo = (len(reach) - 1 + (rows.kernel - 1) * rows.dilation) // rows.stride + 1
        fetched += sum(0 <= low + row < problem.height for row in range(halo))
    planes = problem.in_channels * problem.out_channels
    loads = {"space": "global", "op": "load", "buffer": "input"}
    assert total(report, "requests", **loads) == fetched * planes


def loads_of_vectors(report):
    """Return the sites of loads of more than a word a lane from shared memory."""
    loads = [s for s in report.sites if (s.space, s.op) == ("shared", "load")]
    return [s for s in loads if s.bytes_requested > 4 * s.active_lanes]


def test_register_blocked_by_hand():
    """3x7: tiles of the flat axis for 8 channels, the four warps side by side along it.

    For each input channel and row of taps a warp loads a window of 18 inputs, 4 vectors and a pair
    that differ from lane to lane (4 wavefronts each: pairs 12 words apart meet in the banks), and
    7 x 8 weights, 14 vectors that do not (2, one a half warp).
    """
    problem, report = lab.Problem.named("star_small"), profile("register_blocked", "star_small")
    assert problem.out_channels == 8
    pitch = -(-problem.out_width // 4) * 4
    tiles = -(-(problem.out_height * pitch + 2) // (4 * 32 * 12))  # 2: to an aligned input
    warps, rows_of_taps = tiles * 4, problem.in_channels * 3
    assert report.fma == warps * 32 * rows_of_taps * 7 * 12 * 8
    vectors = loads_of_vectors(report)
    assert sum(s.requests for s in vectors) == warps * rows_of_taps * (4 + 1 + 14)
    assert sum(s.wavefronts for s in vectors) == warps * rows_of_taps * (4 * 4 + 4 + 14 * 2)
    assert sum(s.active_lanes for s in vectors) == 32 * sum(s.requests for s in vectors)
    of_bytes = 32 * warps * rows_of_taps * (4 * 16 + 8 + 14 * 16)
    assert sum(s.bytes_requested for s in vectors) == of_bytes
    stores = [s for s in report.sites if (s.space, s.op, s.buffer) == ("global", "store", "output")]
    assert sum(s.active_lanes for s in stores) == np.prod(problem.output_shape)


def test_winograd_by_hand():
    """Four products for two rows: pairs of rows on the flat axis, 160 pixels and 8 x 4 channels.

    For each input channel a warp loads two windows of 26 inputs, 6 vectors and a pair each, and 14
    vectors of weights. A vector goes by quarter warps (4 wavefronts) and a pair by half warps:
    2 + 2, or 1 + 2 where products 0 and 1 want the same. Of the weights all lanes of a product want
    the same: half warps, of two vectors from different banks (1 + 1).
    """
    problem, report = lab.Problem.named("channels_small"), profile("winograd", "channels_small")
    pairs, pitch = problem.out_height // 2 + 1, -(-problem.out_width // 4) * 4
    tiles = -(-(pairs * pitch + 2) // 320)
    channels_of_warps = tiles * 8 * problem.in_channels
    sums = channels_of_warps * 32 * (7 * 20 * 8 + 26)  # and the windows' own additions
    columns = tiles * problem.in_channels * 32 * 7
    assert report.fma == sums + 2 * columns  # a column of weights takes two more
    vectors = loads_of_vectors(report)
    assert sum(s.requests for s in vectors) == channels_of_warps * (7 + 7 + 14)
    assert sum(s.wavefronts for s in vectors) == channels_of_warps * (
        6 * 4 + 4 + 6 * 4 + 3 + 14 * 2
    )
    weights = [s for s in report.sites if s.buffer == "weight"]
    assert sum(s.active_lanes for s in weights) == 3 * columns
    assert report.hazards == ()


def test_register_blocked_general_by_hand():
    """Stride 2: four phases, each one tile of four warps with 4 pixels and 8 channels a thread.

    For each input channel and row of up to 4 taps a warp loads a window of 8 inputs, 2 vectors that
    differ from lane to lane (4 wavefronts each), and 8 weights a tap, 2 vectors that do not (2).
    """
    problem = lab.Problem.named("strided_small")
    report = profile("register_blocked", "strided_small")
    assert problem.out_channels == 8
    assert report.grid_blocks == 4
    rows, columns = (
        [len(range(first, axis.kernel, axis.k_step)) for first in range(axis.k_step)]
        for axis in problem.axes
    )
    assert (sum(rows), sum(columns)) == problem.kernel_size
    assert max(columns) <= 4
    warps_and_channels = 4 * problem.in_channels
    taps, rows_of_taps = sum(rows) * sum(columns), sum(rows) * len(columns)
    assert report.fma == 32 * warps_and_channels * taps * 4 * 8
    vectors = [s for s in loads_of_vectors(report) if s.bytes_requested == 16 * s.active_lanes]
    assert sum(s.requests for s in vectors) == warps_and_channels * (2 * rows_of_taps + 2 * taps)
    assert sum(s.wavefronts for s in vectors) == warps_and_channels * (
        2 * 4 * rows_of_taps + 2 * 2 * taps
    )
    assert report.hazards == ()


def test_reuse_and_footprint():
    report = profile("coalesced", "star_small")
    problem = lab.Problem.named("star_small")
    use = report.buffers["input"]
    assert use.bytes == 4 * 8 * 16 * 24
    assert use.footprint == use.bytes // 32
    # Without padding every input value meets every tap of every output channel.
    assert (use.loads == problem.out_channels * 3 * 7).all()
    assert use.reuse == problem.out_channels * 3 * 7
    assert report.arithmetic_intensity == pytest.approx(
        2 * problem.multiply_adds
        / sum(s.bytes_moved for s in report.sites if s.space == "global")
    )  # fmt: skip


def test_the_report_is_the_same_every_time_and_in_every_process():
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from counter_cases import STAGE_CASES;"
        "print(json.dumps([c.run('simulator', trace=True).to_dict() for c in STAGE_CASES]))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    outputs = {
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    assert len(outputs) == 1
    assert json.loads(outputs.pop())[0]["fma"] == lab.Problem.named("star_small").multiply_adds


@pytest.mark.parametrize("name", PROBLEMS)
def test_tensor_core_by_hand(name):
    """Each warp with a pixel and a channel multiplies its whole tile, for all taps of its phase."""
    problem = lab.Problem.named(name)
    x, weight, bias = problem.random_inputs()
    report = kernels["tensor_core"].profile(x, weight, bias, **problem.arguments)
    assert problem.dilation == (1, 1)
    instructions = 0
    for first_h, first_w in np.ndindex(*problem.stride):
        taps, pixels = 1, problem.batch
        for axis, first in zip(problem.axes, (first_h, first_w), strict=True):
            taps *= len(range((first + axis.padding) % axis.stride, axis.kernel, axis.stride))
            pixels *= len(range(first, axis.out_size, axis.stride))
        warps = -(-pixels // 64) * -(-problem.out_channels // 32)
        instructions += warps * taps * -(-problem.in_channels // 8) * 2 * 8
    assert report.tensor_fma == instructions * 16 * 8 * 8
    assert report.fma == 0
    assert report.totals["global_store_active_lanes"] == np.prod(problem.output_shape)


def test_a_choice_of_blocks():
    problem = lab.Problem.named("star_small")
    x, weight, _ = problem.random_inputs()
    whole = lab.stages["coalesced"].profile(x, weight)
    parts = [
        lab.stages["coalesced"].profile(x, weight, blocks=range(first, whole.grid_blocks, 3))
        for first in range(3)
    ]
    assert whole.blocks == whole.grid_blocks == sum(part.blocks for part in parts)
    assert whole.fma == sum(part.fma for part in parts)
    for name, value in whole.totals.items():
        assert value == sum(part.totals[name] for part in parts)
    assert f"traced {parts[0].blocks:,} of {whole.blocks:,} blocks" in parts[0].table()
    with pytest.raises(lab.KernelError, match=f"block {whole.grid_blocks} .* the grid has"):
        lab.stages["coalesced"].profile(x, weight, blocks=[whole.grid_blocks])


def test_a_profile_leaves_its_inputs_alone_and_takes_every_form():
    problem = lab.Problem.named("star_small")
    x, weight, _ = problem.random_inputs()
    report = lab.stages["coalesced"].profile(x[0].numpy(), weight.numpy())
    assert report.to_dict() == lab.stages["coalesced"].profile(x, weight).to_dict()
    assert json.loads(json.dumps(report.to_dict()))["sites"][0]["buffer"] == "input"
    with pytest.raises(ValueError, match="empty"):
        lab.stages["coalesced"].profile(x[:0], weight)


def test_tracing_needs_the_simulator():
    program = lab.compile("__global__ void run() {}", "simulator")
    with pytest.raises(ValueError, match="blocks"):
        program.launch("run", 1, 1, [], blocks=[0])
    assert program.launch("run", 1, 1, []) is None


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_counts_the_same(case, record):
    content = json.loads(record.read_text())
    measured = content["counters"][str(case)]
    report = case.run("simulator", trace=True)
    counted = {**report.totals, "fma": report.fma}
    if isinstance(case, StageCase) and case.stage in ("register_blocked", "winograd"):
        exact = {name for name in measured if name.startswith("global")} | {"fma"}
        of_tile = sum(s.wavefronts for s in report.sites if s.buffer == "tile" and s.op == "load")
        if of_tile:  # the general path's; how many of these loads are left, the compiler decides
            all_loads = counted["shared_load_wavefronts"]
            assert all_loads - of_tile < measured["shared_load_wavefronts"] < all_loads
        else:
            exact.add("shared_load_wavefronts")
    else:
        exact = set(measured) - {"async_copies"}
    for name in sorted(exact):
        assert counted[name] == pytest.approx(measured[name], rel=0.01), name
    for name in measured.keys() - exact - {"async_copies"}:
        assert name in content["explained"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["star_small", "channels_small"])
def test_but_for_its_copies_register_blocked_stores_as_the_gpu_counts(record, name):
    """All its global loads are asynchronous copies, which the simulator counts as stores too."""
    measured = json.loads(record.read_text())["counters"][f"register_blocked {name}"]
    counted = profile("register_blocked", name).totals
    copies = counted["global_load_requests"]
    assert counted["shared_store_requests"] - copies == measured["shared_store_requests"]


def test_there_is_a_record_of_every_case():
    assert RECORDS
    for record in RECORDS:
        assert set(json.loads(record.read_text())["counters"]) == {str(case) for case in CASES}


def test_every_stage_case_names_its_kernel():
    for case in CASES:
        if isinstance(case, StageCase):
            of_kernel = case.kernel.partition("<")[0].rpartition("::")[2]
            files = [path.read_text() for path in kernel_headers()]
            assert any(re.search(rf"{of_kernel}\(\s*const float\*", text) for text in files)


def test_a_request_to_two_buffers_counts_for_each():
    source = """
    __global__ void run(const float* a, const float* b, float* y) {
      const float* from = threadIdx.x < 8 ? a : b;
      y[threadIdx.x] = from[threadIdx.x];
    }
    """
    a, b, y = (np.zeros(32, np.float32) for _ in range(3))
    report = lab.compile(source, "simulator").launch("run", 1, 32, [a, b, y], trace=True)
    loads = {
        s.buffer: (s.requests, s.active_lanes, s.sectors) for s in report.sites if s.op == "load"
    }
    assert loads == {"a": (1, 8, 1), "b": (1, 24, 3)}
