"""Makes CUDA C++ readable for g++, changing as little as possible and never a line's number.

Four constructs need it: a launch, ``kernel<<<grid, block>>>(args)``; a dynamic shared array,
``extern __shared__ float tile[];``; a ``static`` beside ``__shared__``; and the keyword
``__noinline__``, which can't be a macro because the standard library uses that word. Comments,
strings and everything else pass through untouched. A build that is traced also gets a mark at every
loop, so that the tracer knows which iteration a thread is in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["mask_comments_and_strings", "mask_unused", "translate", "uses_goto"]

_TOKEN = re.compile(
    r"""//(?:\\\n|[^\n])*  # line comment
      | /\*.*?(?:\*/|\Z)   # block comment
      | R"(?P<d>[^(\s]*)\(.*?\)(?P=d)"        # raw string
      | "(?:\\.|[^"\\\n])*"                   # string
      | (?<![0-9A-Za-z_])(?:u8|[uUL])?'(?:\\.|[^'\\\n])+'  # character (not a digit separator)
    """,
    re.VERBOSE | re.DOTALL,
)
_DYNAMIC_SHARED = re.compile(
    r"""(?:\bextern\s+(?:__align__\s*\(\s*\w+\s*\)\s*)?(?P<volatile>volatile\s+)?__shared__
          |\b__shared__\s+extern)\s+
        (?P<type>[^;\[\]=]+?)\s*\b(?P<name>[A-Za-z_]\w*)\s*\[\s*\]\s*
        (?P<row>(?:\[[^;\[\]]*\]\s*)*);""",
    re.VERBOSE,
)
# The macro for __shared__ says `static`, too.
_STATIC = re.compile(r"\bstatic\s+(?=__shared__\b)|(?<=\b__shared__)\s+static\b")
_CONDITIONAL = re.compile(r"\s*#\s*(?P<word>if|ifdef|ifndef|elif|else|endif)\b(?P<value>.*)")
_NOINLINE = re.compile(r"(?<!\()\b__noinline__\b")  # not in __attribute__((__noinline__))
_LOOP = re.compile(r"\b(?:for|while|do)\b")
_WORD = re.compile(r"\s*([A-Za-z_]\w*)?")
_ALIGNMENT = re.compile(r"\b(?:__align__|alignas)\s*\([^()]*\)")


def mask_comments_and_strings(source: str) -> str:
    """Return `source` with the contents of comments and strings blanked, every position kept."""
    return _TOKEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)


def mask_unused(code: str) -> str:
    """Return masked `code` with what stands behind ``#if 0`` blanked too, every position kept.

    What other conditions leave out stays: only the compiler knows their values.
    """
    lines = code.splitlines(keepends=True)
    # For each #if that is open: whether its lines are left out, and whether all later branches are.
    open_groups: list[tuple[bool, bool]] = []
    for number, line in enumerate(lines):
        directive = _CONDITIONAL.match(line)
        word = directive["word"] if directive else None
        if word in ("if", "ifdef", "ifndef"):
            value = directive["value"].strip() if word == "if" else ""
            open_groups.append((value in ("0", "false"), value in ("1", "true")))
        elif word in ("else", "elif") and open_groups:
            open_groups[-1] = (open_groups[-1][1], open_groups[-1][1])
        elif word == "endif" and open_groups:
            open_groups.pop()
        elif any(left_out for left_out, _ in open_groups):
            lines[number] = re.sub(r"[^\n]", " ", line)
    return "".join(lines)


def uses_goto(source: str) -> bool:
    """Whether there may be loops that `translate` can't mark."""
    return re.search(r"\bgoto\b", mask_comments_and_strings(source)) is not None


def translate(source: str, *, mark_loops: bool = False) -> str:
    """Return CUDA C++ `source` as C++ that the simulator's headers give a meaning to.

    The result has as many lines as `source`, and each construct stays on its line.
    """
    code = mask_comments_and_strings(source)
    edits = [*_launch_edits(code), *_shared_edits(code)]
    if mark_loops:
        edits += _loop_edits(code)
    for match in _STATIC.finditer(code):
        edits.append((match.start(), match.end(), ""))
    for match in _NOINLINE.finditer(code):
        edits.append((match.start(), match.end(), "__attribute__((noinline))"))
    pieces, position = [], 0
    for start, end, text in sorted(edits, key=lambda edit: edit[:2]):
        pieces += [source[position:start], text, "\n" * source.count("\n", start, end)]
        position = end
    return "".join([*pieces, source[position:]])


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


def _walk(code: str, position: int) -> Iterator[tuple[int, str, int]]:
    """Yield each index from `position` on, its character, and the brackets open behind it."""
    depth = 0
    for index in range(position, len(code)):
        if code[index] in "([{":
            depth += 1
        elif code[index] in ")]}":
            depth -= 1
        yield index, code[index], depth


def _closing(code: str, position: int) -> int | None:
    """Find the ``>>>`` outside any parentheses that ends the launch configuration."""
    ends = (i for i, _, depth in _walk(code, position) if depth == 0 and code.startswith(">>>", i))
    return next(ends, None)


_LOOP_MARK = "if (const ::cudasim::Loop cudasim_loop; false) {} else "
_ITERATION_MARK = " if (::cudasim::next_iteration()) {} else "


def _loop_edits(code: str) -> list[tuple[int, int, str]]:
    """Put each loop into the scope of a mark, and a call at the start of each iteration.

    ``for (...) body`` becomes ``if (mark; false) {} else for (...) if (iteration) {} else body``,
    where the conditions are false. This leaves ``break``, ``continue`` and an ``else`` behind the
    loop with the meaning that they had.
    """
    edits = []
    ends_of_do = set()  # where the `while` behind a `do` stands
    for match in _LOOP.finditer(code):
        if match.start() in ends_of_do:
            continue
        if match[0] == "do":
            body = match.end()
            end = _statement_end(code, body)
            if end is None or (end_word := _word(code, end))[0] != "while":
                continue  # the compiler's own message will point at it
            ends_of_do.add(end_word[1])
        else:
            body = _parentheses_end(code, match.end())
            if body is None:
                continue
        edits.append((match.start(), match.start(), _LOOP_MARK))
        if match[0] == "do":
            edits.append((body, body, f" {{{_ITERATION_MARK}"))
            edits.append((end, end, " }"))
        else:
            edits.append((body, body, _ITERATION_MARK))
    return edits


def _word(code: str, position: int) -> tuple[str | None, int]:
    """Return the word that comes next, if one does, and where it starts."""
    match = _WORD.match(code, position)
    return match[1], match.start(1) if match[1] else match.end()


def _parentheses_end(code: str, position: int) -> int | None:
    """Return the end of the parentheses, or braces, that come next."""
    start = _word(code, position)[1]
    for index, _, depth in _walk(code, start):
        if depth <= 0:
            return index + 1 if index > start and depth == 0 else None
    return None


def _statement_end(code: str, position: int) -> int | None:
    """Return the end of the statement that comes next; it may hold others."""
    word, start = _word(code, position)
    if word in ("if", "for", "while", "switch"):
        position = start + len(word)
        if word == "if" and _word(code, position)[0] == "constexpr":
            position = _word(code, position)[1] + len("constexpr")
        head = _parentheses_end(code, position)
        end = None if head is None else _statement_end(code, head)
        if end is not None and word == "if" and _word(code, end)[0] == "else":
            end = _statement_end(code, _word(code, end)[1] + len("else"))
        return end
    if word == "do":
        end = _statement_end(code, start + len(word))
        return None if end is None else _statement_end(code, end + len("while"))
    if code.startswith("{", start):
        return _parentheses_end(code, start)
    ends = (i + 1 for i, character, depth in _walk(code, start) if character == ";" and depth == 0)
    return next(ends, None)


def _shared_edits(code: str) -> list[tuple[int, int, str]]:
    edits = []
    for match in _DYNAMIC_SHARED.finditer(code):
        element = (match["volatile"] or "") + _ALIGNMENT.sub("", match["type"]).strip()
        name, row = match["name"], match["row"].strip()
        inside_function = code.count("{", 0, match.start()) > code.count("}", 0, match.start())
        if inside_function:
            start, end = (f"{element} (*", f"){row}") if row else (f"{element}*", "")
            address = f"static_cast<{start}{end}>(::cudasim_dynamic_shared())"
            text = f"{start} const {name}{end} = {address};"
        else:
            text = f"static const ::cudasim::DynamicShared<{element}{row}> {name};"
        edits.append((match.start(), match.end(), text))
    return edits
