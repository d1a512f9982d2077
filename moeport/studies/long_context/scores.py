"""What a model answers. Shape suffixes: Q questions, R texts that are continued together, V vocabulary ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeport.backends.base import EvaluationModel
from moeport.data import Tokenizer
from moeport.studies.long_context.needles import Question


@dataclass(frozen=True)
class Score:
    """How a model has answered one question."""

    exact: bool
    """Whether the most likely tokens, taken one by one, are the answer's."""
    recall: float
    """Share of the wanted numbers or names that are among what these tokens say, in any order; RULER's measure."""
    choice: bool
    """Whether the answer is more likely than every other candidate."""
    tokens: float
    """Share of the answer's tokens that are the most likely ones after those before them."""
    nats: float
    """Negative log-likelihood of the answer per token."""


def scores(model: EvaluationModel, tokenizer: Tokenizer, asked: Sequence[Question]) -> list[Score]:
    """Ask questions of one length together.

    Each prompt is read once. Then as many texts go on from it as there are candidates, each along one, and one more
    along the most likely tokens.
    """
    decoder = model.decoder(asked[0].length)
    score_QV = decoder.start([each.prompt_T.tolist() for each in asked])
    paths = [path for each in asked for path in (None, *each.candidates)]
    row_R = np.repeat(np.arange(len(asked)), [1 + len(each.candidates) for each in asked])
    decoder.keep(row_R.tolist())
    score_RV, steps = score_QV[row_R], max(len(path) for path in paths if path is not None)
    answers = [np.zeros((steps, 2)) for _ in paths]
    taken: list[list[int]] = [[] for _ in paths]
    for step in range(steps):
        best_R = score_RV[:, : tokenizer.vocab_size].argmax(axis=1)
        log_R = _log_partition(score_RV)
        for row, path in enumerate(paths):
            has_token = path is not None and step < len(path)
            token = int(path[step]) if path is not None and has_token else int(best_R[row])
            taken[row].append(token)
            if has_token:
                answers[row][step] = log_R[row] - float(score_RV[row, token]), best_R[row] == token
        if step + 1 < steps:
            score_RV = decoder.step([each[-1] for each in taken])
    found, first = [], 0
    for each in asked:
        last = first + 1 + len(each.candidates)
        found.append(_score(tokenizer, each, taken[first], answers[first + 1 : last]))
        first = last
    return found


def _score(tokenizer: Tokenizer, question: Question, taken: Sequence[int], answers: Sequence[np.ndarray]) -> Score:
    """The score of one question, from the greedy tokens, and nats and hits along each candidate (steps, 2)."""
    count = len(question.answer)
    greedy = [*taken[:count]]
    said = tokenizer.continuation([*question.prompt_T[-1:].tolist(), *greedy], 1)
    nats = [float(each[:, 0].sum()) for each in answers]
    return Score(
        exact=greedy == question.answer.tolist(),
        recall=float(np.mean([value in said for value in question.wanted])),
        choice=nats[0] < min(nats[1:]),
        tokens=float(answers[0][:count, 1].mean()),
        nats=nats[0] / count,
    )


def _log_partition(score_RV: np.ndarray) -> np.ndarray:
    """Log of the sum of the exponentials of each row, in float64."""
    score_RV = score_RV.astype(np.float64)
    top_R = score_RV.max(axis=1)
    total: np.ndarray = top_R + np.log(np.exp(score_RV - top_R[:, None]).sum(axis=1))
    return total
