"""A zoo of tiny random models of every model type, inputs for them, and the law that each has to keep."""
