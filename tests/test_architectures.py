"""Other architectures: occupancy and predictions by hand, and the record against nvcc."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

import convt_lab as lab
import convt_lab.__main__ as command_line
from convt_lab import architectures
from convt_lab.architectures import ARCHITECTURES, CARDS, Card, occupancy, predict
from convt_lab.gpu import find_toolkit
from convt_lab.stages import fma_stages

needs_nvcc = pytest.mark.skipif(find_toolkit() is None, reason="needs nvcc: no toolkit found")

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_90'
ptxas info    : Function properties for _Z3onePf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8192 bytes smem, 380 bytes cmem[0]
ptxas info    : Function properties for _Z6helperi
    32 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compile time = 10.0 ms
ptxas info    : Compiling entry function '_Z3twoILi3EEvPf' for 'sm_90'
ptxas info    : Function properties for _Z3twoILi3EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""

PTX = """
.visible .entry _Z3onePf(
	.param .u64 .ptr .align 1 _Z3onePf_param_0
)
.maxntid 32, 4, 2
.minnctapersm 2
{
	ret;
}
.visible .entry _Z3twoILi3EEvPf(
	.param .u64 _Z3twoILi3EEvPf_param_0
)
{
	ret;
}
"""


class TestOccupancy:
    @pytest.mark.parametrize(
        ("name", "threads", "registers", "shared", "blocks", "limits"),
        [
            # 255 * 32 registers a warp, rounded up to 8192: 8 warps in 64 Ki, 2 blocks of 4.
            ("sm_90", 128, 255, 0, 2, {"registers"}),
            # 33 * 32 = 1056, rounded up to 1280: 12 warps a quarter, 48 in all, 6 blocks of 8.
            ("sm_80", 256, 33, 0, 6, {"registers"}),
            # 43 * 32 = 1376 -> 1536: 10 warps a quarter, 40 in all (42 if they were one pool).
            ("sm_90", 64, 43, 0, 20, {"registers"}),
            # 100 KiB and the reserved one: two in 228, not three.
            ("sm_90", 128, 32, 100 * 1024, 2, {"shared memory"}),
            # The reserved kilobyte decides: two of 81 + 1 KiB fill 164, two of 82 + 1 do not.
            ("sm_80", 64, 32, 81 * 1024, 2, {"shared memory"}),
            ("sm_80", 64, 32, 82 * 1024, 1, {"shared memory"}),
            ("sm_90", 128, 32, 227 * 1024, 1, {"shared memory"}),
            ("sm_90", 128, 32, 227 * 1024 + 1, 0, {"shared memory"}),
            # 48 warps hold one block of 32.
            ("sm_86", 1024, 20, 0, 1, {"warps"}),
            ("sm_120", 96, 16, 0, 16, {"warps"}),
            # One warp each, and no more than 16 or 24 blocks.
            ("sm_86", 32, 16, 0, 16, {"blocks"}),
            ("sm_89", 32, 16, 0, 24, {"blocks"}),
            # Turing reserves nothing: 64 KiB are one block's. 1024 threads fill it, and with 64
            # registers each the register file too.
            ("sm_75", 1024, 64, 64 * 1024, 1, {"warps", "registers", "shared memory"}),
            ("sm_75", 1024, 32, 64 * 1024, 1, {"warps", "shared memory"}),
            # Turing rounds shared memory up to 256 bytes: 6554 -> 6656, nine in 64 KiB.
            ("sm_75", 32, 32, 6554, 9, {"shared memory"}),
            # More registers than there are.
            ("sm_90", 1024, 65, 0, 0, {"registers"}),
        ],
    )
    def test_by_hand(self, name, threads, registers, shared, blocks, limits):
        found = occupancy(ARCHITECTURES[name], threads, registers, shared)
        assert found.blocks_per_sm == blocks
        assert set(found.limited_by) == limits
        warps = blocks * -(-threads // 32)
        assert found.warps_per_sm == warps
        assert found.occupancy == warps / ARCHITECTURES[name].warps_per_sm

    @pytest.mark.parametrize(
        "arguments", [(0, 32, 0), (1025, 32, 0), (32, 256, 0), (32, -1, 0), (32, 32, -1)]
    )
    def test_nonsense(self, arguments):
        with pytest.raises(ValueError, match=r"^(threads|registers|shared_bytes)=-?\d+: "):
            occupancy(ARCHITECTURES["sm_90"], *arguments)

    @needs_nvcc
    def test_is_nvidias_own(self, tmp_path):
        """The header with NVIDIA's calculator, on a grid of cases."""
        include = find_toolkit() / "include"
        if not (include / "cuda_occupancy.h").is_file() or shutil.which("g++") is None:
            pytest.skip("needs cuda_occupancy.h and g++")
        names = {name: re.fullmatch(r"sm_(\d+)(\d)", name).groups() for name in ARCHITECTURES}
        devices = ",".join(
            f"{{{major}, {minor}, {a.warps_per_sm}, {a.shared_bytes_per_sm}, "
            f"{a.shared_bytes_per_block}, {a.reserved_shared_bytes}}}"
            for (major, minor), a in zip(names.values(), ARCHITECTURES.values(), strict=True)
        )
        (tmp_path / "cases.cpp").write_text(
            """
            #include <cstddef>
            #include <cstdio>
            #include <cuda_occupancy.h>
            struct Device { int major, minor, warps, shared, block, reserved; };
            int main() {
              const Device devices[] = {DEVICES};
              for (const Device& d : devices) {
                for (int threads = 32; threads <= 1024; threads += 96) {
                  for (int registers = 16; registers <= 255; registers += 7) {
                    for (int shared = 0; shared <= d.block; shared += 4100) {
                      cudaOccDeviceProp p;
                      p.computeMajor = d.major; p.computeMinor = d.minor;
                      p.maxThreadsPerBlock = 1024;
                      p.maxThreadsPerMultiprocessor = d.warps * 32;
                      p.regsPerBlock = p.regsPerMultiprocessor = 65536;
                      p.warpSize = 32;
                      p.sharedMemPerBlock = 49152;
                      p.sharedMemPerMultiprocessor = d.shared;
                      p.numSms = 1;
                      p.sharedMemPerBlockOptin = d.block;
                      p.reservedSharedMemPerBlock = d.reserved;
                      cudaOccFuncAttributes f;
                      f.maxThreadsPerBlock = 1024; f.numRegs = registers; f.sharedSizeBytes = 0;
                      f.partitionedGCConfig = PARTITIONED_GC_OFF;
                      f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
                      f.maxDynamicSharedSizeBytes = d.block;
                      f.numBlockBarriers = 1;
                      cudaOccDeviceState s;
                      s.carveoutConfig = 100;  // as much shared memory as the SM can give
                      cudaOccResult r;
                      const int error = cudaOccMaxActiveBlocksPerMultiprocessor(
                          &r, &p, &f, &s, threads, shared);
                      std::printf("sm_%d%d %d %d %d %d\\n", d.major, d.minor, threads, registers,
                                  shared, error ? -error : r.activeBlocksPerMultiprocessor);
                    }
                  }
                }
              }
            }
            """.replace("DEVICES", devices)
        )
        program = tmp_path / "cases"
        command = ["g++", "-O1", f"-I{include}", str(tmp_path / "cases.cpp"), "-o", str(program)]
        subprocess.run(command, check=True, capture_output=True)
        lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        cases = [line.split() for line in lines.splitlines()]
        assert {case[0] for case in cases} == set(ARCHITECTURES)
        for name, *numbers in cases:
            threads, registers, shared, blocks = map(int, numbers)
            found = occupancy(ARCHITECTURES[name], threads, registers, shared)
            assert found.blocks_per_sm == blocks, (name, threads, registers, shared)


class TestPtxas:
    def test_resources(self):
        found = architectures.parse_ptxas(PTXAS, architectures.launch_bounds(PTX))
        assert list(found) == ["_Z3onePf", "_Z3twoILi3EEvPf"]
        # Functions that it calls count with the kernel.
        assert found["_Z3onePf"] == architectures.Resources(40, 8192, 48, 5, 10, 256)
        assert found["_Z3twoILi3EEvPf"] == architectures.Resources(255, 0, 0, 0, 0, None)

    def test_unreadable(self):
        with pytest.raises(ValueError, match="'k'"):
            architectures.parse_ptxas("Compiling entry function 'k' for 'sm_90'\nUsed a few")

    def test_nothing_compiled(self):
        assert architectures.parse_ptxas("ptxas info    : 0 bytes gmem\n") == {}
        assert architectures.launch_bounds("") == {}


class TestPrediction:
    # 2 * 1 * 2*4*4 * 3*1*1 = 192 FLOPs; 4 * (32 + 6 + 48) = 344 bytes.
    PROBLEM = lab.Problem(
        batch=1, in_channels=2, out_channels=3, height=4, width=4, kernel_size=1, bias=False
    )

    def test_bound_by_compute(self):
        found = predict(Card("sm_75", 192e-9, 344e-3, ""), self.PROBLEM)
        assert (found.flops, found.bytes) == (192, 344)
        assert found.compute_ms == pytest.approx(1.0)
        assert found.memory_ms == pytest.approx(0.001)
        assert (found.ms, found.bound) == (found.compute_ms, "compute")

    def test_bound_by_memory(self):
        found = predict(Card("sm_75", 192e-9, 344e-6 / 2, ""), self.PROBLEM)
        assert found.memory_ms == pytest.approx(2.0)
        assert (found.ms, found.bound) == (found.memory_ms, "memory")

    def test_fewer_multiplications(self):
        found = predict(Card("sm_75", 192e-9, 344e-3, ""), self.PROBLEM, factor=1.5)
        assert found.flops == 128
        assert found.ms == pytest.approx(2 / 3, abs=1e-4)

    def test_nonsense(self):
        with pytest.raises(ValueError, match="factor=0"):
            predict(CARDS["T4"], self.PROBLEM, factor=0)

    def test_the_star_on_a_titan_rtx(self):
        # 2 * 8*64*512*512 * 64*21 FLOPs at 16.3 TFLOP/s
        found = predict(CARDS["TITAN RTX"], lab.Problem.named("star"))
        assert found.flops == 360_777_252_864
        assert found.ms == pytest.approx(22.1336, abs=1e-3)

    def test_every_card_has_a_listed_architecture_and_a_source(self):
        for card in CARDS.values():
            assert card.architecture in ARCHITECTURES
            assert card.source


@pytest.fixture(scope="module")
def record():
    return json.loads(architectures.RECORD.read_text())


class TestRecord:
    def test_describes_itself(self, record):
        assert record["schema"] == architectures.SCHEMA
        assert "nothing is measured" in record["what"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"])
        assert re.fullmatch(r"[\d.]+", record["nvcc"])

    def test_limits_and_cards_are_the_modules(self, record):
        for key, items in (("architectures", ARCHITECTURES), ("gpus", CARDS)):
            assert record[key] == {name: dataclasses.asdict(i) for name, i in items.items()}

    def test_every_stage_on_every_architecture(self, record):
        found = {(row["stage"], row["architecture"]) for row in record["kernels"]}
        assert found == {(stage, name) for stage in fma_stages for name in ARCHITECTURES}

    @pytest.mark.parametrize("stage", list(fma_stages))
    def test_launches_are_those_of_the_simulator(self, record, stage):
        for problem in architectures.PLANNED:
            for architecture, limits in ARCHITECTURES.items():
                planned = lab.stages[stage].launches(
                    lab.Problem.named(problem), limits.shared_bytes_per_block
                )
                expected = [(list(p.grid), p.threads, p.shared_bytes) for p in planned]
                found = [
                    (launch["grid"], launch["threads"], launch["dynamic_shared_bytes"])
                    for row in record["kernels"]
                    if (row["stage"], row["architecture"]) == (stage, architecture)
                    for launch in row["launches"]
                    if launch["problem"] == problem
                ]
                assert sorted(found) == sorted(expected), "run `python -m convt_lab architectures`"

    def test_occupancy_is_the_formulas(self, record):
        for row in record["kernels"]:
            for launch in row["launches"]:
                shared = row["static_shared_bytes"] + launch["dynamic_shared_bytes"]
                found = occupancy(
                    ARCHITECTURES[row["architecture"]], launch["threads"], row["registers"], shared
                )
                assert launch["blocks_per_sm"] == found.blocks_per_sm > 0
                assert launch["warps_per_sm"] == found.warps_per_sm
                assert launch["occupancy"] == found.occupancy
                assert launch["limited_by"] == list(found.limited_by)
                assert row["max_threads"] is None or launch["threads"] <= row["max_threads"]

    def test_predictions_are_the_formulas(self, record):
        keys = [(row["stage"], row["problem"], row["gpu"]) for row in record["predicted"]]
        assert keys == [
            (s, p, g) for s in fma_stages for p in architectures.PREDICTED for g in CARDS
        ]
        for row in record["predicted"]:
            factor = architectures.MULTIPLICATION_FACTOR.get(row["stage"], 1.0)
            assert row["multiplication_factor"] == factor
            problem = lab.Problem.named(row["problem"])
            expected = dataclasses.asdict(predict(CARDS[row["gpu"]], problem, factor))
            assert {key: row[key] for key in expected} == expected

    def test_tables(self, record):
        text = architectures.tables(record)
        for row in record["kernels"]:
            assert row["kernel"] in text
        assert "Predicted" in text
        assert max(map(len, text.splitlines())) < 200


@pytest.fixture(scope="module")
def compiled():
    """Everything compiled, once for the tests below."""
    return architectures.compile_all()


@needs_nvcc
class TestCompiled:
    def test_no_spills(self, compiled):
        spilling = {
            pair
            for pair, kernels in compiled.items()
            for r in kernels.values()
            if r.spill_store_bytes or r.spill_load_bytes or r.stack_bytes
        }
        assert spilling == set()

    def test_the_record_is_what_nvcc_says(self, record, compiled):
        if record["nvcc"] != architectures.nvcc_version():
            pytest.skip(f"the record is of nvcc {record['nvcc']}")
        found = json.loads(json.dumps(architectures.make_record(compiled)))
        assert found | {"date": ""} == record | {"date": ""}, (
            "run `python -m convt_lab architectures`"
        )


class TestCommand:
    def test_without_nvcc(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(SystemExit) as ending:
            command_line.main(["architectures", "-o", str(tmp_path / "record.json")])
        assert ending.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no nvcc" in error
        assert not (tmp_path / "record.json").exists()

    def test_writes_and_prints(self, record, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(architectures, "make_record", lambda: record)
        path = tmp_path / "record.json"
        assert command_line.main(["architectures", "--output", str(path)]) == 0
        assert path.read_text() == architectures.RECORD.read_text()
        captured = capsys.readouterr()
        assert captured.out == architectures.tables(record) + "\n"
        assert str(path) in captured.err
