"""The common base of all config sections."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen section of the config that refuses unknown keys.

    Field docstrings become the descriptions that `moeport config schema` prints.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def gives(self, *names: str) -> bool:
        """Whether all these fields were given, rather than left at their defaults."""
        return self.model_fields_set.issuperset(names)
