"""Provide numerics on torch alone: decompositions, tensor trains, autograd functions, optimisers."""
