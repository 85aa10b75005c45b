"""The model of the tensor cores' numbers against the formats themselves, and the simulator."""

import numpy as np
import pytest
import torch

import convt_lab as lab
from convt_lab import reference
from convt_lab.split import FORMATS, matrix_product, pairs_of, scale_of, split, truncated

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)

#: What mma.cuh calls them, and how a value becomes a register's bits.
TYPES = {
    "tf32": ("Tf32", "to_tf32(value)"),
    "bfloat16": ("__nv_bfloat16", "__float2bfloat16_rn(value)"),
    "float16": ("__half", "__float2half_rn(value)"),
}

#: One warp multiplies [16, K] by [K, 8]; every lane brings what mma.cuh says that it holds.
SOURCE = """
#include "mma.cuh"

using T = @TYPE@;
constexpr int IN_REGISTER = 4 / sizeof(T), HALF = 4 * IN_REGISTER, DEPTH = 2 * HALF;

__device__ uint32_t pack(const float* from, int step) {
  T values[IN_REGISTER];
  for (int i = 0; i < IN_REGISTER; ++i) {
    const float value = from[i * step];
    values[i] = @CONVERT@;
  }
  uint32_t bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
}

__global__ void multiply(const float* a, const float* b, float* c, int depth) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {};
  for (int k = t * IN_REGISTER; k < depth; k += DEPTH) {
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) {
      left[i] = pack(a + (g + i % 2 * 8) * depth + k + i / 2 * HALF, 1);
    }
    for (int i = 0; i < 2; ++i) right[i] = pack(b + (k + i * HALF) * 8 + g, 8);
    mma<T>(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}
"""


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def multiplied(format, a, b, backend="simulator", trace=False):
    type_name, convert = TYPES[format.name]
    source = SOURCE.replace("@TYPE@", type_name).replace("@CONVERT@", convert)
    program = lab.compile(source, backend=backend)
    c = np.full((16, 8), np.nan, dtype=np.float32)
    report = program.launch("multiply", 1, 32, [a, b, c, a.shape[1]], trace=trace)
    return c, report


class TestFormats:
    @each_format
    def test_digits_and_range(self, format):
        """Rounded is what is nearest, and nothing that the format holds changes."""
        values = np.copysign(1 + np.abs(random(10_000)), random(10_000, seed=1))
        values *= np.float32(2) ** np.arange(-12, 13, dtype=np.float32).repeat(400)
        rounded = format.round(values)
        assert np.all(np.abs(rounded - values) <= 2.0**-format.digits * np.abs(values))
        assert np.array_equal(format.round(rounded), rounded)
        mantissas = np.frexp(rounded)[0] * 2.0**format.digits
        assert np.array_equal(mantissas, np.round(mantissas))
        assert len(np.unique(mantissas)) > 2 ** (format.digits - 2)  # all digits are used
        least, largest = (np.float32(2.0**e) for e in format.exponents)
        assert np.array_equal(format.round(np.array([least, -largest])), [least, -largest])
        special = np.array([np.inf, -np.inf, np.nan, 0], dtype=np.float32)
        np.testing.assert_array_equal(format.round(special), special)

    def test_as_torch_rounds(self):
        values = random(10_000)
        for name in ("bfloat16", "float16"):
            expected = torch.from_numpy(values).to(getattr(torch, name)).float().numpy()
            assert np.array_equal(FORMATS[name].round(values), expected)

    def test_tf32_ties_go_away_from_zero(self):
        tie = np.float32(1 + 2.0**-11)
        assert FORMATS["tf32"].round(np.array([tie, -tie])).tolist() == [
            1 + 2.0**-10,
            -1 - 2.0**-10,
        ]


class TestSplit:
    @pytest.mark.parametrize(("name", "parts"), [("bfloat16", 3), ("tf32", 3)])
    def test_enough_parts_are_exact(self, name, parts):
        values = random(10_000)
        found = split(values, FORMATS[name], parts)
        assert np.array_equal(np.sum(found, axis=0, dtype=np.float64), values)
        assert all(np.array_equal(FORMATS[name].round(part), part) for part in found)

    @each_format
    def test_each_part_has_the_next_digits(self, format):
        values = random(10_000)
        for parts in (1, 2):
            rest = values.astype(np.float64) - np.sum(
                split(values, format, parts), axis=0, dtype=np.float64
            )
            bound = 2.0 ** -(parts * format.digits) * np.abs(values)
            # Of float16's second part: as many digits as its exponents allow.
            bound += 2.0 ** (format.exponents[0] - format.digits)
            assert np.all(np.abs(rest) <= bound)
            assert np.abs(rest).max() > 0

    def test_pairs_are_those_that_matter_the_smallest_first(self):
        assert pairs_of(1) == ((0, 0),)
        assert pairs_of(2) == ((0, 1), (1, 0), (0, 0))
        assert pairs_of(3) == ((0, 2), (1, 1), (2, 0), (0, 1), (1, 0), (0, 0))

    def test_scales(self):
        format = FORMATS["float16"]
        for largest in (1e-30, 0.75, 1.0, 1000.0, 3e38):
            scale = scale_of(np.array([largest / 3, -largest], dtype=np.float32), format)
            assert np.log2(scale) % 1 == 0
            assert 2.0**14 <= largest * scale < 2.0**15
        assert scale_of(np.zeros(3), format) == 1.0
        assert scale_of(np.array([1e-30]), FORMATS["bfloat16"]) == 1.0


def test_truncated():
    above = 1 + 2.0**-24 + 2.0**-40  # nearer to the next float32 than to 1
    values = np.array([above, -above, 1 + 2.0**-23, -0.1, 0.0])
    assert np.float32(above) == 1 + 2.0**-23
    expected = [1.0, -1.0, 1 + 2.0**-23, -np.nextafter(np.float32(0.1), np.float32(0)), 0.0]
    assert truncated(values).tolist() == expected


class TestMatrixProduct:
    @each_format
    def test_it_is_what_the_simulator_computes(self, format):
        """To the bit: otherwise the model would be of something else."""
        a, b = random(16, 96), random(96, 8, seed=1)
        c, _ = multiplied(format, a, b)
        assert np.array_equal(matrix_product(a, b, format), c)

    @each_format
    @pytest.mark.gpu
    def test_it_is_close_to_what_a_gpu_computes(self, format):
        """Whose order of summation is not told: within what cutting off may cost."""
        if format.name != "float16" and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("no such instruction")
        a, b = random(16, 96), random(96, 8, seed=1)
        c, _ = multiplied(format, a, b, backend="gpu")
        left, right = format.round(a).astype(np.float64), format.round(b).astype(np.float64)
        scale = np.abs(left) @ np.abs(right) * reference.UNIT_ROUNDOFF
        assert np.max(np.abs(c - left @ right) / scale) <= reference.truncation_gate(96, 4)

    @each_format
    def test_small_integers_are_exact(self, format):
        generator = np.random.default_rng(0)
        a, b = (generator.integers(-4, 5, s).astype(np.float32) for s in ((5, 50), (50, 7)))
        for parts in (1, 2):
            for scaled in (False, True):
                c = matrix_product(a, b, format, parts, interval=2, scaled=scaled)
                assert np.array_equal(c, a @ b)

    def test_pairs_of_ones_own(self):
        """The fourth product of two parts is small, but float32 has room for it here."""
        a, b = (np.full(s, 1 + 2.0**-11, dtype=np.float32) for s in ((1, 8), (8, 1)))
        of_all = [(1, 1), *pairs_of(2)]
        three, four, one = (
            matrix_product(a, b, FORMATS["tf32"], 2, pairs=pairs)[0, 0]
            for pairs in (None, of_all, [(0, 0)])
        )
        assert three == 8 * (1 + 2.0**-10)
        assert four == 8 * (1 + 2.0**-11) ** 2 == three + 8 * 2.0**-22
        assert one == 8 * (1 + 2.0**-10) ** 2

    @each_format
    def test_the_simulator_counts_its_multiply_adds(self, format):
        _, report = multiplied(format, random(16, 96), random(96, 8), trace=True)
        assert report.tensor_fma == 16 * 8 * 96
        assert report.fma == 0
        assert report.to_dict()["tensor_fma"] == 16 * 8 * 96
        assert "12,288 multiply-adds of tensor cores" in report.table()
        assert report.arithmetic_intensity > 0
        assert report.hazards == ()
