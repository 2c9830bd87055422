"""The paper: classifiers, metrics, evaluation, report."""
