"""Members of a run anywhere: a launcher hands them to workers, on one machine or many."""
