"""Floor 2: networks, and the functional form that turns any nn.Module into a function of a flat vector."""
