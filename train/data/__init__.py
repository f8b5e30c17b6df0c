"""Data: formats, templates, tokenising, splitting and loading. Knows nothing of models."""

from train.data.dataset import Lengths, TokenDataset, TokenReport
from train.data.formats import DataError, Record, read_records
from train.data.loader import make_loader
from train.data.records import (
    Example,
    Labelled,
    Preference,
    UnusableRecord,
    normalise_preference,
    normalise_sft,
    normalise_unpaired,
)
from train.data.split import split_by_prompt
from train.data.tokenizing import tokenize_preference, tokenize_sft, tokenize_unpaired

__all__ = [
    "DataError",
    "Example",
    "Labelled",
    "Lengths",
    "Preference",
    "Record",
    "TokenDataset",
    "TokenReport",
    "UnusableRecord",
    "make_loader",
    "normalise_preference",
    "normalise_sft",
    "normalise_unpaired",
    "read_records",
    "split_by_prompt",
    "tokenize_preference",
    "tokenize_sft",
    "tokenize_unpaired",
]
