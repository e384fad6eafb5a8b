"""The coordinator proper: the engine joined to its stores and its background work."""
