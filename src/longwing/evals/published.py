"""What others published, to stand beside what was measured here.

Accuracy in percent, from the cards of FalconLite (amazon/FalconLite), FalconLite2 and MistralLite;
the last row is from MistralLite's. Their headings are lengths in Falcon tokens, chat template
included: the means over LongChat's 50 cases of each column. FalconLite's card states four shared
ranges (2800-3800, 5500-5600, 7500-8300, 9300-11000); its values stand at the nearest lengths. How
QuALITY was asked there is not known.
"""

from collections.abc import Mapping

Column = tuple[str, int]
"""(unit, size), as in `Cell`."""

LENGTHS: Mapping[str, Mapping[Column, int]] = {
    "topics": {
        ("topics", 5): 2851,
        ("topics", 10): 5568,
        ("topics", 15): 8313,
        ("topics", 20): 11044,
        ("topics", 25): 13780,
    },
    "lines": {
        ("lines", 200): 3818,
        ("lines", 300): 5661,
        ("lines", 400): 7505,
        ("lines", 500): 9354,
        ("lines", 600): 11188,
        ("lines", 680): 12657,
    },
    "passkey": {
        ("characters", 12000): 3264,
        ("characters", 20000): 5396,
        ("characters", 31000): 8329,
        ("characters", 38000): 10197,
    },
}
"""The published headings by column. 31000 characters are inferred from the length."""

ACCURACY: Mapping[str, Mapping[str, tuple[float | None, ...]]] = {
    "FalconLite": {
        "topics": (100, 100, 92, 92, None),
        "lines": (38, 12, 8, 4, None, None),
        "passkey": (100, 100, 100, 100),
        "quality": (46.9, 40.8),
    },
    "FalconLite2": {
        "topics": (100, 100, 100, 100, 90),
        "lines": (84, 82, 66, 56, 62, 34),
        "passkey": (100, 100, 100, 100),
        "quality": (53.4, 45.4),
    },
    "MistralLite": {
        "topics": (100, 100, 100, 100, 98),
        "lines": (98, 92, 88, 76, 70, 60),
        "passkey": (100, 100, 100, 100),
        "quality": (64.4, 56.2),
    },
    "Mistral-7B-Instruct-v0.1": {
        "topics": (100, 50, 2, 0, 0),
        "lines": (98, 62, 42, 42, 32, 30),
        "passkey": (100, 50, 20, 30),
        "quality": (44.3, 39.7),
    },
}
"""By model and task, in the order of LENGTHS; QuALITY over all questions and over the hard ones."""
