"""The tool that runs compute-sanitizer, with a stand-in for it that writes what it would."""

import functools
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from paths import on_path
from strategies import problem_set

import convt_lab as lab
from convt_lab import records
from convt_lab.stages import kernels

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.append(str(TOOLS))

import compute_sanitizer as tool  # noqa: E402
from compute_sanitizer import OPERATOR, WAYS, Case, Report, Sanitizer  # noqa: E402

NAMES = [*kernels, OPERATOR]
CASES = {name: tool.all_cases([name]) for name in NAMES}

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void coalesced_kernel(const float *, float *)+0x160 in coalesced.cu:31
=========     by thread (127,0,0) in block (3,0,0)
=========     Address 0x7f6510c00200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f6510c00000 of size 512 bytes
=========
========= Invalid __global__ write of size 4 bytes
=========     at void coalesced_kernel(const float *, float *)+0x160 in coalesced.cu:31
=========     by thread (126,0,0) in block (3,0,0)
=========     Address 0x7f6510c00204 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""

RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at winograd_kernel(float *)+0xf0 in flat.cuh:40
=========     and Read access at winograd_kernel(float *)+0x280 in flat.cuh:46 [508 hazards]
=========
========= Warning: Race reported between Write access at winograd_kernel(float *)+0x10
=========     and Write access at winograd_kernel(float *)+0x20 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""

INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cudnn::engines_precompiled::scale<float>(float *)+0x80
=========     by thread (16,0,0) in block (0,0,0)
=========     Address 0x7f3c7ec000fc
=========
========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 2 errors
"""

SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp.
=========     at lab::wait(int *)+0xa0 in cells.cuh:61
=========     by thread (19,0,0) in block (0,0,0)
=========     Device Frame:void something<float>(int)+0x20
=========
========= ERROR SUMMARY: 1 error
"""

CLEAN = """\
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""

NO_RACE = """\
========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""

DONE = '{"done": true}\n'


def judged(log=CLEAN, cases=(), status=0, output=DONE, errors="", tool_name="memcheck"):
    functions = tool.kernel_functions()
    return tool.judge(
        tool_name, "some", cases, status, log, output, errors, seconds=9, functions=functions
    )


@functools.cache
def launched(name, problem, dtype, channels_last):
    """Return the symbols of what a kernel launches."""
    launches = kernels[name].launches(problem, dtype=dtype, channels_last=channels_last)
    return frozenset(launch.symbol for launch in launches)


class TestCases:
    def test_sixty_problems_and_every_kernel_in_every_form(self):
        assert len(set(tool.PROBLEMS)) == len(tool.PROBLEMS) >= 60
        for name in kernels:
            counts = Counter((case.dtype, case.channels_last) for case in CASES[name])
            assert len(counts) == len(tool.forms(kernels[name]))
            assert min(counts.values()) >= 6
            assert len(CASES[name]) >= 24
            assert len(set(CASES[name])) == len(CASES[name])
            covered = sum(map(kernels[name].covers, tool.PROBLEMS))
            assert len({case.problem for case in CASES[name]}) >= min(20, covered)
            assert len({case.offset for case in CASES[name]}) == 3
        assert {case.problem for name in kernels for case in CASES[name]} == set(tool.PROBLEMS)

    def test_what_they_vary(self):
        problems = tool.PROBLEMS
        for name in ("stride", "dilation", "padding", "output_padding", "kernel_size"):
            assert len({getattr(problem, name) for problem in problems}) >= 3, name
        assert {problem.bias for problem in problems} == {True, False}
        assert {1, 2} < {problem.groups for problem in problems}
        assert max(problem.multiply_adds for problem in problems) < 3e7

    @pytest.mark.parametrize("name", kernels)
    def test_a_kernel_takes_its_cases(self, name):
        for case in CASES[name]:
            dtype = getattr(torch, case.dtype)
            assert kernels[name].supports(case.problem, dtype, case.channels_last)
            if case.channels_last:
                x = torch.empty(case.problem.input_shape, dtype=dtype)
                assert not tool.laid_out(x, True).is_contiguous()

    def test_the_operator_goes_all_its_ways(self):
        ways = Counter(case.way for case in CASES[OPERATOR])
        fast = [name for name in kernels if name not in lab.dispatch.SLOW]
        assert set(ways) == {*WAYS, *fast}
        assert min(ways.values()) >= 2
        for name in fast:
            forms = {
                (case.dtype, case.channels_last) for case in CASES[OPERATOR] if case.way == name
            }
            assert len(forms) == len(tool.forms(kernels[name]))

    @pytest.mark.parametrize("name", kernels)
    def test_every_variant_is_launched(self, name):
        """Of those that random problems and these reach, in any form."""
        reached = {
            symbol
            for case in CASES[name]
            for symbol in launched(
                name, case.problem, getattr(torch, case.dtype), case.channels_last
            )
        }
        possible = {
            symbol
            for form in tool.forms(kernels[name])
            for problem in (*tool.PROBLEMS, *problem_set(300)[::3])
            if problem.batch and kernels[name].supports(problem, *form)
            for symbol in launched(name, problem, *form)
        }
        assert reached == possible

    def test_every_function_is_launched(self):
        """By some case of some kernel: a rare path is checked too."""
        reached = {
            symbol
            for name in kernels
            for case in CASES[name][::-1]
            for symbol in launched(
                name, case.problem, getattr(torch, case.dtype), case.channels_last
            )
        }
        functions = tool.kernel_functions() - {"fma_rate_kernel"}  # it is for the ceilings
        assert len(functions) >= 15
        mangled = {f"{len(function)}{function}" for function in functions}
        assert [f for f in sorted(mangled) if not any(f in symbol for symbol in reached)] == []

    def test_the_functions_are_all_of_the_sources(self):
        folder = tool.KERNEL_FOLDER
        sources = [path.read_text() for path in folder.glob("*.cu*")]
        assert len(tool.kernel_functions()) == sum(
            len(re.findall(r"^__global__", text, re.MULTILINE)) for text in sources
        )

    def test_shards_hold_everything_once(self):
        cases = [case for name in NAMES for case in CASES[name]]
        parts = tool.shards(cases, 4)
        assert len(parts) == 4
        assert Counter(case for part in parts for case in part) == Counter(cases)
        assert max(map(len, parts)) < 1.2 * min(map(len, parts))
        assert len(tool.shards(CASES["winograd"], 4)) == 1

    def test_a_case_as_json(self):
        for case in CASES[OPERATOR] + CASES["hopper"]:
            assert Case.from_json(json.loads(json.dumps(asdict(case)))) == case
        assert str(CASES["winograd"][0]).startswith("winograd float32 contiguous, Problem(")


def lines_of(output):
    return [json.loads(line) for line in output.splitlines()]


class TestDriver:
    @pytest.fixture(autouse=True)
    def settings_as_before(self):
        fill = torch.utils.deterministic.fill_uninitialized_memory
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        allow_tf32 = torch.backends.cudnn.allow_tf32
        yield
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(is_deterministic)
        torch.backends.cudnn.allow_tf32 = allow_tf32

    @pytest.fixture
    def drive(self, tmp_path, capsys):
        def run(cases, **fields):
            spec = {"tool": "memcheck", "device": "cpu", "cases": [asdict(c) for c in cases]}
            (tmp_path / "spec.json").write_text(json.dumps({**spec, **fields}))
            tool.drive(tmp_path / "spec.json")
            return lines_of(capsys.readouterr().out)

        return run

    def test_kernels_and_the_operator(self, drive):
        cases = tool.all_cases(["coalesced", OPERATOR], 8, "cpu")
        *lines, last = drive(cases)
        assert last == {"done": True}
        assert [line["case"] for line in lines] == list(range(len(cases)))
        assert {line["failure"] for line in lines} == {None}
        assert {(c.kernel, *line["ran"]) for c, line in zip(cases, lines, strict=True)} == {
            ("coalesced", "coalesced"),
            (OPERATOR, "pytorch"),
        }

    @pytest.mark.parametrize("way", WAYS)
    def test_the_operators_ways_with_kernels_of_ours(self, way):
        """On the simulator, as on a GPU."""
        cases = tool.all_cases([OPERATOR], 12, "cpu")
        for case in [case for case in cases if case.way == way][:2]:
            ran = []
            with on_path("simulator"):
                assert tool.run_case(case, 3, torch.device("cpu"), ran) is None
            assert ran == ["register_blocked"]

    def test_the_memory_format_and_the_offset_arrive(self, monkeypatch):
        seen = []
        kernel = kernels["tensor_core_split"]
        monkeypatch.setattr(tool, "_call_kernel", lambda case, tensors, ran: seen.append(tensors))
        problem = lab.Problem(2, 3, 4, 5, 6, kernel_size=3)
        for channels_last in (False, True):
            case = Case(kernel.name, problem, "float16", channels_last, offset=1)
            with pytest.raises(AttributeError):  # of None, the result
                tool.run_case(case, 0, torch.device("cpu"), [])
            x, weight, bias = seen.pop()
            order = torch.channels_last if channels_last else torch.contiguous_format
            assert x.is_contiguous(memory_format=order)
            assert x.storage_offset() == 1
            assert x.untyped_storage().nbytes() == 2 * (x.numel() + 1)
            assert torch.equal(x, problem.random_inputs(0)[0].half())
            assert weight.dtype == torch.float16
            assert bias is None

    @pytest.mark.parametrize("value", [0.0, float("nan")])
    def test_a_wrong_result(self, drive, monkeypatch, value):
        def forget_a_pixel(case, tensors, ran):
            y = kernels[case.kernel](*tensors, **case.problem.arguments)
            y.view(-1)[y.abs().argmax()] = value
            return y

        monkeypatch.setattr(tool, "_call_kernel", forget_a_pixel)
        wrong, done = drive(tool.cases_of_kernel("coalesced", 1, tool.PROBLEMS[2:3]))
        assert re.match(r"wrong by (1|nan) of the largest output", wrong["failure"])
        assert done == {"done": True}

    def test_what_raises_does_not_end_the_process(self, drive):
        uncovered = lab.Problem(1, 1, 1, 5, 5, kernel_size=3, stride=17)
        cases = [Case("one_channel", uncovered), Case("naive_gather", tool.PROBLEMS[1])]
        first, second, done = drive(cases)
        assert first["failure"].startswith("ValueError: one_channel does not cover")
        assert second["failure"] is None
        assert done == {"done": True}

    @pytest.mark.parametrize(("name", "is_poisoned"), [("memcheck", True), ("initcheck", False)])
    def test_memory_is_poisoned_but_for_initcheck(self, name, is_poisoned):
        tool.poison_outputs(name)
        assert torch.are_deterministic_algorithms_enabled() == is_poisoned
        assert torch.utils.deterministic.fill_uninitialized_memory == is_poisoned
        if is_poisoned:
            assert torch.empty(100).isnan().all()

    def test_a_planted_bug(self, drive):
        assert drive([], tool="racecheck", planted=True) == [
            {"case": 0, "failure": None},
            {"done": True},
        ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("memcheck", "out_of_bounds"),
        ("racecheck", "race"),
        ("initcheck", None),  # an array that is passed is taken for initialised
        ("synccheck", "divergent_barrier"),
    ],
)
def test_the_planted_bugs_are_what_they_shall_be(name, kind):
    """By the simulator, which looks for hazards itself."""
    x, y = torch.ones(tool.THREADS), torch.zeros(tool.THREADS)
    program = tool.planted_program("cpu")
    try:
        report = program.launch(tool.PLANTED[name], 1, tool.THREADS, [x, y], trace=True)
    except lab.KernelError as error:
        report = error.report
    kinds = {hazard.kind for hazard in report.hazards}
    assert kind in kinds or not (kind or kinds)


class TestLogs:
    def test_memcheck(self):
        run = judged(MEMCHECK, status=tool.REPORTED)
        assert [report.head for report in run.reports] == [
            "Invalid __global__ write of size 4 bytes"
        ] * 2
        assert run.reports[0].to_json()["where"] == [
            "at void coalesced_kernel(const float *, float *)+0x160 in coalesced.cu:31"
        ]
        assert run.summaries == ("ERROR SUMMARY: 2 errors",)
        assert run.failures == run.elsewhere == ()
        assert not run.is_clean

    def test_racecheck(self):
        run = judged(RACECHECK, status=tool.REPORTED, tool_name="racecheck")
        assert [report.head[:13] for report in run.reports] == ["Error: Race r", "Warning: Race"]
        assert "508 hazards" in run.reports[0].text
        assert run.failures == ()
        # Warnings may leave the exit status as it is.
        assert not judged(RACECHECK, tool_name="racecheck").is_clean

    def test_initcheck_elsewhere(self):
        """A report in cuDNN is not ours; one that names no kernel may be."""
        run = judged(INITCHECK, status=tool.REPORTED, tool_name="initcheck")
        assert [report.head[:8] for report in run.reports] == ["Host API"]
        assert [report.head[:8] for report in run.elsewhere] == ["Uniniti"[:7] + "a"]
        only_theirs = INITCHECK.replace("Host API", "Elsewhere API").split("========= Elsew")[0]
        run = judged(only_theirs + "========= ERROR SUMMARY: 1 error\n", status=tool.REPORTED)
        assert run.is_clean
        assert "1 of them elsewhere" in str(run)

    def test_synccheck_in_a_function_of_a_header(self):
        run = judged(SYNCCHECK, status=tool.REPORTED, tool_name="synccheck")
        assert len(run.reports) == 1
        assert run.failures == ()

    @pytest.mark.parametrize("log", [CLEAN, NO_RACE])
    def test_clean(self, log):
        run = judged(f"something else\n{log}")
        assert run.is_clean
        assert run.reports == ()
        assert "0 " in str(run)

    @pytest.mark.parametrize("count", ["1,003 errors", "3 errors"])
    def test_more_than_is_shown(self, count):
        run = judged(MEMCHECK.replace("2 errors", count), status=tool.REPORTED)
        missing = 1001 if "," in count else 1
        assert f"counts {missing} reports more than its log shows" in run.failures[0]

    @pytest.mark.parametrize(
        "message",
        [
            "Error: No attachable process found. compute-sanitizer timed-out.",
            "Target application returned an error",
            "Internal Sanitizer Error: The Sanitizer encountered an error while launching k",
            "Device not supported. Please refer to the documentation",
            "Warning: Detected overflow of tracked cuda::barrier structures.",
        ],
    )
    def test_messages_are_failures(self, message):
        run = judged(CLEAN.replace("========= ERROR", f"========= {message}\n========= ERROR"))
        assert run.failures == (f"the sanitizer says: {message}",)
        assert not run.is_clean

    def test_no_summary(self):
        run = judged("========= COMPUTE-SANITIZER\n")
        assert "wrote no summary: ========= COMPUTE-SANITIZER" in run.failures[0]
        assert "its log is empty" in judged("").failures[0]

    def test_a_status_without_a_report(self):
        assert "exit status says" in judged(status=tool.REPORTED).failures[0]
        assert (
            "ended with status 3 after 0 of 0 cases: oh"
            in judged(status=3, errors="oh\n").failures[0]
        )
        run = judged("", status=1, output="Error: no such option\n")
        assert "after 0 of 0 cases: Error: no such option" in run.failures[0]

    def test_cases_that_fail_or_never_run(self):
        cases = CASES["coalesced"][:3]
        output = '{"case": 0, "failure": null}\nnoise\n{"case": 1, "failure": "wrong by 1"}\n3\n'
        run = judged(cases=cases, output=output + DONE)
        assert run.cases == 2
        assert run.failures == (f"{cases[1]}: wrong by 1", "ran 2 of 3 cases")
        run = judged(cases=cases, output=output, status=139, errors="Segmentation fault\n")
        assert f"status 139 after 2 of 3 cases, at {cases[2]}: Segmentation" in run.failures[1]
        run = judged(log="", cases=cases, output=output, status=tool.TIMED_OUT)
        assert (
            f"was not done after 9 s and was ended after 2 of 3 cases, at {cases[2]}"
            in (run.failures[1])
        )
        assert len(run.failures) == 2

    def test_what_the_operator_ran(self):
        cases = [case for case in CASES[OPERATOR] if case.way == "winograd"]
        output = '{"case": 0, "failure": null, "ran": ["winograd"]}\n' + DONE
        run = judged(cases=cases[:1], output=output)
        assert run.ran == (("winograd", "winograd"),)
        assert tool.unreached(cases, [run], "cuda") == []
        run = judged(cases=cases[:1], output=output.replace('["w', '["not_w'))
        assert tool.unreached(cases, [run], "cuda") == ["memcheck: the operator never ran winograd"]
        assert tool.unreached(cases, [run], "cpu") == []

    def test_a_name_within_another_is_not_that_name(self):
        report = Report("Invalid", ("at my_cells_kernel2(int)+0x1 in mycells.cuh:3",))
        assert not report.is_in({"cells_kernel"})
        report = Report("Invalid", ("at void cells_kernel<float>(int)+0x1",))
        assert report.is_in({"cells_kernel"})


#: What stands in for compute-sanitizer: it does what the file beside it says for each tool.
FAKE = """\
#!{python} -S
import json, subprocess, sys, time
from pathlib import Path

words, options = sys.argv[1:], []
if words[0] in ("--version", "--help"):
    print("Version 2025.3.1.0 (build 1) (public-release)\\n --kernel-{filter} arg")
    sys.exit()
while words[0].startswith("--"):
    options.append((words.pop(0), words.pop(0)))
here, spec = Path(__file__).parent, json.loads(Path(words[-1]).read_text())
with open(here / "commands", "a") as file:
    file.write(json.dumps(options) + "\\n")
given, log = dict(options), ["COMPUTE-SANITIZER"]
does = json.loads((here / "does").read_text()).get(given["--tool"], "")
planted, status = spec.get("planted"), 0
if planted and does != "misses":
    log += ["Something is wrong", "    at PLANTED+0x10 in kernel.cu:5"]
elif does == "reports" and not planted:
    log += ["Invalid __shared__ read of size 4 bytes", "    at cells_kernel(int)+0x1"]
if len(log) > 1:
    status = int(given["--error-exitcode"])
if does == "hangs" and not planted:
    time.sleep(60)
if does == "crashes" and not planted:
    sys.exit("cannot go on")
if does == "runs":
    status = subprocess.run(words).returncode or status
else:
    for number, case in enumerate(spec.get("cases", ())):
        print(json.dumps({{"case": number, "failure": None, "ran": [case["way"]]}}))
    print(json.dumps({{"done": True}}))
log.append(f"ERROR SUMMARY: {{len(log) // 2}} errors")
log = "".join(f"========= {{line}}\\n" for line in log)
Path(given["--log-file"]).write_text(log.replace("PLANTED", PLANTED[given["--tool"]]))
sys.exit(status)
"""


@pytest.fixture
def sanitizer(monkeypatch, tmp_path):
    """Return a function that puts a stand-in on PATH, and the file with its commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def install(filter="name", **does):
        text = FAKE.format(python=sys.executable, filter=filter)
        text = text.replace("sys.argv[1:], []", f"sys.argv[1:], []\nPLANTED = {tool.PLANTED!r}")
        (folder / "does").write_text(json.dumps(does))
        (folder / "compute-sanitizer").write_text(text)
        (folder / "compute-sanitizer").chmod(0o755)
        return folder / "commands"

    return install


def check(*words):
    return tool.main(["--device", "cpu", "--jobs", "2", *words])


class TestSanitizer:
    def test_command(self, sanitizer):
        sanitizer()
        found = Sanitizer.find(["--num-cuda-barriers", "8"])
        assert found.version == "2025.3.1.0"
        command = found.command("racecheck", "log", ["b_kernel", "a_kernel"])
        assert command[1:3] == ["--tool", "racecheck"]
        assert command[-8:] == [
            *("--num-cuda-barriers", "8", "--kernel-name", "kns=a_kernel"),
            *("--kernel-name", "kns=b_kernel", "--log-file", "log"),
        ]
        assert "--kernel-name" not in found.command("initcheck", "log", ["a_kernel"])
        assert "--padding" in found.command("memcheck", "log")

    def test_what_an_older_one_calls_the_filter(self, sanitizer):
        sanitizer(filter="regex")
        assert "--kernel-regex" in Sanitizer.find().command("synccheck", "log", ["a"])

    def test_in_the_toolkit(self, monkeypatch, tmp_path):
        place = tmp_path / "compute-sanitizer" / "compute-sanitizer"
        place.parent.mkdir()
        place.write_text("#!/bin/sh\n")
        place.chmod(0o755)
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(tool, "find_toolkit", lambda: tmp_path)
        assert Sanitizer.find().program == str(place)

    @pytest.mark.parametrize("toolkit", [None, Path("/opt/cuda")])
    def test_there_is_none(self, monkeypatch, toolkit):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(tool, "find_toolkit", lambda: toolkit)
        with pytest.raises(SystemExit, match="neither on PATH nor in the CUDA toolkit"):
            tool.main([])

    def test_without_a_gpu(self, sanitizer, monkeypatch):
        sanitizer()
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match="no CUDA device"):
            tool.main([])


class TestWholeRuns:
    def test_with_real_processes(self, sanitizer, tmp_path, capsys):
        """Everything but the sanitizer itself."""
        commands = sanitizer(memcheck="runs")
        path = tmp_path / "record.json"
        words = ["--kernels", "naive_gather,operator", "--tools", "memcheck", "--shards", "1"]
        assert check(*words, "--cases", "4", "--output", str(path)) == 0
        assert "nothing was reported" in capsys.readouterr().out
        record = json.loads(path.read_text())
        assert record["schema"] == 1
        assert record["software"]["compute_sanitizer"] == "2025.3.1.0"
        assert record["planted"] == {
            "memcheck": {"bug": "planted_write_past_the_end", "report": "Something is wrong"}
        }
        assert record["cases"]["naive_gather float32 contiguous"] == 4
        assert sum(record["operator"]["as measured"].values()) == 1
        found = record["tools"]["memcheck"]
        assert found["cases"] == sum(record["cases"].values())
        assert found["summaries"] == {"ERROR SUMMARY: 0 errors": 1}
        assert found["reports"] == found["elsewhere"] == found["failures"] == []
        assert re.fullmatch(
            r"compute-sanitizer --tool memcheck .* --log-file LOG "
            r"python tools/compute_sanitizer\.py --drive SPEC",
            found["command"],
        )
        assert len(commands.read_text().splitlines()) == 2

    def test_all_tools_and_kernels(self, sanitizer, tmp_path, capsys):
        commands = sanitizer()
        path = tmp_path / "record.json"
        assert check("--output", str(path), "--logs", str(tmp_path / "logs")) == 0
        record = json.loads(path.read_text())
        assert list(record["tools"]) == list(tool.TOOLS)
        assert {found["processes"] for found in record["tools"].values()} == {4}
        assert set(record["cases"]) == {case.form for name in NAMES for case in CASES[name]}
        given = [dict(json.loads(line)) for line in commands.read_text().splitlines()]
        assert Counter(options["--tool"] for options in given) == dict.fromkeys(tool.TOOLS, 5)
        assert {"--kernel-name" in o for o in given if o["--tool"] in tool.FILTERED} == {True}
        assert len(list((tmp_path / "logs").glob("*.log"))) == 20

    def test_a_part_is_not_written(self, sanitizer, capsys):
        sanitizer()
        before = sorted(records.FOLDER.iterdir())
        assert check("--kernels", "coalesced", "--tools", "synccheck") == 0
        assert "a part of the record" in capsys.readouterr().err
        assert sorted(records.FOLDER.iterdir()) == before

    def test_what_the_whole_is(self):
        parser = tool._parser()

        def is_whole(*words):
            return tool._is_whole(parser.parse_args(words), parser)

        assert is_whole()
        assert is_whole("--jobs", "3", "--shards", "5")
        for words in (["--tools", "memcheck"], ["--kernels", "hopper"], ["--cases", "3"]):
            assert not is_whole(*words)
        assert not is_whole("--device", "cpu")

    def test_reports(self, sanitizer, tmp_path, capsys):
        sanitizer(racecheck="reports")
        path = tmp_path / "record.json"
        words = ["--kernels", "few_channels", "--shards", "1", "--output", str(path)]
        assert check(*words) == 1
        text = capsys.readouterr().out
        assert (
            "  1 x Invalid __shared__ read of size 4 bytes\n      at cells_kernel(int)+0x1" in text
        )
        assert "the check has failed" in text
        found = json.loads(path.read_text())["tools"]
        assert found["racecheck"]["reports"] == [
            {
                "report": "Invalid __shared__ read of size 4 bytes",
                "where": ["at cells_kernel(int)+0x1"],
                "count": 1,
            }
        ]
        assert found["memcheck"]["reports"] == []

    def test_a_process_that_hangs(self, sanitizer, capsys):
        sanitizer(synccheck="hangs")
        words = ["--kernels", "coalesced", "--tools", "synccheck", "--timeout", "2"]
        assert check(*words) == 1
        assert "was not done after 2 s and was ended after 0 of" in capsys.readouterr().out

    def test_a_process_that_crashes(self, sanitizer, tmp_path, capsys):
        sanitizer(initcheck="crashes")
        (tmp_path / "initcheck-0.log").write_text(CLEAN)  # of another time
        words = ["--kernels", "coalesced", "--tools", "initcheck,synccheck"]
        assert check(*words, "--logs", str(tmp_path)) == 1
        text = capsys.readouterr().out
        assert "FAILED: ended with status 1 after 0 of 24 cases, at coalesced" in text
        assert "cannot go on" in text
        assert "the sanitizer wrote no summary" in text
        assert text.count("FAILED") == 2

    @pytest.mark.parametrize("only", [["--planted-only"], []])
    def test_a_planted_bug_that_is_missed(self, sanitizer, capsys, only):
        commands = sanitizer(initcheck="misses")
        assert check(*only) == 1
        text = capsys.readouterr().out
        assert "the check can't be trusted:\n  initcheck did not report planted_unini" in text
        assert len(commands.read_text().splitlines()) == 4

    def test_the_planted_bugs_alone(self, sanitizer, capsys):
        commands = sanitizer()
        assert check("--planted-only") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [[name, "finds"] for name in tool.TOOLS]
        assert len(commands.read_text().splitlines()) == 4

    @pytest.mark.parametrize(
        "words", [["--tools", "memchek"], ["--kernels", "nothing"], ["--device", "tpu"]]
    )
    def test_what_is_not_there(self, words, capsys):
        with pytest.raises(SystemExit):
            tool.main(words)
        assert words[1] in capsys.readouterr().err


class TestRecords:
    @pytest.mark.parametrize("path", sorted(records.FOLDER.glob("*-sanitizer.json")), ids=str)
    def test_nothing_was_reported(self, path):
        record = json.loads(path.read_text())
        assert record["schema"] == 1
        assert path.stem == f"{records.slug(record['gpu'])}-sanitizer"
        assert record["problems"] >= 60
        assert record["failures"] == []
        assert {name: entry["bug"] for name, entry in record["planted"].items()} == tool.PLANTED
        assert set(record["tools"]) == set(tool.TOOLS)
        for found in record["tools"].values():
            assert found["reports"] == found["failures"] == []
            assert found["cases"] == sum(record["cases"].values())
        # A kernel in a form that is new since then is not in it.
        assert set(record["cases"]) == {case.form for name in NAMES for case in CASES[name]}

    def test_it_is_no_record_of_speeds(self, tmp_path):
        (tmp_path / "nvidia-t4.json").touch()
        (tmp_path / "nvidia-t4-sanitizer.json").touch()
        assert records.names(tmp_path) == ("nvidia-t4",)


def test_a_kernel_for_newer_gpus_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    names = tool._left_out("cuda")
    assert "hopper" in names
    assert "tensor_core_split" not in names
    assert "hopper is left out" in capsys.readouterr().out
    assert tool._left_out("cpu") == []


def test_a_planted_bug_counts_only_in_its_own_kernel():
    run = judged(MEMCHECK, status=tool.REPORTED)
    assert tool.missed_bugs([run])[0].startswith("memcheck did not report some")
    assert tool.missed_bugs([replace(run, name="coalesced_kernel")]) == []
