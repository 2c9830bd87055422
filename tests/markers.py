"""Which tests the option `-m` takes."""

from collections import defaultdict


def only_on_a_gpu(chosen: str) -> bool:
    """Whether what `-m` says takes no test without the mark `gpu`: "gpu", "gpu and not slow"; not "slow or gpu"."""
    try:
        others = [eval(chosen, {}, defaultdict(lambda is_so=is_so: is_so, gpu=False)) for is_so in (False, True)]
    except SyntaxError:  # none, or what pytest refuses in its own words
        return False
    return not any(others)
