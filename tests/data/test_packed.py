import json

import numpy as np
import pytest

from moeport.data.documents import Document, documents_fingerprint
from moeport.data.packed import PackedTokens
from moeport.data.token_files import metadata_path, write_tokens
from moeport.data.tokenizer import ByteTokenizer, Tokenizer
from moeport.errors import DataError

DOCUMENTS = [Document("a", "héllo"), Document("b", "x"), Document("c", "world!")]
END = 256
STREAM = [END, *"héllo".encode(), END, *b"x", END, *b"world!", END]


@pytest.fixture
def path(tmp_path):
    write_tokens(tmp_path / "train.tokens", DOCUMENTS, ByteTokenizer())
    return tmp_path / "train.tokens"


def test_the_file_is_documents_between_ends_of_text(path):
    assert np.fromfile(path, "<u2").tolist() == STREAM
    packed = PackedTokens(path, 4)
    assert (packed.num_tokens, packed.num_documents, packed.num_bytes) == (len(STREAM), 3, 13)
    assert packed.metadata.source_fingerprint == documents_fingerprint(DOCUMENTS)
    assert packed.metadata.tokenizer_fingerprint == ByteTokenizer().fingerprint


def test_batches_of_many_documents_do_not_change_the_file(path, tmp_path, monkeypatch):
    monkeypatch.setattr("moeport.data.token_files.CHARACTERS_PER_BATCH", 1)
    write_tokens(tmp_path / "again.tokens", DOCUMENTS, ByteTokenizer())
    assert (tmp_path / "again.tokens").read_bytes() == path.read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path):
    definition = json.loads(ByteTokenizer()._definition)
    definition["model"]["vocab"] |= {"<|endoftext|>": END}
    definition["model"]["vocab"] |= {f"filler{number}": number for number in range(257, 65537)}
    tokenizer = Tokenizer(json.dumps(definition))
    assert tokenizer.vocab_size == 65537
    write_tokens(tmp_path / "a.tokens", DOCUMENTS, tokenizer)
    assert np.fromfile(tmp_path / "a.tokens", "<u4").tolist() == STREAM
    assert PackedTokens(tmp_path / "a.tokens", 4).num_sequences == 4


def test_sequences_overlap_by_one_token(path):
    packed = PackedTokens(path, 4)
    assert packed.num_sequences == (len(STREAM) - 1) // 4
    for index in range(packed.num_sequences):
        inputs, targets = packed.sequence(index)
        assert inputs.tolist() == STREAM[index * 4 : index * 4 + 4]
        assert targets.tolist() == STREAM[index * 4 + 1 : index * 4 + 5]
    inputs, targets = packed.batch(np.array([2, 0]))
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist() == [STREAM[8:12], STREAM[0:4]]
    assert targets.tolist() == [STREAM[9:13], STREAM[1:5]]


@pytest.mark.parametrize("sequence_length", [1, 2, 4, 5, len(STREAM) - 2, len(STREAM) - 1, len(STREAM), 100])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_windows_predict_every_token_but_the_first_once(path, sequence_length, batch_size):
    packed = PackedTokens(path, sequence_length)
    inputs, targets = [], []
    for tokens_BS, targets_BS in packed.windows(batch_size):
        assert tokens_BS.shape == targets_BS.shape
        assert tokens_BS.dtype == targets_BS.dtype == np.int64
        assert tokens_BS.shape[0] <= batch_size
        assert tokens_BS.shape[1] == sequence_length or tokens_BS.shape[0] == 1
        inputs += tokens_BS.ravel().tolist()
        targets += targets_BS.ravel().tolist()
    assert inputs == STREAM[:-1]
    assert targets == STREAM[1:]


def refused(path, message):
    with pytest.raises(DataError, match=message):
        PackedTokens(path, 4)


def test_damaged_files_are_noticed(path):
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    refused(path, "train.tokens: 31 bytes, expected 34: the tokens are truncated or foreign$")
    path.write_bytes(b"\x07" + content[1:])
    refused(path, "train.tokens: the checksum of the tokens is not the one in their metadata$")
    path.unlink()
    refused(path, "train.tokens: cannot read the tokens: No such file or directory$")


def test_damaged_metadata_is_noticed(path):
    metadata = metadata_path(path)
    fields = json.loads(metadata.read_text())
    for content in ("", "{}", "[1]", json.dumps(fields)[:-5], json.dumps({**fields, "more": 1})):
        metadata.write_text(content)
        refused(path, "train.json: not the metadata of a token file$")
    metadata.write_text(json.dumps({**fields, "format_version": 99}))
    refused(path, "train.json: format version 99, expected 1$")
    metadata.unlink()
    refused(path, "train.json: cannot read the metadata of the tokens: No such file or directory$")


def test_a_failed_write_leaves_the_old_file(path):
    class Failing(ByteTokenizer):
        def encode_batch(self, texts):
            raise KeyboardInterrupt

    before = sorted(path.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, DOCUMENTS, Failing())
    assert sorted(path.parent.iterdir()) == before
    assert PackedTokens(path, 4).num_tokens == len(STREAM)
