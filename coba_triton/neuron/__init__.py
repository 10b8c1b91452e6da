"""The neuron: its records, equations, adjoint and surrogate derivatives, as plain Python."""
