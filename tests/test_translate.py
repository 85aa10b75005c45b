"""The source translation: it changes what g++ can't parse, and nothing else."""

import pytest

from convt_lab.simulator.translate import (
    mask_comments_and_strings,
    mask_unused,
    translate,
    uses_goto,
)


def test_a_launch_becomes_an_operator_in_place():
    source = "f<<<dim3(1, g(2)), 32>>>(a);"
    assert translate(source) == "f% ::cudasim::config(dim3(1, g(2)), 32)(a);"


def test_a_launch_of_a_template_over_several_lines_keeps_its_lines():
    source = "run<Pair<Pair<int, 2>, 3>, 4>\n    <<<grid,\n       block>>>(x,\n y);"
    translated = translate(source)
    assert translated.count("\n") == source.count("\n")
    assert "<<<" not in translated
    assert translated.startswith("run<Pair<Pair<int, 2>, 3>, 4>\n    % ::cudasim::config(grid,")


@pytest.mark.parametrize(
    "source",
    [
        "// f<<<1, 2>>>(x);",
        "/* f<<<1,\n2>>>(x); */",
        'const char* s = "f<<<1, 2>>>(\\"x)";',
        'auto s = R"(extern __shared__ float a[]; f<<<1>>>())";',
        "Pair<Pair<Pair<int>>> x; y = a >> b; c <<= 1;",
        "int big = 1'000'000; char c = '\"';",
        "__shared__ float tile[8][33];",
        "__attribute__((__noinline__)) void f();",
    ],
)
def test_everything_else_passes_through(source):
    assert translate(source) == source


@pytest.mark.parametrize(
    ("declaration", "element"),
    [
        ("extern __shared__ float tile[];", "float"),
        ("extern __shared__ __align__(16) unsigned char tile[ ] ;", "unsigned char"),
        ("extern __shared__ alignas(16) float4 tile[];", "float4"),
        ("extern __align__(16) __shared__ int tile[];", "int"),
        ("extern volatile __shared__ float tile[];", "volatile float"),
        ("extern __shared__ volatile float tile[];", "volatile float"),
        ("__shared__ extern float tile[];", "float"),
    ],
)
def test_a_dynamic_shared_array_in_a_function(declaration, element):
    translated = translate(f"void f() {{\n{declaration}\n}}")
    cast = f"static_cast<{element}*>(::cudasim_dynamic_shared())"
    assert translated == f"void f() {{\n{element}* const tile = {cast};\n}}"


def test_a_dynamic_shared_array_outside_a_function():
    translated = translate("extern __shared__ float tile[];\nvoid f() {}")
    assert translated.startswith("static const ::cudasim::DynamicShared<float> tile;\n")


def test_a_dynamic_shared_array_of_rows():
    source = "extern __shared__ float tile[][8] [N];"
    inside = translate(f"void f() {{ {source} }}")
    cast = "static_cast<float (*)[8] [N]>(::cudasim_dynamic_shared())"
    assert inside == f"void f() {{ float (* const tile)[8] [N] = {cast}; }}"
    assert translate(source) == "static const ::cudasim::DynamicShared<float[8] [N]> tile;"


@pytest.mark.parametrize(
    "source", ["static __shared__ int a[3];", "__shared__ static int a[3];", "__shared__ int a[3];"]
)
def test_a_shared_array_is_static_once(source):
    assert translate(source) == "__shared__ int a[3];"


def test_noinline_becomes_an_attribute():
    assert translate("__device__ __noinline__ int f();") == (
        "__device__ __attribute__((noinline)) int f();"
    )


def test_masking_keeps_every_position():
    source = 'a; // "x\nb = "//"; /* \n */ c;'
    masked = mask_comments_and_strings(source)
    assert [len(line) for line in masked.split("\n")] == [len(line) for line in source.split("\n")]
    assert masked.split() == ["a;", "b", "=", ";", "c;"]


def test_what_is_never_compiled_is_masked():
    source = "a\n # if 0\nb\n#ifdef X\nc\n#else\nd\n#endif\n#elif Y\ne\n#endif\nf"
    masked = mask_unused(source)
    assert len(masked) == len(source)
    assert [line for line in masked.split("\n") if len(line.strip()) == 1] == ["a", "e", "f"]
    source = "#if 1\na\n#elif 1\nb\n#else\nc\n#endif\n#if X\nd\n#else\ne\n#endif\n#endif\nf"
    masked = mask_unused(source)
    assert [line for line in masked.split("\n") if len(line.strip()) == 1] == ["a", "d", "e", "f"]


def test_a_line_comment_that_goes_on_and_characters_with_a_prefix_are_masked():
    source = "a // b \\\n c\nd = L'{' + u8'}' + 1'000;"
    assert mask_comments_and_strings(source).split() == ["a", "d", "=", "+", "+", "1'000;"]


MARK = "if (const ::cudasim::Loop cudasim_loop; false) {} else "
TURN = " if (::cudasim::next_iteration()) {} else "


@pytest.mark.parametrize(
    ("source", "marked"),
    [
        ("for (;;) f(x[(0)]);", f"{MARK}for (;;){TURN} f(x[(0)]);"),
        ("while (a) { b; }", f"{MARK}while (a){TURN} {{ b; }}"),
        ("do { b; } while (a);", f"{MARK}do {{{TURN} {{ b; }} }} while (a);"),
        ("for (a;b;c)for (;d;);", f"{MARK}for (a;b;c){TURN}{MARK}for (;d;){TURN};"),
        (
            "do if constexpr (a) b; else while (c) {} while (d);",
            f"{MARK}do {{{TURN} if constexpr (a) b; else {MARK}while (c){TURN} {{}} }} while (d);",
        ),
        (
            "do do x = {1, 2}; while (a); while (b);",
            f"{MARK}do {{{TURN} {MARK}do {{{TURN} x = {{1, 2}}; }} while (a); }} while (b);",
        ),
        (
            "do switch (a) { case 1: b; } while (c);",
            f"{MARK}do {{{TURN} switch (a) {{ case 1: b; }} }} while (c);",
        ),
        (
            'do f("while (\\")"); while /* ; */ (c);',
            f'{MARK}do {{{TURN} f("while (\\")"); }} while /* ; */ (c);',
        ),
        (
            "int format, done, meanwhile; // for (;;) do",
            "int format, done, meanwhile; // for (;;) do",
        ),
    ],
)
def test_loops_are_marked_where_a_trace_is_wanted(source, marked):
    assert translate(source, mark_loops=True) == marked
    assert translate(source) == source


@pytest.mark.parametrize(
    "source", ["do x", "do {", "for (;;", "while", "do x; until (y);", "for ("]
)
def test_half_a_loop_is_left_to_the_compiler(source):
    assert translate(source, mark_loops=True) == source


def test_only_code_uses_goto():
    assert uses_goto("if (a) goto b;")
    assert not uses_goto("// goto b;\nint gotos;")
