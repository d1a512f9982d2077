"""The compiled code of the encoder: cuts text by a program, looks words up, and encodes those not seen before.

Every function here is compiled by numba and runs without Python's lock. Integers have 64 bits and a sign unless said
otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

WITHIN = 255
"""Class of the bytes of a character after its first."""

MERGES, LONGEST = 0, 1
"""How a word is encoded: by merging pairs, or the longest token first."""


class Cut(NamedTuple):
    """A `Program` without its symbol; see there."""

    classes: np.ndarray
    first: np.ndarray
    before: np.ndarray
    begins: np.ndarray
    sets: np.ndarray
    least: np.ndarray
    most: np.ndarray
    keeps: np.ndarray


class Coding(NamedTuple):
    """How words are encoded.

    Args:
        keys: int64, a hash table of pairs of tokens (left << 32 | right), or of a node of the tree of tokens and a byte
            (node << 8 | byte); -1 where it is empty. Its length is a power of two.
        values: int64, for each pair its priority << 32 | the token it makes; for each node and byte the next node.
        tokens: int64, for each node the number of the token that ends there; -1: none.
        begins: int64, where the ids of each token begin in `ids`, and the end.
        ids: uint32, the ids that stand for tokens: one, or those of a demolished scaffold.
    """

    keys: np.ndarray
    values: np.ndarray
    tokens: np.ndarray
    begins: np.ndarray
    ids: np.ndarray


class Memory(NamedTuple):
    """Words seen before.

    Args:
        rows: int64 (slots, 4), a hash table; the number of slots is a power of two. A row has the key of a word, where
            it begins in `bytes`, its length, and its ids: how many in the lowest 16 bits, above them the id if it is
            one, else where they begin in `ids`. No ids: the slot is empty. The key of up to 7 bytes is the bytes with
            their number, which nothing else can have; that of more is a hash.
        bytes: uint8, longer words one after the other.
        ids: uint32, the ids of words that have several.
        used: number of words, bytes and ids.
    """

    rows: np.ndarray
    bytes: np.ndarray
    ids: np.ndarray
    used: np.ndarray


def compiled(function: Any) -> Any:
    """Compiled on the first call, and kept on disk for later processes where a folder for it can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(nogil=True)(function)


@compiled
def slot_of(key, keys):
    """Where a key is in a hash table, or the empty slot where it would be."""
    mask = len(keys) - 1
    place = ((key * 0x9E3779B97F4A7C1) >> 20) & mask
    while keys[place] != key and keys[place] != -1:
        place = (place + 1) & mask
    return place


@compiled
def fill_pairs(pairs, values, keys, table):
    """Puts pairs into a hash table; of equal ones the first."""
    for number in range(len(pairs)):
        place = slot_of(pairs[number], keys)
        if keys[place] == -1:
            keys[place] = pairs[number]
            table[place] = values[number]


@compiled
def fill_tree(data, ends, keys, table, tokens):
    """Puts tokens, one after the other in data, into a tree of bytes; node 0 is the root."""
    nodes, start = 1, 0
    for number in range(len(ends)):
        node = 0
        for at in range(start, ends[number]):
            place = slot_of(node << 8 | data[at], keys)
            if keys[place] == -1:
                keys[place] = node << 8 | data[at]
                table[place] = nodes
                nodes += 1
            node = table[place]
        tokens[node] = number
        start = ends[number]


@compiled
def classify(data, classes, symbol, found):
    """The class of each byte that begins a character; the others are WITHIN. Bytes that are not UTF-8 are symbols."""
    size, at = len(data), 0
    while at < size:
        byte = np.int64(data[at])
        if byte < 0x80:
            found[at] = classes[byte]
            at += 1
            continue
        follow = 1 if 0xC2 <= byte < 0xE0 else 2 if 0xE0 <= byte < 0xF0 else 3 if 0xF0 <= byte < 0xF5 else 0
        code = byte & (0x3F >> follow)
        valid = follow > 0 and at + follow < size
        if valid:
            for after in range(at + 1, at + follow + 1):
                valid = valid and (data[after] & 0xC0) == 0x80
                code = code << 6 | (data[after] & 0x3F)
            if follow == 2:
                valid = valid and code >= 0x800 and not 0xD800 <= code < 0xE000
            if follow == 3:
                valid = valid and 0x10000 <= code < 0x110000
        found[at] = classes[code] if valid else symbol
        at += 1
        if valid:
            for _ in range(follow):
                found[at] = WITHIN
                at += 1


@compiled
def cut_words(kinds, cut, found):
    """Writes where each pre-token ends: a match, or what lies before the next one. Returns their number.

    It calls nothing, and takes the arrays out of `cut` once: to hand them on costs more than the work itself.
    """
    first, before, begins, sets = cut.first, cut.before, cut.begins, cut.sets
    least, most, keeps = cut.least, cut.most, cut.keeps
    lowest, highest = np.empty(len(sets), np.int64), np.empty(len(sets), np.int64)
    size, words, start, here, one = len(kinds), 0, 0, 0, np.uint64(1)
    while here < size:
        end = -1
        for way in range(len(first)):
            if not (first[way] >> np.uint64(kinds[here])) & one:
                continue
            begin, stop, run, at = begins[way], begins[way + 1], begins[way], here
            while run >= begin:
                if run < stop:
                    members, count, low = sets[run], 0, at
                    while at < size and count < most[run] and (members >> np.uint64(kinds[at])) & one:
                        at += 1
                        while at < size and kinds[at] == WITHIN:
                            at += 1
                        count += 1
                        low = at if count <= least[run] else low
                    lowest[run], highest[run] = at if keeps[run] else low, at
                    if count >= least[run]:
                        run += 1
                        continue
                elif before[way] == 0 or at == size or (before[way] >> np.uint64(kinds[at])) & one:
                    end = at
                    break
                run -= 1
                while run >= begin and highest[run] == lowest[run]:
                    run -= 1
                if run >= begin:  # this run gives back its last character
                    at = highest[run] - 1
                    while kinds[at] == WITHIN:
                        at -= 1
                    highest[run] = at
                    run += 1
            if end >= 0:
                break
        if end > here:
            if here > start:
                found[words] = here
                words += 1
            found[words] = start = here = end
            words += 1
        else:
            here += 1
            while here < size and kinds[here] == WITHIN:
                here += 1
    if start < size:
        found[words] = size
        words += 1
    return words


@compiled
def push(heap, size, key):
    """Adds a key to a heap of `size` keys, the smallest first."""
    at = size
    while at > 0 and heap[(at - 1) >> 1] > key:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = key


@compiled
def pop(heap, size):
    """Takes the smallest key from a heap of `size` keys."""
    smallest, key = heap[0], heap[size - 1]
    at, child = 0, 1
    while child < size - 1:
        if child + 1 < size - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[at] = heap[child]
        at, child = child, 2 * child + 1
    heap[at] = key
    return smallest


@compiled
def merge(word, coding, heap, token, after, before):
    """Merges the pair of the lowest priority, then the leftmost, until none is left; `token` is -1 within a part."""
    size, waiting = len(word), 0
    for place in range(size):
        token[place], after[place], before[place] = word[place], place + 1, place - 1
    for place in range(size - 1):
        slot = slot_of(token[place] << 32 | token[place + 1], coding.keys)
        if coding.keys[slot] != -1:
            push(heap, waiting, (coding.values[slot] >> 32) << 32 | place)
            waiting += 1
    while waiting:
        key = pop(heap, waiting)
        waiting -= 1
        left = key & 0xFFFFFFFF
        right = after[left]
        if token[left] < 0 or right == size:
            continue
        slot = slot_of(token[left] << 32 | token[right], coding.keys)
        if coding.keys[slot] == -1 or coding.values[slot] >> 32 != key >> 32:
            continue  # it was merged otherwise meanwhile
        token[left], token[right] = coding.values[slot] & 0xFFFFFFFF, -1
        after[left] = after[right]
        if after[left] < size:
            before[after[left]] = left
            slot = slot_of(token[left] << 32 | token[after[left]], coding.keys)
            if coding.keys[slot] != -1:
                push(heap, waiting, (coding.values[slot] >> 32) << 32 | left)
                waiting += 1
        if before[left] >= 0:
            slot = slot_of(token[before[left]] << 32 | token[left], coding.keys)
            if coding.keys[slot] != -1:
                push(heap, waiting, (coding.values[slot] >> 32) << 32 | before[left])
                waiting += 1


@compiled
def longest(word, coding, heap, token, length, owner):
    """Fixes the longest token first, then the leftmost; `token` is -1 within one.

    See `longest_first`: a token that covers the end of a later one is at least as long, so it covers its last byte.
    """
    size, waiting = len(word), 0
    for place in range(size):
        token[place], owner[place] = -1, -1
        longest_at(word, place, size, coding, token, length)
        push(heap, waiting, (0x7FFFFFFF - length[place]) << 32 | place)
        waiting += 1
    while waiting:
        place = pop(heap, waiting) & 0xFFFFFFFF
        waiting -= 1
        last = place + length[place] - 1
        if owner[place] >= 0:
            continue
        if owner[last] >= 0:
            longest_at(word, place, owner[last], coding, token, length)
            push(heap, waiting, (0x7FFFFFFF - length[place]) << 32 | place)
            waiting += 1
        else:
            owner[place : last + 1] = place
    for place in range(size):
        if owner[place] != place:
            token[place] = -1


@compiled
def longest_at(word, place, end, coding, token, length):
    """Finds the longest token that starts here and ends by `end`; every byte is one."""
    node = 0
    for at in range(place, end):
        slot = slot_of(node << 8 | word[at], coding.keys)
        if coding.keys[slot] == -1:
            break
        node = coding.values[slot]
        if coding.tokens[node] >= 0:
            token[place], length[place] = coding.tokens[node], at + 1 - place


@compiled
def encode_word(word, kind, coding, scratch, out, at):
    """Writes the ids of a word from `at` on; returns the place after the last."""
    if kind == LONGEST:
        longest(word, coding, scratch[0], scratch[1], scratch[2], scratch[3])
    else:
        merge(word, coding, scratch[0], scratch[1], scratch[2], scratch[3])
    token = scratch[1]
    for place in range(len(word)):
        if token[place] >= 0:
            for number in range(coding.begins[token[place]], coding.begins[token[place] + 1]):
                out[at] = coding.ids[number]
                at += 1
    return at


@compiled
def remember(word, ids, memory, key, slot):
    """Keeps a word with its ids; where there is no room, everything else is forgotten."""
    words, start, first = memory.used[0], memory.used[1], memory.used[2]
    room = 2 * words < len(memory.rows) and start + len(word) <= len(memory.bytes)
    if not room or first + len(ids) > len(memory.ids):
        memory.rows[:, 3] = 0
        words, start, first = 0, 0, 0
        slot = slot_of_word(key, len(memory.rows))
    row = memory.rows[slot]
    row[0], row[1], row[2], row[3] = key, start, len(word), first << 16 | len(ids)
    if len(word) > 7:
        memory.bytes[start : start + len(word)] = word
        start += len(word)
    if len(ids) == 1:
        row[3] = np.int64(ids[0]) << 16 | 1
    else:
        memory.ids[first : first + len(ids)] = ids
        first += len(ids)
    memory.used[0], memory.used[1], memory.used[2] = words + 1, start, first


@compiled
def slot_of_word(key, slots):
    """Where a word would be in an empty table of this many slots."""
    mixed = key * 0x1E3779B97F4A7C15
    return ((mixed >> 32) ^ mixed >> 17) & (slots - 1)


@compiled
def look_up(text, ends, kind, coding, memory, kept, out, done):
    """Writes the ids of words from memory, or encodes them; returns the place after the last.

    As in `cut_words`, hardly anything is called for a word that is known.
    """
    rows, known, ids = memory.rows, memory.bytes, memory.ids
    scratch = np.empty((4, 3 * kept), np.int64)
    slots, start = len(rows), 0
    for end in ends:
        size = end - start
        if size > kept:
            large = np.empty((4, 3 * size), np.int64)
            done = encode_word(text[start:end], kind, coding, large, out, done)
            start = end
            continue
        key = size
        if size <= 7:
            for place in range(start, end):
                key = key << 8 | text[place]
        else:
            for place in range(start, end):
                key = (key ^ text[place]) * 0x100000001B3
            key |= np.int64(1) << 62
        slot = slot_of_word(key, slots)
        while rows[slot, 3]:
            if rows[slot, 0] == key:
                if size <= 7:
                    break
                first, same = rows[slot, 1], 0
                if rows[slot, 2] == size:
                    while same < size and known[first + same] == text[start + same]:
                        same += 1
                if same == size:
                    break
            slot = (slot + 1) & (slots - 1)
        row = rows[slot, 3]
        if row & 0xFFFF == 1:
            out[done] = row >> 16
            done += 1
        elif row:
            for place in range(row >> 16, (row >> 16) + (row & 0xFFFF)):
                out[done] = ids[place]
                done += 1
        else:
            before = done
            done = encode_word(text[start:end], kind, coding, scratch, out, done)
            remember(text[start:end], out[before:done], memory, key, slot)
        start = end
    return done


@compiled
def encode(data, ends, limit, kind, symbol, cut, coding, memory, kept, out, counts):
    """Encodes texts that lie one after the other.

    Args:
        data: uint8, the texts.
        ends: where each ends.
        limit: words that end later are left; for a single text.
        kind: MERGES or LONGEST.
        symbol: class of bytes that are not UTF-8.
        cut: how texts are cut.
        coding: how words are encoded.
        memory: words seen before.
        kept: longest word that is remembered.
        out: uint32, as long as data, receives the ids.
        counts: receives the number of ids of each text.

    Returns:
        the end of the last word encoded.
    """
    longest_text, begin, done, end = 0, 0, 0, 0
    for number in range(len(ends)):
        longest_text, begin = max(longest_text, ends[number] - begin), ends[number]
    kinds, words, begin = np.empty(longest_text, np.uint8), np.empty(longest_text, np.int64), 0
    for number in range(len(ends)):
        text, size = data[begin : ends[number]], ends[number] - begin
        classify(text, cut.classes, symbol, kinds)
        count = cut_words(kinds[:size], cut, words)
        while count and begin + words[count - 1] > limit:
            count -= 1
        before = done
        done = look_up(text, words[:count], kind, coding, memory, kept, out, done)
        counts[number] = done - before
        end = begin + words[count - 1] if count else begin
        begin = ends[number]
    return end
