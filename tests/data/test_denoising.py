"""UL2's mixture of denoisers, against loops in plain Python."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, chisquare

from moeport.config.objective import OPENMOE, Denoiser, ObjectiveConfig
from moeport.data.denoising import Denoising, _parts

TOKENS, END = 300, 300
"""Ids of the text, and the one that ends it."""
LENGTH = 64
NUMBERS = range(len(OPENMOE))
MODES_OF_OPENMOE = ("S", "R", "R", "X", "X", "X")
"""Of its denoisers, in their order."""


def denoising(length=LENGTH, seed=0, **options):
    config = ObjectiveConfig(name="ul2", **options)
    return Denoising(config, length, TOKENS + 1 + config.special_tokens(length), END, seed)


def text(length=LENGTH, seed=0):
    """Tokens that never repeat within a sequence."""
    return np.random.default_rng(seed).permutation(TOKENS)[: length + 1]


def restored(mixture, tokens, predicted):
    """The text that a rearranged sequence was made from, read from left to right."""
    tokens, sentinels = tokens.tolist(), mixture.sentinels.tolist()
    begin = predicted.tolist().index(True)
    end = begin + int(predicted.sum())
    shown, answer = tokens[1 if mixture.modes else 0 : begin], tokens[begin:end]
    assert predicted.tolist() == [begin <= place < end for place in range(len(tokens))]
    assert set(tokens[end:]) <= {END}
    if not set(shown) & set(sentinels):
        return shown + answer
    assert answer.pop() == END
    spans = {}
    for token in answer:
        if token in sentinels:
            spans[token] = last = []
        else:
            last.append(token)
    assert list(spans) == sentinels[: len(spans)] == [token for token in shown if token in sentinels]
    assert all(spans.values())
    return [token for place in shown for token in spans.get(place, [place])]


@pytest.mark.parametrize("mode_tokens", [True, False])
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("length", [8, 21, LENGTH, 257])
def test_a_sequence_gives_its_text_back(length, number, mode_tokens):
    mixture = denoising(length, mode_tokens=mode_tokens)
    layout, starts = mixture.layouts[number], set()
    for seed in range(20):
        source = text(length, seed)
        tokens, predicted = mixture.rearranged(number, source, np.random.default_rng(seed))
        assert tokens.shape == predicted.shape == (length + 1,)
        assert not predicted[0]
        assert predicted.sum() == layout.targets
        found = restored(mixture, tokens, predicted)
        assert len(found) == layout.source
        start = source.tolist().index(found[0])
        assert found == source[start : start + layout.source].tolist()
        starts.add(start)
        if mode_tokens:
            assert tokens[0] == mixture.modes[MODES_OF_OPENMOE[number]]
    assert len(starts) == 1 if layout.source == length + 1 - mode_tokens == length + 1 else len(starts) > 1


@pytest.mark.parametrize("denoiser", OPENMOE, ids=lambda denoiser: denoiser.name)
@pytest.mark.parametrize("length", [8, 9, 100, 2048])
def test_a_layout_is_the_longest_text_with_room(denoiser, length):
    layout = denoiser.layout(length)
    assert layout.tokens <= length
    assert layout.noise == max(1, round(layout.source * denoiser.rate))
    if denoiser.kind == "prefix":
        assert (layout.source, layout.targets) == (length, round(length / 2))
        return
    assert layout.spans == min(max(1, round(layout.noise / denoiser.mean_span)), layout.source - layout.noise)
    for source in range(layout.source + 1, length + 1):
        noise = round(source * denoiser.rate)
        assert source + 2 * max(1, round(noise / denoiser.mean_span)) + 1 > length


@pytest.mark.parametrize("denoiser", OPENMOE[1:], ids=lambda denoiser: denoiser.name)
def test_layouts_of_very_long_sequences_are_found(denoiser):
    room = 10**12
    layout = denoiser.layout(room)
    assert layout.noise == round(layout.source * denoiser.rate)
    assert layout.spans == round(layout.noise / denoiser.mean_span)
    assert room - 3 < layout.tokens == layout.source + 2 * layout.spans + 1 <= room


def test_the_mixture_is_that_of_openmoe():
    found = [(d.name, d.weight, d.kind, d.rate, d.mode) for d in OPENMOE]
    assert found[0] == ("prefix", 0.5, "prefix", 0.5, "S")
    assert [(d.mean_span, d.rate, d.weight, d.mode) for d in OPENMOE[1:]] == [
        (3, 0.15, 0.1, "R"),
        (8, 0.15, 0.1, "R"),
        (3, 0.5, 0.1, "X"),
        (8, 0.5, 0.1, "X"),
        (64, 0.5, 0.1, "X"),
    ]
    assert [d.name for d in OPENMOE[1:]] == ["spans-3-15", "spans-8-15", "spans-3-50", "spans-8-50", "spans-64-50"]
    assert Denoiser(name="x", mean_span=12).mode == Denoiser(name="x", rate=0.3).mode == "X"


def test_denoisers_have_their_shares():
    mixture, steps, batch_size = denoising(), 200, 256
    drawn = np.concatenate([mixture.chosen(step, batch_size) for step in range(steps)])
    for number, share in zip(NUMBERS, [0.5, *[0.1] * 5], strict=True):
        low, high = binom.interval(1 - 1e-9, steps * batch_size, share)
        assert low <= (drawn == number).sum() <= high


def test_all_divisions_into_spans_are_equally_likely():
    random, possible = np.random.default_rng(0), [p for p in itertools.product(range(1, 6), repeat=3) if sum(p) == 6]
    drawn = [tuple(_parts(6, 3, random).tolist()) for _ in range(4000)]
    assert chisquare([drawn.count(each) for each in possible]).pvalue > 1e-6
    assert len(drawn) == sum(map(drawn.count, possible))
    assert _parts(5, 1, random).tolist() == [5]
    assert _parts(5, 5, random).tolist() == [1] * 5


def test_a_step_weighs_its_targets_alike_with_a_mean_of_one():
    mixture, windows = denoising(), np.stack([text(seed=seed) for seed in range(9)])
    inputs, targets, weights = mixture.of_step(3, 9, 0, windows[:, :-1], windows[:, 1:])
    assert inputs.shape == targets.shape == weights.shape == (9, LENGTH)
    chosen, counted = mixture.chosen(3, 9), 0
    for row in range(9):
        rearranged = np.append(inputs[row], targets[row, -1])
        np.testing.assert_array_equal(rearranged[1:], targets[row])
        predicted = np.append(False, weights[row] > 0)
        counted += predicted.sum()
        assert predicted.sum() == mixture.layouts[chosen[row]].targets
        found = restored(mixture, rearranged, predicted)
        start = windows[row].tolist().index(found[0])
        assert found == windows[row, start : start + len(found)].tolist()
    assert set(np.unique(weights).tolist()) == {0.0, float(np.float32(9 * LENGTH / counted))}
    assert weights.mean(dtype=np.float64) == pytest.approx(1, rel=1e-6)


def test_draws_depend_on_seed_step_and_position_alone():
    windows = np.stack([text(seed=seed) for seed in range(8)])
    inputs, targets = windows[:, :-1], windows[:, 1:]
    whole = denoising().of_step(5, 8, 0, inputs, targets)
    for first, end in ((0, 3), (3, 8)):
        part = denoising().of_step(5, 8, first, inputs[first:end], targets[first:end])
        for got, want in zip(part, whole, strict=True):
            np.testing.assert_array_equal(got, want[first:end])
    for other in (denoising().of_step(6, 8, 0, inputs, targets), denoising(seed=1).of_step(5, 8, 0, inputs, targets)):
        assert not np.array_equal(other[0], whole[0])


def test_steps_after_the_mixture_are_causal():
    windows = text()[None]
    mixture = denoising(steps=4)
    assert mixture.of_step(3, 1, 0, windows[:, :-1], windows[:, 1:]) is not None
    assert mixture.of_step(4, 1, 0, windows[:, :-1], windows[:, 1:]) is None


def test_ids_are_the_last_ones_and_none_of_the_text():
    mixture = denoising()
    ids = [*mixture.modes.values(), *mixture.sentinels.tolist()]
    assert sorted(ids) == list(range(END + 1, END + 1 + len(ids)))
    assert len(ids) == mixture.config.special_tokens(LENGTH)
    assert ObjectiveConfig().special_tokens(LENGTH) == 0


def test_held_out_sequences_take_the_denoisers_in_turn():
    windows = np.stack([text(seed=seed) for seed in range(8)])
    batches = [(0, (windows[:5, :-1], windows[:5, 1:])), (1, (windows[5:, :-1], windows[5:, 1:]))]
    short = [(1, (windows[:1, :9], windows[:1, 1:10]))]
    mixture = denoising()
    found = list(mixture.held_out(batches + short))
    assert [domain for domain, _, _ in found] == [0, 1]
    assert [number.tolist() for _, _, number in found] == [[0, 1, 2, 3, 4], [5, 0, 1]]
    for _, (inputs, targets, counts), number in found:
        for row in range(len(inputs)):
            assert counts[row].sum() == mixture.layouts[number[row]].targets
            restored(mixture, np.append(inputs[row], targets[row, -1]), np.append(False, counts[row] > 0))
    again = list(denoising().held_out([(0, (windows[:, :-1], windows[:, 1:]))]))
    np.testing.assert_array_equal(again[0][1][0], np.concatenate([inputs for _, (inputs, _, _), _ in found]))
