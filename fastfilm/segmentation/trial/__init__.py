"""Does metadata help? Arms with and without it, trained on the same folds, and what may be concluded."""
