import argparse
import gzip
import inspect
import lzma

import pytest

from moeport.data.compression import compression_baselines
from moeport.data.documents import Document


def test_bits_per_byte_of_documents_by_themselves():
    texts = ["naïve " * 50, "other", inspect.getsource(argparse)]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert compression_baselines([Document(str(number), text) for number, text in enumerate(texts)]) == {
        "gzip": pytest.approx(8 * sum(len(gzip.compress(text.encode(), 9)) for text in texts) / num_bytes),
        "xz": pytest.approx(8 * sum(len(lzma.compress(text.encode(), preset=9)) for text in texts) / num_bytes),
    }


def test_the_same_document_twice_takes_twice_the_bits():
    document = Document("a", "Two copies are not one text. " * 20)
    once, twice = compression_baselines([document]), compression_baselines([document] * 2)
    assert once == pytest.approx(twice)
