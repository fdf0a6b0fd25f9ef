"""Where a model looks: maps, and figures of them."""
