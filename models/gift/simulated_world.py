"""The world behind the simulated KuaiLive: people, clicks, gifts, watch times, rooms, as arrays.

The story told by the numbers: a user browses in bursts, between favourite streamers and chance finds. Each user
and streamer share a hidden affinity that lengthens watches, brings comments and likes, and weakly steers the
user's few gifts; a gift lengthens its own watch in turn, and makes further gifts to that streamer far likelier.
Each user's number of gifts is drawn first (at least one, as in the published sample), then the clicks that carry
them. The caller hands every function its own random generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

# Published counts at scale 1; rooms are distinct rooms, of which room.csv repeats some.
N_USERS, N_STREAMERS, N_ROOMS, N_ROOM_REPEATS = 23_772, 452_621, 11_613_708, 206_256
N_CLICKS, N_COMMENTS, N_LIKES, N_GIFTS = 4_909_515, 196_526, 179_311, 72_646
SCALES = (0.001, 1.0)

HOUR_MS, DAY_MS, SLOT_MS = 3_600_000, 86_400_000, 43_200_000
START_MS = 1_746_374_400_000  # 2025-05-05 00:00 Beijing
FIRST_MS, LAST_MS = START_MS + 22, 1_748_185_198_515  # first and last published click; the last hour is missing
CUTOFF_MS = 1_748_275_200_000  # 2025-05-27 00:00 Beijing: rooms still open then end here
N_HOURS, N_SLOTS = 21 * 24 - 1, 43  # a streamer opens at most one room in a 12-hour slot

# Clicks in 8, 7 and 7 UTC days (the first has 8 hours), gifts by UTC hour, and Monday..Sunday in Beijing.
PERIOD_HOURS, PERIOD_CLICKS = (176, 168, 159), (1_872_509, 1_701_600, 1_335_406)
GIFTS_BY_UTC_HOUR = (
    *(2400, 2700, 2790, 2920, 3400, 3150, 2950, 2910, 2930, 3150, 3890, 5120),
    *(6240, 6000, 5600, 4280, 2960, 1660, 1020, 760, 730, 1150, 1870, 2050),
)
WEEKDAY = (1.0, 1.03, 1.03, 1.0, 1.0, 0.97, 0.97)

# Knobs without a published number of their own, set so that the published figures come out (see the tests).
GIFTS_FOLLOW_CLICKS = 0.97  # correlation of a user's ranks by clicks and by gifts
FAVOURITES, RANKING = 0.53, 1.6  # clicks ** 0.53 favourites per user; a higher ranking favours the first of them
FONDNESS = 0.3  # affinity of favourites above that of finds
AFFINITY_GIFT, CHARM_GIFT = 0.3, 0.3  # log-weight of a click per standard deviation
MAX_REPEATS, REPEAT_RATE = 0.6, 0.22  # of a user's gifts; per click after a pair's first gift
# Pull of the three periods on the gifts of users with one or two, and with more: the positive rate rises, and
# users yet without a gift are, late in the window, only so much likelier to give one (2.26 against 1.30 %).
GIFT_DRIFT = np.array([[1.0, 0.5, 0.15], [1.0, 1.55, 1.5]])

# Gifts per user: P(count >= k). Prices: counts of 1..20, then P(price >= p). Watch: quantile -> seconds.
GIFT_CCDF = {1: 1.0, 2: 0.50, 3: 0.31, 4: 0.21, 5: 0.15, 10: 0.05, 20: 0.0145, 100: 0.0004, 289: 4.2e-5}
PRICE_ATOMS = (
    *(31882, 7858, 3176, 1967, 2499, 1150, 886, 630, 627, 4654),
    *(868, 583, 318, 307, 231, 209, 155, 132, 143, 1506),
)
PRICE_CCDF = {21: 0.177, 88: 0.101, 298: 0.0505, 1488: 0.0101, 10_000: 5.5e-4, 56_246: 1.38e-5}
PRICE_POINTS = np.array(
    (30, 52, 66, 88, 99, 100, 188, 199, 298, 299, 366, 520, 666, 888, 999, 1000, 1314, 1488, 2990, 5200, 13140)
)
WATCH_S = np.array(
    [
        (0.0, 0.03, 0.5, 0.539, 0.782, 0.90, 0.944, 0.97, 0.99, 0.999, 1.0),
        (0.3, 1.0, 4.2, 5.0, 30.0, 125.0, 300.0, 620.0, 1800.0, 4200.0, 10_000.0),
    ]
)

# P(1..10 clicks in a row share one millisecond), and how far a click may be moved for it.
TIE_SIZES, TIE_LIMIT_MS = np.array([0.604, 0.17, 0.1, 0.055, 0.032, 0.018, 0.01, 0.006, 0.003, 0.002]), 60_000


@dataclass
class People:
    """Users and streamers in an internal order; ids in the files are permutations."""

    clicks: np.ndarray  # [U] clicks of each user
    gifts: np.ndarray  # [U] gifts of each user, >= 1
    attention: np.ndarray  # [U] how long a user tends to watch, standard normal
    wealth: np.ndarray  # [U] standard normal
    popularity: np.ndarray  # [S] positive weights
    quality: np.ndarray  # [S] how long a streamer is watched, standard normal
    charm: np.ndarray  # [S] how readily a streamer is given to, standard normal
    user_id: np.ndarray
    streamer_id: np.ndarray


@dataclass
class Clicks:
    """Clicks, sorted by user and burst. `n_gifts` and `price` describe the gifts a click carries."""

    user: np.ndarray
    streamer: np.ndarray
    burst: np.ndarray
    affinity: np.ndarray  # shared by gift, watch, comment and like; constant within a pair
    start: np.ndarray  # of the burst, ms
    n_gifts: np.ndarray
    gift_click: np.ndarray  # [G] the click of each gift
    gift_price: np.ndarray  # [G]
    watch: np.ndarray  # ms
    time: np.ndarray  # ms
    room: np.ndarray  # index of the room


@dataclass
class Rooms:
    """All rooms, sorted by streamer and slot. Those of streamer s: offset[s] <= index < offset[s + 1]."""

    streamer: np.ndarray
    start: np.ndarray
    end: np.ndarray
    live_id: np.ndarray
    offset: np.ndarray


def _to_total(values: np.ndarray, total: int, low: int, high: int) -> np.ndarray:
    """Scale to the total and round up or down, within [low, high]."""
    for _ in range(20):
        values = np.clip(values * (total / values.sum()), low, high)
    whole = np.maximum(np.floor(values), low).astype(np.int64)
    missing = total - int(whole.sum())
    up = np.argsort(whole - values, kind="stable")[: max(missing, 0)]
    whole[up] += 1
    return whole


def _normals(rng: np.random.Generator, n: int) -> np.ndarray:
    """Standard normal quantiles, shuffled: the calibrated totals vary less than with independent draws."""
    return rng.permutation(ndtri((np.arange(n) + 0.5) / n))


def _by_rank(score: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (ascending) dealt out in the order of `score`."""
    result = np.empty_like(values)
    result[np.argsort(score, kind="stable")] = values
    return result


def make_people(rng: np.random.Generator, scale: float) -> People:
    n_users, n_streamers = round(N_USERS * scale), round(N_STREAMERS * scale)
    activity = _normals(rng, n_users)
    clicks = _to_total(12 + np.exp(3.897 + 1.658 * activity), round(N_CLICKS * scale), 1, 14_633)
    # Active users give more, though far less than in proportion.
    quantile = 1.0 - (np.arange(n_users) + 0.5) / n_users
    counts = np.array(list(GIFT_CCDF), dtype=float)
    tail = np.exp(np.interp(np.log(quantile), np.log(list(GIFT_CCDF.values()))[::-1], np.log(counts)[::-1]))
    inclined = GIFTS_FOLLOW_CLICKS * activity + math.sqrt(1 - GIFTS_FOLLOW_CLICKS**2) * rng.standard_normal(n_users)
    gifts = _by_rank(inclined, _to_total(np.floor(tail), round(N_GIFTS * scale), 1, 289))
    return People(
        clicks=clicks,
        gifts=gifts,
        attention=rng.standard_normal(n_users),
        wealth=rng.standard_normal(n_users),
        popularity=np.exp(2.1 * _normals(rng, n_streamers)),
        quality=rng.standard_normal(n_streamers),
        charm=rng.standard_normal(n_streamers),
        user_id=rng.permutation(n_users),
        streamer_id=rng.permutation(n_streamers),
    )


def _pair_normal(user: np.ndarray, streamer: np.ndarray, salt: int) -> np.ndarray:
    """A standard normal number per (user, streamer) by hashing (splitmix64): equal pairs get equal numbers."""
    x = (user.astype(np.uint64) << np.uint64(32)) | streamer.astype(np.uint64)
    x += np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ndtri(((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _hour_weights() -> np.ndarray:
    hour = np.arange(N_HOURS)
    weight = np.array(GIFTS_BY_UTC_HOUR, dtype=float)[(hour + 16) % 24] * np.array(WEEKDAY)[hour // 24 % 7]
    period = np.repeat(np.arange(3), PERIOD_HOURS)
    return weight * (np.array(PERIOD_CLICKS) / np.bincount(period, weight))[period]


def make_clicks(rng: np.random.Generator, people: People) -> Clicks:
    n_users, n = len(people.clicks), int(people.clicks.sum())
    user = np.repeat(np.arange(n_users), people.clicks)
    n_bursts = np.ceil(people.clicks / 6).astype(np.int64)
    first_burst = np.cumsum(n_bursts) - n_bursts
    burst = np.sort(first_burst[user] + (rng.random(n) * n_bursts[user]).astype(np.int64))
    hours = np.cumsum(_hour_weights())
    start = np.searchsorted(hours, rng.random(int(n_bursts.sum())) * hours[-1], side="right")
    start = START_MS + ((start + rng.random(len(start))) * HOUR_MS).astype(np.int64)
    start = start[np.lexsort((start, np.repeat(np.arange(n_users), n_bursts)))]  # a user's bursts in order of time

    # Favourites: a list per user, the first ones visited most. The rest are finds, of every streamer at first.
    reach = np.cumsum(people.popularity)
    n_favourites = np.ceil(people.clicks**FAVOURITES).astype(np.int64)
    favourites = np.searchsorted(reach, rng.random(int(n_favourites.sum())) * reach[-1], side="right")
    place = (n_favourites[user] * rng.random(n) ** RANKING).astype(np.int64)
    favourite = rng.random(n) < 0.5
    streamer = favourites[(np.cumsum(n_favourites) - n_favourites)[user] + place]
    finds = rng.permutation(np.flatnonzero(~favourite))
    streamer[finds] = np.searchsorted(reach, rng.random(len(finds)) * reach[-1], side="right")
    everyone = rng.permutation(len(reach))[: len(finds)]
    streamer[finds[: len(everyone)]] = everyone
    # Some clicks return to the room just left.
    back = (rng.random(n) < 0.045) & np.r_[False, burst[1:] == burst[:-1]]
    streamer = streamer[np.maximum.accumulate(np.where(back, 0, np.arange(n)))]
    affinity = _pair_normal(user, streamer, 1) + FONDNESS * favourite * (1.5 - place / n_favourites[user])
    empty = np.empty(0, dtype=np.int64)
    return Clicks(user, streamer, burst, affinity, start[burst], empty, empty, empty, empty, empty, empty)


def choose_gifts(rng: np.random.Generator, people: People, clicks: Clicks) -> None:
    """Deal each user's gifts to the user's clicks: first gifts of a pair, then repeats among its later clicks.

    On the real data a seen pair without a gift is hardly likelier to bring one than a new pair, while after a first
    gift the rate is tenfold: giving makes a giver. So the first gifts follow affinity and charm but weakly.
    """
    n = len(clicks.user)
    period = np.searchsorted(np.cumsum(PERIOD_HOURS), (clicks.start - START_MS) // HOUR_MS, side="right")
    score = AFFINITY_GIFT * clicks.affinity + CHARM_GIFT * people.charm[clicks.streamer]
    score += np.log(GIFT_DRIFT)[(people.gifts > 2).astype(int)[clicks.user], np.minimum(period, 2)] + rng.gumbel(
        size=n
    )
    shared = rng.binomial(people.gifts - 1, 0.05)  # gifts that join another one in its click
    carrying = np.minimum(people.clicks, people.gifts - shared)
    repeats = rng.binomial(carrying - 1, MAX_REPEATS)
    firsts = _top(score, people, clicks, carrying - repeats)
    score[firsts] = -np.inf
    later = np.where(_after(firsts, clicks), score, -np.inf)
    n_later = np.bincount(clicks.user[np.isfinite(later)], minlength=len(repeats))
    n_again = np.minimum(repeats, rng.binomial(n_later, REPEAT_RATE))
    again = _top(later, people, clicks, n_again)
    score[again] = -np.inf
    carriers = np.sort(np.r_[firsts, again, _top(score, people, clicks, repeats - n_again)])
    # Carriers are now sorted by user; the gifts beyond one per carrier join a random one.
    first = np.cumsum(carrying) - carrying
    joiner = np.repeat(np.arange(len(carrying)), people.gifts - carrying)
    joined = carriers[first[joiner] + (rng.random(len(joiner)) * carrying[joiner]).astype(np.int64)]
    clicks.gift_click = np.r_[carriers, joined]
    clicks.n_gifts = np.bincount(clicks.gift_click, minlength=n)
    giver, streamer = clicks.user[clicks.gift_click], clicks.streamer[clicks.gift_click]
    generosity = 0.9 * people.wealth[giver] + 0.25 * clicks.affinity[clicks.gift_click]
    generosity += 0.25 * people.charm[streamer] + 0.7 * rng.standard_normal(len(giver))
    clicks.gift_price = _by_rank(generosity, _prices(len(giver)))


def _top(score: np.ndarray, people: People, clicks: Clicks, counts: np.ndarray) -> np.ndarray:
    """The rows of each user's `counts[user]` highest scores; with Gumbel noise in them, a weighted sample."""
    order = np.lexsort((-score, clicks.user))
    first = np.cumsum(people.clicks) - people.clicks
    turn = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.repeat(first, counts) + turn]


def _after(rows: np.ndarray, clicks: Clicks) -> np.ndarray:
    """[N] whether a click comes after one of `rows` of the same pair (a user's clicks are in order of time)."""
    pair = clicks.user * (int(clicks.streamer.max()) + 1) + clicks.streamer
    order = np.argsort(pair, kind="stable")
    marked = np.zeros(len(pair), dtype=bool)
    marked[rows] = True
    pair, marked = pair[order], marked[order]
    new = np.r_[True, pair[1:] != pair[:-1]]
    before = np.cumsum(marked) - marked
    before -= before[np.maximum.accumulate(np.where(new, np.arange(len(pair)), 0))]
    result = np.empty(len(pair), dtype=bool)
    result[order] = before > 0
    return result


def _prices(n: int) -> np.ndarray:
    """[n] prices, ascending: the published counts of 1..20, a log-log tail above, partly on price points."""
    tail = 1.0 - (np.arange(n) + 0.5) / n
    beyond = 1.0 - np.cumsum(PRICE_ATOMS) / N_GIFTS  # P(price > 1..20)
    price = 1 + np.sum(tail[:, None] < beyond[None, :], axis=1)
    log_tail = np.log(tail[price > 20])
    knots, values = np.log(list(PRICE_CCDF.values()))[::-1], np.log(list(PRICE_CCDF))[::-1]
    high = np.rint(np.exp(np.interp(log_tail, knots, values))).astype(np.int64)
    near = PRICE_POINTS[np.argmin(np.abs(np.log(PRICE_POINTS)[None, :] - np.log(high)[:, None]), axis=1)]
    high = np.where(np.abs(np.log(near / high)) < 0.06, near, high)
    price[price > 20] = np.maximum(high, 21)
    return np.sort(price)


def watch(rng: np.random.Generator, people: People, clicks: Clicks) -> None:
    """Watch times: ranks of a latent number, mapped to the published quantiles. Gifts lengthen the watch."""
    n = len(clicks.user)
    latent = 0.45 * clicks.affinity + 0.3 * people.attention[clicks.user] + 0.25 * people.quality[clicks.streamer]
    latent -= 0.2 * np.log(people.clicks / 64)[clicks.user]  # who clicks much watches less
    latent = (latent - latent.mean()) / latent.std() * 0.55 + 0.835 * rng.standard_normal(n)
    total = np.bincount(clicks.gift_click, clicks.gift_price, minlength=n)
    giving = np.flatnonzero((clicks.n_gifts > 0) & (rng.random(n) > 0.02))
    dear = ndtri((np.argsort(np.argsort(total[giving], kind="stable"), kind="stable") + 0.5) / len(giving))
    latent[giving] = 1.65 + 0.64 * (0.37 * dear + 0.25 * latent[giving] + 0.88 * rng.standard_normal(len(giving)))
    quantile = (np.arange(n) + 0.5) / n
    seconds = np.exp(np.interp(quantile, WATCH_S[0], np.log(WATCH_S[1])))
    clicks.watch = _by_rank(latent, np.rint(seconds * 1000).astype(np.int64))


def stamp(rng: np.random.Generator, clicks: Clicks) -> None:
    """Click times: one after another within a burst, then clumped into shared milliseconds as published."""
    n = len(clicks.user)
    step = clicks.watch + (rng.exponential(20_000, n)).astype(np.int64)
    past = np.cumsum(step) - step
    new = np.r_[True, clicks.burst[1:] != clicks.burst[:-1]]
    past -= past[np.maximum.accumulate(np.where(new, np.arange(n), 0))]
    time = clicks.start + past
    late = time > LAST_MS
    time[late] = LAST_MS - (rng.random(int(late.sum())) * DAY_MS / 6).astype(np.int64)
    order = np.argsort(time, kind="stable")
    sizes = rng.choice(len(TIE_SIZES), size=n, p=TIE_SIZES / TIE_SIZES.sum()) + 1
    lead = np.repeat(np.cumsum(sizes) - sizes, sizes)[:n]
    clumped = time[order[lead]]
    sorted_time = time[order]
    time[order] = np.where(sorted_time - clumped <= TIE_LIMIT_MS, clumped, sorted_time)
    time[order[0]], time[order[-1]] = FIRST_MS, LAST_MS
    clicks.time = np.clip(time, FIRST_MS, LAST_MS)


def make_rooms(rng: np.random.Generator, people: People, clicks: Clicks, scale: float) -> Rooms:
    """A room for every streamer and slot that was clicked, and unclicked ones up to the published number."""
    n_streamers = len(people.popularity)
    phase = (rng.random(n_streamers) * SLOT_MS).astype(np.int64)
    slot = (clicks.time - START_MS + phase[clicks.streamer]) // SLOT_MS
    key = clicks.streamer * N_SLOTS + slot
    exists = np.zeros(n_streamers * N_SLOTS, dtype=bool)
    exists[key] = True
    n_clicked = int(exists.sum())
    wanted = max(round(N_ROOMS * scale) - n_clicked, 0) / (len(exists) - n_clicked)
    habit = rng.uniform(0.3, 1.0, n_streamers)
    habit *= wanted / habit.mean()
    exists |= rng.random(len(exists), dtype=np.float32) < np.repeat(
        np.minimum(habit, 1.0).astype(np.float32), N_SLOTS
    )
    position = np.cumsum(exists, dtype=np.int32) - 1
    clicks.room = position[key].astype(np.int64)
    keys = np.flatnonzero(exists)
    streamer, n = keys // N_SLOTS, len(keys)
    low = START_MS - phase[streamer] + (keys % N_SLOTS) * SLOT_MS
    start = low + (rng.random(n) * SLOT_MS * 0.8).astype(np.int64)
    end = start + np.minimum(rng.lognormal(15.5, 0.9, n), SLOT_MS).astype(np.int64)
    np.minimum.at(start, clicks.room, clicks.time - (rng.exponential(1_800_000, len(key))).astype(np.int64))
    np.maximum.at(end, clicks.room, clicks.time + clicks.watch)
    np.maximum(start, low - 8 * HOUR_MS, out=start)
    censored = (end > LAST_MS) & (rng.random(n) < 0.2)
    end = np.where(censored, CUTOFF_MS, np.minimum(end, CUTOFF_MS))
    offset = np.r_[0, np.cumsum(np.bincount(streamer, minlength=n_streamers))]
    return Rooms(streamer, start, end, rng.permutation(n), offset)


def choose_reactions(
    rng: np.random.Generator, people: People, clicks: Clicks, total: int, affinity: float
) -> np.ndarray:
    """[total] clicks of comments or likes: one for every user, the others in proportion to a rate per click."""
    talkative = rng.standard_normal(len(people.clicks))
    rate = talkative[clicks.user] + 0.6 * affinity * clicks.affinity + 0.35 * np.log(clicks.watch / 5000)
    reach = np.r_[0.0, np.cumsum(np.exp(np.minimum(rate, 8.0)))]
    last = np.cumsum(people.clicks)
    low, high = reach[last - people.clicks], reach[last]
    own = low + rng.random(len(low)) * (high - low)
    free = rng.random(total - len(low)) * reach[-1]
    return np.clip(np.searchsorted(reach, np.r_[own, free], side="right") - 1, 0, len(clicks.user) - 1)
