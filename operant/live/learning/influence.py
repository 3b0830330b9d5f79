"""How much each source moves a model that several teach: reputation from agreement, and a cap on each source's share.

Both are functions of the log up to a step and of the version that the step begins with, and are kept with the version.
So a step made again from its record, or without a source, weighs everybody as it has to.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

__all__ = ["PRIOR", "after", "reputations", "shares"]

PRIOR = (4.0, 1.0)  # of a source that nobody has met: as if it had agreed in four of five meetings
BEGIN = 0.1  # of the window: so much is taken as taught when less has been, or nobody could begin
PER_PAIR = 5  # opinions that one witness's word on a source is worth at most, however often the two have met
ROUNDS = 100  # of a fixed point; what is left after them is below 1e-9 of what there was


def reputations(opinions: Iterable[tuple[str, str, int]]) -> dict[str, float]:
    """The reputation of each source, from 0 to 1: how far its ratings agree with others' ratings of the same things.

        r_s = clip((2 p_s − 1) / (2 p_0 − 1), 0, 1),  p_0 = a / (a + b)
        p_s = (a + Σ_t r_t k_st agree_st) / (a + b + Σ_t r_t k_st met_st),  k_st = min(1, PER_PAIR / met_st)

    p_s is the posterior mean of a Beta-Bernoulli rate of agreement, in which a witness t counts as far as t is trusted
    (Jøsang & Ismail 2002, The Beta Reputation System); 2p − 1 is the correlation with what others say. All start at 1.
    Nobody rises above a newcomer: agreement only keeps a reputation, so keys that agree with each other alone have no
    more than keys that nobody has met. One witness's word is worth PER_PAIR opinions at most, so a group cannot make up
    for its contradictions with many others by agreeing with itself a thousand times.

    opinions: (thing, source, 1 or −1), one for each thing and source. Of whom nobody else has met, it is 1.
    """
    about: dict[str, dict[str, int]] = defaultdict(dict)
    for thing, source, verdict in opinions:
        about[thing][source] = verdict
    met: Counter[tuple[str, str]] = Counter()
    agree: Counter[tuple[str, str]] = Counter()
    for verdicts in about.values():
        for one, other in itertools.permutations(verdicts, 2):
            met[one, other] += 1
            agree[one, other] += verdicts[one] == verdicts[other]
    witnesses: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for (one, other), times in sorted(met.items()):
        counted = min(1.0, PER_PAIR / times)
        witnesses[one].append((other, counted * agree[one, other], counted * times))
    a, b = PRIOR
    newcomer = 2 * a / (a + b) - 1
    found = dict.fromkeys(sorted({source for verdicts in about.values() for source in verdicts}), 1.0)
    for _ in range(ROUNDS):
        new = {}
        for source, before in found.items():
            agreed = a + sum(found[t] * yes for t, yes, _ in witnesses[source])
            rate = agreed / (a + b + sum(found[t] * times for t, _, times in witnesses[source]))
            new[source] = (before + min(1.0, max(0.0, (2 * rate - 1) / newcomer))) / 2
        found = new
    # what is on its way to 0 is there
    return {source: 0.0 if value < 1e-9 else value for source, value in found.items()}


def shares(
    sources: Mapping[str, float], trust: Mapping[str, float], had: Mapping[str, float], *, cap: float, window: float
) -> dict[str, float]:
    """The share of a step that each of its sources has: as much as it would have, and as keeps it under the cap.

        I'_s = I_s (1 − A / window) + a_s ≤ max(cap, 2 / N) · max(BEGIN · window, Σ I'),  0 ≤ a_s ≤ w_s r_s / S

    with the largest A = Σ a that holds. What one source has less no other has more: the step is shorter. sources: the S
    different ones of the step, each with the mean weight w_s > 0 of what it says: who blames is learned at a fraction
    (`LiveConfig.bad_weight`) and uses up as little of what it may have. trust: r_s, 1 for one that is not in it. had:
    I_s, what each has had before, in steps (`after`); N counts those and the step's, so that each of few may have twice
    an equal part.
    """
    different = sorted(sources)
    part, before = max(cap, 2 / max(2, len(had.keys() | set(different)))), sum(had.values())
    wanted = {s: sources[s] * trust.get(s, 1.0) / len(different) for s in different}
    given, whole = wanted, sum(wanted.values())
    for _ in range(ROUNDS):  # from above, so that it ends at the largest
        fading = 1 - min(1.0, whole / window)
        room = part * max(BEGIN * window, before * fading + whole)
        given = {s: max(0.0, min(wanted[s], room - had.get(s, 0.0) * fading)) for s in different}
        whole = sum(given.values())
    return {s: 0.0 if share < 1e-9 else share for s, share in given.items()}


def after(had: Mapping[str, float], given: Mapping[str, float], window: float) -> dict[str, float]:
    """What each source has had after a step of these shares: I_s ← I_s (1 − Σ a / window) + a_s, so that all together
    never have more than `window` steps, and what was long ago fades as others speak."""
    fading = 1 - min(1.0, sum(given.values()) / window)
    new = {s: had.get(s, 0.0) * fading + given.get(s, 0.0) for s in sorted(had.keys() | given.keys())}
    return {s: value for s, value in new.items() if value > 1e-6}
