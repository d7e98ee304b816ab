"""The error for mistakes of a user, and how it says that settings differ. Any other exception is a bug of ours."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

MAX_WIDTH = 100  # characters of a value
CONTEXT = 20  # characters before the place where two long values differ


class UserError(ValueError):
    """A mistake in a flag, a file or a folder: one sentence that names it, its value and what to do.

    The command line prints the sentence, and below it each of the `details` on a line, and exits with status 2, without
    a traceback.
    """

    def __init__(self, sentence: str, details: Sequence[str] = ()):
        super().__init__(sentence)
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n  ".join((self.args[0], *self.details))


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], words: tuple[str, str] = ("was", "now")
) -> dict[str, str]:
    """{key: `key: was 1, now 2`} of the values that differ, in the order of the keys.

    The values of nested mappings, and of mappings in lists, have lines of their own, such as `vae.sha256: ...`.

    Args:
        words: what stands before the two values.
    """
    found: dict[str, str] = {}
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = _nested(before.get(key)), _nested(now.get(key))
        both = [value for value in (old, new) if value not in (None, [])]
        if both and all(isinstance(value, Mapping) for value in both):
            inner = differences(old or {}, new or {}, words)
            found |= {f"{key}.{name}": f"{key}.{line}" for name, line in inner.items()}
        elif old != new:
            one, other = _shortened(_as_text(old), _as_text(new))
            found[key] = f"{key}: {words[0]} {one}, {words[1]} {other}"
    return found


def _nested(value: Any) -> Any:
    """A list of mappings as a mapping by position; a tuple as a list."""
    if not isinstance(value, tuple | list):
        return value
    if value and all(isinstance(each, Mapping) for each in value):
        return {str(i): each for i, each in enumerate(value)}
    return list(value)


def _as_text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str):
        text = " ".join(line.strip() for line in value.splitlines()) or "empty"
        return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text  # a SHA-256
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_as_text, value))}]"
    return str(value)


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Long values without what is equal at their beginning and without their end."""
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))) - CONTEXT
    if max(len(one), len(other)) > MAX_WIDTH and start > 0:
        one, other = f"...{one[start:]}", f"...{other[start:]}"
    cut = (text if len(text) <= MAX_WIDTH else f"{text[: MAX_WIDTH - 3]}..." for text in (one, other))
    return next(cut), next(cut)


def a_type(value: object) -> str:
    """`a list`, `an int`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
