"""The tests in this directory need root, and minutes; `make rollout-test` runs them, `make test` does not."""
