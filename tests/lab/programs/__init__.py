"""Programs that tests run inside containers: `python -m tests.lab.programs.NAME`."""
