"""What a preference run will need on a machine, from its compiler, before anyone rents it."""
