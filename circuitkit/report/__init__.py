"""A report of a run or of a study: one page that needs nothing else, and its figures as files."""
