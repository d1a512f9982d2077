"""How each figure is read, and where it comes from: one table for the page and the documentation."""

from __future__ import annotations

from dataclasses import dataclass

OPENMOE = "OpenMoE, arXiv 2402.01739"
LOCMOE_PLUS = "LocMoE+, arXiv 2406.00023"
CLOSER_LOOK = "A Closer Look into Mixture-of-Experts in Large Language Models, arXiv 2406.18219"


@dataclass(frozen=True)
class Reading:
    """A figure's title, a sentence or two on how to read it, and its source."""

    title: str
    how: str
    source: str


READINGS = {
    "ids": Reading(
        "Token ids against positions",
        "Each curve sorts rows by how unevenly the experts share them: 0 is an even division, and the highest rows go "
        "to few experts. If the curve of token ids lies far above that of positions and above chance, routing follows "
        "the token itself more than its context: context-independent specialisation.",
        f"{OPENMOE}; the line of chance, from the layer's overall shares, is ours",
    ),
    "depth": Reading(
        "Specialisation through depth",
        "The mean of each of those curves by layer. Where ids come down to chance, the layer routes by something else.",
        f"{OPENMOE}; the mean is ours",
    ),
    "top": Reading(
        "What each expert reads",
        "For each expert, the token ids with the largest share going to it. 100% (or, with k experts per token, 1/k) "
        "means that the id goes there whatever its context.",
        OPENMOE,
    ),
    "positions": Reading(
        "Experts by position",
        "Each row is an expert and each column a range of positions of the sequence: orange gets more than an even "
        "share, blue less. Rows of one colour mean that position does not matter.",
        OPENMOE,
    ),
    "datasets": Reading(
        "Experts by dataset",
        "The same for each dataset, domain or kind of file: columns that look alike mean that experts do not "
        "specialise in domains.",
        OPENMOE,
    ),
    "drops": Reading(
        "Drops by position",
        "The share of the assignments that found no room, by position in the sequence. A curve that rises is "
        "drop-towards-the-end: later tokens find the experts full.",
        OPENMOE,
    ),
    "dataset_drops": Reading(
        "Drops by dataset",
        "The share of the assignments that found no room, by layer. Text unlike the training data is routed less "
        "evenly, and loses more.",
        OPENMOE,
    ),
    "early": Reading(
        "Early routing learning",
        "How much of each token id's histogram over the experts an earlier checkpoint shares with the inspected one, "
        "which is at 1: curves that are high from the beginning mean that routing was learned early.",
        f"{OPENMOE}; the measure of overlap, the sum of the smaller shares, is ours",
    ),
    "separation": Reading(
        "Separation of the experts' tokens",
        "CH: the spread of the experts' mean tokens divided by the spread of the tokens around them. Higher means that "
        "tokens of one expert are more alike and those of different experts less.",
        f"{LOCMOE_PLUS}, the index CH without factors for the numbers of tokens and experts, as printed",
    ),
    "angles": Reading(
        "Angles of tokens and gate rows",
        "Mean angle of a token with the gate row of its expert, and with those of the others. 90° is what unrelated "
        "directions have; a gap that opens means that gate rows and tokens have found each other.",
        f"LocMoE, arXiv 2401.13920, and {LOCMOE_PLUS}",
    ),
    "bounds": Reading(
        "Capacity bounds against loads",
        "How many assignments an expert must take by theory, at the cosines of its tokens with its gate row, beside "
        "what it was given. A bound far below the load says that capacity could be saved, if its assumptions hold.",
        f"LocMoE, arXiv 2401.13920, theorem 1, and {LOCMOE_PLUS}, remark 7; which cosine enters is ours",
    ),
    "robustness": Reading(
        "Without the first choice",
        "The loss if every token loses its first choice in every layer. A small rise means that other experts know the "
        "same; with one expert per token, nothing of the routed experts is left.",
        "CartesianMoE, arXiv 2410.16077; that the other gates stay as they are is ours",
    ),
    "weights": Reading(
        "Similarity of the experts' weights",
        "Cosines of flattened matrices and of mean neurons. Neurons have no order of their own: matched ones may be "
        "alike where matrices are not. A tau near 1 says that the experts still have their neurons in one order, as "
        "copies of one dense block do. R² says how far gate rows are alike where neurons are.",
        CLOSER_LOOK,
    ),
    "components": Reading(
        "Experts in the plane of two components",
        "Each dot is an expert: the first two principal components of its flattened, standardised matrix. Clusters are "
        "experts that are alike, and one far from all others differs from them; without either, the experts are spread "
        "evenly. The percentages say how much of all differences the plane shows.",
        CLOSER_LOOK,
    ),
    "outputs": Reading(
        "Similarity of the experts' outputs",
        "Every expert is given the same tokens. Orange pairs give similar outputs; 1/2 is what unrelated outputs have, "
        "and transparent; blue pairs oppose each other.",
        f"{CLOSER_LOOK}: 1 - arccos(cos) / pi",
    ),
    "ranks": Reading(
        "Norm of the output against the score",
        "Every expert is given the same tokens. An orange diagonal from the top left means that the router prefers "
        "experts with large outputs.",
        CLOSER_LOOK,
    ),
    "active": Reading(
        "Active neurons",
        "The share of the neurons whose activation is further than 0.001 from 0; with SwiGLU nearly all of them are.",
        CLOSER_LOOK,
    ),
}
