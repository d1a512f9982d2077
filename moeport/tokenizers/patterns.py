"""The patterns that cut text into pre-tokens, in the notation of tokenizers, tiktoken and regex alike.

Their matches follow each other without a gap, so they are the pre-tokens.
"""

_CONTRACTIONS = r"'(?:[sdmt]|ll|ve|re)"
_SPACES = r"\s+(?!\S)|\s+"

PATTERNS = {
    "gpt2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    "gpt4": "'(?:[sS\u017fdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|{_SPACES}",
    "digits": rf"{_CONTRACTIONS}| ?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    "moeport": r" ?[\p{L}_][\p{L}\p{N}_]{0,127}"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}_]{1,128}(?:\s{0,128}\n[ \t]{0,128})?"
    r"|\s{0,128}\n[ \t]{0,128}"
    r"|\s{1,128}",
}
"""By name:

- `gpt2`: contractions; letters, numbers and other characters, each with the space before them; and white space. The
  last space before a word goes with the word.
- `gpt4`: likewise, with numbers of up to 3 digits, any character but a line end before letters, and line ends of their
  own.
- `digits`: `gpt2` with every digit by itself, without the space before it, as in the paper of Scaffold-BPE.
- `moeport`: identifiers, up to 3 digits, and punctuation, each with the space before it, and punctuation also with the
  line end and indentation after it; lengths are bounded."""
