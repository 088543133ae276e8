"""Numerics on torch alone: decompositions, tensor trains, autograd functions, optimisers."""
