"""The quickstart's data: dates, times, amounts and numbers written out in English, and the same in Chinese.

Nothing is downloaded. The words come from well-kept libraries: num2words spells English numbers, cn2an Chinese ones,
and Babel (the Unicode CLDR) names months, weekdays, parts of the day, units and currencies. The two languages disagree
in ways that must be learned: thousands against ten thousands, "a quarter to four" against three forty-five, percent
and fractions the other way round, and the order of a date.

The Chinese of an English phrase is a function of it, so that an exact match is always possible.
"""

from __future__ import annotations

import datetime
import json
import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import cn2an
from babel import dates, numbers, units
from num2words import num2words

from operant.data.rows import Row
from operant.types import OperantError

Phrase = tuple[str, str]
"""The same thing in English and in Chinese."""


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of the five splits; no English and no Chinese phrase stands in two of them.

    labelled: prompt and completion, for supervised fine-tuning.
    prompts: prompt and references; the references are for the reward alone.
    dev, test: prompt, completion and references.
    raw: phrases of either language, none a translation of another, for pretraining.
    """

    labelled: list[Row]
    prompts: list[Row]
    dev: list[Row]
    test: list[Row]
    raw: list[str]

    def save(self, folder: str | Path) -> Path:
        """Write each split as JSON Lines: labelled.jsonl, prompts.jsonl, dev.jsonl, test.jsonl, raw.jsonl (`text`)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        splits: dict[str, list[Row]] = {
            "labelled": self.labelled,
            "prompts": self.prompts,
            "dev": self.dev,
            "test": self.test,
            "raw": [{"text": text} for text in self.raw],
        }
        for name, rows in splits.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return folder


def make_task(
    seed: int = 0, *, labelled: int = 600, prompts: int = 6000, dev: int = 200, test: int = 400, raw: int = 6000
) -> Task:
    """Draw the splits. The same seed and sizes give the same rows; a smaller test or dev set is the larger one's start.

    Raises OperantError when a size is negative.
    """
    for name, size in (("labelled", labelled), ("prompts", prompts), ("dev", dev), ("test", test), ("raw", raw)):
        if size < 0:
            raise OperantError(f"the quickstart's {name} is {size}; give a number of rows, 0 or more")
    seen: set[str] = set()

    def fresh(split: str, size: int) -> list[Phrase]:
        stream = phrases(random.Random(f"{seed} {split}"))
        rows: list[Phrase] = []
        while len(rows) < size:
            english, chinese = next(stream)
            if english not in seen and chinese not in seen:
                seen.update((english, chinese))
                rows.append((english, chinese))
        return rows

    # The held-out sets come first, so that their rows do not depend on how much there is to train on.
    held_test, held_dev = fresh("test", test), fresh("dev", dev)
    pairs, unlabelled, text = fresh("labelled", labelled), fresh("prompts", prompts), fresh("raw", raw)
    return Task(
        labelled=[{"prompt": en, "completion": zh} for en, zh in pairs],
        prompts=[{"prompt": en, "references": [zh]} for en, zh in unlabelled],
        dev=[{"prompt": en, "completion": zh, "references": [zh]} for en, zh in held_dev],
        test=[{"prompt": en, "completion": zh, "references": [zh]} for en, zh in held_test],
        raw=[pair[i % 2] for i, pair in enumerate(text)],  # one language of each, so nothing is parallel
    )


def phrases(rng: random.Random) -> Iterator[Phrase]:
    """Endless phrases in English and Chinese, drawn with `rng`; repeats are possible."""
    frames, weights = _frames(), [frame.weight for frame in _frames()]
    while True:
        frame = rng.choices(frames, weights)[0]
        english, chinese = frame.draw(rng)
        yield english[0].upper() + english[1:], chinese


# --- numbers -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def number(value: int | str) -> Phrase:
    """A cardinal, spelled. A string is a decimal and keeps its zeros: "3.05" is three point zero five, 三点零五."""
    spoken = num2words(value) if isinstance(value, int) else _decimal(value)
    return spoken.replace(",", ""), cn2an.an2cn(value)


def _decimal(value: str) -> str:
    whole, _, digits = value.partition(".")
    return " ".join([num2words(int(whole)), "point", *(num2words(int(digit)) for digit in digits)])


@cache
def ordinal(value: int) -> Phrase:
    """21: twenty-first, 第二十一."""
    return num2words(value, to="ordinal").replace(",", ""), "第" + cn2an.an2cn(value)


@cache
def year(value: int) -> Phrase:
    """1985: nineteen eighty-five, 一九八五年: English in pairs of digits, Chinese digit by digit."""
    return num2words(value, to="year").replace(",", ""), cn2an.an2cn(str(value), "direct") + "年"


@cache
def digits(value: str) -> Phrase:
    """305: three oh five, 三零五."""
    spoken = ("oh" if digit == "0" else num2words(int(digit)) for digit in value)
    return " ".join(spoken), cn2an.an2cn(value, "direct")


@cache
def fraction(numerator: int, denominator: int) -> Phrase:
    """(3, 5): three fifths, 五分之三."""
    below = "half" if denominator == 2 else num2words(denominator, to="ordinal")
    english = f"{num2words(numerator)} {below}" + ("s" if numerator > 1 else "")
    return english, f"{cn2an.an2cn(denominator)}分之{cn2an.an2cn(numerator)}"


def percent(value: int | str) -> Phrase:
    """25: twenty-five percent, 百分之二十五."""
    english, chinese = number(value)
    return f"{english} percent", f"百分之{chinese}"


def _counted(value: int | str) -> Phrase:
    # Before a measure word, 2 alone is 两; within a larger number it stays 二.
    english, chinese = number(value)
    return english, "两" if value == 2 else chinese


# --- quantities, dates and times, named by Babel -------------------------------------------------------------------


@cache
def _unit(unit: str, one: bool) -> Phrase:
    english = units.format_unit(1 if one else 5, unit, "long", locale="en").split(" ", 1)[1]
    # Babel has some Chinese units in the long form and the others in the short one.
    length: Literal["long", "short"] = "long" if unit.startswith(("mass-", "temperature-")) else "short"
    return english, units.format_unit(5, unit, length, locale="zh").removeprefix("5").strip()


def measure(value: int | str, unit: str) -> Phrase:
    """(2, "length-kilometer"): two kilometers, 两公里. Units by their CLDR names."""
    (english, chinese), (unit_en, unit_zh) = _counted(value), _unit(unit, value == 1)
    return f"{english} {unit_en}", f"{chinese}{unit_zh}"


def temperature(value: int) -> Phrase:
    """-3: minus three degrees Celsius, 零下三摄氏度."""
    english, chinese = measure(abs(value), "temperature-celsius")
    return (f"minus {english}", f"零下{chinese}") if value < 0 else (english, chinese)


@cache
def _currency(code: str, one: bool) -> Phrase:
    english = numbers.get_currency_name(code, 1 if one else 5, locale="en")
    return english, numbers.get_currency_name(code, locale="zh")


def money(value: int | str, code: str) -> Phrase:
    """("12.5", "EUR"): twelve point five euros, 十二点五欧元. Currencies by their ISO 4217 codes."""
    (english, chinese), (name_en, name_zh) = _counted(value), _currency(code, value == 1)
    return f"{english} {name_en}", f"{chinese}{name_zh}"


@cache
def _day_period(hour: int) -> Phrase:
    at = datetime.time(hour, 30)
    return dates.format_time(at, "B", locale="en"), dates.format_time(at, "B", locale="zh")


@cache
def time_of_day(hour: int, minute: int, direct: bool = False) -> Phrase:
    """(15, 45): a quarter to four in the afternoon, or `direct`: three forty-five in the afternoon; 下午三点四十五分.

    The part of the day is the CLDR's in each language, which divide the day differently.
    """
    this, following = (num2words((h - 1) % 12 + 1) for h in (hour, hour + 1))
    if minute == 0:
        english = f"{this} o'clock"
    elif direct:
        english = f"{this} {'oh ' if minute < 10 else ''}{num2words(minute)}"
    elif minute == 30:
        english = f"half past {this}"
    else:
        past = minute < 30
        apart = minute if past else 60 - minute
        minutes = "a quarter" if apart == 15 else num2words(apart)
        english = f"{minutes} {'past' if past else 'to'} {this if past else following}"
    period_en, period_zh = _day_period(hour)
    hour_zh = _counted((hour - 1) % 12 + 1)[1]
    if minute in (0, 30):
        minutes_zh = "半" if minute else ""
    else:
        minutes_zh = f"{'零' if minute < 10 else ''}{cn2an.an2cn(minute)}分"
    return f"{english} {period_en}", f"{period_zh}{hour_zh}点{minutes_zh}"


def date(day: datetime.date, *, with_year: bool, with_weekday: bool, day_first: bool = False) -> Phrase:
    """2024-03-25: Monday, March twenty-fifth, twenty twenty-four; 二零二四年三月二十五日星期一."""
    (month_en, month_zh), (weekday_en, weekday_zh) = _month(day.month), _weekday(day.weekday())
    day_en, day_zh = ordinal(day.day)
    english = f"the {day_en} of {month_en}" if day_first else f"{month_en} {day_en}"
    chinese = f"{month_zh}{day_zh.removeprefix('第')}日"
    if with_weekday:
        english, chinese = f"{weekday_en}, {english}", f"{chinese}{weekday_zh}"
    if with_year:
        year_en, year_zh = year(day.year)
        english, chinese = f"{english}, {year_en}", f"{year_zh}{chinese}"
    return english, chinese


@cache
def _month(month: int) -> Phrase:
    return dates.get_month_names(locale="en")[month], dates.get_month_names(locale="zh")[month]


@cache
def _weekday(weekday: int) -> Phrase:
    return dates.get_day_names(locale="en")[weekday], dates.get_day_names(locale="zh")[weekday]


# --- what is drawn into a phrase --------------------------------------------------------------------------------------

CURRENCIES = "USD EUR GBP CHF JPY KRW".split()
WHOLE_CURRENCIES = {"JPY", "KRW"}  # have no cents

STUFF = [("rice", "大米"), ("sugar", "白糖"), ("flour", "面粉"), ("salt", "盐"), ("tea", "茶叶"), ("steel", "钢材")]
DURATIONS = "minute hour day week month year".split()
MASSES = "mass-gram mass-kilogram mass-ton".split()
LENGTHS = "length-meter length-kilometer length-mile".split()


def _whole(rng: random.Random, most: int) -> int:
    """An integer whose number of digits is uniform, since people speak of small numbers as often as of large ones."""
    size = rng.randint(1, most)
    value = rng.randint(10 ** (size - 1), 10**size - 1)
    # Round numbers, and zeros inside a number, are common in speech and hard: 三万零二十.
    if size > 2 and rng.random() < 0.4:
        value -= value % 10 ** rng.randint(1, size - 1)
        value += rng.choice((0, 0, rng.randint(1, 9)))
    return value


def _decimal_or_whole(rng: random.Random, most: int) -> int | str:
    if rng.random() < 0.3:
        return f"{_whole(rng, min(most, 3))}.{rng.choice('123456789')}"
    return _whole(rng, most)


def _draw_date(rng: random.Random) -> Phrase:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36500))
    form = rng.random()
    return date(day, with_year=form < 0.4, with_weekday=form > 0.6, day_first=rng.random() < 0.4)


def _draw_money(rng: random.Random) -> Phrase:
    code = rng.choice(CURRENCIES)
    return money(_whole(rng, 6) if code in WHOLE_CURRENCIES else _decimal_or_whole(rng, 5), code)


def _draw_share(rng: random.Random) -> Phrase:
    if rng.random() < 0.5:
        below = rng.randint(2, 10)
        return fraction(rng.choice([above for above in range(1, below) if math.gcd(above, below) == 1]), below)
    return percent(rng.randint(1, 99) if rng.random() < 0.7 else f"{rng.randint(1, 99)}.{rng.randint(1, 9)}")


def _draw_time(rng: random.Random) -> Phrase:
    return time_of_day(rng.randrange(24), 5 * rng.randrange(12), rng.random() < 0.4)


DRAW: dict[str, Callable[[random.Random], Phrase]] = {
    "stuff": lambda rng: rng.choice(STUFF),
    "date": _draw_date,
    "time": _draw_time,
    "money": _draw_money,
    "share": _draw_share,
    "year": lambda rng: year(rng.randint(1950, 2049)),
    "month": lambda rng: _month(rng.randint(1, 12)),
    "people": lambda rng: number(_whole(rng, 7)),
    "place": lambda rng: ordinal(rng.randint(1, 120)),
    "floor": lambda rng: ordinal(rng.randint(1, 60)),
    "room": lambda rng: digits(str(rng.randint(100, 2999))),
    "duration": lambda rng: measure(rng.randint(1, 60), f"duration-{rng.choice(DURATIONS)}"),
    "mass": lambda rng: measure(_decimal_or_whole(rng, 4), rng.choice(MASSES)),
    "length": lambda rng: measure(_decimal_or_whole(rng, 5), rng.choice(LENGTHS)),
    "degrees": lambda rng: temperature(rng.randint(-30, 45)),
}


class Frame:
    """A Chinese phrase with holes and the ways to say it in English."""

    def __init__(self, weight: float, chinese: str, *english: str) -> None:
        self.weight, self.chinese, self.english = weight, chinese, english
        self.holes = [name for _, name, _, _ in string.Formatter().parse(chinese) if name]

    def draw(self, rng: random.Random) -> Phrase:
        """The phrase with its holes filled by `rng`, said in one of the ways."""
        filled = {hole: DRAW[hole](rng) for hole in self.holes}
        english = rng.choice(self.english).format_map({hole: pair[0] for hole, pair in filled.items()})
        return english, self.chinese.format_map({hole: pair[1] for hole, pair in filled.items()})


@cache
def _frames() -> list[Frame]:
    return [
        Frame(3, "{date}", "{date}"),
        Frame(3, "{date}{time}", "{time} on {date}", "{date}, at {time}"),
        Frame(2, "{time}", "{time}"),
        Frame(2, "{money}", "{money}"),
        Frame(1, "{mass}{stuff}", "{mass} of {stuff}"),
        Frame(1, "{length}", "{length}"),
        Frame(1, "{duration}", "{duration}"),
        Frame(1, "{degrees}", "{degrees}"),
        Frame(0.5, "{time}{degrees}", "{degrees} at {time}", "at {time}, {degrees}"),
        Frame(1, "{share}", "{share}"),
        Frame(1, "{people}人", "{people} people"),
        Frame(1, "{year}{month}", "{month} {year}"),
        Frame(1, "{floor}层{room}号房间", "room {room} on the {floor} floor", "the {floor} floor, room {room}"),
        Frame(1, "{place}名", "{place} place"),
    ]
