"""The commands of `lit-bilevel` that do not train."""
