"""Data: formats, templates, tokenising, splitting and loading. Knows nothing of models."""

from train.data.buckets import make_buckets, saves_by_sharing
from train.data.dataset import Lengths, TokenDataset, TokenReport
from train.data.formats import DataError, Record, read_records
from train.data.layout import answer_names, is_packed, padding_share
from train.data.loader import make_loader
from train.data.mixing import mix
from train.data.packing import pack
from train.data.records import (
    Preference,
    UnusableRecord,
    normalise_preference,
    normalise_prompt,
    normalise_sft,
    normalise_unpaired,
)
from train.data.split import split_by_prompt
from train.data.tokenizing import (
    tokenize_preference,
    tokenize_prompts,
    tokenize_sft,
    tokenize_unpaired,
)
