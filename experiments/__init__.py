"""The papers' tables and figures, one short file each: `python -m experiments.NAME`, then `python -m experiments.report`."""
