"""Matrix atoms for a model that is trained already: groups of layers, atoms, ranks, factors."""
