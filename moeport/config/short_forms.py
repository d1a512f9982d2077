"""Values that may be written shorter than the mapping that they stand for."""

from dataclasses import replace

from moeport.config.tree import Node, merge

BASES = ("model", "attention", "rope_bases")
EXPECTED = {BASES[-1]: "a mapping, a list of numbers above 1 or null"}
"""What messages expect of a section that has short forms."""


def with_mappings(root: Node) -> Node:
    """The tree with a mapping where the rotary bases are a list or null."""
    node = root.find(*BASES)
    if node is None or not (node.value is None or isinstance(node.value, list)):
        return root
    values = {} if node.value is None else {"values": node}
    mapping = replace(node, value={"kind": replace(node, value="list" if values else "none"), **values})
    for part in reversed(BASES):
        mapping = Node({part: mapping}, node.place, node.key_place, "")
    return merge(root, mapping)
