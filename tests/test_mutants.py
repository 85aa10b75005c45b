"""Each mutant is caught by the tests that it names. `python -m tests.mutants` prints which."""

import dataclasses
import re

import pytest
import torch
from mutants.mutant import Edit, NotCaughtError, catch, check_unchanged, mutated
from mutants.registry import EXERCISES, KERNELS, MUTANTS, OPERATOR, STAGE, mutant


def cases(mutants):
    return [pytest.param(one, id=one.name, marks=marks_of(one)) for one in mutants]


def marks_of(one):
    if not one.gpus:
        return []
    lacking = pytest.mark.skipif(
        torch.cuda.device_count() < one.gpus, reason=f"needs {one.gpus} NVIDIA GPUs"
    )
    return [pytest.mark.gpu, lacking]


# Classes, so that several processes share the work.
@pytest.mark.parametrize("one", cases(KERNELS))
class TestKernels:
    def test_it_is_caught(self, one, record_property):
        record_property("caught by", catch(one).tests)


@pytest.mark.parametrize("one", cases(OPERATOR))
class TestOperator:
    def test_it_is_caught(self, one, record_property):
        record_property("caught by", catch(one).tests)


@pytest.mark.parametrize("one", cases(EXERCISES))
class TestExercises:
    def test_it_is_caught(self, one, record_property):
        record_property("caught by", catch(one).tests)


@pytest.mark.parametrize(
    "mutants", [KERNELS, OPERATOR, EXERCISES], ids=["kernels", "operator", "exercises"]
)
class TestWithoutAChange:
    """A test that fails anyway catches nothing."""

    def test_all_pass(self, mutants):
        check_unchanged(mutants)


class TestTheList:
    def test_names(self):
        names = [one.name for one in MUTANTS]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"[\w-]+", name) for name in names)

    def test_enough_need_no_gpu(self):
        assert sum(one.gpus == 0 for one in MUTANTS) >= 22

    @pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in MUTANTS])
    def test_each_fits_its_file(self, one):
        """Those too that are not tried here."""
        assert mutated(one)
        assert one.tests
        assert not any(test.startswith("test_mutants.py") for test in one.tests)


class TestTheRunner:
    """What is no catch."""

    harmless = mutant(
        "harmless",
        "nothing is wrong",
        "problem.py",
        "Everything here is integer arithmetic.",
        "Everything here is integer arithmetic!",
        "test_problem.py::test_compulsory_bytes",
    )

    def refused(self, message, time_limit=60, **changes):
        with pytest.raises(NotCaughtError, match=message):
            catch(dataclasses.replace(self.harmless, **changes), time_limit)

    def test_a_change_that_changes_nothing(self):
        self.refused("test_compulsory_bytes does not notice that nothing is wrong")

    def test_a_test_that_is_not_there(self):
        self.refused("status 4", tests=("test_problem.py::test_that_is_not_there",))

    def test_a_test_that_is_skipped(self):
        self.refused("does not notice", tests=("test_stages.py::test_a_fresh_tensor_is_poisoned",))

    def test_a_kernel_that_does_not_compile(self):
        self.refused(
            "another reason.*CompileError",
            file="convt_lab/kernels/naive_gather.cu",
            edits=(Edit("constexpr int THREADS = 256;", "constexpr int THREADS = none;"),),
            tests=(f"{STAGE}::test_unbatched[cpu-naive_gather]",),
        )

    def test_a_package_that_cannot_be_imported(self):
        self.refused("did not start", edits=(Edit("import math\n", "import no_such_module\n"),))

    def test_an_error_that_the_mutant_does_not_announce(self):
        """A name that is not there makes every test fail that goes that way."""
        self.refused(
            "another reason.*NameError",
            edits=(Edit("return 4 * sum(math.prod(", "return 4 * total(math.prod("),),
        )

    def test_a_run_that_takes_too_long(self):
        self.refused("not done after 0.1 s", time_limit=0.1)

    @pytest.mark.parametrize(
        "edit", [Edit("no such text", "x"), Edit("padding", "x"), Edit("", "")]
    )
    def test_a_change_that_no_longer_fits(self, edit):
        self.refused("no longer fits", edits=(edit,))
