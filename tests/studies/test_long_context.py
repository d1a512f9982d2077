"""Needles in a haystack, and the loss by position, against direct computations."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from moeport.backends import get_backend
from moeport.config import config_from_dict, load_config
from moeport.config.model import CapacityConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig
from moeport.core.parameters import initial_parameters
from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.studies.compare.fairness import differences
from moeport.studies.long_context.measure import Wanted, measure, wilson
from moeport.studies.long_context.needles import DIGITS, FORMS, VARIABLES, Options, Question, questions
from moeport.studies.long_context.positions import by_position
from moeport.studies.long_context.scores import scores
from moeport.studies.long_context.text import Haystack, Text, files_text, held_out_text
from moeport.training.trained import TrainedText
from tests.training.tiny import tiny_values

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
claims, script = (importlib.import_module(name) for name in ("claims", "long_context"))

TOKENIZER = ByteTokenizer()
WORDS = ("apple", "brook", "cloud", "delta", "ember", "frost", "grove", "house")
TEXT = Text(["".join(f"line {i} has {WORDS[i % 8]} in it\n" for i in range(120)), "the second document\n" * 40], "here")
SIDES = {"paths": "train", "validation_paths": "held"}
NUMBER = rf"\d{{{DIGITS}}}"


def model_of(moe=None, backend="numpy", scale=1.0):
    config = ModelConfig(
        num_layers=1, d_model=16, init_std=0.3, moe=MoEConfig(num_experts=4, expert_hidden=8, **moe or {})
    )
    lm = DecoderLM(config, TOKENIZER.vocab_size)
    chosen = get_backend(BackendConfig(name=backend, dtype="float64", device="cpu"))
    params = initial_parameters(lm.parameter_specs(), 0)
    return chosen.evaluation_model(lm, {name: scale * value for name, value in params.items()})


def asked(form, length=900, **given):
    values: dict[str, Any] = {"depths": (0.0, 0.5, 1.0), "samples": 2, "needles": 3} | given
    options = Options((length,), **values)
    return list(questions(Haystack.of(TEXT, TOKENIZER), form, length, options))


def parts(question):
    """The text before the question, the question, and the candidates, as text."""
    text = TOKENIZER.decode(question.prompt_T[1:])
    before, _, last = text.rpartition("\n")
    return before, last, [TOKENIZER.decode(each) for each in question.candidates]


class TestText:
    def test_files_are_read_as_by_the_source_and_cut_at_the_limit(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_text("one two")
        (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n{"text": "four five"}\n')
        assert files_text([str(tmp_path)]).documents == ["one two", "three", "four five"]
        monkeypatch.setattr("moeport.studies.long_context.text.MOST_CHARACTERS", 10)
        assert files_text([str(tmp_path)]).documents == ["one two", "thr"]

    def test_the_held_out_text_of_a_mixture_is_that_of_its_sources_in_order(self, tmp_path):
        sources = []
        for name in ("b", "a"):
            for side in ("train", "held"):
                (tmp_path / f"{name}-{side}.txt").write_text(f"{side} of {name}")
            paths = {side: [str(tmp_path / f"{name}-{file}.txt")] for side, file in SIDES.items()}
            sources.append({"name": name, "source": {"name": "files", **paths}})
        values = tiny_values(tmp_path)
        del values["data"]["source"]
        values["data"]["sources"] = sources
        found = held_out_text(config_from_dict(values).data, print)
        assert found.documents == ["held of b", "held of a"]

    def test_keys_are_words_without_capitals_in_any_script(self):
        text = Text(["Apple apple, übrig; NASA_name 一二三四,二三 слово Слова מילים"], "")
        assert text.words == sorted(["apple", "übrig", "一二三四", "слово", "מילים"])

    def test_a_place_moves_to_the_end_of_a_line_that_is_near(self):
        haystack = Haystack.of(Text(["ab\ncdef\n", "g"], ""), TOKENIZER)
        assert bytes(haystack.id_T.tolist()) == b"ab\ncdef\n\n\ng"
        assert haystack.break_T.tolist() == [3, 8, 9, 10]
        assert [haystack.near(place, 1) for place in (0, 2, 3, 4, 5, 11)] == [0, 3, 3, 3, 5, 10]


class TestPrompts:
    @pytest.mark.parametrize("form", FORMS)
    def test_they_have_the_length_that_was_asked_for_and_real_text_around_the_needles(self, form):
        found = asked(form)
        assert len(found) == 6
        assert [each.depth for each in found] == [*([0.0] * 2 + [0.5] * 2 + [1.0] * 2)] * FORMS[form].has_depth or (
            [None] * 6
        )
        for each in found:
            assert len(each.prompt_T) + max(map(len, each.candidates)) == 900
            assert each.prompt_T[0] == TOKENIZER.end_of_text
            before, _, _ = parts(each)
            bare = re.sub(rf"(The number of \w+ is {NUMBER}\.|VAR \w+ = (VAR \w+|{NUMBER}))\n", "", before)
            assert bare in "\n\n".join(TEXT.documents)
            assert all(answer in each.candidates for answer in [each.answer])

    def test_single(self):
        for each in asked("single"):
            before, last, candidates = parts(each)
            ((key, value),) = re.findall(rf"The number of (\w+) is ({NUMBER})\.", before)
            assert last == f"What is the number of {key}? The number of {key} is"
            assert key in WORDS or key in ("line", "second", "document")
            assert candidates[0] == f" {value}"
            assert len({*candidates}) == 3
            assert not any(other in before for other in candidates[1:])

    def test_multi_key(self):
        for each in asked("multi_key"):
            before, last, candidates = parts(each)
            found = dict(re.findall(rf"The number of (\w+) is ({NUMBER})\.", before))
            key = re.fullmatch(r"What is the number of (\w+)\? The number of \1 is", last).group(1)
            assert candidates[0] == f" {found[key]}"
            assert {*candidates} == {f" {value}" for value in found.values()}
            assert len(found) == 3

    def test_multi_value(self):
        for each in asked("multi_value"):
            before, last, candidates = parts(each)
            found = re.findall(rf"The number of (\w+) is ({NUMBER})\.", before)
            ((key, count),) = {(key, len(found)) for key, _ in found}
            assert count == 3
            assert last == f"What are all the numbers of {key}? The numbers of {key} are"
            assert candidates[0] == f" {', '.join(value for _, value in found)}"
            assert not any(value in before for other in candidates[1:] for value in other.strip().split(", "))

    def test_variable_tracking(self):
        for each in asked("variable_tracking"):
            before, last, candidates = parts(each)
            value_of, chains = {}, {}
            for name, value in re.findall(rf"VAR (\w+) = (VAR \w+|{NUMBER})", before):
                value_of[name] = value_of[value[4:]] if value.startswith("VAR ") else value
                chains.setdefault(value_of[name], []).append(name)
            wanted = re.fullmatch(rf"Which variables are ({NUMBER})\? They are VAR", last).group(1)
            assert candidates[0] == f" {', '.join(chains[wanted])}"
            assert {*candidates} == {f" {', '.join(names)}" for names in chains.values()}
            assert [len(names) for names in chains.values()] == [VARIABLES] * 3

    def test_the_needle_is_at_its_depth_at_the_end_of_a_line(self):
        for each in asked("multi_key", depths=(0.0, 0.3, 1.0)):
            before, _, candidates = parts(each)
            start = before.rindex("The", 0, before.index(f"is{candidates[0]}."))
            assert start / len(before) == pytest.approx(each.depth, abs=0.12)  # its length, and a line to either side
            if each.depth == 0.3:
                assert before[start - 1] == "\n"

    def test_a_question_is_the_same_whatever_else_is_asked(self):
        some = asked("multi_key", depths=(0.5,), samples=1)[0]
        again = next(each for each in asked("multi_key", samples=5) if each.depth == 0.5)
        other = asked("multi_key", depths=(0.5,), samples=1, seed=1)[0]
        assert some.prompt_T.tolist() == again.prompt_T.tolist() != other.prompt_T.tolist()

    @pytest.mark.parametrize(
        ("form", "given", "message"),
        [
            (
                "single",
                {"length": 60},
                r"--lengths 60: form single with --needles 3 takes \d+ tokens .* such as \d+",
            ),
            ("single", {"length": 9000}, r"--lengths 9000: the text has 3,6\d\d tokens; expected at least 8,\d+ to"),
            ("multi_key", {"needles": 50}, r"the text has 11 different words of 4 to 8 letters without capitals"),
            ("multi_value", {"needles": 95}, r"--needles 95: a question takes more than the 9,000 different numbers"),
        ],
    )
    def test_what_cannot_be_asked(self, form, given, message):
        with pytest.raises(UserError, match=message):
            asked(form, **given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"forms": ("single", "twice")},
                "^--forms twice: is not a form; expected single, multi_key, ",
            ),
            ({"depths": (0.5, 1.5)}, "^--depths 1.5: expected numbers from 0"),
        ],
    )
    def test_options_that_are_wrong(self, given, message):
        with pytest.raises(UserError, match=message):
            Options((10,), **given).check()


def direct(model, question):
    """The score of a question, from the scores of whole texts, token by token."""

    def along(path):
        ids = [*question.prompt_T.tolist(), *path]
        score_CV = model.logits(np.array([ids]))[0, len(question.prompt_T) - 1 : -1]
        share_CV = np.exp(score_CV) / np.exp(score_CV).sum(1, keepdims=True)
        return [-np.log(share_CV[i, token]) for i, token in enumerate(path)], score_CV.argmax(1).tolist()

    each = [along(path.tolist()) for path in question.candidates]
    answer, greedy = question.answer.tolist(), []
    for _ in answer:
        greedy.append(int(model.logits(np.array([[*question.prompt_T.tolist(), *greedy]]))[0, -1].argmax()))
    nats, best = each[0]
    said = bytes(token for token in greedy if token < 256).decode(errors="replace")
    return {
        "exact": greedy == answer,
        "recall": np.mean([value in said for value in question.wanted]),
        "choice": all(sum(nats) < sum(other) for other, _ in each[1:]),
        "tokens": np.mean([token == own for token, own in zip(best, answer, strict=True)]),
        "nats": np.mean(nats),
    }


def short(prompt, answers, wanted):
    """A question by hand, whose candidates may have different lengths."""
    ids = [np.frombuffer(each.encode(), np.uint8).astype(np.int64) for each in (prompt, *answers)]
    prompt_T = np.concatenate([[TOKENIZER.end_of_text], ids[0]])
    return Question("single", len(prompt_T) + max(map(len, ids[1:])), None, prompt_T, ids[1:], wanted)


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"router": {"name": "expert_choice"}},
        {"capacity": CapacityConfig(policy="factor", factor=0.5)},
    ],
    ids=["cached", "looks ahead", "capacity"],
)
def test_scores_are_those_of_whole_texts(moe):
    model = model_of(moe)
    several = [
        short("a: 12\nb: 34\na:", [" 12", " 34", " 5"], ["12"]),
        short("a: 98\nc: 76\nc:", [" 76", " 98", " 1"], ["76"]),
    ]
    for found, each in zip(scores(model, TOKENIZER, several), several, strict=True):
        assert vars(found) == pytest.approx(direct(model, each), rel=1e-9)


def test_an_answer_that_the_model_gives_is_exact_recalled_chosen_and_right():
    model = model_of()
    asked_for = short("a: 12\nb: 34\na:", ["xyz", " 34"], [])
    greedy = [int(model.logits(asked_for.prompt_T[None])[0, -1].argmax())]
    for _ in range(2):
        greedy.append(int(model.logits(np.array([[*asked_for.prompt_T, *greedy]]))[0, -1].argmax()))
    said = TOKENIZER.continuation([10, *greedy], 1)
    candidates = [np.array(greedy), *asked_for.candidates[1:]]
    given = Question("single", asked_for.length, None, asked_for.prompt_T, candidates, [said, "not there"])
    (found,) = scores(model, TOKENIZER, [given])
    assert (found.exact, found.recall, found.choice, found.tokens) == (True, 0.5, True, 1.0)


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_other_backends_score_long_prompts_as_numpy_does(backend):
    pytest.importorskip(backend)
    several = asked("multi_key", 200, samples=1, depths=(0.2, 0.8), needles=2)
    own, reference = (scores(model_of(backend=name), TOKENIZER, several) for name in (backend, "numpy"))
    for found, expected in zip(own, reference, strict=True):
        assert vars(found) == pytest.approx(vars(expected), rel=1e-6)


def test_answers_whose_loss_is_not_finite_are_refused(tmp_path):
    config = config_from_dict(tiny_values(tmp_path))
    trained = TrainedText(model_of(scale=np.nan), TOKENIZER, config, "step-000001")
    wanted = Wanted(Options((300,), depths=(0.5,), forms=("single",), samples=1))
    with pytest.raises(UserError, match="the loss on an answer is not finite"):
        measure(trained, "broken", TEXT, wanted, lambda *_: None)


class TestByPosition:
    def test_it_is_the_mean_of_each_position_in_a_loop(self):
        model, length = model_of(), 70
        found = by_position(model, TOKENIZER, TEXT, length, 5, 150)
        ids = [[TOKENIZER.end_of_text, *document.encode()] for document in TEXT.documents]
        nats = []
        for document, start in ((0, 0), (1, 0), (0, 70), (1, 70), (0, 140)):
            cut = ids[document][start : start + length + 1]
            score_SV = model.logits(np.array([cut[:-1]]))[0]
            nats.append([np.log(np.exp(score_SV[i]).sum()) - score_SV[i, token] for i, token in enumerate(cut[1:])])
        assert (found.block, found.documents, found.blocks[0], found.blocks[-1]) == (3, 2, (1, 3), (70, 70))
        for block, (first, last) in enumerate(found.blocks):
            means = [np.mean(each[first - 1 : last]) for each in nats]
            assert found.nats_NP[:, block] == pytest.approx(means, rel=1e-9)
            assert found.losses[block].mean == pytest.approx(np.mean(means), rel=1e-9)
        assert found.over(61, 70).mean == pytest.approx(np.mean([each[60:] for each in nats]), rel=1e-9)

    def test_a_document_that_is_too_short_is_left_out_and_none_is_an_error(self):
        text = Text(["a" * 120, "b" * 49], "here")
        assert by_position(model_of(), TOKENIZER, text, 50, 9, 1).documents == 1
        with pytest.raises(UserError, match="--lengths 121: the longest document has 120 tokens"):
            by_position(model_of(), TOKENIZER, text, 121, 9, 1)


def test_intervals_of_shares_are_wilsons():
    for right, count in ((3, 10), (0, 7), (20, 20)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


class TestScript:
    """`benchmarks/long_context.py`: what it trains on, and what its verdicts follow from."""

    def test_text_of_other_options_is_not_used_again(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        for number in range(3):
            (source / f"{number}.txt").write_text(f"document {number}\n" + TEXT.documents[0])

        def files(mix):
            own = {"text": str(source), "mix": mix}
            return script.text_files(script.Given(tmp_path / "runs", own=own), "short", 512)

        made = files("0.5")
        texts = [Path(path).read_text() for path in made.values()]
        assert files("0.50") == made
        with pytest.raises(SystemExit, match=r"made with .*'mix': 0.5.*expected the same, or another --output-dir"):
            files("0")
        assert texts == [Path(path).read_text() for path in made.values()]

    def test_documents_that_look_back_make_up_their_share_and_hold_the_answer(self):
        found = list(script.looking_back(TEXT.documents, 512, 0.5))
        size = sum(map(len, TEXT.documents))
        assert size <= sum(map(len, found)) <= size + 512 * script.BYTES_PER_TOKEN
        assert found == list(script.looking_back(TEXT.documents, 512, 0.5))
        half = {document: document[: len(document) // 2] for document in found}
        copies = [document for document in found if document == 2 * half[document]]
        assert 0.2 < len(copies) / len(found) < 0.6
        assert all(half[document] in "\n\n".join(TEXT.documents) for document in copies)
        for document in found:
            if document in copies:
                continue
            before, question, after = re.fullmatch(r"(.*)\n(What [^\n]*)(.*)", document, re.DOTALL).groups()
            needles = re.findall(rf"The number of (\w+) is ({NUMBER})\.", before)
            key, kind, answer = re.fullmatch(
                r"What.* of (\w+)\? The numbers? of \1 (is|are) ([\d, ]+)", question.rstrip(".")
            ).groups()
            assert [value for other, value in needles if other == key] == answer.split(", ")
            others = re.findall(rf"\nThe number of (\w+) is ({NUMBER})", after)
            assert others == [pair for pair in needles if pair[0] != key]
            assert (len(others), kind) in ((0, "is"), (3, "is"), (0, "are"))
        assert list(script.looking_back(TEXT.documents, 512, 0)) == []

    def test_verdicts_are_those_of_paired_differences_beyond_the_first_length(self, capsys):
        def measured(loss, exact):
            """`as_json` of a model that is worse beyond 128 tokens by `loss`, and answers a share `exact` there."""
            cells = [
                {"length": n, "depth": depth, "exact": exact if n > 128 else 1.0, "choice": 0.5, "nats": 1.0}
                for n in (128, 256, 512, 1024)
                for depth in (None, 0.0)
            ]
            blocks = [{"last": last, "loss": 2 + (loss if last > 128 else 0)} for last in range(32, 1025, 32)]
            return {"needles": cells, "positions": {"blocks": blocks}}

        noise = {0: 0.01, 1: -0.01, 2: 0.0}
        found = {
            name: {seed: measured(loss + noise[seed] * wobble, exact) for seed in noise}
            for name, loss, exact, wobble in (("none", 1.0, 0.25, 1), ("abf", 0.3, 0.5, 2), ("other", 0.2, 0.75, 1))
        }
        report = script.Report(script.Given(None))
        script.report_on(found, 128, report)
        told = report.figures["verdicts"]
        assert told["other to none"]["loss_beyond"]["mean"] == pytest.approx(-0.8)
        assert told["other to none"]["missed_beyond"]["mean"] == pytest.approx(-0.5)
        assert told["other to abf"]["loss_beyond"]["verdict"] == "shown"
        assert told["other to none"]["loss_first"]["verdict"] == "not shown"
        assert {*told} == {"abf to none", "none to abf", "other to none", "other to abf"}
        assert "| `other` | 100.0% ± 0.0% | 75.0% ± 0.0% | 75.0% ± 0.0% | 75.0% ± 0.0% |" in capsys.readouterr().out

    def test_all_seeds_go_on_from_their_own_checkpoint_or_from_one(self):
        def starts(checkpoint):
            return script.seeds_from(script.Given(None, seeds=(0, 1, 2), own={"checkpoint": checkpoint}))

        assert starts("") == {0: (0,), 1: (1,), 2: (2,)}
        assert starts("7") == {7: (0, 1, 2)}
        with pytest.raises(SystemExit, match="--checkpoint latest: expected a seed, such as 0"):
            starts("latest")

    def test_arms_differ_in_positions_alone_and_train_on_equal_tokens(self, tmp_path):
        given = script.Given(tmp_path, own={"arms": ",".join(script.ROPE), "long": "400"})
        files = {side: str(tmp_path / f"{side}.jsonl") for side in ("train", "validation")}
        made = script.arms(given, SimpleNamespace(dir=tmp_path / "before"), files, 128)
        configs = {
            name: load_config(claims.ROUTERS / f"{arm.router}.yaml", (*arm.size, *arm.settings))
            for name, arm in made.items()
        }
        for config in configs.values():
            found = differences(configs["none"], config, ())
            assert all(difference.key.startswith("model.attention.rope_") for difference in found)
            assert (config is not configs["none"]) == bool(found)
            assert config.data.sequence_length * config.training.batch_size == script.TOKENS
        assert configs["yarn"].model.attention.rope_scaling.original_positions == 128
