"""Training as the papers write it: words as lists of tokens, and everything counted anew in each round.

Scaffold-BPE (2404.17808): algorithm 1 is `train`, algorithm 2 is `encode`. Slow on purpose; shares no code with the
package.
"""

from collections import Counter

# GPT-2's characters for bytes are in this order: printable ones first.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HUGGINGFACE_ORDER = [*_PRINTABLE, *(byte for byte in range(256) if byte not in _PRINTABLE)]


class State:
    """The variables of algorithm 1, for one corpus."""

    def __init__(self, words, choices):
        self.L = [([bytes([byte]) for byte in word], count) for word, count in words.items()]
        self.V = [bytes([byte]) for byte in range(256)]
        self.E = []  # merged pairs in order
        self.waiting = {}  # scaffold -> (its pair, its key when it was pushed)
        self.choices = choices

    def frequency(self, token):
        return sum(count * word.count(token) for word, count in self.L)

    def pairs(self):
        found = Counter()
        for word, count in self.L:
            place, last = 0, None
            while place + 1 < len(word):
                pair = (word[place], word[place + 1])
                # Of overlapping places of (a, a), disjoint ones alone may count.
                overlapping = pair[0] == pair[1] and last == place - 1
                if self.choices.overlaps == "adjacent" or not overlapping:
                    found[pair] += count
                    last = place if pair[0] == pair[1] else None
                place += 1
        return {pair: count for pair, count in found.items() if count >= self.choices.min_frequency}

    def rank(self, token):
        if len(token) == 1:
            return HUGGINGFACE_ORDER.index(token[0]) if self.choices.pair_ties == "huggingface" else token[0]
        return 256 + next(rank for rank, pair in enumerate(self.E) if pair[0] + pair[1] == token)

    def first_place(self, parts):
        place = 0
        for word, _ in self.L:
            for start in range(len(word)):
                if tuple(word[start : start + len(parts)]) == parts:
                    return place + sum(map(len, word[:start]))
            place += sum(map(len, word))
        return 10**9

    def precedes(self, pair, as_token):
        """A sorting key: the smaller, the earlier among equally frequent entries."""
        left, right = pair
        rule = self.choices.pair_ties
        if rule == "smallest":
            return (left, right)
        if rule == "largest":  # of two strings, the larger one is smaller when its bytes are turned, then the longer
            return tuple((*(255 - byte for byte in token), 256) for token in pair)
        if rule == "merged":
            return (left + right, left)
        if rule == "first":
            return (self.first_place((left + right,) if as_token else pair), left, right)
        ranks = (self.rank(left), self.rank(right))
        return tuple(-rank for rank in ranks) if rule == "newest" else ranks

    def queue(self):
        """All entries of Q, the head first: (frequency, kind, pair)."""
        pairs = self.pairs()
        entries = [(count, "pair", pair) for pair, count in pairs.items()]
        for token, (pair, pushed) in self.waiting.items():
            key = self.frequency(token) if self.choices.scaffold_key == "current" else pushed
            if key > 0 or (self.choices.used_up == "readmitted" and not pairs):
                entries.append((key, "scaffold", pair))
        first = {"scaffold": "scaffold", "pair": "pair", "rule": None}[self.choices.scaffold_ties]

        def order(entry):
            count, kind, pair = entry
            return (-count, first is not None and kind != first, self.precedes(pair, kind == "scaffold"))

        return sorted(entries, key=order)

    def merge(self, pair):
        for word, _ in self.L:
            place = 0
            while place + 1 < len(word):
                if (word[place], word[place + 1]) == pair:
                    word[place : place + 2] = [pair[0] + pair[1]]
                place += 1

    def head_frequency(self):
        entries = [entry for entry in self.queue() if self.choices.head == "queue" or entry[1] == "pair"]
        return max((entry[0] for entry in entries), default=0)


def train(words, vocab_size, algorithm, choices):
    """(merges, scaffolds, normal tokens in the order in which they became normal last)."""
    state = State(words, choices)
    while len(state.V) < vocab_size:
        queue = state.queue()
        if not queue:
            break
        _, kind, pair = queue[0]
        token = pair[0] + pair[1]
        if kind == "scaffold":
            del state.waiting[token]
            state.V.append(token)
            continue
        assert token not in state.V, "no token has two spellings"
        assert token not in state.waiting, "no token has two spellings"
        state.E.append(pair)
        state.V.append(token)
        state.merge(pair)
        if algorithm == "bpe":
            continue
        for component in {*pair}:
            if len(component) == 1:  # bytes are pinned
                continue
            frequency = state.frequency(component)
            if component in state.V and frequency < state.head_frequency():
                state.V.remove(component)
                its_pair = next(pair for pair in state.E if pair[0] + pair[1] == component)
                state.waiting[component] = (its_pair, frequency)
    return state.E, {*state.waiting}, state.V


def encode(word, merges, scaffolds):
    """Algorithm 2: scaffolding by the lowest rank, then demolition along the merges."""
    made_of = {left + right: (left, right) for left, right in merges}
    parts = [bytes([byte]) for byte in word]
    for left, right in merges:
        place = 0
        while place + 1 < len(parts):
            if (parts[place], parts[place + 1]) == (left, right):
                parts[place : place + 2] = [left + right]
            place += 1
    while any(part in scaffolds for part in parts):
        parts = [piece for part in parts for piece in (made_of[part] if part in scaffolds else (part,))]
    return parts
