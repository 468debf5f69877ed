"Every table and figure of the paper, and a verdict for each claim."
