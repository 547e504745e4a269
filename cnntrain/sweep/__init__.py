"""Sweeps: many trainings that end with an answer. Read `cnntrain.sweep.run` first.

A *trial* is one setting of the swept keys; a *run* is one training of it, with one seed and, in
cross-validation, one fold.
"""
