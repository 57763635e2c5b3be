"""Events a second of the excited market, beside the older synthetic market on the same core.

Both are compiled before the clock runs. The excited market draws six exciting streams and a deeper book; the older one
draws one stream, so it may be faster: the goal beside it is half its rate. Rates are of events that come out. Half of
the mirrored world's events are a copy of the other half, turned over.

    python benchmarks/synthetic.py [--json] [--seconds 3600] [--rounds 7]
"""

from common import header, options, rate_row, show, take_turns

from tradebook.market.excited import excited_market, usual_plan
from tradebook.market.synthetic import synthetic_market
from tradebook.market.worlds import WORLDS, make_world


def main():
    "Measure and print"
    args = options(__doc__, seconds=3600)
    plan = usual_plan(7, args.seconds)
    n_new = len(excited_market(plan).events)
    n_old = len(synthetic_market(7, args.seconds, 0.0).events)
    worlds = {name: sum(len(m.events) for m in make_world(name, 7, 300).markets) for name in WORLDS}
    cases = {
        "plan and market": lambda: excited_market(usual_plan(7, args.seconds)),
        "older market": lambda: synthetic_market(7, args.seconds, 0.0),
    }
    cases |= {name: lambda name=name: make_world(name, 7, 300) for name in WORLDS}
    took = take_turns(cases, args.rounds)
    took["older market, as many events"] = [s * n_new / n_old for s in took["older market"]]
    head = header(
        "numpy", "numba", events=n_new, events_of_the_older=n_old, rounds=args.rounds,
    )  # fmt: skip
    unit = "M events/s"
    rows = [
        rate_row("excited market", took, "plan and market", n_new, unit, 1.0),
        rate_row(
            "the same, beside the older", took, "plan and market", n_new, unit, 0.5,
            "older market, as many events",
        ),
        *[rate_row(f"world {name}", took, name, n, unit, 1.0) for name, n in worlds.items()],
    ]  # fmt: skip
    show(head, rows, args.json)


if __name__ == "__main__":
    main()
