"""How near the search for rotary bases comes to the 32 that HARPE's paper lists (arXiv 2412.07171).

    python benchmarks/rope_bases.py

The paper gives the range, the step and the width of the heads. It leaves open which distances are compared, what counts
as a peak, and which peak goes with which valley. Each row is one choice of these: the number of bases that are among
those of the paper, and the mean distance between both lists, each in ascending order.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from moeport.config.model import AttentionConfig, ModelConfig, RopeBasesConfig
from moeport.model.rope_bases import bases_of

PUBLISHED = """
1.00 1.15 1.30 1.45 2.17 2.20 2.23 2.47 2.50 2.65 2.68 2.71 2.74 2.80 2.83 2.92 3.01 3.04 3.10 3.13 3.16 3.22 3.43 3.46
3.61 3.88 4.09 4.15 4.39 4.45 4.51 4.54
"""
"""In millions, of heads 1 to 32."""
RANGES = ((0, 2048), (0, 4096), (1000, 3096), (0, 16384))
"""First distance and number of distances."""
SPACINGS = (1, 5, 20, 50)


def main() -> None:
    """Print the table, the nearest first."""
    published = np.array(PUBLISHED.split(), float)
    rows = []
    for (first, positions), spacing, pairing in product(RANGES, SPACINGS, ("nearest", "order")):
        given = RopeBasesConfig(
            kind="peak_valley", first_position=first, positions=positions, spacing=spacing, pairing=pairing
        )
        attention = AttentionConfig(num_heads=32, head_dim=128, rope_bases=given)
        found = np.round(np.array(bases_of(ModelConfig(attention=attention))) / 1e6, 2)
        common, away = len({*found} & {*published}), float(np.abs(found - published).mean())
        rows.append((-common, away, f"{first:>6} {positions:>9} {spacing:>7} {pairing:<8} {common:>6} {away:>8.3f}"))
    print("first  positions spacing pairing  common distance (millions)")
    for *_, row in sorted(rows):
        print(row)
    candidates, chosen = 134, len(published)
    print(f"By chance, {chosen} of {candidates} candidates have {chosen**2 / candidates:.1f} in common.")


if __name__ == "__main__":
    main()
