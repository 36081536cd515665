"""Random search of a generator's hyperparameters: python -m stages.search mnist --trials 20."""

import argparse
import signal
import sys

from gbc.params import InputError, entry, load_params


def main() -> None:
    """Trials of generator <name> → a study in data/search/<study>.db, and a DVC experiment search-<study>-<number> each."""
    parser = argparse.ArgumentParser(prog="python -m stages.search", description=f"{__doc__} The same command goes on with a search.")
    parser.add_argument("name", help="generator, of train_single, train_multi or celeba in params.yaml")
    parser.add_argument("--trials", type=int, default=20, help="finished ones that the study has at the end; default 20")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals; default 0")
    parser.add_argument("--study", help="default: the generator's name")
    parser.add_argument("--storage", help="URL of a database, the same on many machines; default sqlite:///data/search/<study>.db")
    parser.add_argument("--apply", action="store_true", help="no trials: the best one's params and generator into the workspace")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            from gbc.search import apply, best, open_study, search
        except ImportError as error:
            raise InputError(f"{error}; the search needs Optuna: pip install -e '.[search]'") from error
        params = load_params([])
        entry(params.train, given.name)
        title = given.study or given.name
        study = open_study(title, given.storage or f"sqlite:///data/search/{title}.db")
        if given.apply:
            return apply(study)
        search(params, given.name, given.trials, study, given.seed)
        print(f"best: {best(study).user_attrs['experiment']}, KKT violation {best(study).value:.4g}; --apply applies it")
    except (InputError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"error: {str(error) or 'interrupted; the same command goes on'}")


if __name__ == "__main__":
    main()
