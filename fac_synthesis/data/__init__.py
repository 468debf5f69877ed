"Records, corpora and items; the planted world; what a task is."
