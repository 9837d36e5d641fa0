"""Which rows share a run of words with an evaluation set.

After GPT-3's appendix C (arXiv 2005.14165): n-grams of normalised words, and those that stand in many rows are
boilerplate and do not count. A Chinese character is a word, since such text has no spaces.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_CJK = "\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so no power of it is 0 modulo 2^64


@dataclass(frozen=True, slots=True)
class Match:
    place: str  # of the evaluation text
    words: str  # that both have
    gram: int  # the same for the same words


def words_of(text: str) -> tuple[str, ...]:
    """Words as they are compared: NFKC, case folded, without punctuation."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


class EvaluationTexts:
    """All n-grams of the evaluation sets; a text of fewer words counts as a whole. Finding is exact."""

    def __init__(self, texts: Iterable[tuple[str, str]], size: int):
        """texts: (place, text). size: words of an n-gram."""
        self._size = size
        self._value_of: dict[str, int] = {}
        self._texts: list[tuple[str, tuple[str, ...]]] = []
        self._short: dict[tuple[str, ...], str] = {}
        grams, places = [], []
        for place, text in texts:
            words = words_of(text)
            if len(words) < size:
                self._short.setdefault(words, place)
                continue
            found = self._grams(words)
            grams.append(found)
            places.append(np.full(len(found), len(self._texts)))
            self._texts.append((place, words))
        every = np.concatenate(grams) if grams else np.empty(0, np.uint64)
        order = np.argsort(every, kind="stable")
        self._every = every[order]
        self._text_of = np.concatenate(places)[order] if places else np.empty(0, int)

    def find(self, prompt: str, answer: str) -> list[Match]:
        """Every n-gram of the row that stands in an evaluation text, one place for each."""
        words = words_of(prompt)
        if place := self._short.get(words):
            return [Match(place, " ".join(words), hash(words))]
        found: dict[int, Match] = {}
        for part in (words, words_of(answer)):
            if len(part) < self._size or not len(self._every):
                continue
            grams = self._grams(part)
            at = np.searchsorted(self._every, grams).clip(max=len(self._every) - 1)
            for start in np.flatnonzero(self._every[at] == grams).tolist():
                run, (place, text) = part[start : start + self._size], self._texts[self._text_of[at[start]]]
                if _contains(text, run):
                    found.setdefault(int(grams[start]), Match(place, " ".join(run), int(grams[start])))
        return list(found.values())

    def _grams(self, words: Sequence[str]) -> np.ndarray:
        """uint64 [len(words) - size + 1], a polynomial of the words' values modulo 2^64."""
        values = np.array([self._value(word) for word in words], np.uint64)
        grams = np.zeros(len(words) - self._size + 1, np.uint64)
        for offset in range(self._size):
            grams = grams * _BASE + values[offset : offset + len(grams)]
        return grams

    def _value(self, word: str) -> int:
        value = self._value_of.get(word)
        if value is None:
            value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
            self._value_of[word] = value
        return value


def contaminated(matches: dict[int, list[Match]], common: int) -> dict[int, Match]:
    """row -> its first match that is no boilerplate: one that stands in at most `common` rows."""
    rows_with = Counter(match.gram for found in matches.values() for match in found)
    rare = {row: [match for match in found if rows_with[match.gram] <= common] for row, found in matches.items()}
    return {row: found[0] for row, found in rare.items() if found}


def _contains(text: tuple[str, ...], run: tuple[str, ...]) -> bool:
    starts = (at for at, word in enumerate(text) if word == run[0])
    return any(text[at : at + len(run)] == run for at in starts)
