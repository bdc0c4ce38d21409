"""What a solution is. An edit is a dict: {"f" or "Class.f": a whole def}, "swaps": [(old, new), ...], "answers": {...}."""
from typing import NamedTuple


class Solution(NamedTuple):
    """right: edits that are right, written in different ways. wrong: pairs (edit, words of what the grader says)."""
    right: list
    wrong: list


def wrong(words, **edit):
    """An edit that is wrong, and words that the grader's sentence has. Methods: **{"Class.f": ...}."""
    return edit, words
