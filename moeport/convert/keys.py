"""The keys of a config.json, each of which must be asked for, carried along, or refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from moeport.convert.family import Family
from moeport.errors import UserError

CARRIED = frozenset(
    (
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cls_token_id",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "finetuning_task",
        "id2label",
        "label2id",
        "max_window_layers",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    )
)
"""Keys on which neither logits nor moeport's training depend; they are kept for the way back."""

ALIASES = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "num_nextn_predict_layers": "num_mtp_layers",
}
"""Other names that transformers takes for a key."""


ADVICE = {
    "quantization_config": "convert the weights to bfloat16 first, and remove the key: transformers does so with "
    "from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True)) and save_pretrained, or for "
    "DeepSeek-V3 its repository's inference/fp8_cast_bf16.py",
}
"""What to do about a key that moeport does not have."""


class Keys:
    """The keys of a config.json, of which each must be asked for.

    Args:
        family: gives the values of missing keys.
        values: the keys of the file.
        place: names the file in messages.
    """

    def __init__(self, family: Family, values: Mapping[str, Any], place: str):
        self.family = family
        self.values = values
        self.place = place
        self.asked: set[str] = set()

    def get(self, key: str, kinds: tuple[type, ...]) -> Any:
        """The value of a key, or what transformers takes without it.

        Raises UserError if it is none of `kinds`, or if an alias of the key has another value.
        """
        names = [name for name in dict.fromkeys((key, ALIASES.get(key, key))) if name in self.values]
        self.asked |= {key, *names}
        found = [self.values[name] for name in names] or [self.family.defaults[key]]
        if len(found) > 1 and found[0] != found[1]:
            raise UserError(f"{self.place}: {names[0]} and {names[1]} differ ({found[0]} and {found[1]}); remove one")
        if type(found[0]) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"{self.place}: {key} is {shown(found[0])}; expected {wanted}")
        return found[0]

    def integer(self, key: str) -> int:
        """A positive integer."""
        value: int = self.get(key, (int,))
        if value < 1:
            raise UserError(f"{self.place}: {key} is {value}; expected at least 1")
        return value

    def number(self, key: str) -> float:
        """A number."""
        return float(self.get(key, (int, float)))

    def flag(self, key: str) -> bool:
        """True or false."""
        value: bool = self.get(key, (bool,))
        return value

    def only(self, key: str, wanted: Any) -> None:
        """Refuse a key that has another value than the one that moeport computes with."""
        value = self.values.get(key, wanted)
        self.asked.add(key)
        if value != wanted:
            advice = ADVICE.get(key, f"expected {shown(wanted)}")
            raise UserError(f"{self.place}: {key} is {shown(value)}, which moeport does not have; {advice}")

    def refuse_others(self, ignored: Collection[str]) -> None:
        """Refuse keys that nobody has asked for: what they do is unknown."""
        others = sorted(self.values.keys() - self.asked - CARRIED - {*ignored})
        if others:
            listed = "; ".join(f"{key} = {shown(self.values[key])}" for key in others)
            raise UserError(
                f"{self.place}: {self.family.model_type} has keys here that moeport does not know and that may change "
                f"results: {listed}. If one changes none, say so with --ignore-key KEY"
            )


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
