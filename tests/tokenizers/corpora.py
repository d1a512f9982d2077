"""Small corpora on which choices matter: few letters, many ties, long runs."""

import random

from moeport.tokenizers.training_choices import VALUES, Choices

ALPHABETS = (b"ab", b"abc", b"abcde", b"a\xe9 \x01")


def random_case(seed):
    """Words with counts, a size of the vocabulary that may be out of reach, and choices, the defaults every third."""
    draw = random.Random(seed)
    alphabet = draw.choice(ALPHABETS)
    words = {}
    for _ in range(draw.randint(1, 30)):
        word = bytes(draw.choice(alphabet) for _ in range(draw.randint(1, draw.choice([4, 8, 14]))))
        words[word] = words.get(word, 0) + draw.choice([1, 1, 2, 3, 5, 20])
    vocab_size = 256 + draw.randint(0, draw.choice([5, 15, 60]))
    if seed % 3 == 0:
        return words, vocab_size, Choices()
    drawn = {name: draw.choice(values) for name, values in VALUES.items() if name != "unreachable"}
    return words, vocab_size, Choices(**drawn, min_frequency=draw.choice([1, 1, 1, 2, 4]))
