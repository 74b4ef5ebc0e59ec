"""HOW is a number rounded? Learnable quantizers and the layers that use them."""
