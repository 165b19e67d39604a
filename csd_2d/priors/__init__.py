"""Diffusion priors, one module per family of models; `loading` chooses one by its name."""
