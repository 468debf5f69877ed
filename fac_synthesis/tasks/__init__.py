"The four downstream tasks, and their scores in one layout."
