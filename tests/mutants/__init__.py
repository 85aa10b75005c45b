"""Wrong variants of the operator and its kernels, and the tests that catch them.

A test-suite that has never seen a wrong program fail is only believed to be good. Each mutant of
`registry` is one small change that makes the package wrong, and names the tests that must fail for
it. `python -m tests.mutants` runs them all and prints which test caught which.
"""
