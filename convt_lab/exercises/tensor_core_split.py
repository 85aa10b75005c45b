"""The exercises of the chapter."""

EXERCISES = ()
