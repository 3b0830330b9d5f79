from __future__ import annotations

import datetime
import json
import random
import re
from itertools import islice

import cn2an
import pytest

from operant.recipes.quickstart_task import (
    date,
    digits,
    fraction,
    make_task,
    measure,
    money,
    number,
    ordinal,
    percent,
    phrases,
    temperature,
    time_of_day,
    year,
)
from operant.types import OperantError

SMALL = {"labelled": 40, "prompts": 300, "dev": 30, "test": 50, "raw": 200}


@pytest.mark.parametrize(
    ("pair", "english", "chinese"),
    [
        (number(12), "twelve", "十二"),
        (number(1205), "one thousand two hundred and five", "一千二百零五"),
        (number(23000), "twenty-three thousand", "二万三千"),
        (number(10020), "ten thousand and twenty", "一万零二十"),
        (number(1_234_567), "one million two hundred and thirty-four thousand five hundred and sixty-seven",
         "一百二十三万四千五百六十七"),
        (number("3.05"), "three point zero five", "三点零五"),
        (ordinal(21), "twenty-first", "第二十一"),
        (ordinal(102), "one hundred and second", "第一百零二"),
        (year(1985), "nineteen eighty-five", "一九八五年"),
        (year(2005), "two thousand and five", "二零零五年"),
        (digits("3050"), "three oh five oh", "三零五零"),
        (fraction(3, 5), "three fifths", "五分之三"),
        (fraction(1, 2), "one half", "二分之一"),
        (percent("12.5"), "twelve point five percent", "百分之十二点五"),
        (measure(2, "length-kilometer"), "two kilometers", "两公里"),
        (measure(12, "duration-month"), "twelve months", "十二个月"),
        (measure(1, "mass-kilogram"), "one kilogram", "一千克"),
        (temperature(-3), "minus three degrees Celsius", "零下三摄氏度"),
        (temperature(0), "zero degrees Celsius", "零摄氏度"),
        (money(1, "USD"), "one US dollar", "一美元"),
        (money("12.5", "EUR"), "twelve point five euros", "十二点五欧元"),
        (money(2, "GBP"), "two British pounds", "两英镑"),
        (time_of_day(15, 45), "a quarter to four in the afternoon", "下午三点四十五分"),
        (time_of_day(15, 45, direct=True), "three forty-five in the afternoon", "下午三点四十五分"),
        (time_of_day(2, 30), "half past two in the morning", "凌晨两点半"),
        (time_of_day(9, 5, direct=True), "nine oh five in the morning", "上午九点零五分"),
        (time_of_day(23, 50), "ten to twelve at night", "晚上十一点五十分"),
        (time_of_day(0, 0), "twelve o'clock in the morning", "凌晨十二点"),
        (time_of_day(12, 0), "twelve o'clock in the afternoon", "中午十二点"),
    ],
)  # fmt: skip
def test_renderings_worked_by_hand(pair: tuple[str, str], english: str, chinese: str) -> None:
    assert pair == (english, chinese)


def test_dates_worked_by_hand() -> None:
    day = datetime.date(2024, 3, 25)
    assert date(day, with_year=True, with_weekday=True) == (
        "Monday, March twenty-fifth, twenty twenty-four",
        "二零二四年三月二十五日星期一",
    )
    assert date(day, with_year=False, with_weekday=False, day_first=True) == (
        "the twenty-fifth of March",
        "三月二十五日",
    )


def test_chinese_numbers_read_back() -> None:
    rng = random.Random(3)
    for _ in range(500):
        value = rng.randint(0, 10 ** rng.randint(1, 8))
        assert cn2an.cn2an(number(value)[1]) == value


def test_same_seed_same_task_and_another_seed_another() -> None:
    assert make_task(7, **SMALL) == make_task(7, **SMALL)
    assert make_task(7, **SMALL).test != make_task(8, **SMALL).test


def test_held_out_sets_do_not_depend_on_the_training_sets() -> None:
    small, large = make_task(1, **SMALL), make_task(1, **(SMALL | {"labelled": 200, "prompts": 900, "raw": 10}))
    assert small.test == large.test
    assert small.dev == large.dev
    assert make_task(1, **(SMALL | {"test": 20})).test == small.test[:20]


def test_no_phrase_in_two_splits_in_either_language() -> None:
    task = make_task(2, **SMALL)
    assert [len(rows) for rows in (task.labelled, task.prompts, task.dev, task.test, task.raw)] == [
        40,
        300,
        30,
        50,
        200,
    ]
    labelled = [(row["prompt"], row["completion"]) for row in task.labelled]
    rewarded = [(row["prompt"], row["references"][0]) for row in task.prompts]
    held_out = [(row["prompt"], row["references"][0]) for row in task.dev + task.test]
    texts = [text for pair in labelled + rewarded + held_out for text in pair] + task.raw
    assert len(texts) == len(set(texts)) == 2 * 420 + 200


def test_prompts_hide_their_answer_and_held_out_rows_have_it() -> None:
    task = make_task(2, **SMALL)
    assert all(row.keys() == {"prompt", "references"} for row in task.prompts)
    assert all(row["references"] == [row["completion"]] for row in task.dev + task.test)


def test_raw_text_is_half_of_each_language_and_never_mixed() -> None:
    raw = make_task(2, **SMALL).raw
    chinese = [bool(re.fullmatch(r"[一-鿿，。]+", text)) for text in raw]
    english = [bool(re.fullmatch(r"[A-Za-z ,.'-]+", text)) for text in raw]
    assert sum(chinese) == sum(english) == 100


def test_the_chinese_is_a_function_of_the_english() -> None:
    meaning: dict[str, str] = {}
    for english, chinese in islice(phrases(random.Random(5)), 20_000):
        assert meaning.setdefault(english, chinese) == chinese
        assert "{" not in english + chinese
        assert english[0].isupper()
    assert len(meaning) > 10_000


def test_saved_files_read_back(tmp_path) -> None:
    task = make_task(4, **SMALL)
    folder = task.save(tmp_path / "task")
    read = {path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in folder.iterdir()}
    assert read.pop("raw") == [{"text": text} for text in task.raw]
    assert read == {"labelled": task.labelled, "prompts": task.prompts, "dev": task.dev, "test": task.test}


def test_negative_size_is_refused_in_one_line() -> None:
    with pytest.raises(OperantError, match=r"^the quickstart's dev is -1; give a number of rows, 0 or more$"):
        make_task(0, dev=-1)
