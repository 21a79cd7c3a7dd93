"""Rows that are nearly the same: MinHash signatures of their word shingles, compared where bands of them agree.

The signatures are datasketch's; they go to disk as they come, 512 bytes a row, so that a million rows need little
memory. Source: Broder 1997, "On the resemblance and containment of documents"; Leskovec et al., "Mining of Massive
Datasets", chapter 3.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH

from align.data.findings import LISTED_ROWS, Finding, Places, split_answers
from align.data.records import Origin, Record, TextDocument

SHINGLE_WORDS = 5
PERMUTATIONS = 128
"""The standard error of an estimate is at most 0.044 (half of 1 / sqrt(128)); at 0.8 it is 0.035."""
MISSES_WEIGH = (0.1, 0.9)
"""Bands that meet by chance cost a comparison of signatures; a pair that no band brings together is never found."""
COMPARED = 16
"""Rows before a row in its bucket that it is compared with; larger buckets are families of near copies."""
CHUNK_ROWS = 1 << 15


class NearDuplicates:
    """Takes records in, keeps their signatures in a file in `scratch`, and finds the near duplicates at the end."""

    def __init__(self, threshold: float, scratch: Path):
        self.threshold = threshold
        self._places, self._hashes = Places(), array("Q")
        self._signer = MinHash(PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
        lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, weights=MISSES_WEIGH)
        self.bands, self.rows_a_band = lsh.b, lsh.r
        self._path = scratch / "signatures.bin"
        self._file = open(self._path, "wb")

    def add(self, origins: Sequence[Origin], records: Sequence[Record]) -> None:
        """Sign a batch of records; those without a word are left aside."""
        for origin, record in zip(origins, records, strict=True):
            text = text_of(record)
            if not (words := text.casefold().split()):
                continue
            self._places.add(origin)
            self._hashes.append(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))
            signature = self._signer.copy()
            signature.update_batch(shingles(words))
            self._file.write(signature.hashvalues.astype("<u4").tobytes())

    def results(self) -> Finding:
        """Rows that have a near duplicate earlier in the sources. An exact copy of an earlier row is none of them."""
        self._file.close()
        match, similarity = self._matches()
        self._path.unlink()
        found = np.flatnonzero(match >= 0)
        rows = [
            f"{_named(self._places[later], self._places[match[later]])} ({similarity[later]:.2f})"
            for later in found[:LISTED_ROWS].tolist()
        ]
        of = len(self._places)
        text = (
            f"{len(found):,} of {of:,} rows are near duplicates of an earlier row: "
            f"estimated Jaccard similarity of {SHINGLE_WORDS}-word shingles from {self.threshold:g}"
        )
        return Finding("near_duplicates", len(found), of, rows, "warn" if len(found) > of / 100 else "info", text)

    def _matches(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows,) the earlier row that each is a near duplicate of, -1 for none; (rows,) their similarity."""
        match = np.full(len(self._places), -1, np.int64)
        similarity = np.zeros(len(match), np.float32)
        if not len(match):
            return match, similarity
        first = np.sort(np.unique(np.frombuffer(self._hashes, np.uint64), return_index=True)[1])
        row_of = self._places.as_numbers()
        signatures = np.memmap(self._path, "<u4", "r", shape=(len(match), PERMUTATIONS))
        for band in range(self.bands):
            columns = slice(band * self.rows_a_band, (band + 1) * self.rows_a_band)
            for earlier, later in neighbours(band_hashes(self._path, columns)[first]):
                earlier, later = first[earlier], first[later]
                # The records that one row makes share a prompt by nature.
                asked = (match[later] < 0) & (row_of[earlier] != row_of[later])
                earlier, later = earlier[asked], later[asked]
                estimate = agreement(signatures, earlier, later)
                near = estimate >= self.threshold
                match[later[near]], similarity[later[near]] = earlier[near], estimate[near]
        return match, similarity


def _named(later: Origin, earlier: Origin) -> str:
    """Two origins; the file once where it is the same: `pairs.jsonl:812 ~ 11`."""
    return f"{later} ~ {earlier.number if later.path == earlier.path else earlier}"


def band_hashes(path: Path, columns: slice) -> np.ndarray:
    """(rows,) uint64: equal where these columns of the signatures in a file are."""
    multipliers = np.random.default_rng(0).integers(0, 2**63, columns.stop - columns.start, np.uint64) | np.uint64(1)
    hashes = []
    with open(path, "rb") as file:
        while len(values := np.fromfile(file, "<u4", CHUNK_ROWS * PERMUTATIONS)):
            band = values.reshape(-1, PERMUTATIONS)[:, columns].astype(np.uint64)
            hashes.append((band * multipliers).sum(axis=1, dtype=np.uint64))
    return np.concatenate(hashes)


def neighbours(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of indices (earlier, later) with equal hashes: each index with up to COMPARED before it in its bucket."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    for distance in range(1, COMPARED + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            return
        yield order[same], order[same + distance]


def agreement(signatures: np.ndarray, earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
    """(pairs,) the share of equal values, an estimate of the Jaccard similarity."""
    estimate = np.empty(len(earlier), np.float32)
    for start in range(0, len(earlier), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        estimate[part] = (signatures[earlier[part]] == signatures[later[part]]).mean(axis=1)
    return estimate


def shingles(words: Sequence[str]) -> set[bytes]:
    """Every run of SHINGLE_WORDS words; a shorter text as a whole."""
    last = max(len(words) - SHINGLE_WORDS, 0)
    runs = (" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last + 1))
    return {run.encode("utf-8", "surrogatepass") for run in runs}


def text_of(record: Record) -> str:
    """The words that are compared: every turn and every answer."""
    if isinstance(record, TextDocument):
        return record.text
    prompt, answers = split_answers(record)
    return "\n".join([message.content for message in (*prompt, *answers)])
