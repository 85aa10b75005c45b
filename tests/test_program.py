"""`lab.compile` and `Program.launch`, as a learner meets them."""

import re
import subprocess

import numpy as np
import pytest
import torch
from kernels_for_tests import SCALE

import convt_lab as lab
from convt_lab.backend import KERNEL_FOLDER
from convt_lab.gpu import find_toolkit

BACKENDS = ["simulator", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def run(source, grid, block, args, backend, name="run", shared_bytes=0):
    lab.compile(source, backend).launch(name, grid, block, args, shared_bytes)


class TestLaunch:
    def test_numpy_arrays_are_written_in_place(self, backend):
        x, y = np.arange(100, dtype=np.float32), np.full(100, np.nan, np.float32)
        run(SCALE, 4, 32, [x, y, 2.5, 100], backend, "scale")
        np.testing.assert_array_equal(y, 2.5 * x)

    def test_tensors_are_written_in_place(self, backend):
        x, y = torch.arange(100.0), torch.full((100,), torch.nan)
        run(SCALE, (4, 1), (32, 1, 1), [x, y, 2, 100], backend, "scale")
        assert torch.equal(y, 2 * x)

    @pytest.mark.gpu
    def test_cuda_tensors_are_used_where_they_are(self):
        x, y = torch.arange(100.0).cuda(), torch.full((100,), torch.nan).cuda()
        run(SCALE, 4, 32, [x, y, 2.0, 100], "gpu", "scale")
        assert torch.equal(y, 2 * x)

    def test_arguments_that_overlap_alias_each_other(self):
        base = np.arange(8, dtype=np.float32)
        source = """
        __global__ void run(float* a, const float* b) { a[0] = 7.0f; a[1] = b[0] + b[1]; }
        """
        run(source, 1, 1, [base[2:6], base[:4]], "simulator")
        assert base.tolist() == [0, 1, 7, 1, 4, 5, 6, 7]

    def test_every_kind_of_number(self, backend):
        source = """
        using real = double;
        __global__ void run(long long* out, bool flag, unsigned char byte, int i, long long big,
                            unsigned u, float f, real d, size_t size) {
          out[0] = flag; out[1] = byte; out[2] = i; out[3] = big; out[4] = u;
          out[5] = (long long)(f * 4); out[6] = (long long)(d * 4); out[7] = size;
        }
        """
        out = np.zeros(8, np.int64)
        numbers = [True, 255, -7, 2**40, 2**32 - 1, 0.25, 2.5, np.uint64(2**63 - 1)]
        run(source, 1, 1, [out, *numbers], backend)
        assert out.tolist() == [1, 255, -7, 2**40, 2**32 - 1, 1, 10, 2**63 - 1]

    def test_a_null_pointer(self, backend):
        source = "__global__ void run(const float* x, int* out) { *out = x == nullptr; }"
        out = np.zeros(1, np.int32)
        run(source, 1, 1, [None, out], backend)
        assert out[0] == 1

    def test_dynamic_shared_memory(self, backend):
        source = """
        __global__ void run(float* x) {
          extern __shared__ float tile[];
          tile[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          x[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
        }
        """
        x = np.arange(64, dtype=np.float32)
        run(source, 1, 64, [x], backend, shared_bytes=64 * 4)
        assert x.tolist() == list(range(63, -1, -1))

    def test_more_dynamic_shared_memory_than_allowed_unasked(self, backend):
        source = """
        __global__ void run(float* x, int n) {
          extern __shared__ float tile[];
          for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = i;
          __syncthreads();
          x[threadIdx.x] = tile[n - 1 - threadIdx.x];
        }
        """
        x, n = np.zeros(32, np.float32), 60 * 1024 // 4
        run(source, 1, 32, [x, n], backend, shared_bytes=4 * n)
        assert x[0] == n - 1

    @pytest.mark.parametrize("kib", [32, 33, 47, 48, 49, 200])
    def test_what_the_kernel_declares_counts_as_well(self, kib, backend):
        """Unasked, it has 48 KiB of both: no more than 32 KiB of dynamic memory here."""
        source = """
        __global__ void run(float* x, int n) {
          __shared__ float mine[4096];
          extern __shared__ float tile[];
          for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = i;
          for (int i = threadIdx.x; i < 4096; i += blockDim.x) mine[i] = i;
          __syncthreads();
          x[threadIdx.x] = tile[n - 1 - threadIdx.x] + mine[4095 - threadIdx.x];
        }
        """
        x, n = np.zeros(32, np.float32), kib * 1024 // 4
        run(source, 1, 32, [x, n], backend, shared_bytes=4 * n)
        assert x[0] == n - 1 + 4095

    def test_more_than_a_block_can_have(self, backend):
        """The error is told once: it does not come up again in what is called next."""
        source = """
        __global__ void run(float* x) {
          __shared__ float mine[4096];
          extern __shared__ float tile[];
          mine[threadIdx.x] = tile[threadIdx.x] = 1;
          *x = mine[0] + tile[0];
        }
        """
        x = np.zeros(1, np.float32)
        program = lab.compile(source, backend)
        told = {"gpu": "invalid argument", "simulator": "16384 static, 220000 dynamic"}[backend]
        with pytest.raises(lab.KernelError, match=told):
            program.launch("run", 1, 1, [x], shared_bytes=220000)
        if backend == "gpu":
            assert (torch.ones(3, device="cuda") + 1).sum() == 6
        program.launch("run", 1, 1, [x], shared_bytes=200000)
        assert x[0] == 2

    def test_kernels_in_namespaces_and_linkage_blocks(self, backend):
        source = """
        namespace { __global__ void hidden(int* x) { *x += 1; } }
        namespace a::b { struct S { int f; }; __global__ void nested(int* x) { *x += 10; } }
        extern "C" { __global__ void plain(int* x) { *x += 100; } }
        template <int N> __global__ void template_kernel(int* x) { *x += N; }
        __global__ void __launch_bounds__(32 * (1 + 1)) bounded(int* x) { *x += 1000; }
        // __global__ void commented(int* x) {}
        __global__ void declared(int* x);
        __launch_bounds__(64) __global__ void declared(int* x) { *x += 10000; }
        """
        program = lab.compile(source, backend)
        assert list(program.kernels) == ["hidden", "nested", "plain", "bounded", "declared"]
        x = np.zeros(1, np.int32)
        for name in program.kernels:
            program.launch(name, 1, 1, [x])
        assert x[0] == 11111

    def test_parameters_are_as_the_compiler_sees_them(self):
        source = """
        #define IMAGE const float* __restrict__
        typedef unsigned long long count_t;
        __global__ void run(IMAGE x, count_t n, const float4 *v, float (*f), void* p) {}
        """
        parameters = lab.compile(source, "simulator").kernels["run"].parameters
        assert [(p.name, p.code) for p in parameters] == [
            ("x", "*const f4"),
            ("n", "u8"),
            ("v", "*const V16"),
            ("argument 3", "*f4"),
            ("p", "*V0"),
        ]


class TestRefusals:
    """Each bad argument is named, with its value and what would be right."""

    @pytest.fixture
    def program(self):
        return lab.compile(SCALE, "simulator")

    @pytest.fixture
    def good(self):
        return [np.zeros(8, np.float32), np.zeros(8, np.float32), 1.0, 8]

    @pytest.mark.parametrize(
        ("index", "value", "error", "message"),
        [
            (0, [1.0, 2.0], TypeError, "'x' is a pointer.*not list"),
            (0, 3.0, TypeError, "'x' is a pointer.*not float 3.0"),
            (
                0,
                np.zeros(8),
                TypeError,
                r"'x' points to float;.*has dtype float64: pass dtype float32 "
                r"\(array\.astype\(np\.float32\)\)$",
            ),
            (1, np.zeros(8), TypeError, r"float64: .*np\.float32\), .*the results will be in it"),
            (0, torch.zeros(8, dtype=torch.bfloat16), TypeError, "'x' points to float;.*bfloat16"),
            (
                0,
                torch.zeros(8).double(),
                TypeError,
                r"float64: .*\(tensor\.to\(torch\.float32\)\)$",
            ),
            (0, np.zeros((8, 2), np.float32)[:, 0], ValueError, "'x' is a non-contiguous array"),
            (0, torch.zeros(8, 2)[:, 0], ValueError, "'x' is a non-contiguous tensor"),
            (0, np.zeros(8, ">f4"), TypeError, "'x'.*native byte order"),
            (1, np.zeros(8, object), TypeError, "'y'.*object"),
            (2, "1", TypeError, "'factor' is declared float;.*str '1'"),
            (
                2,
                np.zeros(1, np.float32),
                TypeError,
                r"'factor' is declared float, .*ndarray.*item\(\)",
            ),
            (2, torch.tensor(3.0), TypeError, r"not a tensor.*shape \(\).*: pass value\.item\(\)$"),
            (
                3,
                torch.zeros(9),
                TypeError,
                r"'n' .*shape \(9,\), .*: pass one .*value\[0\]\.item\(\)$",
            ),
            (3, 8.0, TypeError, "'n' is declared int;.*float 8.0"),
            (3, 2**31, ValueError, "'n' is declared int, which holds .* got 2147483648"),
            (3, None, TypeError, "'n' is declared int;.*NoneType"),
        ],
    )
    def test_an_argument(self, program, good, index, value, error, message):
        good[index] = value
        with pytest.raises(error, match=message):
            program.launch("scale", 1, 32, good)

    def test_a_read_only_array_for_a_pointer_that_is_written(self, program, good):
        good[1].flags.writeable = False
        with pytest.raises(ValueError, match=r"'y' is written by the kernel.*read-only"):
            program.launch("scale", 1, 32, good)
        good[0].flags.writeable = False
        good[1] = np.zeros(8, np.float32)
        program.launch("scale", 1, 32, good)  # reading is allowed

    def test_the_number_of_arguments(self, program, good):
        with pytest.raises(
            TypeError, match=r"args has 3 values; scale takes 4: \(const float\* x, "
        ):
            program.launch("scale", 1, 32, good[:3])

    def test_an_unknown_kernel(self, program, good):
        with pytest.raises(lab.KernelError, match=r"no kernel 'scael'.*'scale'"):
            program.launch("scael", 1, 32, good)

    @pytest.mark.parametrize("grid", [0, -1, (1, 2, 3, 4), (), 1.5, (1, 0), 2**31])
    def test_a_grid(self, program, good, grid):
        with pytest.raises((ValueError, TypeError), match="grid"):
            program.launch("scale", grid, 32, good)

    @pytest.mark.parametrize("block", [1025, (32, 33), (1, 1, 65)])
    def test_a_block(self, good, backend, block):
        with pytest.raises(lab.KernelError, match="scale"):
            run(SCALE, 1, block, good, backend, "scale")

    @pytest.mark.parametrize("shared_bytes", [-1, 1.5, 10**6])
    def test_shared_bytes(self, program, good, shared_bytes):
        with pytest.raises(ValueError, match="shared_bytes"):
            program.launch("scale", 1, 32, good, shared_bytes=shared_bytes)

    def test_a_backend(self):
        with pytest.raises(ValueError, match="backend='cpu': must be 'auto'"):
            lab.compile(SCALE, "cpu")

    def test_a_source_that_is_no_text(self):
        with pytest.raises(TypeError, match="source is a bytes"):
            lab.compile(b"", "simulator")

    def test_a_parameter_that_launch_cannot_pass(self):
        source = "struct S { int a; }; __global__ void run(S s) {}"
        with pytest.raises(
            TypeError, match=r"'s' is a struct .* of 4 bytes, .*members, one by one"
        ):
            run(source, 1, 1, [3], "simulator")

    @pytest.mark.parametrize(
        "value", [list(range(10**4)), np.zeros(10**4), torch.zeros(10**4).double()]
    )
    @pytest.mark.parametrize("index", [0, 2, 3])
    def test_no_message_holds_a_whole_array(self, program, good, index, value):
        good[index] = value
        with pytest.raises(TypeError) as caught:
            program.launch("scale", 1, 32, good)
        assert len(str(caught.value)) < 200
        assert "10000" in str(caught.value) or "float64" in str(caught.value)

    @pytest.mark.parametrize("value", [list(range(10**4)), np.zeros(10**4)])
    @pytest.mark.parametrize("name", ["grid", "block", "shared_bytes", "blocks"])
    def test_nor_one_that_is_no_argument(self, program, good, name, value):
        sizes = {"grid": 1, "block": 32, name: value}
        with pytest.raises((TypeError, ValueError), match=name) as caught:
            program.launch("scale", args=good, trace=True, **sizes)
        assert len(str(caught.value)) < 200

    def test_a_parameter_with_a_default(self):
        source = "__global__ void run(float* x, int n = 3, float f = (1.0f < 2) ? 1 : 2) {}"
        parameters = lab.compile(source, "simulator").kernels["run"].parameters
        assert [p.name for p in parameters] == ["x", "n", "f"]


class TestCompileErrors:
    def test_the_line_is_the_learners_own(self, backend):
        source = "__global__ void run(float* x) {\n  x[0] = 1.0f;\n  x[1] = oops;\n}\n"
        with pytest.raises(lab.CompileError, match="oops") as caught:
            lab.compile(source, backend)
        assert caught.value.line == 3

    def test_the_line_after_translated_lines(self):
        source = (
            "__global__ void k() {}\n"
            "__global__ void run() {\n  extern __shared__\n    float s[];\n  s[0] = 1;\n}\n"
            "void f() { k<<<1,\n 2>>>(); }\n"
            "int broken = ;\n"
        )
        with pytest.raises(lab.CompileError) as caught:
            lab.compile(source, "simulator")
        assert caught.value.line == 9

    @pytest.mark.parametrize(
        ("source", "line"),
        [
            ("int a;\n__global__ void run(int* x) {\n  if (*x) {\n    *x = 1;\n  }\n", 2),
            ("__global__ void run() {\n", 1),
            ("namespace n {\nvoid f() {\n\n__global__ void run() {}\n}  // {\n", 1),
            (
                "/* } */ void f() {\n  const char* s = \"}\"; char c = '}', w = L'}'; // \\\n }\n",
                1,
            ),
            ("#if 0\n}\n#endif\nvoid f() {\n", 4),
        ],
    )
    def test_a_brace_that_is_not_closed(self, source, line, backend):
        message = f"the '{{' in line {line} is never closed"
        with pytest.raises(lab.CompileError, match=message) as caught:
            lab.compile(source, backend)
        assert caught.value.line == line
        assert "\n" not in str(caught.value)

    def test_a_brace_too_many(self, backend):
        source = "void f() {\n}\n}\n__global__ void run() {}\n"
        with pytest.raises(lab.CompileError, match="the '}' in line 3 closes nothing") as caught:
            lab.compile(source, backend)
        assert caught.value.line == 3

    @pytest.mark.parametrize(
        "source",
        [
            "#ifdef A\nvoid f() {\n#else\nvoid f(int) {\n#endif\n}\n",
            "#define OPEN {\nvoid f() OPEN }\n",
            "#define TWICE(x) do { \\\n  x; x; } \\\n  while (0)\nvoid f(int a) { TWICE(++a); }\n",
            "// a comment of two lines: \\\n {{{\nvoid f() {}\n",
            "wchar_t a = L'{', b = u8'{';\n",
            "#if 0\nvoid f() { don't\n#if 1\n{\n#endif\n#else\nvoid f() {}\n#endif\n",
            "#if 1\nvoid f() {}\n#elif 1\n}\n#else\n}\n#endif\n",
        ],
    )
    def test_braces_that_are_legal(self, source):
        lab.compile(source, "simulator")

    def test_the_output_is_cut(self):
        source = "__global__ void run() {}\n" + "int x = oops;\n" * 100
        with pytest.raises(lab.CompileError, match="'oops' was not declared") as caught:
            lab.compile(source, "simulator")
        lines = str(caught.value).splitlines()
        assert len(lines) == 14
        assert re.fullmatch(r"\(\d+ more lines are left out\)", lines[-1])
        assert caught.value.line == 2

    def test_the_output_is_cut_before_an_error_in_a_header(self):
        source = "#include <vector>\nstruct S { S(const S&) = delete; };\n" + (
            "void f(S& s) {\n  std::vector<S> v;\n  v.push_back(s);\n  int n = oops;\n}\n"
        )
        with pytest.raises(lab.CompileError, match="'oops' was not declared") as caught:
            lab.compile(source, "simulator")
        assert caught.value.line == 6
        assert len(str(caught.value).splitlines()) <= 14

    @pytest.mark.parametrize("name", ["kernel.cu", " some folder/kernel.cuh\n", "/tmp/kernel.cu"])
    def test_the_name_of_a_file(self, name):
        with pytest.raises(ValueError, match="pass the text, not the name of a file"):
            lab.compile(name, "simulator")

    def test_what_only_ends_like_a_file(self):
        assert not lab.compile("// kernel.cu", "simulator").kernels
        assert not lab.compile("int x; // kernel.cu", "simulator").kernels

    def test_a_function_without_a_body(self):
        source = "__device__ float f(int);\n__global__ void run(float* x) {\n  x[0] = f(1);\n}\n"
        with pytest.raises(
            lab.CompileError, match=r"^f\(int\) is declared, but nowhere defined"
        ) as e:
            run(source, 1, 1, [np.zeros(1, np.float32)], "simulator")
        assert e.value.line == 3

    @pytest.mark.gpu
    def test_a_function_without_a_body_on_a_gpu(self):
        source = "__device__ float f(int);\n__global__ void run(float* x) {\n  x[0] = f(1);\n}\n"
        with pytest.raises(lab.CompileError, match=r"^f\(int\) is declared, but nowhere defined"):
            lab.compile(source, "gpu")

    def test_a_kernel_without_a_body(self):
        source = "__global__ void later(int* x);\n__global__ void run(int* x) { *x = 1; }\n"
        assert list(lab.compile(source, "simulator").kernels) == ["run"]

    def test_a_kernel_that_is_left_out(self, backend):
        old, new = "__global__ void old() { }\n", "__global__ void run() { }\n"
        for source in (
            f"#if 0\n{old}#if 1\n{old}#endif\n#else\n{new}#endif\n",
            f"#if 1  // yes\n{new}#else\n{old}#endif\n",
            f"  # if 0\n{old}#endif\n{new}",
        ):
            assert list(lab.compile(source, backend).kernels) == ["run"]

    def test_kernels_that_cannot_be_launched(self, backend):
        for source, line in (
            ("#ifdef NEVER\n__global__ void run() {}\n#endif\n", 2),
            ("__global__ void run(float) {}\n__global__ void run(int) {}\n", 2),
            ("__global__ void run(int& x) {}\n", 1),
        ):
            message = f"the kernel 'run' in line {line} can't be launched by its name"
            with pytest.raises(lab.CompileError, match=message) as caught:
                lab.compile(source, backend)
            assert caught.value.line == line

    def test_a_text_that_ends_too_early(self, backend):
        kernel = "__global__ void run(int* x) { *x = 1; }\n"
        for source, line in (
            (f"{kernel}int y = 3  // no semicolon\n\n", 2),
            ("int y = 3\n", 1),
            (f"{kernel}int f(int a,\n", 2),
        ):
            with pytest.raises(lab.CompileError) as caught:
                lab.compile(source, backend)
            assert caught.value.line == line
            assert len(str(caught.value).splitlines()) <= 14


# What learners call their macros, and what the lines of ours must not fall over.
MACROS = """
#define T float
#define P 5
#define I 3
#define size 32
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
""" + "".join(
    f"#define {name} 7\n"
    for name in (
        *("value", "kernel", "block", "grid", "stream", "error", "bytes", "name", "code", "prefix"),
        *("symbol", "shared_bytes", "arguments", "signature", "launch", "string", "std", "size_t"),
    )
)


class TestMacros:
    SOURCE = f"{MACROS}__global__ void run(T* x) {{ x[P] = min(size, value); }}\n"

    def test_they_are_the_texts_own(self, backend):
        x = np.zeros(8, np.float32)
        run(self.SOURCE, 1, 1, [x], backend)
        assert x.tolist() == [0, 0, 0, 0, 0, 7, 0, 0]

    def test_they_do_not_reach_a_traced_launch(self):
        x = np.zeros(8, np.float32)
        assert lab.compile(self.SOURCE, "simulator").launch("run", 1, 1, [x], trace=True)
        assert x[5] == 7

    @pytest.mark.skipif(find_toolkit() is None, reason="needs nvcc: no CUDA toolkit found")
    def test_nvcc_agrees(self, tmp_path):
        text = lab.compile(self.SOURCE, "simulator")._text
        (tmp_path / "kernel.cu").write_text(f"#include <cuda_runtime.h>\n{text}")
        command = [str(find_toolkit() / "bin" / "nvcc"), "-c", "-std=c++17", f"-I{KERNEL_FOLDER}"]
        command += ["-arch=sm_90", "kernel.cu"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_a_program_is_compiled_once():
    assert lab.compile(SCALE, "simulator") is lab.compile(SCALE, "simulator")


def test_repr_names_the_kernels():
    assert repr(lab.compile(SCALE, "simulator")) == "<Program on the simulator: scale>"
