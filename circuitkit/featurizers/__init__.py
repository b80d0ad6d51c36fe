"""Featurizers: between the activation at a site and its coordinates (neurons, features of a dictionary, directions)."""

from circuitkit.featurizers.base import Featurizer
from circuitkit.featurizers.dictionary import Dictionary
from circuitkit.featurizers.identity import Identity
from circuitkit.featurizers.pca import PCA
from circuitkit.featurizers.random import random_dictionary
from circuitkit.featurizers.reading import Placed, load_dictionary
from circuitkit.featurizers.rotation import Rotation

__all__ = ["PCA", "Dictionary", "Featurizer", "Identity", "Placed", "Rotation", "load_dictionary", "random_dictionary"]
