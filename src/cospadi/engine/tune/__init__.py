"""Sequential fitting, layer by layer on compressed inputs, and tuning of the factors with Adam."""
