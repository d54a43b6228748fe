"""Masked image modelling (SimMIM) for Swin Transformer V2: pretraining on images without labels."""

__version__ = "0.1.0"
