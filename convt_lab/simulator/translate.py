"""Makes CUDA C++ readable for g++, changing as little as possible and never a line's number.

Three constructs need it: a launch, ``kernel<<<grid, block>>>(args)``; a dynamic shared array,
``extern __shared__ float tile[];``; and the keyword ``__noinline__``, which can't be a macro
because the standard library uses that word. Comments, strings and everything else pass through
untouched.
"""

from __future__ import annotations

import re

__all__ = ["mask_comments_and_strings", "translate"]

_TOKEN = re.compile(
    r"""//[^\n]*            # line comment
      | /\*.*?(?:\*/|\Z)   # block comment
      | R"(?P<d>[^(\s]*)\(.*?\)(?P=d)"        # raw string
      | "(?:\\.|[^"\\\n])*"                   # string
      | (?<![0-9A-Za-z_])'(?:\\.|[^'\\\n])+'  # character (not a digit separator)
    """,
    re.VERBOSE | re.DOTALL,
)
_DYNAMIC_SHARED = re.compile(
    r"""\bextern\s+(?:__align__\s*\(\s*\w+\s*\)\s*)?(?P<volatile>volatile\s+)?__shared__\s+
        (?P<type>[^;\[\]=]+?)\s*\b(?P<name>[A-Za-z_]\w*)\s*\[\s*\]\s*;""",
    re.VERBOSE,
)
_NOINLINE = re.compile(r"(?<!\()\b__noinline__\b")  # not in __attribute__((__noinline__))
_ALIGNMENT = re.compile(r"\b(?:__align__|alignas)\s*\([^()]*\)")


def mask_comments_and_strings(source: str) -> str:
    """Return `source` with the contents of comments and strings blanked, every position kept."""
    return _TOKEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def translate(source: str) -> str:
    """Return CUDA C++ `source` as C++ that the simulator's headers give a meaning to.

    The result has as many lines as `source`, and each construct stays on its line.
    """
    code = mask_comments_and_strings(source)
    edits = [*_launch_edits(code), *_shared_edits(code)]
    for match in _NOINLINE.finditer(code):
        edits.append((match.start(), match.end(), "__attribute__((noinline))"))
    for start, end, text in sorted(edits, reverse=True):
        lost_lines = source.count("\n", start, end)
        source = source[:start] + text + "\n" * lost_lines + source[end:]
    return source


def _launch_edits(code: str) -> list[tuple[int, int, str]]:
    """Turn ``<<<`` and the ``>>>`` that closes it into an operator between kernel and call."""
    edits = []
    position = 0
    while (start := code.find("<<<", position)) >= 0:
        end = _closing(code, start + 3)
        if end is None:
            break  # the compiler's own message will point at it
        edits.append((start, start + 3, "% ::cudasim::config("))
        edits.append((end, end + 3, ")"))
        position = end + 3
    return edits


def _closing(code: str, position: int) -> int | None:
    """Find the ``>>>`` outside any parentheses that ends the launch configuration."""
    depth = 0
    for index in range(position, len(code)):
        if code[index] in "([{":
            depth += 1
        elif code[index] in ")]}":
            depth -= 1
        elif depth == 0 and code.startswith(">>>", index):
            return index
    return None


def _shared_edits(code: str) -> list[tuple[int, int, str]]:
    edits = []
    for match in _DYNAMIC_SHARED.finditer(code):
        element = (match["volatile"] or "") + _ALIGNMENT.sub("", match["type"]).strip()
        name = match["name"]
        inside_function = code.count("{", 0, match.start()) > code.count("}", 0, match.start())
        if inside_function:
            text = f"{element}* const {name} = static_cast<{element}*>(::cudasim_dynamic_shared());"
        else:
            text = f"static const ::cudasim::DynamicShared<{element}> {name};"
        edits.append((match.start(), match.end(), text))
    return edits
