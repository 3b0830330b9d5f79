"""Rewards by name: built-in metrics, `module:function`, and small expressions of them.

    bleu                                     a built-in
    bleu(tokenize="zh", dense=True)          with options
    chrf + 0.2*length - 0.1*repetition(n=3)  a weighted sum
    exact * format(pattern="[0-9]+")         a product
    gate(format(pattern="..."), bleu)        bleu only where the format holds
    clip(bleu, 0, 0.8)    norm(chrf)         clipping, running normalisation
    model(runs/judge/model)                  a trained reward model; several, with commas, are an ensemble
    similarity(runs/bert/model)              BERTScore's matching over an encoder
    judge(url="http://…/v1", model=…)        a language model's verdict
    my_rewards:politeness                    a function, class or reward object of an importable module

The text is parsed, never evaluated: only these forms and literal options are understood.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from operant.rewards.combine import Clip, Combination, Gate, Product, RunningNorm, Sum, leaves
from operant.rewards.judge import Judge
from operant.rewards.learned import Learned, Similarity
from operant.rewards.metrics import (
    Bleu,
    Chrf,
    Edit,
    Exact,
    Format,
    Length,
    Metric,
    Repetition,
    Rouge,
    Ter,
    option_names,
)
from operant.rewards.seam import as_reward
from operant.types import OperantError, Prompt

logger = logging.getLogger(__name__)

BUILT_IN: dict[str, Callable[..., Metric]] = {
    "bleu": Bleu,
    "chrf": Chrf,
    "chrf++": functools.partial(Chrf, word_order=2),
    "ter": Ter,
    "rouge1": functools.partial(Rouge, variant="1"),
    "rouge2": functools.partial(Rouge, variant="2"),
    "rougeL": functools.partial(Rouge, variant="L"),
    "exact": Exact,
    "edit": Edit,
    "length": Length,
    "repetition": Repetition,
    "format": Format,
    "model": Learned,
    "learned": Learned,
    "similarity": Similarity,
    "judge": Judge,
}
COMBINATIONS: dict[str, Callable[..., Combination]] = {"gate": Gate, "clip": Clip, "norm": RunningNorm}
# a folder in brackets needs no quotes: model(runs/a/model, runs/b/model), similarity(path=~/bert)
_PATHS = re.compile(r"""("[^"]*"|'[^']*')|(?<=[(=])\s*([\w.~-]*/[\w./~-]*(?:\s*,\s*[\w.~-]*/[\w./~-]*)*)(?=\s*[,)])""")
_REFERENCE = re.compile(r"\"[^\"]*\"|'[^']*'|(?<![\w.:'\"])([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)(?![\w.:'\"])")


def reward_names() -> list[str]:
    """The names of the built-in rewards."""
    return list(BUILT_IN)


def reward_by_name(spec: Any, **options: Any) -> Any:
    """The reward that `spec` names; see the module's docstring for the forms.

    spec: a text, a callable (returned as a reward), or a list of texts, callables and mappings such as
        `{"name": "bleu", "weight": 0.5, "dense": True}`, which are summed.
    options: given to every built-in part that knows them: `dense=True`, `potential="prefix"`, `tokenize="zh"`. Options
        written in the text win. None means not given.
    Raises OperantError for an unknown name or option (with the nearest one), a module or function that cannot be
    imported, and an option that no part can honour.
    """
    given = {key: value for key, value in options.items() if value is not None}
    used: set[str] = set()
    reward = _resolve(spec, given, used)
    # dense=False asks for what every reward already is.
    unused = [key for key in given if key not in used and not (key == "dense" and given[key] is False)]
    if unused:
        name = spec if isinstance(spec, str) else reward.name
        raise OperantError(
            f"no part of reward '{name}' takes the option '{unused[0]}'; leave it out{_near_option(unused[0])}"
        )
    return reward


def has_potential(spec: str) -> bool:
    """Whether a metric of the reward that `spec` names can be paid token by token."""
    used: set[str] = set()
    try:
        reward = _resolve(spec, {"dense": True}, used, make=False)
    except OperantError:  # none of its parts can, or it cannot be at all
        return False
    return "dense" in used and bool(reward.dense)


def check_references(reward: Any, prompts: Iterable[Prompt]) -> None:
    """Refuse a reward that compares with references before a run over prompts that lack them.

    Raises OperantError naming the first such prompt. Logs a warning when BLEU would take each Chinese or Japanese
    sentence for one word.
    """
    prompts = list(prompts)
    if not reward.needs_references:
        return
    bare = [prompt.id for prompt in prompts if not prompt.references]
    if bare:
        raise OperantError(
            f"reward '{reward.name}' needs references and {len(bare)} of {len(prompts)} prompts have none"
            f" (first: '{bare[0]}'); add them or use a reward without (repetition, format, length(target=N))"
        )
    sample = "".join(reference for prompt in prompts[:200] for reference in prompt.references)
    unspaced = len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff]", sample))
    if unspaced > len(sample) / 3:
        for part in leaves(reward):
            if isinstance(part, Bleu) and part.tokenize in ("13a", "none", "intl"):
                logger.warning(
                    "BLEU with tokenize=%s takes each unspaced sentence for one word; use zh or ja-mecab", part.tokenize
                )


def _resolve(spec: Any, options: Mapping[str, Any], used: set[str], make: bool = True) -> Any:
    if isinstance(spec, str):
        return _Parser(spec, options, used, make).reward()
    if isinstance(spec, Mapping):
        spec = [spec]
    if isinstance(spec, Sequence):
        if not spec:
            raise OperantError("the list of rewards is empty; name at least one, such as 'chrf'")
        children, weights = [], []
        for item in spec:
            weight = 1.0
            if isinstance(item, Mapping):
                rest = dict(item)
                weight = float(rest.pop("weight", 1.0))
                if "name" not in rest:
                    raise OperantError(f"a reward in the list has no 'name': {dict(item)}")
                name = rest.pop("name")
                used.update(key for key in rest if key in options)
                own: set[str] = set()
                item = _resolve(name, {**options, **rest}, own, make)
                used.update(own & options.keys())
                refused = [key for key in rest if key not in own]
                if refused:
                    raise OperantError(f"reward '{name}' has no option '{refused[0]}'{_near_option(refused[0])}")
            else:
                item = _resolve(item, options, used, make)
            children.append(item)
            weights.append(weight)
        return children[0] if len(children) == 1 and weights == [1.0] else Sum(children, weights)
    return as_reward(spec)


class _Parser:
    """One reward expression. Its names are resolved while the tree is walked.

    make: False leaves classes of the user as they are, since making one may load a model or open a connection.
    """

    def __init__(self, spec: str, options: Mapping[str, Any], used: set[str], make: bool) -> None:
        self.spec, self.options, self.used, self.make = spec, options, used, make
        self.imports: dict[str, str] = {}

    def reward(self) -> Any:
        def stand_in(match: re.Match[str]) -> str:
            if match[1] is None:  # quoted text, such as a judge's rubric, may hold a colon
                return match.group()
            key = f"__import_{len(self.imports)}"
            self.imports[key] = match.group()
            return key

        spec = _PATHS.sub(lambda m: m[1] or f'"{m[2]}"', self.spec.strip())
        text = re.sub(r"\bchrf\+\+", "__chrf_words", _REFERENCE.sub(stand_in, spec))
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError):
            raise self.fault('is not understood; write for instance "bleu(dense=True) + 0.2*length"') from None
        return self.whole(tree)

    def fault(self, what: str) -> OperantError:
        return OperantError(f"reward '{self.spec}' {what}")

    def terms(self, node: ast.expr, sign: float) -> list[tuple[float, Any]]:
        """The weighted summands below `node`."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            right = sign if isinstance(node.op, ast.Add) else -sign
            return self.terms(node.left, sign) + self.terms(node.right, right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return self.terms(node.operand, -sign if isinstance(node.op, ast.USub) else sign)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right_number = self.number(node.left), self.number(node.right)
            if left is not None and right_number is None:
                return [(weight * left, reward) for weight, reward in self.terms(node.right, sign)]
            if right_number is not None and left is None:
                return [(weight * right_number, reward) for weight, reward in self.terms(node.left, sign)]
            if left is None:
                return [(sign, Product([self.whole(node.left), self.whole(node.right)]))]
        return [(sign, self.atom(node))]

    def whole(self, node: ast.expr) -> Any:
        """The reward that `node` is."""
        terms = self.terms(node, 1.0)
        if len(terms) == 1 and terms[0][0] == 1.0:
            return terms[0][1]
        return Sum([reward for _, reward in terms], [weight for weight, _ in terms])

    def number(self, node: ast.expr) -> float | None:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self.number(node.operand)
            return None if inner is None else -inner
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            return float(node.value)
        return None

    def atom(self, node: ast.expr) -> Any:
        positional: list[ast.expr] = []
        keywords: list[ast.keyword] = []
        if isinstance(node, ast.Call):
            positional, keywords = node.args, node.keywords
            node = node.func
        if not isinstance(node, ast.Name):
            raise self.fault("is not understood; use names, options in brackets, +, - and *")
        options = {keyword.arg or "": self.literal(keyword.value) for keyword in keywords}
        if "" in options:
            raise self.fault("is not understood; write options as name=value")
        name = self.imports.get(node.id, "chrf++" if node.id == "__chrf_words" else node.id)
        if name in COMBINATIONS:
            arguments = [self.literal(a) if self.number(a) is not None else self.whole(a) for a in positional]
            try:
                return COMBINATIONS[name](*arguments, **options)
            except (TypeError, ValueError):
                usage = {"gate": "gate(condition, reward, threshold=0.5, closed=0.0)", "clip": "clip(reward, 0, 1)"}
                raise self.fault(f"uses {name} wrongly; write {usage.get(name, 'norm(reward)')}") from None
        maker = BUILT_IN.get(name)
        if positional and maker is not None and (first := getattr(maker, "positional", None)) and len(positional) == 1:
            options.setdefault(first, self.literal(positional.pop(0)))
        if positional:
            raise self.fault(f"gives '{name}' an option without a name; write name=value")
        return self.built_in(name, options) if ":" not in name else self.imported(name, options)

    def literal(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError:
            # tokenize=zh reads as well as tokenize="zh", and true as well as True.
            if isinstance(node, ast.Name):
                return {"true": True, "false": False, "none": None}.get(node.id, node.id)
            raise self.fault("has an option that is no number, text or True/False") from None

    def built_in(self, name: str, options: dict[str, Any]) -> Any:
        if name not in BUILT_IN:
            close = _nearest(name, [*BUILT_IN, *COMBINATIONS])
            hint = (
                f"did you mean '{close}'? (all: {', '.join(BUILT_IN)})"
                if close
                else f"use one of {', '.join(BUILT_IN)}"
            )
            raise OperantError(f"unknown reward '{name}'; {hint}, or 'module:function' for your own")
        maker = BUILT_IN[name]
        metric: Any = maker.func if isinstance(maker, functools.partial) else maker
        known = [
            key for key in option_names(metric) if not (isinstance(maker, functools.partial) and key in maker.keywords)
        ]
        for key in options:
            if key not in known:
                close = _nearest(key, known)
                hint = f"did you mean '{close}'?" if close else f"it takes {', '.join(known)}"
                raise OperantError(f"reward '{name}' has no option '{key}'; {hint}")
        shared = {}
        for key, value in self.options.items():
            dense_as_it_is = key == "dense" and metric.answers_dense
            if key not in known or (key in ("dense", "potential") and not metric.potentials and not dense_as_it_is):
                continue
            self.used.add(key)
            shared[key] = value
        if options.get("dense") is False:
            # Written at this part, it also answers a potential asked for everywhere.
            shared.pop("potential", None)
        return _make(maker, {**shared, **options}, metric)

    def imported(self, name: str, options: dict[str, Any]) -> Any:
        target = import_object(name)
        if isinstance(target, type):
            if not self.make:
                return as_reward(target)
            try:
                target = target(**options)
            except OperantError:
                raise
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise self.fault(f"cannot make '{name}' ({reason}); mend it or its options") from error
        elif options:
            target = functools.partial(target, **options)
            functools.update_wrapper(target, target.func)
        return as_reward(target)


def _make(maker: Callable[..., Metric], options: dict[str, Any], metric: type[Metric]) -> Metric:
    types = {field.name: field.type for field in dataclasses.fields(metric)}
    for key, value in options.items():
        wanted = str(types[key])
        fits = (
            (value is None and "None" in wanted)
            or (wanted.startswith("bool") and isinstance(value, bool))
            or (wanted.startswith("str") and isinstance(value, str))
            or (wanted.startswith("int") and isinstance(value, int) and not isinstance(value, bool))
            or (wanted.startswith("float") and isinstance(value, (int, float)) and not isinstance(value, bool))
        )
        if not fits:
            raise OperantError(f"option '{key}' of reward '{metric.__name__.lower()}' is a {wanted}, not {value!r}")
    return maker(**options)


def import_object(name: str, what: str = "reward") -> Any:
    """What `module:attribute` names; the working folder is looked in too. what: it is for, for the fault's words.

    Raises OperantError when there is no such thing.
    """
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        # A reward beside the data is found from the program as it is from `python -c`.
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise OperantError(f"{what} '{name}' cannot be imported: {error}; check the module's name and folder") from None
    except Exception as error:
        raise OperantError(
            f"importing '{module_name}' for {what} '{name}' raised {type(error).__name__}: {error}; mend it"
        ) from error
    for part in path.split("."):
        if not hasattr(target, part):
            close = _nearest(part, [key for key in dir(target) if not key.startswith("_")])
            hint = f"; did you mean '{close}'?" if close else "; check the function's name"
            raise OperantError(f"module '{module_name}' has no '{part}'{hint}")
        target = getattr(target, part)
    return target


def _nearest(name: str, choices: Iterable[str]) -> str | None:
    folded = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def _near_option(name: str) -> str:
    known = {
        key
        for maker in (Bleu, Chrf, Ter, Rouge, Exact, Edit, Length, Repetition, Format, Learned, Similarity, Judge)
        for key in option_names(maker)
    }
    close = _nearest(name, known - {name})
    return f" (did you mean '{close}'?)" if close else ""
