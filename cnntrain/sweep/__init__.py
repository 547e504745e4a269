"""Sweeps: train many settings and rank them. Start reading at `cnntrain.sweep.sweep_run`.

A *trial* is one setting: a combination of values of the swept keys. A *run* is one training of a trial, with one seed
and, in cross-validation, one fold.
"""
